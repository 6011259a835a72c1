// The register tile under every matrix product here: kRows rows of A by a few vectors of B.
//
// Each element is chains of multiply-adds over k in ascending order, cut at fixed k, whatever the
// tile it falls in. So results depend neither on how work is split among threads nor on the rows
// beside a row.

// Two or three vectors of B stay in registers while rows of A pass: tall rather than wide, for B
// comes from the second-level cache and A from the first. 32 registers (AVX-512) take 24 sums, the
// vectors of B and one of A; 16 take 12 and those; without an FMA (scalar) a product needs one
// more.
constexpr int tile_rows(int wide) {
  return (FASTSEQ_VECTOR_BYTES == 64 ? 24 : FASTSEQ_VECTOR_BYTES == 32 ? 12 : 8) / wide;
}
constexpr int kPanelVectors = 2;
constexpr int kRows = tile_rows(kPanelVectors);
template <class T>
constexpr int kPanel = kPanelVectors * kLanes<T>;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Each form of A gives a place that walks along k: at(m) is A[m][k], next() the step to k + 1.

// A as separate rows, contiguous in k.
template <class T>
struct RowsOfA {
  const T* const* rows;

  // One pointer moves and the other rows are distances from it. With a pointer a row, compilers run
  // out of registers and keep some in vector registers, moves from which take an FMA's place.
  template <int Rows>
  struct Place {
    const char* first;
    int64_t distance[Rows];
    // A[m][k + ahead].
    FASTSEQ_INLINE T at(int m, int64_t ahead = 0) const {
      return reinterpret_cast<const T*>(m == 0 ? first : first + distance[m])[ahead];
    }
    FASTSEQ_INLINE void next() {
      first += sizeof(T);
      // Or the compiler makes a pointer a row of it again.
      asm("" : "+r"(first));
    }
  };
  template <int Rows>
  FASTSEQ_INLINE Place<Rows> place(int64_t k) const {
    Place<Rows> p;
    p.first = reinterpret_cast<const char*>(rows[0] + k);
#pragma GCC unroll 12
    for (int m = 0; m < Rows; ++m) {
      p.distance[m] = reinterpret_cast<const char*>(rows[m] + k) - p.first;
    }
    return p;
  }
};
// A whose rows lie side by side, `stride` elements from one k to the next.
template <class T>
struct ColumnsOfA {
  const T* a;
  int64_t stride;

  template <int Rows>
  struct Place {
    const T* a;
    int64_t stride;
    FASTSEQ_INLINE T at(int m, int64_t ahead = 0) const { return a[m + ahead * stride]; }
    FASTSEQ_INLINE void next() { a += stride; }
  };
  template <int Rows>
  FASTSEQ_INLINE Place<Rows> place(int64_t k) const {
    return {a + k * stride, stride};
  }
};

// What to fetch meanwhile: lines one after the other, or a line every `stride` elements.
template <class T>
struct Strided {
  const T* first;
  int64_t stride;
  explicit operator bool() const { return first; }
};
template <class T>
FASTSEQ_INLINE const T* line_of(const T* soon, int64_t k) {
  return soon + k * kLanes<T>;
}
template <class T>
FASTSEQ_INLINE const T* line_of(const Strided<T>& soon, int64_t k) {
  return soon.first + k * soon.stride;
}

// Chains end, and their sums are added up, every so many k: the rounding of a sum grows with the
// length of a chain.
constexpr int64_t kChain = 128;

