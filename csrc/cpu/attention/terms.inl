// The terms of additive scores: tanh of a query's element plus a key's, in two ways; and the vector
// functions that attention needs beside the common ones.

// All lanes added up, by halves.
#if defined(FASTSEQ_SHUFFLE)
template <class T, int Half, int... I>
FASTSEQ_INLINE Vec<T> other_half(Vec<T> a, typename Square<T>::template Indices<I...>) {
  return __builtin_shufflevector(a, a, (I ^ Half)...);
}
template <class T, int Half = kLanes<T> / 2>
FASTSEQ_INLINE T sum_of_lanes(Vec<T> a) {
  if constexpr (Half == 0) {
    return a[0];
  } else {
    using All = typename Square<T>::template Upto<kLanes<T>>::type;
    return sum_of_lanes<T, Half / 2>(a + other_half<T, Half>(a, All{}));
  }
}
template <class T, int Half = kLanes<T> / 2>
FASTSEQ_INLINE T largest_lane(Vec<T> a) {
  if constexpr (Half == 0) {
    return a[0];
  } else {
    using All = typename Square<T>::template Upto<kLanes<T>>::type;
    const Vec<T> b = other_half<T, Half>(a, All{});
    return largest_lane<T, Half / 2>(a > b ? a : b);
  }
}
// Of every 2 * Half lanes, the lower or Upper half of a's and then of b's.
template <class T, int Half, bool Upper, int... I>
FASTSEQ_INLINE Vec<T> halves(Vec<T> a, Vec<T> b, typename Square<T>::template Indices<I...>) {
  return __builtin_shufflevector(a, b,
                                 (I / (2 * Half) * 2 * Half + I % Half + (Upper ? Half : 0) +
                                  (I % (2 * Half) < Half ? 0 : kLanes<T>))...);
}
// Lane i: sum_of_lanes(a[i]), to the bit, at a third of the cost.
template <class T, int Half = kLanes<T> / 2>
FASTSEQ_INLINE Vec<T> sums_of_lanes(Vec<T> (&a)[kLanes<T>]) {
  if constexpr (Half == 0) {
    return a[0];
  } else {
    using All = typename Square<T>::template Upto<kLanes<T>>::type;
#pragma GCC unroll 8
    for (int i = 0; i < Half; ++i) {
      a[i] = halves<T, Half, false>(a[i], a[i + Half], All{}) +
             halves<T, Half, true>(a[i], a[i + Half], All{});
    }
    return sums_of_lanes<T, Half / 2>(a);
  }
}
#else
template <class T>
FASTSEQ_INLINE T sum_of_lanes(Vec<T> a) {
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) a[lane] += a[lane + half];
  }
  return a[0];
}
template <class T>
FASTSEQ_INLINE T largest_lane(Vec<T> a) {
  for (int lane = 1; lane < kLanes<T>; ++lane) a[0] = a[lane] > a[0] ? a[lane] : a[0];
  return a[0];
}
template <class T>
FASTSEQ_INLINE Vec<T> sums_of_lanes(Vec<T> (&a)[kLanes<T>]) {
  Vec<T> sums;
  for (int i = 0; i < kLanes<T>; ++i) sums[i] = sum_of_lanes<T>(a[i]);
  return sums;
}
#endif

// The first n lanes, and zeros.
template <class T>
FASTSEQ_INLINE Vec<T> first_lanes(Vec<T> a, int n) {
  Vec<T> index;
  for (int lane = 0; lane < kLanes<T>; ++lane) index[lane] = T(lane);
  return index < broadcast(T(n)) ? a : Vec<T>{};
}

template <class T>
FASTSEQ_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// e^x for x <= 0, zero where it would be subnormal; NaN stays NaN.
template <class T>
FASTSEQ_INLINE Vec<T> exp_below_zero(Vec<T> x) {
  using C = ExpConstants<T>;
  const Exp<T> e = exp_parts<T>(clamp(x, C::min, C::max));
  return x < broadcast(C::min) ? Vec<T>{} : (e.expm1 + T(1)) * e.power;
}

// tanh(q + k), and 1 - tanh^2 of it, from a query's and a key's lanes in a form of their own.
template <class T>
struct DirectTerms {
  static FASTSEQ_INLINE Vec<T> form(Vec<T> x) { return x; }
  static FASTSEQ_INLINE Vec<T> value(Vec<T> q, Vec<T> k) { return tanh(q + k); }
  static FASTSEQ_INLINE void both(Vec<T> q, Vec<T> k, Vec<T>& value, Vec<T>& slope) {
    value = tanh(q + k);
    slope = fma(-value, value, broadcast(T(1)));
  }
};

// By e^2q and e^2k: tanh(q + k) = 1 - 2 / (1 + e^2q e^2k), at a fifth of the cost where many terms
// share the exponentials. The error of a value is about half a unit roundoff of 1, not of the
// value. For |q|, |k| <= kRange, beyond which the product would overflow.
template <class T>
struct ExponentialTerms {
  static constexpr T kRange = sizeof(T) == sizeof(float) ? 20 : 170;

  static FASTSEQ_INLINE Vec<T> form(Vec<T> x) {
    const Exp<T> e = exp_parts<T>(x + x);
    return (e.expm1 + T(1)) * e.power;
  }
  static FASTSEQ_INLINE Vec<T> value(Vec<T> q, Vec<T> k) {
    return fma(broadcast(T(-2)), reciprocal(fma(q, k, broadcast(T(1)))), broadcast(T(1)));
  }
  // 1 - tanh^2 = 4 E / (1 + E)^2, which does not cancel.
  static FASTSEQ_INLINE void both(Vec<T> q, Vec<T> k, Vec<T>& value, Vec<T>& slope) {
    const Vec<T> e = q * k, r = reciprocal(e + T(1)), twice = r + r;
    value = T(1) - twice;
    slope = e * twice * twice;
  }
};

// Whether |x + extra| <= ExponentialTerms' range throughout, or is NaN.
template <class T>
bool within_range(const T* x, int64_t stride, const T* extra, int64_t extra_stride, int64_t rows,
                  int64_t K) {
  Vec<T> most{};
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < K; k += kLanes<T>) {
      const int lanes = int(min64(kLanes<T>, K - k));
      Vec<T> sum = load(x + i * stride + k, lanes);
      if (extra) sum += load(extra + i * extra_stride + k, lanes);
      most = larger<T>(larger<T>(sum, -sum), most);
    }
  }
  bool within = true;
  for (int lane = 0; lane < kLanes<T>; ++lane) within &= most[lane] <= ExponentialTerms<T>::kRange;
  return within;
}

// out[k] = e^(2 (x[k] + extra[k])), the form ExponentialTerms wants; extra may be null.
template <class T>
void exponentials(const T* x, const T* extra, int64_t K, T* out) {
  for (int64_t k = 0; k < K; k += kLanes<T>) {
    const int lanes = int(min64(kLanes<T>, K - k));
    Vec<T> sum = load(x + k, lanes);
    if (extra) sum += load(extra + k, lanes);
    store(out + k, ExponentialTerms<T>::form(sum), lanes);
  }
}
