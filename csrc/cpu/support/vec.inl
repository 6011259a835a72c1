// One vector of FASTSEQ_VECTOR_BYTES, as the compiler's own vector type, and its maths.
//
// Included once per instruction-set file, inside that file's own anonymous namespace, so that no
// copy compiled for a wide machine can be the one the linker keeps for a narrow one. Arithmetic is
// the language's operators, and fma().

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  typedef T unaligned
      __attribute__((vector_size(FASTSEQ_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
constexpr int kLanes = FASTSEQ_VECTOR_BYTES / int(sizeof(T));

using VecF = Vec<float>;
using VecD = Vec<double>;

template <class T>
FASTSEQ_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}
template <class T>
FASTSEQ_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = v;
}
// a - 0 and not 0 + a: the former is a for -0 too, so that it folds into a broadcasting load.
template <class T>
FASTSEQ_INLINE Vec<T> broadcast(T a) {
  return a - Vec<T>{};
}

// The first n lanes only, 0 <= n; memory beyond them is neither read nor written.
#if FASTSEQ_VECTOR_BYTES == 64
FASTSEQ_INLINE VecF load_part(const float* p, int n) {
  return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
FASTSEQ_INLINE VecD load_part(const double* p, int n) {
  return _mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
FASTSEQ_INLINE void store_part(float* p, VecF v, int n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v);
}
FASTSEQ_INLINE void store_part(double* p, VecD v, int n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), v);
}
#else
template <class T>
FASTSEQ_INLINE Vec<T> load_part(const T* p, int n) {
  Vec<T> v{};
  for (int lane = 0; lane < n; ++lane) v[lane] = p[lane];
  return v;
}
template <class T>
FASTSEQ_INLINE void store_part(T* p, Vec<T> v, int n) {
  for (int lane = 0; lane < n; ++lane) p[lane] = v[lane];
}
#endif
template <class T>
FASTSEQ_INLINE Vec<T> load(const T* p, int n) {
  return __builtin_expect(n >= kLanes<T>, 1) ? load(p) : load_part(p, n);
}
template <class T>
FASTSEQ_INLINE void store(T* p, Vec<T> v, int n) {
  if (__builtin_expect(n >= kLanes<T>, 1)) {
    store(p, v);
  } else {
    store_part(p, v, n);
  }
}

// Past the caches, to a boundary of a whole vector: for what is not read again soon, and is too
// much to be there when it is. No other thread sees it before end_streams().
#if FASTSEQ_VECTOR_BYTES == 64
constexpr bool kStreams = true;
FASTSEQ_INLINE void stream(float* p, VecF v) { _mm512_stream_ps(p, v); }
FASTSEQ_INLINE void stream(double* p, VecD v) { _mm512_stream_pd(p, v); }
FASTSEQ_INLINE void end_streams() { _mm_sfence(); }
#else
// Of half a cache line each, they would cost more than they save.
constexpr bool kStreams = false;
template <class T>
FASTSEQ_INLINE void stream(T* p, Vec<T> v) {
  store(p, v);
}
FASTSEQ_INLINE void end_streams() {}
#endif

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FASTSEQ_SHUFFLE 1
#endif
#endif

// Transposes a square of lanes x lanes elements, a vector a row.
template <class T>
struct Square {
  static constexpr int N = kLanes<T>;
  Vec<T> row[N];

#if defined(FASTSEQ_SHUFFLE)
  template <int... I>
  struct Indices {};
  template <int Count, int... I>
  struct Upto : Upto<Count - 1, Count - 1, I...> {};
  template <int... I>
  struct Upto<0, I...> {
    using type = Indices<I...>;
  };
  // Elements begin, begin + 1, ... of a and of b in turn.
  template <int Begin, int... I>
  static FASTSEQ_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, Indices<I...>) {
    return __builtin_shufflevector(a, b, (Begin + I / 2 + (I % 2) * N)...);
  }
  // Interleaving the halves log2(N) times takes element (i, j) to (j, i).
  FASTSEQ_INLINE void transpose() {
    using All = typename Upto<N>::type;
#pragma GCC unroll 4
    for (int stage = 1; stage < N; stage *= 2) {
      Vec<T> next[N];
#pragma GCC unroll 8
      for (int i = 0; i < N / 2; ++i) {
        next[2 * i] = interleave<0>(row[i], row[i + N / 2], All{});
        next[2 * i + 1] = interleave<N / 2>(row[i], row[i + N / 2], All{});
      }
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) row[i] = next[i];
    }
  }
