// Products of few rows of A, with B read where it lies: packed panels (gemm.inl) would be read too
// seldom to repay their packing. Sums are cut at the same k, so results have the same bits.

constexpr int64_t kMostTilesInPlace = 6;

template <class T>
bool in_place(const Gemm<T>& g) {
  return g.M <= kMostTilesInPlace * kRows && g.a_k == 1 && !g.split;
}

// Vectors of columns that a tile of so many rows takes: sums enough to hide the latency of an FMA
// and, for few rows, which wait for B, more of each of its rows.
constexpr int vectors_in_place(int rows) {
  constexpr int kSums = kRows * kPanelVectors;
  return kSums >= 24 && rows * 8 <= kSums ? 8 : rows * 4 <= kSums ? 4 : kPanelVectors;
}

// `Rows` rows of C from row m on, `Vectors` vectors of columns from n on, the last `lanes` wide.
template <class T, int Rows, int Vectors>
FASTSEQ_TILE void tile_in_place(const Gemm<T>& g, int64_t m, int64_t n, int lanes) {
  // Rows of B on their way to the first-level cache while one is multiplied.
  constexpr int64_t kAhead = 8;
  const int64_t chain = g.chain ? g.chain : kChain;
  const T* rows[Rows];
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) rows[i] = g.a + (m + i) * g.a_m;
  auto width = [&](int v) { return v + 1 < Vectors ? kLanes<T> : lanes; };
  alignas(64) T total[Rows * Vectors * kLanes<T>];
  for (int64_t k0 = 0; k0 < g.K; k0 += chain) {
    const int64_t k1 = min64(k0 + chain, g.K);
    Vec<T> acc[Rows][Vectors] = {};
    auto place = RowsOfA<T>{rows}.template place<Rows>(k0);
    for (int64_t k = k0; k < k1; ++k, place.next()) {
      const int64_t next = min64(k + kAhead, g.K - 1);
      const T* b = (g.b_rows ? g.b_rows[k] : g.b + k * g.ldb) + n;
      const T* soon = (g.b_rows ? g.b_rows[next] : g.b + next * g.ldb) + n;
      Vec<T> column[Vectors];
#pragma GCC unroll 12
      for (int v = 0; v < Vectors; ++v) {
        __builtin_prefetch(soon + v * kLanes<T>);
        column[v] = load(b + v * kLanes<T>, width(v));
      }
#pragma GCC unroll 12
      for (int i = 0; i < Rows; ++i) {
        const Vec<T> a = broadcast(place.at(i));
#pragma GCC unroll 12
        for (int v = 0; v < Vectors; ++v) acc[i][v] = fma(a, column[v], acc[i][v]);
      }
    }
    const bool block_ends = k1 % kBlockK == 0 || k1 == g.K;
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 12
      for (int v = 0; v < Vectors; ++v) {
        T* so_far = total + (i * Vectors + v) * kLanes<T>;
        Vec<T> sum = acc[i][v];
        if (k0 % kBlockK) sum += load(so_far);
        if (!block_ends) {
          store(so_far, sum);
          continue;
        }
        T* out = g.c_at(m + i, n) + v * kLanes<T>;
        store(out, g.accumulate || k0 >= kBlockK ? sum + load(out, width(v)) : sum, width(v));
      }
    }
  }
}

