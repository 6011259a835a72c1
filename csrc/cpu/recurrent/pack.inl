// Weights as register tiles want them, packed once a call.

// [G*H, K] weights of one group of units: [panels][K][columns of the panel][lanes], units beyond H
// zero. A column is a gate and a vector of units, gates outermost.
template <class L, class T>
void pack_group(const T* w, int64_t H, int64_t K, int64_t group, T* out) {
  for (int column = 0; column < L::kColumns; ++column) {
    const int64_t unit = (group * L::kUnits + column % L::kUnits) * kLanes<T>;
    const int lanes = int(min64(kLanes<T>, H - unit));
    constexpr int kPanelWidth = L::kWide * kLanes<T>;
    T* panel = out + (column / L::kWide) * K * kPanelWidth + (column % L::kWide) * kLanes<T>;
    const T* rows = w + (column / L::kUnits * H + unit) * K;
    for (int64_t k = 0; k < K; k += kLanes<T>) {
      const int wide = int(min64(kLanes<T>, K - k));
      Square<T> square;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes<T>; ++i) {
        square.row[i] = i < lanes ? load(rows + i * K + k, wide) : Vec<T>{};
      }
      square.transpose();
      for (int j = 0; j < wide; ++j) store(panel + (k + j) * kPanelWidth, square.row[j]);
    }
  }
}

// [K, N] as it stands, one panel of columns: [K][vectors of the panel][lanes].
template <class T>
void pack_columns(const T* w, int64_t K, int64_t N, int64_t column, T* out) {
  const int cols = int(min64(kPanel<T>, N - column));
  const int vectors = int(ceil_div(cols, kLanes<T>));
  for (int64_t k = 0; k < K; ++k) {
    for (int v = 0; v < vectors; ++v, out += kLanes<T>) {
      store(out, load(w + k * N + column + v * kLanes<T>, cols - v * kLanes<T>));
    }
  }
}

// What the forward pass multiplies by, of one direction.
template <class T>
struct PackedForward {
  T* bias;                        // [groups][kOut][lanes]: what the sums start from
  T* x;                           // [groups][kPanels][I][kWide][lanes]
  T* h;                           // [groups][kPanels][P][kWide][lanes]
  T* hr;                          // [P, H] transposed and in panels of columns; or null
  TiledColumns tiled_x, tiled_h;  // the groups of x and h
};

template <class L, class T>
struct PackedSizes {
  int64_t groups, bias, x, h, hr;
  explicit PackedSizes(const RecurrentShape& s, bool projected)
      : groups(ceil_div(s.H, L::kUnits * kLanes<T>)),
        bias(groups * L::kOut * kLanes<T>),
        x(groups * L::kColumns * kLanes<T> * s.I),
        h(groups * L::kColumns * kLanes<T> * s.P),
        hr(projected ? ceil_div(s.P, kLanes<T>) * kLanes<T> * s.H : 0) {}
};

template <class L, class T, class Memory>
void lay_out_packed(const PackedSizes<L, T>& size, Memory& memory, PackedForward<T>& p) {
  p.bias = memory.template take<T>(size_t(size.bias));
  p.x = memory.template take<T>(size_t(size.x));
  p.h = memory.template take<T>(size_t(size.h));
  p.hr = memory.template take<T>(size_t(size.hr));
}

template <class L, class T>
void pack_bias(const RecurrentWeights<T>& w, int64_t H, int64_t group, T* out) {
  for (int i = 0; i < L::kOut * kLanes<T>; ++i) {
    const int sum = i / (L::kUnits * kLanes<T>), lane = i % (L::kUnits * kLanes<T>);
    const int64_t unit = group * L::kUnits * kLanes<T> + lane;
    // A gate in two halves: each has its own bias.
    const bool from_x = sum < L::kGates, from_h = sum != L::kApart;
    const int64_t row = (sum < L::kGates ? sum : L::kApart) * H + unit;
    T value = 0;
    if (unit < H && from_x && w.b_ih) value += w.b_ih[row];
    if (unit < H && from_h && w.b_hh) value += w.b_hh[row];
    out[i] = value;
  }
}

template <class L, class T>
void pack_forward(const RecurrentWeights<T>& w, const RecurrentShape& s, int64_t group,
                  PackedForward<T>& p) {
  constexpr int kWidth = L::kColumns * kLanes<T>;
  pack_group<L>(w.w_ih, s.H, s.I, group, p.x + group * s.I * kWidth);
  pack_group<L>(w.w_hh, s.H, s.P, group, p.h + group * s.P * kWidth);
  pack_bias<L>(w, s.H, group, p.bias + group * L::kOut * kLanes<T>);
  if constexpr (kTiled<T>) {
    p.tiled_x.fill(group, p.x + group * s.I * kWidth, L::kWide, L::kColumns);
    p.tiled_h.fill(group, p.h + group * s.P * kWidth, L::kWide, L::kColumns);
  }
}

// Panel `panel` of the transpose of [N, K] weights, as pack_columns would make it of [K, N].
template <class T>
void pack_rows(const T* w, int64_t N, int64_t K, int64_t panel, T* out) {
  const int64_t column = panel * kPanel<T>;
  const int cols = int(min64(kPanel<T>, N - column));
  const int width = int(ceil_div(cols, kLanes<T>)) * kLanes<T>;
  if (width == kPanel<T>) {
    pack_group<Layout<1, -1>>(w, N, K, panel, out);
    return;
  }
  for (int64_t k = 0; k < K; ++k) {
    for (int n = 0; n < width; ++n) out[k * width + n] = n < cols ? w[(column + n) * K + k] : T(0);
  }
}
