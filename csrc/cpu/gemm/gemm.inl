// Blocked matrix product (after Goto and van de Geijn 2008): panels of B and of A are packed into
// caches, the register tile runs over them. Sums are blocked over k at fixed places, so results
// have the same bits for any number of threads.

// A block of B (kBlockK x kBlockN) and one of A (kBlockM x kBlockK) share the second-level cache:
// 512 KiB and 96 KiB of float. Deep rather than wide: each block of k reads and writes all of C.
constexpr int64_t kBlockK = 512, kBlockN = 256, kBlockM = 48;
// Packing A pays where more panels of B than this read it.
constexpr int64_t kFewPanels = 3;
// Parts that a product is cut into at most.
constexpr int64_t kMostParts = 64;

// Packing memory of one task.
template <class T>
struct GemmBlocks {
  T* a;
  T* b;
  // Where it is made by tiles (by_tiles.inl), of one tile of rows and of a block of B.
  uint16_t* a_tiles = nullptr;
  uint16_t* b_tiles = nullptr;
  // Elements of each that a product needs.
  static int64_t a_size(const Gemm<T>& g) {
    return g.a_k == 1 ? 0 : min64(kBlockM, ceil_div(g.M, kRows) * kRows) * min64(kBlockK, g.K);
  }
  static int64_t b_size(const Gemm<T>& g) {
    return min64(kBlockN, ceil_div(g.N, kPanel<T>) * kPanel<T>) * min64(kBlockK, g.K);
  }
};

// [k][n] to [panels][k][columns of the panel]. Rows may be whole pages apart, so that each is read
// over several panels before the next.
template <class T>
void pack_b(const Gemm<T>& g, int64_t k0, int64_t k1, int64_t n0, int64_t n1, T* out) {
  constexpr int64_t kTogether = 4 * kPanel<T>;
  for (int64_t group = n0; group < n1; group += kTogether) {
    const int64_t group_end = min64(group + kTogether, n1);
    for (int64_t k = k0; k < k1; ++k) {
      for (int64_t n = group; n < group_end; n += kPanel<T>) {
        const T* row = g.b_at(k, n);
        const int cols = int(min64(kPanel<T>, n1 - n));
        const int vectors = int(ceil_div(cols, kLanes<T>));
        T* to = out + (n - n0) * (k1 - k0) + (k - k0) * vectors * kLanes<T>;
        for (int v = 0; v < vectors; ++v) {
          store(to + v * kLanes<T>, load(row + v * kLanes<T>, cols - v * kLanes<T>));
        }
      }
    }
  }
}

// A with columns side by side (a_m = 1), to [tiles][k][kRows], row by row for the same reason.
template <class T>
void pack_a(const Gemm<T>& g, int64_t m0, int64_t m1, int64_t k0, int64_t k1, T* out) {
  for (int64_t k = k0; k < k1; ++k) {
    const T* source = g.a + k * g.a_k;
    T* to = out + (k - k0) * kRows;
    for (int64_t m = m0; m < m1; m += kRows, to += (k1 - k0) * kRows) {
      if (m + kRows <= m1) {
        __builtin_memcpy(to, source + m, kRows * sizeof(T));
      } else {
        for (int i = 0; i < kRows; ++i) to[i] = m + i < m1 ? source[m + i] : T(0);
      }
    }
  }
}

// kRows rows of A by `Vectors` vectors of packed B, to sums [kRows][Vectors][lanes].
template <class T, int Vectors, class A>
FASTSEQ_TILE void gemm_sums(int64_t K, const A& a, const T* b, int64_t chain, Strided<T> soon,
                            T* sums) {
  Vec<T> acc[kRows][Vectors] = {};
  multiply<T, kRows, Vectors, 1>(K, a, b, 0, acc, soon, chain);
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) store(sums + (m * Vectors + v) * kLanes<T>, acc[m][v]);
  }
}

