// The functions of cells and scores, for several vectors in step.

// Constants of e^x = 2^n * e^r, |r| <= ln(2)/2. `round` added to and taken from x/ln(2) leaves the
// nearest integer, whose bits then sit at the bottom of the sum. ln2_hi has trailing zeros enough
// for n * ln2_hi to be exact (Cody and Waite 1980).
//
// e^r = 1 + r + r^2 (series[0] + series[1] r + ...).
template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Int = int;
  static constexpr float log2e = 1.44269504088896341f, round = 12582912.0f;
  static constexpr double ln2_hi = 0.693145751953125, ln2_lo = 1.42860682030941723e-6;
  static constexpr int mantissa = 23, bias = 127, terms = 5;
  // The polynomial whose largest relative error of e^r - 1 is least: 1.3e-8 (Remez 1934).
  static constexpr double series[terms] = {0.4999999814962481, 0.16666543424313063,
                                           0.041667200710122934, 0.008366547127439186,
                                           0.0013882516560631468};
  // e^x is nearly infinite above, and not yet subnormal at, these; 2^n is neither.
  static constexpr float max = 88.0f, min = -87.0f;
  // tanh rounds to 1 beyond. Below, n is too small for ln2_lo to change a bit.
  static constexpr float tanh_max = 10.0f;
  static constexpr bool tanh_splits = false;
};
template <>
struct ExpConstants<double> {
  using Int = long long;
  static constexpr double log2e = 1.4426950408889634074, round = 6755399441055744.0;
  static constexpr double ln2_hi = 0.69314718036912381649, ln2_lo = 1.9082149292705877e-10;
  static constexpr int mantissa = 52, bias = 1023, terms = 12;
  // Taylor's: the first term left out is below a quarter of a unit in the last place of e^r - 1.
  static constexpr double series[terms] = {
      1.0 / 2,     1.0 / 6,      1.0 / 24,      1.0 / 120,      1.0 / 720,       1.0 / 5040,
      1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  static constexpr double max = 709.0, min = -708.0;
  static constexpr double tanh_max = 20.0;
  static constexpr bool tanh_splits = true;
};

// N vectors that go through the same maths in step. One alone would leave the units waiting for the
// long chain of its exponential, and a core does not look far enough ahead to begin another's.
template <class T, int N>
struct Several {
  Vec<T> part[N];

  template <class F>
  static FASTSEQ_INLINE Several each(const F& f) {
    Several out;
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) out.part[i] = f(i);
    return out;
  }
  static FASTSEQ_INLINE Several all(double a) {
    return each([&](int) { return broadcast(T(a)); });
  }
  friend FASTSEQ_INLINE Several operator+(const Several& x, const Several& y) {
    return each([&](int i) { return x.part[i] + y.part[i]; });
  }
  friend FASTSEQ_INLINE Several operator-(const Several& x, const Several& y) {
    return each([&](int i) { return x.part[i] - y.part[i]; });
  }
  friend FASTSEQ_INLINE Several operator*(const Several& x, const Several& y) {
    return each([&](int i) { return x.part[i] * y.part[i]; });
  }
  friend FASTSEQ_INLINE Several operator+(const Several& x, T y) {
    return each([&](int i) { return x.part[i] + y; });
  }
  friend FASTSEQ_INLINE Several operator-(const Several& x, T y) {
    return each([&](int i) { return x.part[i] - y; });
  }
  friend FASTSEQ_INLINE Several operator-(const Several& x) {
    return each([&](int i) { return -x.part[i]; });
  }
  friend FASTSEQ_INLINE Several fma(const Several& x, const Several& y, const Several& z) {
    return each([&](int i) { return fma(x.part[i], y.part[i], z.part[i]); });
  }
};
// As many as registers hold, with the sums of their gates; or with all that their gradients need.
constexpr int kTogether = FASTSEQ_VECTOR_BYTES == 64 ? 4 : 2, kTogetherBack = 2;

