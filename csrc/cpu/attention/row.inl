// Attention of one query over one source: scores, softmax, context, and their gradients; and the
// gradients of one source under many queries. S positions, K width of the score, C of the values.
//
// Rows of keys, extra and values lie `stride` elements apart, contiguous inside; extra, masks and
// cotangents may be null where said. Outputs alias no input. Nothing here starts a thread, and no
// result depends on another row.

#include "terms.inl"

// Bytes of rows that others pass over in turn: a third of a first-level cache.
constexpr int64_t kNearBytes = 16 << 10;

template <class T, bool Extra>
FASTSEQ_INLINE Vec<T> additive_key(const T* key, const T* extra, int64_t k, int lanes) {
  return Extra ? load(key + k, lanes) + load(extra + k, lanes) : load(key + k, lanes);
}

template <class Terms, bool Extra, class T>
FASTSEQ_INLINE T additive_score(const T* q, const T* key, const T* extra, int64_t K, const T* v) {
  constexpr int N = kLanes<T>;
  Vec<T> total{};
  for (int64_t k0 = 0; k0 < K; k0 += 2 * N * kChain) {
    const int64_t end = min64(k0 + 2 * N * kChain, K);
    Several<T, 2> sum{};
    int64_t k = k0;
    for (; k + 2 * N <= end; k += 2 * N) {
      const int64_t next = k + N;
      const Vec<T> t = Terms::value(load(q + k), additive_key<T, Extra>(key, extra, k, N));
      const Vec<T> u = Terms::value(load(q + next), additive_key<T, Extra>(key, extra, next, N));
      sum = fma(Several<T, 2>{load(v + k), load(v + next)}, Several<T, 2>{t, u}, sum);
    }
    for (; k < end; k += N) {
      const int lanes = int(min64(N, end - k));
      const Vec<T> t =
          Terms::value(load(q + k, lanes), additive_key<T, Extra>(key, extra, k, lanes));
      sum.part[0] = fma(load(v + k, lanes), t, sum.part[0]);
    }
    total += sum.part[0] + sum.part[1];
  }
  return sum_of_lanes<T>(total);
}

// e[s] = scale * sum over k of v[k] tanh(q[k] + keys[s][k] + extra[s][k]); extra may be null.
// Positions that `mask` (null: all) does not attend to are skipped: e is 0 there. With
// ExponentialTerms for Terms, q and keys are exponentials(), and extra is in them.
template <class Terms, class T>
void additive_scores_by(const T* q, const T* keys, int64_t key_stride, const T* extra,
                        int64_t extra_stride, int64_t S, int64_t K, const T* v, T scale, T* e,
                        const uint8_t* mask) {
  for (int64_t s = 0; s < S; ++s) {
    const T* key = keys + s * key_stride;
    if (mask && !mask[s]) {
      e[s] = 0;
    } else if (extra) {
      e[s] = scale * additive_score<Terms, true>(q, key, extra + s * extra_stride, K, v);
    } else {
      e[s] = scale * additive_score<Terms, false>(q, key, extra, K, v);
    }
  }
}

template <class T>
void additive_scores(const T* q, const T* keys, int64_t key_stride, const T* extra,
                     int64_t extra_stride, int64_t S, int64_t K, const T* v, T scale, T* e,
                     const uint8_t* mask = nullptr) {
  additive_scores_by<DirectTerms<T>>(q, keys, key_stride, extra, extra_stride, S, K, v, scale, e,
                                     mask);
}

