// Blocked matrix product (after Goto and van de Geijn 2008): panels of B and of A are packed into
// caches, the register tile runs over them. Sums are blocked over k at fixed places, so results
// have the same bits for any number of threads.

// A block of B (kBlockK x kBlockN) and one of A (kBlockM x kBlockK) share the L2 cache: 256 KiB and
// 96 KiB of float.
constexpr int64_t kBlockK = 256, kBlockN = 256, kBlockM = 96;

template <class T>
struct GemmBlocks {
  static constexpr int64_t a_elements = kBlockM * kBlockK;
  static constexpr int64_t b_elements = (kBlockN + kPanel<T>)*kBlockK;
  T* a;
  T* b;
};

template <class T>
void pack_b(const Gemm<T>& g, int64_t k0, int64_t k1, int64_t n0, int64_t n1, T* out) {
  for (int64_t n = n0; n < n1; n += kPanel<T>) {
    const int cols = int(min64(kPanel<T>, n1 - n));
    const int vectors = int(ceil_div(cols, kLanes<T>));
    for (int64_t k = k0; k < k1; ++k) {
      const T* row = (g.b_rows ? g.b_rows[k] : g.b + k * g.ldb) + n;
      for (int v = 0; v < vectors; ++v, out += kLanes<T>) {
        store(out, load(row + v * kLanes<T>, cols - v * kLanes<T>));
      }
    }
  }
}

template <class T>
void pack_a(const Gemm<T>& g, int64_t m0, int64_t m1, int64_t k0, int64_t k1, T* out) {
  for (int64_t m = m0; m < m1; m += kRows) {
    const int rows = int(min64(kRows, m1 - m));
    const T* source = g.a + m * g.a_m + k0 * g.a_k;
    for (int64_t k = k0; k < k1; ++k, source += g.a_k, out += kRows) {
      int i = 0;
      for (; i < rows; ++i) out[i] = source[i * g.a_m];
      for (; i < kRows; ++i) out[i] = 0;
    }
  }
}

// kRows rows of packed A by `Vectors` vectors of packed B, to sums [kRows][Vectors][lanes].
template <class T, int Vectors>
FASTSEQ_TILE void gemm_sums(int64_t K, const T* a, const T* b, T* sums) {
  Vec<T> acc[kRows][Vectors] = {};
  multiply<T, kRows, Vectors, 1>(K, PackedA<T>{a}, b, 0, acc);
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) store(sums + (m * Vectors + v) * kLanes<T>, acc[m][v]);
  }
}

template <class T, int Vectors>
FASTSEQ_INLINE void gemm_tile(int64_t K, const T* a, const T* b, T* c, int64_t ldc, int rows,
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
        pack_a(g, mb, me, k0, k1, blocks.a);
        for (int64_t n = nb; n < ne; n += kPanel<T>) {
          const int cols = int(min64(kPanel<T>, ne - n));
          with_const<kPanelVectors>(int(ceil_div(cols, kLanes<T>)), [&](auto vectors) {
            for (int64_t m = mb; m < me; m += kRows) {
              gemm_tile<T, decltype(vectors)::value>(
                  K, blocks.a + (m - mb) * K, blocks.b + (n - nb) * K, g.c + m * g.ldc + n, g.ldc,
                  int(min64(kRows, me - m)), cols, accumulate);
            }
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

// `block_of(task)` gives each task its own packing memory.
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
  constexpr size_t a_bytes = GemmBlocks<T>::a_elements * sizeof(T);
  constexpr size_t b_bytes = GemmBlocks<T>::b_elements * sizeof(T);
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