// One tile of C: `rows` by `cols` from row m and column n on.
template <class T, int Vectors, class A>
FASTSEQ_INLINE void gemm_tile(const Gemm<T>& g, int64_t m, int64_t n, int64_t K, const A& a,
                              const T* b, int rows, int cols, bool accumulate, Strided<T> soon) {
  alignas(64) T sums[kRows * Vectors * kLanes<T>];
  if (accumulate) {
    for (int i = 0; i < rows; ++i) {
      for (int v = 0; v < Vectors; ++v) __builtin_prefetch(g.c_at(m + i, n) + v * kLanes<T>, 1);
    }
  }
  gemm_sums<T, Vectors>(K, a, b, g.chain ? g.chain : kChain, soon, sums);
  for (int i = 0; i < rows; ++i) {
    T* row = g.c_at(m + i, n);
    for (int v = 0; v < Vectors; ++v) {
      T* out = row + v * kLanes<T>;
      const int lanes = cols - v * kLanes<T>;
      const Vec<T> sum = load(sums + (i * Vectors + v) * kLanes<T>);
      store(out, accumulate ? sum + load(out, lanes) : sum, lanes);
    }
  }
}

// A block of C: the rows [m0, m1) of A by packed columns [n0, n1) of B, over [k0, k1).
template <class T>
struct GemmBlock {
  int64_t m0, m1, k0, k1, n0, n1;
  bool accumulate;
  const T* b;
  // A with columns side by side is packed, or, where few panels use it, taken as it stands (null)
  // but for the last rows.
  const T* a;
  T* last_rows;
  // The columns [next, next + next_columns) of A, over `next_depth` of k, are packed next: to be
  // fetched meanwhile.
  const T* next;
  int64_t next_columns, next_depth;
};

// One panel of a block.
template <class T, int Vectors>
void gemm_panel(const Gemm<T>& g, const GemmBlock<T>& block, int64_t n, int cols) {
  const int64_t K = block.k1 - block.k0;
  const T* b = block.b + (n - block.n0) * K;
  auto tile = [&](int64_t m, const auto& a, int rows, Strided<T> soon) {
    gemm_tile<T, Vectors>(g, m, n, K, a, b, rows, cols, block.accumulate, soon);
  };
  int64_t line = (n - block.n0) / kPanel<T> * ceil_div(block.m1 - block.m0, kRows) * kLanes<T>;
  for (int64_t m = block.m0; m < block.m1; m += kRows, line += kLanes<T>) {
    const int rows = int(min64(kRows, block.m1 - m));
    if (g.a_k == 1) {
      const T* row[kRows];
      for (int i = 0; i < kRows; ++i) row[i] = g.a + (m + (i < rows ? i : 0)) * g.a_m + block.k0;
      tile(m, RowsOfA<T>{row}, rows, {});
    } else if (block.a) {
      const bool soon = line < block.next_columns && K <= block.next_depth;
      tile(m, ColumnsOfA<T>{block.a + (m - block.m0) * K, kRows}, rows,
           soon ? Strided<T>{block.next + line, g.a_k} : Strided<T>{});
    } else if (rows == kRows) {
      tile(m, ColumnsOfA<T>{g.a + block.k0 * g.a_k + m, g.a_k}, rows, {});
    } else {
      pack_a(g, m, block.m1, block.k0, block.k1, block.last_rows);
      tile(m, ColumnsOfA<T>{block.last_rows, kRows}, rows, {});
    }
  }
}

template <class T>
void gemm_block(const Gemm<T>& g, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                const GemmBlocks<T>& blocks) {
  // Blocks of even width: A is packed once a block, or not at all for a narrow last one.
  const int64_t panels = ceil_div(n1 - n0, kPanel<T>);
  const int64_t width = ceil_div(panels, ceil_div(n1 - n0, kBlockN)) * kPanel<T>;
  for (int64_t k0 = 0; k0 < g.K; k0 += kBlockK) {
    const int64_t k1 = min64(k0 + kBlockK, g.K);
    for (int64_t nb = n0; nb < n1; nb += width) {
      const int64_t ne = min64(nb + width, n1);
      const bool packed = g.a_k != 1 && ne - nb > kFewPanels * kPanel<T>;
      pack_b(g, k0, k1, nb, ne, blocks.b);
      for (int64_t mb = m0; mb < m1; mb += kBlockM) {
        const int64_t me = min64(mb + kBlockM, m1);
        GemmBlock<T> block{mb,
                           me,
                           k0,
                           k1,
                           nb,
                           ne,
                           g.accumulate || k0 > 0,
                           blocks.b,
                           packed ? blocks.a : nullptr,
                           blocks.a,
                           nullptr,
                           0,
                           0};
        if (packed) {
          pack_a(g, mb, me, k0, k1, blocks.a);
          // The rows of A after these; after the last, the first ones of this block of k again or
          // of the next.
          const bool more = me < m1, again = ne < n1;
          const int64_t next_m = more ? me : m0, next_k = more || again ? k0 : k1;
          block.next = g.a + next_k * g.a_k + next_m;
          block.next_columns = min64(kBlockM, m1 - next_m);
          block.next_depth = min64(kBlockK, g.K - next_k);
        }
        for (int64_t n = nb; n < ne; n += kPanel<T>) {
          const int cols = int(min64(kPanel<T>, ne - n));
          with_const<kPanelVectors>(int(ceil_div(cols, kLanes<T>)), [&](auto vectors) {
            gemm_panel<T, decltype(vectors)::value>(g, block, n, cols);
          });
        }
      }
    }
  }
}