#else
  void transpose() {
    for (int i = 0; i < N; ++i) {
      for (int j = 0; j < i; ++j) {
        const T swapped = row[i][j];
        row[i][j] = row[j][i];
        row[j][i] = swapped;
      }
    }
  }
#endif
};

// a * b + c, rounded once where the instruction set can.
#if FASTSEQ_VECTOR_BYTES == 64
FASTSEQ_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }
FASTSEQ_INLINE VecD fma(VecD a, VecD b, VecD c) { return _mm512_fmadd_pd(a, b, c); }
#elif FASTSEQ_VECTOR_BYTES == 32
FASTSEQ_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }
FASTSEQ_INLINE VecD fma(VecD a, VecD b, VecD c) { return _mm256_fmadd_pd(a, b, c); }
#else
FASTSEQ_INLINE VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }
FASTSEQ_INLINE VecD fma(VecD a, VecD b, VecD c) { return a * b + c; }
#endif

// The nearest value in [lo, hi]; NaN stays NaN. (The compiler makes a comparison and a blend of
// each side; a bound as first operand of the machine's own minimum does the same in one.)
#if FASTSEQ_VECTOR_BYTES == 64
FASTSEQ_INLINE VecF clamp(VecF x, float lo, float hi) {
  return _mm512_max_ps(broadcast(lo), _mm512_min_ps(broadcast(hi), x));
}
FASTSEQ_INLINE VecD clamp(VecD x, double lo, double hi) {
  return _mm512_max_pd(broadcast(lo), _mm512_min_pd(broadcast(hi), x));
}
#elif FASTSEQ_VECTOR_BYTES == 32
FASTSEQ_INLINE VecF clamp(VecF x, float lo, float hi) {
  return _mm256_max_ps(broadcast(lo), _mm256_min_ps(broadcast(hi), x));
}
FASTSEQ_INLINE VecD clamp(VecD x, double lo, double hi) {
  return _mm256_max_pd(broadcast(lo), _mm256_min_pd(broadcast(hi), x));
}
#else
template <class V, class T>
FASTSEQ_INLINE V clamp(V x, T lo, T hi) {
  const V low = lo - V{}, high = hi - V{};
  x = x > high ? high : x;
  return x < low ? low : x;
}
#endif

// 1 / d for finite, normal d; and the same with half its digits right at least, where that is
// cheaper.
#if FASTSEQ_VECTOR_BYTES == 64
// An estimate of 14 bits and one step of Newton's, at a third of a division's cost.
FASTSEQ_INLINE VecF near_reciprocal(VecF d) { return _mm512_rcp14_ps(d); }
FASTSEQ_INLINE VecF reciprocal(VecF d) {
  const VecF r = near_reciprocal(d);
  return fma(r, _mm512_fnmadd_ps(d, r, broadcast(1.0f)), r);
}
#else
FASTSEQ_INLINE VecF near_reciprocal(VecF d) { return 1.0f / d; }
FASTSEQ_INLINE VecF reciprocal(VecF d) { return 1.0f / d; }
#endif
FASTSEQ_INLINE VecD near_reciprocal(VecD d) { return 1.0 / d; }
FASTSEQ_INLINE VecD reciprocal(VecD d) { return 1.0 / d; }