// acc[m][v] += sum over k in [k0, k1) of A[m][k] * B[k][v]. B: `Panels` panels of `Vectors` vectors
// a k, [K][Vectors * lanes], `panel_stride` elements apart. Few rows take several panels, for sums
// enough (eight) to hide the latency of an FMA.
//
// With Fetch, a line of `soon` a k goes to the second-level cache meanwhile.
template <class T, int Rows, int Vectors, int Panels, bool Fetch, class A, class Soon>
FASTSEQ_INLINE void multiply_chain(int64_t k0, int64_t k1, const A& a, const T* panel,
                                   int64_t panel_stride, Vec<T> (&acc)[Rows][Panels * Vectors],
                                   const Soon& soon) {
  auto place = a.template place<Rows>(k0);
  for (int64_t k = k0; k < k1; ++k, place.next()) {
    if (Fetch) __builtin_prefetch(line_of(soon, k), 0, 2);
    Vec<T> b[Panels * Vectors];
#pragma GCC unroll 12
    for (int v = 0; v < Panels * Vectors; ++v) {
      b[v] = load(panel + (v / Vectors) * panel_stride + (k * Vectors + v % Vectors) * kLanes<T>);
    }
#pragma GCC unroll 12
    for (int m = 0; m < Rows; ++m) {
      const Vec<T> a_mk = broadcast(place.at(m));
#pragma GCC unroll 12
      for (int v = 0; v < Panels * Vectors; ++v) acc[m][v] = fma(a_mk, b[v], acc[m][v]);
    }
  }
}

// One k of the first `Chains` chains side by side: sums [chain][row][column].
template <class T, int Rows, int Vectors, int Panels, int Chains, class Place>
FASTSEQ_INLINE void step_abreast(const Place& a, int64_t chain, const T* b, int64_t panel_stride,
                                 Vec<T>* sums) {
#pragma GCC unroll 4
  for (int c = 0; c < Chains; ++c) {
    const T* from = b + c * chain * Vectors * kLanes<T>;
#pragma GCC unroll 12
    for (int m = 0; m < Rows; ++m) {
      const Vec<T> a_mk = broadcast(a.at(m, c * chain));
#pragma GCC unroll 12
      for (int v = 0; v < Panels * Vectors; ++v) {
        Vec<T>& sum = sums[(c * Rows + m) * Panels * Vectors + v];
        sum = fma(a_mk, load(from + (v / Vectors) * panel_stride + (v % Vectors) * kLanes<T>), sum);
      }
    }
  }
}

// The chains of [k0, k1), `Chains` of them side by side, the last perhaps shorter: few sums alone
// leave the units waiting for each other's FMA.
template <class T, int Rows, int Vectors, int Panels, int Chains, class A>
FASTSEQ_INLINE void multiply_abreast(int64_t k0, int64_t k1, int64_t chain, const A& a,
                                     const T* panel, int64_t panel_stride, Vec<T>* sums) {
  constexpr int kSums = Rows * Panels * Vectors, kPanelWidth = Vectors * kLanes<T>;
  const int64_t last = k1 - k0 - (Chains - 1) * chain;
#pragma GCC unroll 16
  for (int i = 0; i < Chains * kSums; ++i) sums[i] = Vec<T>{};
  auto place = a.template place<Rows>(k0);
  const T* b = panel + k0 * kPanelWidth;
  for (int64_t i = 0; i < last; ++i, place.next(), b += kPanelWidth) {
    step_abreast<T, Rows, Vectors, Panels, Chains>(place, chain, b, panel_stride, sums);
  }
  if constexpr (Chains > 1) {
    for (int64_t i = last; i < chain; ++i, place.next(), b += kPanelWidth) {
      step_abreast<T, Rows, Vectors, Panels, Chains - 1>(place, chain, b, panel_stride, sums);
    }
  }
}

// acc += those sums, chain by chain.
template <class T, int Chains, int Rows, int Columns>
FASTSEQ_INLINE void add_abreast(const Vec<T>* sums, Vec<T> (&acc)[Rows][Columns]) {
#pragma GCC unroll 16
  for (int i = 0; i < Chains * Rows * Columns; ++i) {
    const int element = i % (Rows * Columns);
    acc[element / Columns][element % Columns] += sums[i];
  }
}

