// Backward, in three stages: gradients of the scores by query; those of keys, values and v, and of
// additive queries, by piece of a source; sums over the pieces. How a source is cut depends on
// sizes alone, so that sums have the same bits for any number of threads.

// Positions a piece at most (a sum over more would lose digits), and at least where pieces are for
// the threads' sake; and how many of them a call should have for those.
constexpr int64_t kLongestPiece = 512, kShortestPiece = 16, kWantedPieces = 32;

template <class T>
struct BackwardPlan {
  int64_t pieces, positions;  // of a source
  T* d_e;                     // [B, Q, S]
  T* d_query;                 // [B, pieces, Q, K], the result itself where there is one piece
  T* d_v;                     // [B, pieces, K]

  template <class Memory>
  BackwardPlan(const AttentionBackward<T>& a, Memory& memory) {
    const int64_t wanted = min64(ceil_div(kWantedPieces, max64(1, a.B)), a.S / kShortestPiece);
    positions = ceil_div(a.S, max64(1, max64(wanted, ceil_div(a.S, kLongestPiece))));
    pieces = positions ? ceil_div(a.S, positions) : 1;
    const bool additive = a.need_scores && a.additive;
    d_e = memory.template take<T>(size_t(a.need_scores ? a.B * a.Q * a.S : 0));
    d_v = memory.template take<T>(size_t(additive ? a.B * pieces * a.K : 0));
    d_query = additive && pieces > 1 ? memory.template take<T>(size_t(a.B * pieces * a.Q * a.K))
                                     : a.d_query;
  }
};

// Stage one: d_e of the queries [q0, q1) of row b, and their gradients under the dot score.
template <class T>
void backward_queries(const AttentionBackward<T>& a, const BackwardPlan<T>& plan, int64_t b,
                      int64_t q0, int64_t q1) {
  if (!a.need_scores) return;
  const int64_t S = source_length(a, b), Q = q1 - q0;
  T* d_e = plan.d_e + (b * a.Q + q0) * a.S;
  if (a.d_context.base) {
    dot_products(a.d_context.at(b, q0), a.d_context.row, Q, a.values.at(b, 0), a.values.row, S, a.C,
                 T(1), d_e, a.S);
  } else {
    for (int64_t i = 0; i < Q * a.S; ++i) d_e[i] = 0;
  }
  for (int64_t i = 0; i < Q; ++i) {
    const T* d_weights = a.d_weights.base ? a.d_weights.at(b, q0 + i) : nullptr;
    softmax_gradient(a.weights + (b * a.Q + q0 + i) * a.S, d_weights, S, a.scale, d_e + i * a.S);
  }
  if (a.additive) return;
  T* d_query = a.d_query + (b * a.Q + q0) * a.K;
  if (a.Q >= kFewQueries) {
    product(Q, a.K, S, d_e, a.S, false, a.keys.at(b, 0), a.keys.row, d_query, a.K);
    return;
  }
  for (int64_t i = 0; i < Q; ++i) {
    weighted_sum(d_e + i * a.S, a.keys.at(b, 0), a.keys.row, S, a.K, d_query + i * a.K);
  }
}

// out[s] = sum over i of p[i][s] rows[i], [S, N]; rows of p are p_stride apart.
template <class T>
void sum_over_queries(const T* p, int64_t p_stride, int64_t Q, int64_t S, const T* rows,
                      int64_t row_stride, int64_t N, T* out) {
  if (Q >= kFewQueries) {
    product(S, N, Q, p, p_stride, true, rows, row_stride, out, N);
    return;
  }
  for (int64_t s = 0; s < S; ++s) {
    T column[kFewQueries];
    for (int64_t i = 0; i < Q; ++i) column[i] = p[i * p_stride + s];
    weighted_sum(column, rows, row_stride, Q, N, out + s * N);
  }
}

