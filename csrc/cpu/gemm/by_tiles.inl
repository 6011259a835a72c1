// gemm.inl's blocks, multiplied by tiles of bfloat16: B is packed as it is there and then made
// tiles of; A is made tiles of 16 rows of, which all panels of the block use.

template <class T>
bool by_tiles(const Gemm<T>& g) {
  return kTiled<T> && g.tiles.multiply && g.K >= kFewestTiled && g.N >= kFewestTiled;
}

// Rows [m, m + rows) of A over [k0, k1). Returns whether all fit.
template <class T>
bool tile_a(const Gemm<T>& g, int64_t m, int rows, int64_t k0, int64_t k1, uint16_t* tiles) {
  const T* row[kTileRows];
  if (g.a_k == 1) {
    for (int i = 0; i < rows; ++i) row[i] = g.a + (m + i) * g.a_m + k0;
    return tile_rows(row, rows, k1 - k0, g.tiles, tiles) == 0;
  }
  Bits largest{};
  for (int64_t k = k0; k < k0 + tile_blocks(k1 - k0) * kTileDepth; k += kLanes<T>) {
    Square<T> square;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      square.row[i] = k + i < k1 ? load(g.a + (k + i) * g.a_k + m, rows) : Vec<T>{};
    }
    square.transpose();
    for (int i = 0; i < rows; ++i) {
      store_parts(parts_of(square.row[i], largest), g.tiles, i, k - k0, tiles);
    }
  }
  return fits(largest);
}

template <class T>
void gemm_block_by_tiles(const Gemm<T>& g, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                         const GemmBlocks<T>& blocks) {
  const int64_t panel_size = tiled_size(g.tiles, min64(kBlockK, g.K), kPanelVectors);
  alignas(64) T sums[kTileRows * kPanel<T>];
  bool panel_fits[kBlockN / kPanel<T>];
  for (int64_t k0 = 0; k0 < g.K; k0 += kBlockK) {
    const int64_t k1 = min64(k0 + kBlockK, g.K), K = k1 - k0;
    for (int64_t nb = n0; nb < n1; nb += kBlockN) {
      const int64_t ne = min64(nb + kBlockN, n1);
      const auto width = [&](int64_t n) {
        return int(ceil_div(min64(kPanel<T>, ne - n), kLanes<T>));
      };
      pack_b(g, k0, k1, nb, ne, blocks.b);
      for (int64_t n = nb; n < ne; n += kPanel<T>) {
        const int64_t panel = (n - nb) / kPanel<T>;
        panel_fits[panel] = true;
        for (int v = 0; v < width(n); ++v) {
          panel_fits[panel] &=
              tile_column(blocks.b + (n - nb) * K + v * kLanes<T>, width(n) * kLanes<T>, K, v,
                          width(n), g.tiles, blocks.b_tiles + panel * panel_size);
        }
      }
      for (int64_t m = m0; m < m1; m += kTileRows) {
        const int rows = int(min64(kTileRows, m1 - m));
        const bool a_fits = tile_a(g, m, rows, k0, k1, blocks.a_tiles);
        const bool accumulate = g.accumulate || k0 > 0;
        for (int64_t n = nb; n < ne; n += kPanel<T>) {
          const int64_t panel = (n - nb) / kPanel<T>;
          const int vectors = width(n), cols = int(min64(kPanel<T>, ne - n));
          if (!a_fits || !panel_fits[panel]) {
            const GemmBlock<T> block{m,        m + rows, k0,       k1,      nb, ne, accumulate,
                                     blocks.b, nullptr,  blocks.a, nullptr, 0,  0};
            with_const<kPanelVectors>(
                vectors, [&](auto v) { gemm_panel<T, decltype(v)::value>(g, block, n, cols); });
            continue;
          }
          g.tiles.multiply({blocks.a_tiles, blocks.b_tiles + panel * panel_size, tile_blocks(K),
                            rows, vectors, g.tiles.parts, sums});
          for (int i = 0; i < rows; ++i) {
            for (int v = 0; v < vectors; ++v) {
              T* out = g.c_at(m + i, n) + v * kLanes<T>;
              const int lanes = cols - v * kLanes<T>;
              const Vec<T> sum = load(sums + (i * vectors + v) * kLanes<T>);
              store(out, accumulate ? sum + load(out, lanes) : sum, lanes);
            }
          }
        }
      }
    }
  }
}