// total (+)= sums, then sums = 0 for the next chain; or, after the last, sums += total.
template <class T, int Rows, int Columns>
FASTSEQ_INLINE void add_chain(bool first, bool last, T* total, Vec<T> (&sums)[Rows][Columns]) {
#pragma GCC unroll 12
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 12
    for (int v = 0; v < Columns; ++v) {
      T* sum = total + (m * Columns + v) * kLanes<T>;
      if (!first) sums[m][v] += load(sum);
      if (!last) {
        store(sum, sums[m][v]);
        sums[m][v] = Vec<T>{};
      }
    }
  }
}

// The same over all of [0, K), in chains.
template <class T, int Rows, int Vectors, int Panels, bool Fetch, class A, class Soon>
FASTSEQ_INLINE void multiply_chains(int64_t K, const A& a, const T* panel, int64_t panel_stride,
                                    Vec<T> (&acc)[Rows][Panels * Vectors], const Soon& soon,
                                    int64_t chain, bool back) {
  if (K <= chain) {
    multiply_chain<T, Rows, Vectors, Panels, Fetch>(0, K, a, panel, panel_stride, acc, soon);
    return;
  }
  constexpr int kSums = Rows * Panels * Vectors;
  if constexpr (kSums < 8) {
    Vec<T> sums[2 * kSums], later[2 * kSums];
    if (back && K > 3 * chain && K <= 4 * chain) {
      // The later half first: of the step before, it was read last.
      multiply_abreast<T, Rows, Vectors, Panels, 2>(2 * chain, K, chain, a, panel, panel_stride,
                                                    later);
      multiply_abreast<T, Rows, Vectors, Panels, 2>(0, 2 * chain, chain, a, panel, panel_stride,
                                                    sums);
      add_abreast<T, 2>(sums, acc);
      add_abreast<T, 2>(later, acc);
      return;
    }
    int64_t k0 = 0;
    for (; k0 + chain < K; k0 += 2 * chain) {
      const int64_t k1 = min64(k0 + 2 * chain, K);
      multiply_abreast<T, Rows, Vectors, Panels, 2>(k0, k1, chain, a, panel, panel_stride, sums);
      add_abreast<T, 2>(sums, acc);
    }
    if (k0 < K) {
      multiply_abreast<T, Rows, Vectors, Panels, 1>(k0, K, chain, a, panel, panel_stride, sums);
      add_abreast<T, 1>(sums, acc);
    }
    return;
  }
  alignas(64) T total[Rows * Panels * Vectors * kLanes<T>];
  for (int64_t k0 = 0; k0 < K; k0 += chain) {
    multiply_chain<T, Rows, Vectors, Panels, Fetch>(k0, min64(k0 + chain, K), a, panel,
                                                    panel_stride, acc, soon);
    add_chain<T>(k0 == 0, k0 + chain >= K, total, acc);
  }
}

// `soon`: what to fetch meanwhile, K lines of it; null for nothing. (Fetching what is near
// already takes the few buffers that the panel itself needs.) `back`: few rows may begin with what
// is last; the sums are the same.
template <class T, int Rows, int Vectors, int Panels, class A, class Soon = const T*>
FASTSEQ_INLINE void multiply(int64_t K, const A& a, const T* panel, int64_t panel_stride,
                             Vec<T> (&acc)[Rows][Panels * Vectors], Soon soon = {},
                             int64_t chain = kChain, bool back = false) {
  if (soon) {
    multiply_chains<T, Rows, Vectors, Panels, true>(K, a, panel, panel_stride, acc, soon, chain,
                                                    back);
  } else {
    multiply_chains<T, Rows, Vectors, Panels, false>(K, a, panel, panel_stride, acc, soon, chain,
                                                     back);
  }
}

// Calls f(integral_constant-like<n>) for the n in [1, Max] that equals `value`.
template <int N>
struct Const {
  static constexpr int value = N;
};
template <int Max, class F>
FASTSEQ_INLINE void with_const(int value, const F& f) {
  if constexpr (Max > 0) {
    if (value == Max) {
      f(Const<Max>{});
    } else {
      with_const<Max - 1>(value, f);
    }
  }
}