// Queries rows of q against Rows rows of keys.
template <class T, int Queries, int Rows>
FASTSEQ_INLINE void dot_tile(const T* q, int64_t q_stride, const T* keys, int64_t key_stride,
                             int64_t K, T scale, T* e, int64_t e_stride) {
  constexpr int N = kLanes<T>;
  Vec<T> total[Queries][Rows] = {};
  for (int64_t k0 = 0; k0 < K; k0 += N * kChain) {
    const int64_t end = min64(k0 + N * kChain, K);
    Vec<T> sum[Queries][Rows] = {};
    const auto step = [&](int64_t k, int lanes) __attribute__((always_inline)) {
      Vec<T> key[Rows];
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) key[r] = load(keys + r * key_stride + k, lanes);
#pragma GCC unroll 4
      for (int i = 0; i < Queries; ++i) {
        const Vec<T> x = load(q + i * q_stride + k, lanes);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) sum[i][r] = fma(x, key[r], sum[i][r]);
      }
    };
    int64_t k = k0;
    for (; k + N <= end; k += N) step(k, N);
    if (k < end) step(k, int(end - k));
#pragma GCC unroll 4
    for (int i = 0; i < Queries; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) total[i][r] += sum[i][r];
    }
  }
  if constexpr (Queries * Rows % N == 0) {
    alignas(64) T sums[Queries * Rows];
#pragma GCC unroll 8
    for (int first = 0; first < Queries * Rows; first += N) {
      Vec<T> together[N];
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) together[i] = total[(first + i) / Rows][(first + i) % Rows];
      store(sums + first, scale * sums_of_lanes<T>(together));
    }
    for (int i = 0; i < Queries; ++i) {
      __builtin_memcpy(e + i * e_stride, sums + i * Rows, Rows * sizeof(T));
    }
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < Queries; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) e[i * e_stride + r] = scale * sum_of_lanes<T>(total[i][r]);
    }
  }
}

// e[i][s] = scale * sum over k of q[i][k] keys[s][k], for Q queries of one source.
template <class T>
void dot_products(const T* q, int64_t q_stride, int64_t Q, const T* keys, int64_t key_stride,
                  int64_t S, int64_t K, T scale, T* e, int64_t e_stride) {
  // The sums, and a row of operands, fill the registers.
  constexpr int kQueries = FASTSEQ_VECTOR_BYTES == 64 ? 4 : 2, kRowsOfKeys = 4;
  // Queries that stay in the first-level cache while the keys pass.
  const int64_t together =
      max64(1, kNearBytes / int64_t(sizeof(T)) / kQueries / max64(1, K)) * kQueries;
  for (int64_t q0 = 0; q0 < Q; q0 += together) {
    const int64_t q1 = min64(q0 + together, Q);
    for (int64_t s = 0; s < S; s += kRowsOfKeys) {
      const T* key = keys + s * key_stride;
      const int64_t rows = min64(kRowsOfKeys, S - s);
      int64_t i = q0;
      for (; i + kQueries <= q1 && rows == kRowsOfKeys; i += kQueries) {
        dot_tile<T, kQueries, kRowsOfKeys>(q + i * q_stride, q_stride, key, key_stride, K, scale,
                                           e + i * e_stride + s, e_stride);
      }
      for (; i < q1; ++i) {
        const T* x = q + i * q_stride;
        T* to = e + i * e_stride + s;
        if (rows == kRowsOfKeys) {
          dot_tile<T, 1, kRowsOfKeys>(x, 0, key, key_stride, K, scale, to, 0);
          continue;
        }
        for (int64_t r = 0; r < rows; ++r) {
          dot_tile<T, 1, 1>(x, 0, key + r * key_stride, 0, K, scale, to + r, 0);
        }
      }
    }
  }
}

// The same of one query.
template <class T>
void dot_scores(const T* q, const T* keys, int64_t key_stride, int64_t S, int64_t K, T scale,
                T* e) {
  dot_products(q, 0, 1, keys, key_stride, S, K, scale, e, 0);
}