// The columns [n0, n1) of C. All rows of A by some columns, so that B comes from afar once.
template <class T>
void gemm_in_place(const Gemm<T>& g, int64_t n0, int64_t n1) {
  const int64_t tiles = ceil_div(g.M, kRows);
  const int most = int(ceil_div(g.M, tiles));
  int columns = vectors_in_place(most) * kLanes<T>;
  for (int64_t n = n0; n < n1; n += columns) {
    // What is left of the columns, in narrower tiles.
    if (n + columns > n1) columns = int(min64(columns, kPanel<T>));
    const int cols = int(min64(columns, n1 - n)), vectors = int(ceil_div(cols, kLanes<T>));
    const int lanes = cols - (vectors - 1) * kLanes<T>;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t m = (g.M * i) / tiles;
      const int rows = int((g.M * (i + 1)) / tiles - m);
      with_const<kRows>(rows, [&](auto count) {
        constexpr int kN = decltype(count)::value;
        // Of a row more, as another tile may have.
        constexpr int kWide = vectors_in_place(kN), kLess = vectors_in_place(kN + 1);
        if (vectors == kWide) {
          tile_in_place<T, kN, kWide>(g, m, n, lanes);
        } else if (vectors == kLess) {
          tile_in_place<T, kN, kLess>(g, m, n, lanes);
        } else if (vectors == kPanelVectors) {
          tile_in_place<T, kN, kPanelVectors>(g, m, n, lanes);
        } else {
          tile_in_place<T, kN, 1>(g, m, n, lanes);
        }
      });
    }
  }
}

// Outer products of few k, A with columns side by side: C is written in order, as fast as memory
// takes it.
constexpr int64_t kMostOuter = 8;

template <class T>
bool is_outer(const Gemm<T>& g) {
  return g.K <= kMostOuter && g.a_m == 1;
}

template <class T, int Rows>
FASTSEQ_TILE void outer_rows(const Gemm<T>& g, int64_t m) {
  for (int64_t n = 0; n < g.N; n += kPanel<T>) {
    const int64_t cols = g.N - n;
    const int lanes[] = {int(min64(cols, kLanes<T>)), int(min64(cols - kLanes<T>, kLanes<T>))};
    const int vectors = lanes[1] > 0 ? 2 : 1;
    Vec<T> acc[Rows][2] = {};
    for (int64_t k = 0; k < g.K; ++k) {
      const T* b = g.b_at(k, n);
      const T* a = g.a + k * g.a_k + m;
      const Vec<T> b_0 = load(b, lanes[0]);
      const Vec<T> b_1 = vectors == 2 ? load(b + kLanes<T>, lanes[1]) : Vec<T>{};
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) {
        acc[i][0] = fma(broadcast(a[i]), b_0, acc[i][0]);
        acc[i][1] = fma(broadcast(a[i]), b_1, acc[i][1]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      T* out = g.c_at(m + i, n);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        if (v >= vectors) continue;
        T* to = out + v * kLanes<T>;
        store(to, g.accumulate ? acc[i][v] + load(to, lanes[v]) : acc[i][v], lanes[v]);
      }
    }
  }
}

// gemm_part(), but in place or by tiles where that is for the product.
template <class T>
void multiply_part(const Gemm<T>& g, int64_t part, int64_t parts, const GemmBlocks<T>& blocks) {
  const auto share = [&](int64_t extent, int64_t unit, const auto& work) {
    const int64_t chunk = ceil_div(ceil_div(extent, unit), parts) * unit;
    const int64_t begin = min64(part * chunk, extent);
    work(begin, min64(begin + chunk, extent));
  };
  if (!g.M || !g.N || !g.K) {
    gemm_part(g, part, parts, blocks);
  } else if (is_outer(g)) {
    share(g.M, 4, [&](int64_t m, int64_t end) {
      for (; m + 4 <= end; m += 4) outer_rows<T, 4>(g, m);
      for (; m < end; ++m) outer_rows<T, 1>(g, m);
    });
  } else if (in_place(g)) {
    share(g.N, kPanel<T>, [&](int64_t begin, int64_t end) { gemm_in_place(g, begin, end); });
  } else if (by_tiles(g)) {
    if constexpr (kTiled<T>) {
      gemm_part(g, part, parts, kTileRows, [&](int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
        gemm_block_by_tiles(g, m0, m1, n0, n1, blocks);
      });
    }
  } else {
    gemm_part(g, part, parts, blocks);
  }
}