// The part `part` of `parts` of a product: some rows of C, so many at least, or columns where there
// are few rows; as block(m0, m1, n0, n1).
template <class T, class Block>
void gemm_part(const Gemm<T>& g, int64_t part, int64_t parts, int64_t rows, const Block& block) {
  if (g.M == 0 || g.N == 0) return;
  const bool by_rows = g.M >= g.N;
  const int64_t extent = by_rows ? g.M : g.N, unit = by_rows ? rows : kPanel<T>;
  const int64_t chunk = ceil_div(ceil_div(extent, unit), parts) * unit;
  const int64_t begin = min64(part * chunk, extent), end = min64(begin + chunk, extent);
  if (begin == end) return;
  const int64_t m0 = by_rows ? begin : 0, m1 = by_rows ? end : g.M;
  const int64_t n0 = by_rows ? 0 : begin, n1 = by_rows ? g.N : end;
  if (g.K > 0) {
    block(m0, m1, n0, n1);
    return;
  }
  for (int64_t m = m0; m < m1 && !g.accumulate; ++m) {
    for (int64_t n = n0; n < n1; ++n) *g.c_at(m, n) = 0;
  }
}
template <class T>
void gemm_part(const Gemm<T>& g, int64_t part, int64_t parts, const GemmBlocks<T>& blocks) {
  gemm_part(g, part, parts, kRows, [&](int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
    gemm_block(g, m0, m1, n0, n1, blocks);
  });
}

// out[n] = sum over k of a[k * lda + n], for n in [n0, n1): sums of kLeaf rows, kLeaf of which are
// added up before they are added to the total.
template <class T>
void column_sums(const T* a, int64_t K, int64_t n0, int64_t n1, int64_t lda, T* out) {
  constexpr int64_t kLeaf = 32;
  for (int64_t n = n0; n < n1; n += kLanes<T>) {
    const int lanes = int(min64(kLanes<T>, n1 - n));
    Vec<T> total{}, branch{};
    for (int64_t k0 = 0; k0 < K; k0 += kLeaf) {
      Vec<T> leaf{};
      for (int64_t k = k0; k < min64(k0 + kLeaf, K); ++k) leaf += load(a + k * lda + n, lanes);
      branch += leaf;
      if ((k0 / kLeaf + 1) % kLeaf == 0) {
        total += branch;
        branch = Vec<T>{};
      }
    }
    store(out + n, total + branch, lanes);
  }
}

// A task below this many multiply-adds costs more to hand out than to do.
constexpr int64_t kWorthATask = int64_t(1) << 17;

template <class T>
void gemm(const Gemm<T>& g, const Threads& threads) {
  const int64_t parts =
      max64(1, min64(min64(threads.count, kMostParts), g.M * g.N * g.K / kWorthATask));
  const int64_t a_size = GemmBlocks<T>::a_size(g), b_size = GemmBlocks<T>::b_size(g);
  Scratch scratch(size_t(parts) * (Scratch::padded(size_t(a_size) * sizeof(T)) +
                                   Scratch::padded(size_t(b_size) * sizeof(T))));
  GemmBlocks<T> blocks[kMostParts];
  for (int64_t part = 0; part < parts; ++part) {
    blocks[part] = {scratch.take<T>(size_t(a_size)), scratch.take<T>(size_t(b_size))};
  }
  run_tasks(threads, parts, [&](int64_t part) { gemm_part(g, part, parts, blocks[part]); });
}
