// Blocked matrix product (after Goto and van de Geijn 2008): panels of B and of A are packed into
// caches, the register tile runs over them. Sums are blocked over k at fixed places, so results
// have the same bits for any number of threads.

// A block of B (kBlockK x kBlockN) and one of A (kBlockM x kBlockK) share the second-level cache:
// 512 KiB and 96 KiB of float.
constexpr int64_t kBlockK = 256, kBlockN = 512, kBlockM = 96;

// Packing memory of one task.
template <class T>
struct GemmBlocks {
  T* a;
  T* b;
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
      const T* row = g.b_rows ? g.b_rows[k] : g.b + k * g.ldb;
      for (int64_t n = group; n < group_end; n += kPanel<T>) {
        const int cols = int(min64(kPanel<T>, n1 - n));
        const int vectors = int(ceil_div(cols, kLanes<T>));
        T* to = out + (n - n0) * (k1 - k0) + (k - k0) * vectors * kLanes<T>;
        for (int v = 0; v < vectors; ++v) {
          store(to + v * kLanes<T>, load(row + n + v * kLanes<T>, cols - v * kLanes<T>));
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
FASTSEQ_TILE void gemm_sums(int64_t K, const A& a, const T* b, T* sums) {
  Vec<T> acc[kRows][Vectors] = {};
  multiply<T, kRows, Vectors, 1>(K, a, b, 0, acc);
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) store(sums + (m * Vectors + v) * kLanes<T>, acc[m][v]);
  }
}

template <class T, int Vectors, class A>
FASTSEQ_INLINE void gemm_tile(int64_t K, const A& a, const T* b, T* c, int64_t ldc, int rows,
                              int cols, bool accumulate) {
  alignas(64) T sums[kRows * Vectors * kLanes<T>];
  gemm_sums<T, Vectors>(K, a, b, sums);
  for (int m = 0; m < rows; ++m) {
    for (int v = 0; v < Vectors; ++v) {
      T* out = c + m * ldc + v * kLanes<T>;
      const int lanes = cols - v * kLanes<T>;
      const Vec<T> sum = load(sums + (m * Vectors + v) * kLanes<T>);
      store(out, accumulate ? sum + load(out, lanes) : sum, lanes);
    }
  }
}

// The rows [m0, m1) of C by one panel of packed B.
template <class T, int Vectors>
void gemm_panel(const Gemm<T>& g, int64_t m0, int64_t m1, int64_t k0, int64_t K, const T* packed_a,
                const T* b, T* c, int cols, bool accumulate) {
  for (int64_t m = m0; m < m1; m += kRows) {
    const int rows = int(min64(kRows, m1 - m));
    T* out = c + m * g.ldc;
    if (g.a_k == 1) {
      const T* row[kRows];
      for (int i = 0; i < kRows; ++i) row[i] = g.a + (m + (i < rows ? i : 0)) * g.a_m + k0;
      gemm_tile<T, Vectors>(K, RowsOfA<T>{row}, b, out, g.ldc, rows, cols, accumulate);
    } else {
      const PackedA<T> a{packed_a + (m - m0) * K};
      gemm_tile<T, Vectors>(K, a, b, out, g.ldc, rows, cols, accumulate);
    }
  }
}

template <class T>
void gemm_block(const Gemm<T>& g, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                const GemmBlocks<T>& blocks) {
  for (int64_t k0 = 0; k0 < g.K; k0 += kBlockK) {
    const int64_t k1 = min64(k0 + kBlockK, g.K), K = k1 - k0;
    const bool accumulate = g.accumulate || k0 > 0;
    for (int64_t nb = n0; nb < n1; nb += kBlockN) {
      const int64_t ne = min64(nb + kBlockN, n1);
      pack_b(g, k0, k1, nb, ne, blocks.b);
      for (int64_t mb = m0; mb < m1; mb += kBlockM) {
        const int64_t me = min64(mb + kBlockM, m1);
        if (g.a_k != 1) pack_a(g, mb, me, k0, k1, blocks.a);
        for (int64_t n = nb; n < ne; n += kPanel<T>) {
          const int cols = int(min64(kPanel<T>, ne - n));
          with_const<kPanelVectors>(int(ceil_div(cols, kLanes<T>)), [&](auto vectors) {
            gemm_panel<T, decltype(vectors)::value>(
                g, mb, me, k0, K, blocks.a, blocks.b + (n - nb) * K, g.c + n, cols, accumulate);
          });
        }
      }
    }
  }
}

// Tasks a product is cut into: rows of C, or columns where there are few rows.
template <class T>
struct GemmSplit {
  bool by_rows;
  int64_t tasks, chunk;
};

template <class T>
GemmSplit<T> split_gemm(const Gemm<T>& g, int threads) {
  const bool by_rows = g.M >= g.N;
  const int64_t extent = by_rows ? g.M : g.N, unit = by_rows ? kRows : kPanel<T>;
  // A task below this many multiply-adds costs more to hand out than to do.
  constexpr int64_t kWorthATask = int64_t(1) << 17;
  const int64_t worth = max64(1, g.M * g.N * g.K / kWorthATask);
  const int64_t wanted = min64(min64(threads, worth), max64(1, ceil_div(extent, unit)));
  const int64_t chunk = max64(1, ceil_div(ceil_div(extent, unit), wanted)) * unit;
  return {by_rows, ceil_div(extent, chunk), chunk};
}

template <class T>
void gemm(const Gemm<T>& g, const Threads& threads) {
  if (g.M == 0 || g.N == 0) return;
  if (g.K == 0) {
    for (int64_t m = 0; m < g.M && !g.accumulate; ++m) {
      for (int64_t n = 0; n < g.N; ++n) g.c[m * g.ldc + n] = 0;
    }
    return;
  }
  const GemmSplit<T> split = split_gemm(g, threads.count);
  const size_t a_bytes = Scratch::padded(size_t(GemmBlocks<T>::a_size(g)) * sizeof(T));
  const size_t b_bytes = Scratch::padded(size_t(GemmBlocks<T>::b_size(g)) * sizeof(T));
  Scratch scratch(size_t(split.tasks) * (a_bytes + b_bytes));
  char* memory = scratch.take<char>(size_t(split.tasks) * (a_bytes + b_bytes));
  run_tasks(threads, split.tasks, [&](int64_t task) {
    char* mine = memory + size_t(task) * (a_bytes + b_bytes);
    const GemmBlocks<T> blocks{reinterpret_cast<T*>(mine), reinterpret_cast<T*>(mine + a_bytes)};
    const int64_t begin = task * split.chunk, end = begin + split.chunk;
    if (split.by_rows) {
      gemm_block(g, begin, min64(end, g.M), 0, g.N, blocks);
    } else {
      gemm_block(g, 0, g.M, begin, min64(end, g.N), blocks);
    }
  });
}

// out[n] = sum over k of a[k * lda + n]: the bias gradients. Partial sums of kBlockK rows.
template <class T>
void column_sums(const T* a, int64_t K, int64_t N, int64_t lda, T* out, const Threads& threads) {
  const int64_t panels = ceil_div(N, kPanel<T>);
  const int64_t tasks = K * N < (int64_t(1) << 16) ? 1 : min64(threads.count, panels);
  const int64_t each = tasks ? ceil_div(panels, tasks) : 0;
  run_tasks(threads, tasks, [&](int64_t task) {
    const int64_t end = min64((task + 1) * each * kPanel<T>, N);
    for (int64_t n = task * each * kPanel<T>; n < end; n += kPanel<T>) {
      Vec<T> total[kPanelVectors] = {};
      for (int64_t k0 = 0; k0 < K; k0 += kBlockK) {
        Vec<T> part[kPanelVectors] = {};
        for (int64_t k = k0; k < min64(k0 + kBlockK, K); ++k) {
#pragma GCC unroll 2
          for (int v = 0; v < kPanelVectors; ++v) {
            const int64_t column = n + v * kLanes<T>;
            if (column < N)
              part[v] += load(a + k * lda + column, int(min64(kPanel<T>, N - column)));
          }
        }
        for (int v = 0; v < kPanelVectors; ++v) total[v] += part[v];
      }
      for (int v = 0; v < kPanelVectors; ++v) {
        const int64_t column = n + v * kLanes<T>;
        if (column < N) store(out + column, total[v], int(min64(kPanel<T>, N - column)));
      }
    }
  });
}