// Scores to weights, in place. Zero where `mask` (null: all) does not attend, whatever e holds
// there; all zero where it attends to nothing.
template <class T>
void masked_softmax(T* e, const uint8_t* mask, int64_t S) {
  constexpr int N = kLanes<T>;
  constexpr T kLowest = -__builtin_huge_val();
  if (mask) {
    for (int64_t s = 0; s < S; ++s) e[s] = mask[s] ? e[s] : kLowest;
  }
  T largest = kLowest;
  int64_t s = 0;
  if (S >= N) {
    // The last vector overlaps the one before.
    Vec<T> most = larger<T>(load(e + S - N), broadcast(kLowest));
    for (; s + N <= S; s += N) most = larger<T>(load(e + s), most);
    largest = largest_lane<T>(most);
    s = S;
  }
  for (; s < S; ++s) largest = e[s] > largest ? e[s] : largest;
  if (mask && largest == kLowest) {
    for (s = 0; s < S; ++s) e[s] = 0;
    return;
  }
  Vec<T> sum{};
  for (s = 0; s < S; s += N) {
    const int lanes = int(min64(N, S - s));
    const Vec<T> power = exp_below_zero<T>(load(e + s, lanes) - largest);
    store(e + s, power, lanes);
    sum += lanes < N ? first_lanes<T>(power, lanes) : power;
  }
  const Vec<T> divisor = broadcast(sum_of_lanes<T>(sum));
  for (s = 0; s < S; s += N) {
    const int lanes = int(min64(N, S - s));
    store(e + s, load(e + s, lanes) / divisor, lanes);
  }
  // A NaN among the scores is everywhere now.
  if (mask && divisor[0] != divisor[0]) {
    for (s = 0; s < S; ++s) e[s] = mask[s] ? e[s] : T(0);
  }
}