template <class T>
void backward_piece_of_scores(const AttentionBackward<T>& a, const BackwardPlan<T>& plan, int64_t b,
                              int64_t piece, int64_t s0, int64_t S) {
  const T* d_e = plan.d_e + b * a.Q * a.S + s0;
  T* d_keys = a.d_keys + (b * a.S + s0) * a.K;
  if (!a.additive) {
    sum_over_queries(d_e, a.S, a.Q, S, a.query.at(b, 0), a.query.row, a.K, d_keys);
    return;
  }
  const int64_t part = b * plan.pieces + piece;
  T* d_query = plan.d_query + part * a.Q * a.K;
  T* d_v = plan.d_v + part * a.K;
  for (int64_t i = 0; i < a.Q * a.K; ++i) d_query[i] = 0;
  for (int64_t k = 0; k < a.K; ++k) d_v[k] = 0;
  ScoredQueries<T> queries{a.Q, a.query.at(b, 0), a.query.row, d_e, a.S, d_query, a.K};
  const T* keys = a.keys.at(b, s0);
  const T* extra = a.extra.base ? a.extra.at(b, s0) : nullptr;
  if (!uses_exponentials(a, b, source_length(a, b))) {
    additive_source_gradients(queries, keys, a.keys.row, extra, a.extra.row, S, a.K, a.v, d_keys,
                              a.K, d_v);
    return;
  }
  Scratch scratch(size_t(a.Q * a.K) * sizeof(T));
  T* form = scratch.take<T>(size_t(a.Q * a.K));
  for (int64_t q = 0; q < a.Q; ++q) {
    exponentials<T>(a.query.at(b, q), nullptr, a.K, form + q * a.K);
  }
  queries.q = form;
  queries.q_stride = a.K;
  additive_source_gradients_by<ExponentialTerms<T>>(queries, keys, a.keys.row, extra, a.extra.row,
                                                    S, a.K, a.v, d_keys, a.K, d_v);
}

// Stage two: what one piece of row b's source adds.
template <class T>
void backward_piece(const AttentionBackward<T>& a, const BackwardPlan<T>& plan, int64_t b,
                    int64_t piece) {
  const int64_t s0 = min64(piece * plan.positions, a.S), s1 = min64(s0 + plan.positions, a.S);
  const int64_t S = max64(0, min64(s1, source_length(a, b)) - s0);
  if (a.need_scores) {
    backward_piece_of_scores(a, plan, b, piece, s0, S);
    T* unused = a.d_keys + (b * a.S + s0 + S) * a.K;
    for (int64_t i = 0; i < (s1 - s0 - S) * a.K; ++i) unused[i] = 0;
  }
  if (a.need_values) {
    T* d_values = a.d_values + (b * a.S + s0) * a.C;
    const int64_t reached = a.d_context.base ? S : 0;
    if (reached) {
      sum_over_queries(a.weights + b * a.Q * a.S + s0, a.S, a.Q, S, a.d_context.at(b, 0),
                       a.d_context.row, a.C, d_values);
    }
    for (int64_t i = reached * a.C; i < (s1 - s0) * a.C; ++i) d_values[i] = 0;
  }
}

// Stage three: an additive query's gradient, summed over the pieces.
template <class T>
void sum_pieces(const AttentionBackward<T>& a, const BackwardPlan<T>& plan, int64_t b, int64_t q0,
                int64_t q1) {
  if (!a.need_scores || plan.d_query == a.d_query) return;
  const int64_t size = a.Q * a.K;
  T* to = a.d_query + b * size;
  const T* from = plan.d_query + b * plan.pieces * size;
  for (int64_t i = q0 * a.K; i < q1 * a.K; ++i) {
    T sum = 0;
    for (int64_t piece = 0; piece < plan.pieces; ++piece) sum += from[piece * size + i];
    to[i] = sum;
  }
}

template <class T>
void attention_backward(const AttentionBackward<T>& a, const Threads& all_threads) {
  const Threads threads = threads_for(a, all_threads);
  ScratchSize size;
  BackwardPlan<T>(a, size);
  Scratch scratch(size.bytes());
  const BackwardPlan<T> plan(a, scratch);
  if (threads.count == 1 || a.B >= kTasksPerThread * threads.count) {
    run_queue(threads, a.B, [&](int64_t b, int64_t) {
      backward_queries(a, plan, b, 0, a.Q);
      for (int64_t piece = 0; piece < plan.pieces; ++piece) backward_piece(a, plan, b, piece);
      sum_pieces(a, plan, b, 0, a.Q);
    });
  } else {
    const int64_t parts = query_parts(a, threads), some = ceil_div(a.Q, parts);
    const auto of_queries = [&](int64_t task, auto stage) {
      const int64_t q0 = min64(task % parts * some, a.Q);
      stage(a, plan, task / parts, q0, min64(q0 + some, a.Q));
    };
    run_queue(threads, a.B * parts,
              [&](int64_t task, int64_t) { of_queries(task, backward_queries<T>); });
    run_queue(threads, a.B * plan.pieces, [&](int64_t task, int64_t) {
      backward_piece(a, plan, task / plan.pieces, task % plan.pieces);
    });
    run_queue(threads, a.B * parts,
              [&](int64_t task, int64_t) { of_queries(task, sum_pieces<T>); });
  }
  if (a.need_scores && a.additive) column_sums(plan.d_v, a.B * plan.pieces, 0, a.K, a.K, a.d_v);
}