// e^(Scale x) = power * (1 + Scale * rest), for x clamped by the caller to [min, max] / Scale of
// ExpConstants; NaN passes through `rest`. Scale is -2, -1, 1 or 2.
template <int Scale, bool Split, class T, int N>
FASTSEQ_INLINE void exponential(const Several<T, N>& x, Several<T, N>& power, Several<T, N>& rest) {
  using C = ExpConstants<T>;
  using V = Several<T, N>;
  using VecI = Vec<typename C::Int>;
  const V shifted = fma(x, V::all(Scale * C::log2e), V::all(C::round)), n = shifted - C::round;
  V r = fma(n, V::all(-(Split ? C::ln2_hi : C::ln2_hi + C::ln2_lo) / Scale), x);
  if constexpr (Split) r = fma(n, V::all(-C::ln2_lo / Scale), r);
  double scale = Scale;
#pragma GCC unroll 16
  for (int k = 1; k < C::terms; ++k) scale *= Scale;
  V p = V::all(C::series[C::terms - 1] * scale);
#pragma GCC unroll 16
  for (int k = C::terms - 2; k >= 0; --k) {
    scale /= Scale;
    p = fma(p, r, V::all(C::series[k] * scale));
  }
  rest = fma(r * r, p, r);
  power = V::each([&](int i) {
    return (Vec<T>)(((VecI)shifted.part[i] << C::mantissa) +
                    (typename C::Int(C::bias) << C::mantissa));
  });
}

template <class T, int N>
FASTSEQ_INLINE Several<T, N> sigmoid(const Several<T, N>& x) {
  using C = ExpConstants<T>;
  using V = Several<T, N>;
  V power, rest;
  exponential<-1, true>(V::each([&](int i) { return clamp(x.part[i], -C::max, -C::min); }), power,
                        rest);
  const V d = fma(-rest, power, power + T(1));
  // Zero where it would be subnormal: at -inf it must be, or inf times it were no NaN.
  return V::each([&](int i) { return x.part[i] <= -C::max ? Vec<T>{} : reciprocal(d.part[i]); });
}

// (e^2x - 1) / (e^2x + 1), both halved: by e^2x - 1, which keeps the relative error small near
// zero. What the sum below loses to rounding is made good in the quotient, for 1 - tanh^2 magnifies
// its error.
template <class T, int N>
FASTSEQ_INLINE Several<T, N> tanh(const Several<T, N>& x) {
  using C = ExpConstants<T>;
  using V = Several<T, N>;
  V power, rest;
  exponential<2, C::tanh_splits>(
      V::each([&](int i) { return clamp(x.part[i], -C::tanh_max, C::tanh_max); }), power, rest);
  const V n = fma(power, rest, fma(power, V::all(0.5), V::all(-0.5))), d = n + T(1);
  const V lost = n - (d - T(1)), r = V::each([&](int i) { return near_reciprocal(d.part[i]); });
  const V q = n * r;
  return fma(r, fma(-q, lost, fma(-q, d, n)), q);
}

FASTSEQ_INLINE VecF sigmoid(VecF x) { return sigmoid(Several<float, 1>{x}).part[0]; }
FASTSEQ_INLINE VecD sigmoid(VecD x) { return sigmoid(Several<double, 1>{x}).part[0]; }
FASTSEQ_INLINE VecF tanh(VecF x) { return tanh(Several<float, 1>{x}).part[0]; }
FASTSEQ_INLINE VecD tanh(VecD x) { return tanh(Several<double, 1>{x}).part[0]; }

template <class T>
struct Exp {
  Vec<T> power;  // 2^n
  Vec<T> expm1;  // e^r - 1
};
// x clamped by the caller to [min, max] of ExpConstants; NaN passes through expm1.
template <class T>
FASTSEQ_INLINE Exp<T> exp_parts(Vec<T> x) {
  Several<T, 1> power, rest;
  exponential<1, true>(Several<T, 1>{x}, power, rest);
  return {power.part[0], rest.part[0]};
}

// max(x, 0), NaN staying NaN.
template <class T, int N>
FASTSEQ_INLINE Several<T, N> relu(const Several<T, N>& x) {
  return Several<T, N>::each([&](int i) { return x.part[i] <= Vec<T>{} ? Vec<T>{} : x.part[i]; });
}
// d where x is positive or NaN, else 0: as torch's gradient.
template <class T, int N>
FASTSEQ_INLINE Several<T, N> where_positive(const Several<T, N>& x, const Several<T, N>& d) {
  return Several<T, N>::each([&](int i) { return x.part[i] <= Vec<T>{} ? Vec<T>{} : d.part[i]; });
}