// Vectors vectors of columns, `lanes` of the last.
template <class T, int Vectors>
FASTSEQ_INLINE void weighted_columns(const T* p, const T* values, int64_t stride, int64_t S,
                                     int lanes, T* context) {
  constexpr int N = kLanes<T>;
  Vec<T> total[Vectors] = {};
  for (int64_t s0 = 0; s0 < S; s0 += kChain) {
    const int64_t end = min64(s0 + kChain, S);
    Vec<T> sum[Vectors] = {};
    for (int64_t s = s0; s < end; ++s) {
      if (p[s] == T(0)) continue;
      const Vec<T> weight = broadcast(p[s]);
      const T* row = values + s * stride;
#pragma GCC unroll 8
      for (int i = 0; i < Vectors - 1; ++i) sum[i] = fma(weight, load(row + i * N), sum[i]);
      const int last = Vectors - 1;
      sum[last] = fma(weight, load(row + last * N, lanes), sum[last]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) total[i] += sum[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < Vectors - 1; ++i) store(context + i * N, total[i]);
  store(context + (Vectors - 1) * N, total[Vectors - 1], lanes);
}

// context[c] = sum over s of p[s] values[s][c]; rows of no weight are not read. With d_e for p and
// keys for values, the gradient of a dot score's query.
template <class T>
void weighted_sum(const T* p, const T* values, int64_t stride, int64_t S, int64_t C, T* context) {
  constexpr int64_t N = kLanes<T>, kVectors = 8;
  for (int64_t c = 0; c < C; c += kVectors * N) {
    const int64_t columns = min64(kVectors * N, C - c);
    const int64_t vectors = ceil_div(columns, N);
    with_const<int(kVectors)>(int(vectors), [&](auto count) {
      const int lanes = int(columns - (vectors - 1) * N);
      weighted_columns<T, decltype(count)::value>(p, values + c, stride, S, lanes, context + c);
    });
  }
}

// d_e[s], holding the gradient of the weights p [S] through the context, to the gradient of the
// scores before `scale`; d_weights [S], what else there is of the weights' gradient, may be null.
// Zero wherever p is. The mean is taken off twice: the result sums to zero over s, and what a first
// mean has lost of that is common to all positions, where a key's bias finds nothing else.
template <class T>
void softmax_gradient(const T* p, const T* d_weights, int64_t S, T scale, T* d_e) {
  constexpr int N = kLanes<T>;
  T mean = 0;
  for (int pass = 0; pass < 2; ++pass) {
    Vec<T> total{};
    for (int64_t s0 = 0; s0 < S; s0 += N * kChain) {
      Vec<T> sum{};
      for (int64_t s = s0; s < min64(s0 + N * kChain, S); s += N) {
        const int lanes = int(min64(N, S - s));
        Vec<T> d_p = load(d_e + s, lanes);
        if (pass) {
          d_p -= mean;
        } else if (d_weights) {
          d_p += load(d_weights + s, lanes);
        }
        store(d_e + s, d_p, lanes);
        sum = fma(load(p + s, lanes), d_p, sum);
      }
      total += sum;
    }
    mean = sum_of_lanes<T>(total);
  }
  for (int64_t s = 0; s < S; s += N) {
    const int lanes = int(min64(N, S - s));
    store(d_e + s, (load(d_e + s, lanes) - mean) * load(p + s, lanes) * scale, lanes);
  }
}

// d_e[s], the gradient of the scores before `scale`, from those of the context [C] and of the
// weights p [S], one of which may be null.
template <class T>
void score_gradients(const T* p, const T* d_context, const T* d_weights, const T* values,
                     int64_t stride, int64_t S, int64_t C, T scale, T* d_e) {
  if (d_context) {
    dot_scores(d_context, values, stride, S, C, T(1), d_e);
  } else {
    for (int64_t s = 0; s < S; ++s) d_e[s] = 0;
  }
  softmax_gradient(p, d_weights, S, scale, d_e);
}

template <class Terms, bool Extra, class T>
FASTSEQ_INLINE void additive_query_lanes(const T* q, const T* keys, int64_t key_stride,
                                         const T* extra, int64_t extra_stride, int64_t S,
                                         const T* v, const T* d_e, int64_t k, int lanes, T* d_q) {
  const Vec<T> x = load(q + k, lanes);
  Vec<T> total{};
  for (int64_t s0 = 0; s0 < S; s0 += kChain) {
    Vec<T> sum{};
    for (int64_t s = s0; s < min64(s0 + kChain, S); ++s) {
      if (d_e[s] == T(0)) continue;
      const T* more = Extra ? extra + s * extra_stride : extra;
      Vec<T> t, slope;
      Terms::both(x, additive_key<T, Extra>(keys + s * key_stride, more, k, lanes), t, slope);
      sum = fma(broadcast(d_e[s]), slope, sum);
    }
    total += sum;
  }
  store(d_q + k, load(v + k, lanes) * total, lanes);
}

// d_q[k] = v[k] * sum over s of d_e[s] (1 - tanh^2), the tanh made anew. As in additive_scores_by,
// q and keys are in the form of the terms.
template <class Terms, class T>
void additive_query_gradient_by(const T* q, const T* keys, int64_t key_stride, const T* extra,
                                int64_t extra_stride, int64_t S, int64_t K, const T* v,
                                const T* d_e, T* d_q) {
  constexpr int N = kLanes<T>;
  for (int64_t k = 0; k < K; k += N) {
    const int lanes = int(min64(N, K - k));
    if (extra) {
      additive_query_lanes<Terms, true>(q, keys, key_stride, extra, extra_stride, S, v, d_e, k,
                                        lanes, d_q);
    } else {
      additive_query_lanes<Terms, false>(q, keys, key_stride, extra, extra_stride, S, v, d_e, k,
                                         lanes, d_q);
    }
  }
}

template <class T>
void additive_query_gradient(const T* q, const T* keys, int64_t key_stride, const T* extra,
                             int64_t extra_stride, int64_t S, int64_t K, const T* v, const T* d_e,
                             T* d_q) {
  additive_query_gradient_by<DirectTerms<T>>(q, keys, key_stride, extra, extra_stride, S, K, v, d_e,
                                             d_q);
}

// Queries of one source and what is known of their scores.
template <class T>
struct ScoredQueries {
  int64_t Q;
  const T* q;  // [Q][K], in the form of the terms
  int64_t q_stride;
  const T* d_e;  // [Q][S], as score_gradients makes it
  int64_t d_e_stride;
  T* d_q;  // [Q][K], added to; or null
  int64_t d_q_stride;
};

// As many positions as registers hold beside the constants of the tanh: each holds its key and the
// key's gradient while the queries pass.
constexpr int kPositions = FASTSEQ_VECTOR_BYTES == 64 ? 4 : 2;

template <class Terms, int Positions, class T>
FASTSEQ_INLINE void additive_source_lanes(const ScoredQueries<T>& a, const Vec<T> (&key)[Positions],
                                          int64_t s, int64_t k, int lanes, const T* v, T* d_keys,
                                          int64_t d_key_stride, T* d_v) {
  Vec<T> d_key[Positions] = {}, d_v_total{};
  const Vec<T> weight = load(v + k, lanes);
  for (int64_t q0 = 0; q0 < a.Q; q0 += kChain) {
    Vec<T> sum[Positions] = {}, d_v_sum{};
    for (int64_t i = q0; i < min64(q0 + kChain, a.Q); ++i) {
      const T* d_e = a.d_e + i * a.d_e_stride + s;
      bool any = false;
#pragma GCC unroll 4
      for (int r = 0; r < Positions; ++r) any |= d_e[r] != T(0);
      if (!any) continue;
      const Vec<T> q = load(a.q + i * a.q_stride + k, lanes);
      Vec<T> d_query{};
#pragma GCC unroll 4
      for (int r = 0; r < Positions; ++r) {
        Vec<T> t, slope;
        Terms::both(q, key[r], t, slope);
        const Vec<T> d = broadcast(d_e[r]), d_term = d * slope;
        sum[r] += d_term;
        d_query += d_term;
        d_v_sum = fma(d, t, d_v_sum);
      }
      if (a.d_q) {
        T* d_q = a.d_q + i * a.d_q_stride + k;
        store(d_q, fma(weight, d_query, load(d_q, lanes)), lanes);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Positions; ++r) d_key[r] += sum[r];
    d_v_total += d_v_sum;
  }
#pragma GCC unroll 4
  for (int r = 0; r < Positions; ++r) {
    store(d_keys + (s + r) * d_key_stride + k, weight * d_key[r], lanes);
  }
  store(d_v + k, load(d_v + k, lanes) + d_v_total, lanes);
}

// The gradients of one source's keys [S][K] (and extra: the same), written, and of v [K], added to,
// under all of its queries; where a.d_q is given, those of the queries too, added to. d_v and d_q
// are sums over ceil(S / kPositions) parts in a row: a long source is better given in pieces with
// gradients of their own.
template <class Terms, class T>
void additive_source_gradients_by(const ScoredQueries<T>& a, const T* keys, int64_t key_stride,
                                  const T* extra, int64_t extra_stride, int64_t S, int64_t K,
                                  const T* v, T* d_keys, int64_t d_key_stride, T* d_v) {
  constexpr int N = kLanes<T>;
  for (int64_t s = 0; s < S; s += kPositions) {
    with_const<kPositions>(int(min64(kPositions, S - s)), [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      for (int64_t k = 0; k < K; k += N) {
        const int lanes = int(min64(N, K - k));
        Vec<T> key[kCount];
#pragma GCC unroll 4
        for (int r = 0; r < kCount; ++r) {
          key[r] = load(keys + (s + r) * key_stride + k, lanes);
          if (extra) key[r] += load(extra + (s + r) * extra_stride + k, lanes);
          key[r] = Terms::form(key[r]);
        }
        additive_source_lanes<Terms, kCount>(a, key, s, k, lanes, v, d_keys, d_key_stride, d_v);
      }
    });
  }
}

template <class T>
void additive_source_gradients(const ScoredQueries<T>& a, const T* keys, int64_t key_stride,
                               const T* extra, int64_t extra_stride, int64_t S, int64_t K,
                               const T* v, T* d_keys, int64_t d_key_stride, T* d_v) {
  additive_source_gradients_by<DirectTerms<T>>(a, keys, key_stride, extra, extra_stride, S, K, v,
                                               d_keys, d_key_stride, d_v);
}
