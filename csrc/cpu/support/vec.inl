// One vector of FASTSEQ_VECTOR_BYTES, as the compiler's own vector type, and its maths.
//
// Included once per instruction-set file, inside that file's own anonymous namespace, so that no
// copy compiled for a wide machine can be the one the linker keeps for a narrow one. Arithmetic is
// the language's operators (a * b + c contracts to an FMA where the instruction set has one).

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
template <class T>
FASTSEQ_INLINE Vec<T> load(const T* p, int n) {
  if (__builtin_expect(n >= kLanes<T>, 1)) return load(p);
  Vec<T> v{};
  for (int lane = 0; lane < n; ++lane) v[lane] = p[lane];
  return v;
}
template <class T>
FASTSEQ_INLINE void store(T* p, Vec<T> v, int n) {
  if (__builtin_expect(n >= kLanes<T>, 1)) {
    store(p, v);
    return;
  }
  for (int lane = 0; lane < n; ++lane) p[lane] = v[lane];
}

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
  // e^x is infinite above, and not yet subnormal at, these.
  static constexpr float max = 89.0f, min = -87.0f;
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
  const Vec<T> shifted = x * C::log2e + C::round;
  const Vec<T> n = shifted - C::round;
  Vec<T> r = x - n * C::ln2_hi;
  r = r - n * C::ln2_lo;
  Vec<T> p = broadcast<T>(T(inverse_factorial(C::terms)));
#pragma GCC unroll 16
  for (int k = C::terms - 1; k >= 2; --k) p = p * r + T(inverse_factorial(k));
  p = r * r * p + r;
  const VecI bits = (VecI)shifted - (VecI)broadcast<T>(C::round) + C::bias;
  return {(Vec<T>)(bits << C::mantissa), p};
}

template <class T>
FASTSEQ_INLINE Vec<T> sigmoid_of(Vec<T> x) {
  using C = ExpConstants<T>;
  Vec<T> negated = -x;
  negated = negated > C::max ? broadcast(C::max) : negated;
  negated = negated < C::min ? broadcast(C::min) : negated;
  const Exp<T> e = exp_parts<T>(negated);
  return T(1) / (T(1) + (e.power * e.expm1 + e.power));
}

// By e^2x - 1, which keeps the relative error small near zero.
template <class T>
FASTSEQ_INLINE Vec<T> tanh_of(Vec<T> x) {
  using C = ExpConstants<T>;
  Vec<T> y = x > C::tanh_max ? broadcast(C::tanh_max) : x;
  y = y < -C::tanh_max ? broadcast(-C::tanh_max) : y;
  const Exp<T> e = exp_parts<T>(y + y);
  const Vec<T> expm1 = e.power * e.expm1 + (e.power - T(1));
  return expm1 / (expm1 + T(2));
}

FASTSEQ_INLINE VecF sigmoid(VecF x) { return sigmoid_of<float>(x); }
FASTSEQ_INLINE VecD sigmoid(VecD x) { return sigmoid_of<double>(x); }
FASTSEQ_INLINE VecF tanh(VecF x) { return tanh_of<float>(x); }
FASTSEQ_INLINE VecD tanh(VecD x) { return tanh_of<double>(x); }
