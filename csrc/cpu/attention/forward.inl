// Forward: a task is some queries of one source. Its results depend on nothing else, so that every
// split of the work gives the same bits.

// Below so many queries of a source, a product packs more than it computes.
constexpr int64_t kFewQueries = 4;
// A tanh costs about as much as so many multiply-adds.
constexpr int64_t kTanhCost = 16;
// Tasks for each thread, for those whose sources are short to take more of them.
constexpr int64_t kTasksPerThread = 4;

// These threads, or this one alone where there is too little to do.
template <class T>
Threads threads_for(const AttentionInputs<T>& a, const Threads& threads) {
  const int64_t work = a.B * a.Q * a.S * (a.K * (a.additive ? kTanhCost : 1) + a.C);
  return {int(max64(1, min64(threads.count, work / kWorthATask))), threads.parallel_for};
}

template <class T>
int64_t source_length(const AttentionInputs<T>& a, int64_t b) {
  return a.lengths ? max64(0, min64(a.lengths[b], a.S)) : a.S;
}

// Parts that each row's queries are cut into.
template <class T>
int64_t query_parts(const AttentionInputs<T>& a, const Threads& threads) {
  if (threads.count == 1) return 1;
  const int64_t wanted = ceil_div(kTasksPerThread * threads.count, max64(1, a.B));
  return max64(1, min64(wanted, a.Q / kFewQueries));
}

// C = A B on this thread: A [M, K] by rows or, with `by_columns`, by columns `stride` apart.
template <class T>
void product(int64_t M, int64_t N, int64_t K, const T* a, int64_t stride, bool by_columns,
             const T* b, int64_t ldb, T* c, int64_t ldc) {
  Gemm<T> g{};
  g.M = M, g.N = N, g.K = K;
  g.a = a, g.a_m = by_columns ? 1 : stride, g.a_k = by_columns ? stride : 1;
  g.b = b, g.ldb = ldb;
  g.c = c, g.ldc = ldc;
  gemm(g, Threads{1, nullptr});
}

// Whether row b's terms come from exponentials: where many queries share them, they are in range,
// and an error of half a unit roundoff in each moves no score by more than a few, which is what
// rounding moves the weights by. Not a matter of which queries are asked about.
template <class T>
bool uses_exponentials(const AttentionInputs<T>& a, int64_t b, int64_t S) {
  constexpr T kLargestGain = 4;
  if (!a.additive || a.Q < kFewQueries) return false;
  T square = 0;
  for (int64_t k = 0; k < a.K; ++k) square += a.v[k] * a.v[k];
  return square * a.scale * a.scale <= kLargestGain * kLargestGain &&
         within_range<T>(a.query.at(b, 0), a.query.row, nullptr, 0, a.Q, a.K) &&
         within_range<T>(a.keys.at(b, 0), a.keys.row, a.extra.base ? a.extra.at(b, 0) : nullptr,
                         a.extra.row, S, a.K);
}

// Scores of the queries [q0, q1) of row b, to e [.., a.S].
template <class T>
void forward_scores(const AttentionForward<T>& a, int64_t b, int64_t q0, int64_t q1, int64_t S,
                    T* e) {
  const T* keys = a.keys.at(b, 0);
  if (!a.additive) {
    dot_products(a.query.at(b, q0), a.query.row, q1 - q0, keys, a.keys.row, S, a.K, a.scale, e,
                 a.S);
    return;
  }
  const int64_t rows = max64(1, kNearBytes / int64_t(sizeof(T)) / max64(1, a.K));
  const bool by_exponentials = uses_exponentials(a, b, S);
  const int64_t form = by_exponentials ? a.K : 0;
  Scratch scratch(Scratch::padded(size_t((q1 - q0) * form) * sizeof(T)) +
                  Scratch::padded(size_t(rows * form) * sizeof(T)));
  T* q_form = scratch.take<T>(size_t((q1 - q0) * form));
  T* key_form = scratch.take<T>(size_t(rows * form));
  for (int64_t q = q0; q < q1 && by_exponentials; ++q) {
    exponentials<T>(a.query.at(b, q), nullptr, a.K, q_form + (q - q0) * a.K);
  }
  for (int64_t s = 0; s < S; s += rows) {
    const int64_t some = min64(rows, S - s);
    const T* extra = a.extra.base ? a.extra.at(b, s) : nullptr;
    for (int64_t i = 0; i < some && by_exponentials; ++i) {
      exponentials(keys + (s + i) * a.keys.row, extra ? extra + i * a.extra.row : extra, a.K,
                   key_form + i * a.K);
    }
    for (int64_t q = q0; q < q1; ++q) {
      const uint8_t* mask = a.mask.base ? a.mask.at(b, q) + s : nullptr;
      T* to = e + (q - q0) * a.S + s;
      if (by_exponentials) {
        additive_scores_by<ExponentialTerms<T>>(q_form + (q - q0) * a.K, key_form, a.K,
                                                static_cast<const T*>(nullptr), 0, some, a.K, a.v,
                                                a.scale, to, mask);
      } else {
        additive_scores(a.query.at(b, q), keys + s * a.keys.row, a.keys.row, extra, a.extra.row,
                        some, a.K, a.v, a.scale, to, mask);
      }
    }
  }
}

template <class T>
void forward_queries(const AttentionForward<T>& a, int64_t b, int64_t q0, int64_t q1) {
  const int64_t S = source_length(a, b);
  T* weights = a.weights + (b * a.Q + q0) * a.S;
  T* context = a.context + (b * a.Q + q0) * a.C;
  forward_scores(a, b, q0, q1, S, weights);
  for (int64_t q = q0; q < q1; ++q) {
    T* e = weights + (q - q0) * a.S;
    masked_softmax(e, a.mask.base ? a.mask.at(b, q) : nullptr, S);
    for (int64_t s = S; s < a.S; ++s) e[s] = 0;
  }
  if (a.Q >= kFewQueries) {
    product(q1 - q0, a.C, S, weights, a.S, false, a.values.at(b, 0), a.values.row, context, a.C);
    return;
  }
  for (int64_t i = 0; i < q1 - q0; ++i) {
    weighted_sum(weights + i * a.S, a.values.at(b, 0), a.values.row, S, a.C, context + i * a.C);
  }
}

template <class T>
void attention_forward(const AttentionForward<T>& a, const Threads& all_threads) {
  const Threads threads = threads_for(a, all_threads);
  const int64_t parts = query_parts(a, threads), some = ceil_div(a.Q, parts);
  run_queue(threads, a.B * parts, [&](int64_t task, int64_t) {
    const int64_t b = task / parts, q0 = min64(task % parts * some, a.Q);
    forward_queries(a, b, q0, min64(q0 + some, a.Q));
  });
}
