// The products of a step by tiles of bfloat16, in the layouts of tile.inl and pack.inl.

// Calls of fewer sequences stay in float32: tiles would be less than half full.
constexpr int64_t kFewestTiledRows = kTileRows / 2;

template <class T>
Tiles tiles_of(const RecurrentInputs<T>& a, int64_t K) {
  const bool worth = kTiled<T> && a.shape.B >= kFewestTiledRows && K >= kFewestTiled;
  return worth ? a.tiles : Tiles{};
}

// sums_tile() for up to kTileRows rows, the i-th tile of rows of `x` and `h`, by one group; columns
// that are null are multiplied in float32, as are rows that do not fit.
template <class L, class T>
void sums_by_tiles(const SumsTile<T>& tile, int64_t i, int rows, const TiledRows& x,
                   const uint16_t* x_columns, const TiledRows& h, const uint16_t* h_columns,
                   T* out) {
  const auto in_float32 = [&](SumsTile<T> part, int begin, int end) {
    for (int m = begin; m < end; m += L::kRows) {
      part.start = tile.start + m;
      part.x = tile.x + m;
      part.h = tile.h + m;
      sums_tile<L>(part, int(min64(end - m, L::kRows)), 1, out + m * L::kOut * kLanes<T>);
    }
  };
  SumsTile<T> rest = tile;
  if (x_columns) rest.x_width = 0;
  if (h_columns) rest.h_width = 0;
  in_float32(rest, 0, rows);
  alignas(64) T product[kTileRows * L::kColumns * kLanes<T>];
  const auto add = [&](const TiledRows& from, const uint16_t* columns, bool recurrent) {
    if (!columns) return uint32_t(0);
    from.multiply(i, rows, columns, L::kColumns, product);
    for (int m = 0; m < rows; ++m) {
      for (int v = 0; v < L::kColumns; ++v) {
        const bool apart = recurrent && L::kApart >= 0 && v / L::kUnits == L::kApart;
        T* sum = out + (m * L::kOut + (apart ? L::kColumns : v)) * kLanes<T>;
        store(sum, load(sum) + load(product + (m * L::kColumns + v) * kLanes<T>));
      }
    }
    return from.unfit[i];
  };
  const uint32_t unfit = add(x, x_columns, false) | add(h, h_columns, true);
  for (int m = 0; m < rows; ++m) {
    if (unfit >> m & 1) in_float32(tile, m, m + 1);
  }
}

// PanelProduct::sums() of one panel for the i-th tile of rows.
template <class T>
void sums_by_tiles(const PanelProduct<T>& product, int64_t p, int64_t i, int rows,
                   const T* const* from, bool any, const TiledRows& tiled, const uint16_t* columns,
                   T* out) {
  const int wide = product.vectors(p);
  const auto in_float32 = [&](int begin, int end) {
    for (int m = begin; m < end; m += kRows) {
      product.sums(p, 1, int(min64(end - m, kRows)), from + m, any, kTileRows, false,
                   out + m * wide * kLanes<T>);
    }
  };
  if (!any || !columns) return in_float32(0, rows);
  tiled.multiply(i, rows, columns, wide, out);
  for (int m = 0; m < rows; ++m) {
    if (tiled.unfit[i] >> m & 1) in_float32(m, m + 1);
  }
}
