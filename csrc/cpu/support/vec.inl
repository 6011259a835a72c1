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

// Constants of e^x = 2^n * e^r, |r| <= ln(2)/2. `round` added to and taken from x/ln(2) leaves the
// nearest integer, whose bits then sit at the bottom of the sum. ln2_hi has trailing zeros enough
// for n * ln2_hi to be exact (Cody and Waite 1980).
template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Int = int;
  static constexpr float log2e = 1.44269504088896341f, round = 12582912.0f;
  static constexpr float ln2_hi = 0.693145751953125f, ln2_lo = 1.42860682030941723e-6f;
  static constexpr int mantissa = 23, bias = 127, terms = 7;
  // e^x is nearly infinite above, and not yet subnormal at, these.
  static constexpr float max = 88.0f, min = -87.0f;
  // tanh rounds to 1 beyond.
  static constexpr float tanh_max = 10.0f;
};
template <>
struct ExpConstants<double> {
  using Int = long long;
  static constexpr double log2e = 1.4426950408889634074, round = 6755399441055744.0;
  static constexpr double ln2_hi = 0.69314718036912381649, ln2_lo = 1.9082149292705877e-10;
  static constexpr int mantissa = 52, bias = 1023, terms = 13;
  static constexpr double max = 710.0, min = -708.0;
  static constexpr double tanh_max = 20.0;
};

// 1/n!: the Taylor coefficients of e^r. At |r| <= ln(2)/2 the first term left out is below a
// quarter of a unit in the last place of e^r - 1 (terms = 7 for float, 13 for double).
constexpr double inverse_factorial(int n) {
  double f = 1;
  for (int i = 2; i <= n; ++i) f *= i;
  return 1 / f;
}

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

template <class T>
struct Exp {
  Vec<T> power;  // 2^n
  Vec<T> expm1;  // e^r - 1
};

// x clamped by the caller to [min, max] of ExpConstants; NaN passes through expm1.
template <class T>
FASTSEQ_INLINE Exp<T> exp_parts(Vec<T> x) {
  using C = ExpConstants<T>;
  using VecI = Vec<typename C::Int>;
  const Vec<T> shifted = fma(x, broadcast(C::log2e), broadcast(C::round));
  const Vec<T> n = shifted - C::round;
  Vec<T> r = fma(n, broadcast(-C::ln2_hi), x);
  r = fma(n, broadcast(-C::ln2_lo), r);
  Vec<T> p = broadcast<T>(T(inverse_factorial(C::terms)));
#pragma GCC unroll 16
  for (int k = C::terms - 1; k >= 2; --k) p = fma(p, r, broadcast(T(inverse_factorial(k))));
  p = fma(r * r, p, r);
  const VecI bits = (VecI)shifted - (VecI)broadcast<T>(C::round) + C::bias;
  return {(Vec<T>)(bits << C::mantissa), p};
}

// 1 / d for finite, normal d.
#if FASTSEQ_VECTOR_BYTES == 64
// An estimate of 14 bits and one step of Newton's, at a third of a division's cost.
FASTSEQ_INLINE VecF reciprocal(VecF d) {
  const VecF r = _mm512_rcp14_ps(d);
  return fma(r, _mm512_fnmadd_ps(d, r, broadcast(1.0f)), r);
}
#else
FASTSEQ_INLINE VecF reciprocal(VecF d) { return 1.0f / d; }
#endif
FASTSEQ_INLINE VecD reciprocal(VecD d) { return 1.0 / d; }

template <class T>
FASTSEQ_INLINE Vec<T> sigmoid_of(Vec<T> x) {
  using C = ExpConstants<T>;
  const Exp<T> e = exp_parts<T>(clamp(-x, C::min, C::max));
  // (e^r - 1 + 1) 2^n and not e^r - 1 times 2^n, plus 2^n: where 2^n is infinite, so is the former.
  // Zero where it would be subnormal: at -inf it must be, or inf times it were no NaN.
  return x <= -C::max ? Vec<T>{} : reciprocal(T(1) + (e.expm1 + T(1)) * e.power);
}

// By e^2x - 1, which keeps the relative error small near zero, over the same plus 2; what the sum
// loses to rounding is made good in the quotient, for 1 - tanh^2 magnifies its error.
template <class T>
FASTSEQ_INLINE Vec<T> tanh_of(Vec<T> x) {
  using C = ExpConstants<T>;
  const Vec<T> y = clamp(x, -C::tanh_max, C::tanh_max);
  const Exp<T> e = exp_parts<T>(y + y);
  const Vec<T> n = fma(e.power, e.expm1, e.power - T(1)), d = n + T(2);
  const Vec<T> lost = n - (d - T(2)), r = reciprocal(d), q = n * r;
  return fma(r, fma(-q, lost, fma(-q, d, n)), q);
}

FASTSEQ_INLINE VecF sigmoid(VecF x) { return sigmoid_of<float>(x); }
FASTSEQ_INLINE VecD sigmoid(VecD x) { return sigmoid_of<double>(x); }
FASTSEQ_INLINE VecF tanh(VecF x) { return tanh_of<float>(x); }
FASTSEQ_INLINE VecD tanh(VecD x) { return tanh_of<double>(x); }

// max(x, 0), NaN staying NaN.
template <class V>
FASTSEQ_INLINE V relu(V x) {
  return x <= V{} ? V{} : x;
}
// d where x > 0, else 0.
template <class V>
FASTSEQ_INLINE V where_positive(V x, V d) {
  return x > V{} ? d : V{};
}

// Two vectors that go through the same maths side by side: one alone leaves the units waiting for
// the long chain of its exponential.
template <class T>
struct Two {
  Vec<T> a, b;
  friend FASTSEQ_INLINE Two operator+(Two x, Two y) { return {x.a + y.a, x.b + y.b}; }
  friend FASTSEQ_INLINE Two operator-(Two x, Two y) { return {x.a - y.a, x.b - y.b}; }
  friend FASTSEQ_INLINE Two operator*(Two x, Two y) { return {x.a * y.a, x.b * y.b}; }
  friend FASTSEQ_INLINE Two operator+(Two x, T y) { return {x.a + y, x.b + y}; }
};
template <class T>
FASTSEQ_INLINE Two<T> fma(Two<T> x, Two<T> y, Two<T> z) {
  return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)};
}
template <class T>
FASTSEQ_INLINE Two<T> sigmoid(Two<T> x) {
  return {sigmoid(x.a), sigmoid(x.b)};
}
template <class T>
FASTSEQ_INLINE Two<T> tanh(Two<T> x) {
  return {tanh(x.a), tanh(x.b)};
}
template <class T>
FASTSEQ_INLINE Two<T> relu(Two<T> x) {
  return {relu(x.a), relu(x.b)};
}
template <class T>
FASTSEQ_INLINE Two<T> where_positive(Two<T> x, Two<T> d) {
  return {where_positive(x.a, d.a), where_positive(x.b, d.b)};
}
