// What a decoder's queries ask of a source: scores, weights and context, forward and backward.

// The keys of sources as ExponentialTerms wants them, made once for all the queries of a call. A
// source has them, and a query uses them, where they are in range.
template <class T>
struct KeyForms {
  T* keys;       // [sources, S, K]; null: scores are not made of them
  uint8_t* has;  // [sources]

  // Whether exponentials lose too few digits to matter, as uses_exponentials has it. Not a matter
  // of how many steps there are: a longer target begins with the same bits.
  static bool wanted(const DecoderInputs<T>& a) {
    constexpr T kLargestGain = 4;
    if (a.shape.dot) return false;
    T square = 0;
    for (int64_t k = 0; k < a.shape.K; ++k) square += a.v[k] * a.v[k];
    return square * a.scale * a.scale <= kLargestGain * kLargestGain;
  }
  template <class Memory>
  void lay_out(Memory& memory, const DecoderShape& s, int64_t sources, bool wanted) {
    if (!wanted) return;
    keys = memory.template take<T>(size_t(sources * s.S * s.K));
    has = memory.template take<uint8_t>(size_t(sources));
  }
  void prepare(const DecoderInputs<T>& a, int64_t source) const {
    if (!keys) return;
    const int64_t K = a.shape.K, end = a.ends[source], first = source * a.shape.S * K;
    has[source] = within_range<T>(a.keys + first, K, nullptr, 0, end, K);
    if (has[source]) exponentials<T>(a.keys + first, nullptr, end * K, keys + first);
  }
  // The source's keys where `query` [K] can use them, its own exponentials then in `form`; or null.
  FASTSEQ_INLINE const T* of(const DecoderShape& s, int64_t source, const T* query, T* form) const {
    if (!keys || !has[source] || !within_range<T>(query, 0, nullptr, 0, 1, s.K)) return nullptr;
    exponentials<T>(query, nullptr, s.K, form);
    return keys + source * s.S * s.K;
  }
};

// What attends to a source: one query against its keys. `form`: [K], to write to.
template <class T>
FASTSEQ_INLINE void attend(const DecoderInputs<T>& a, const KeyForms<T>& forms, int64_t b,
                           const T* query, T* form, T* weights, T* context) {
  const DecoderShape& s = a.shape;
  const int64_t source = b / s.width, end = a.ends[source];
  const T* keys = a.keys + source * s.S * s.K;
  if (s.dot) {
    dot_scores(query, keys, s.K, end, s.K, a.scale, weights);
  } else if (const T* exponential = forms.of(s, source, query, form)) {
    additive_scores_by<ExponentialTerms<T>>(form, exponential, s.K, static_cast<const T*>(nullptr),
                                            0, end, s.K, a.v, a.scale, weights, nullptr);
  } else {
    additive_scores<T>(query, keys, s.K, nullptr, 0, end, s.K, a.v, a.scale, weights);
  }
  masked_softmax(weights, a.mask ? a.mask + source * s.S : nullptr, end);
  for (int64_t i = end; i < s.S; ++i) weights[i] = 0;
  weighted_sum(weights, a.values + source * s.S * s.C, s.C, end, s.C, context);
}

// dL/dquery of sequence b from the gradients of its scores.
template <class T>
FASTSEQ_INLINE void attend_backward(const DecoderInputs<T>& a, const KeyForms<T>& forms, int64_t b,
                                    const T* query, T* form, const T* dscores, T* dquery) {
  const DecoderShape& s = a.shape;
  const T* keys = a.keys + b * s.S * s.K;
  const int64_t end = a.ends[b];
  if (s.dot) {
    weighted_sum<T>(dscores, keys, s.K, end, s.K, dquery);
  } else if (const T* exponential = forms.of(s, b, query, form)) {
    additive_query_gradient_by<ExponentialTerms<T>>(
        form, exponential, s.K, static_cast<const T*>(nullptr), 0, end, s.K, a.v, dscores, dquery);
  } else {
    additive_query_gradient<T>(query, keys, s.K, nullptr, 0, end, s.K, a.v, dscores, dquery);
  }
}

// The gradients of source b's keys, and of v, which are added to, under all its queries. `forms`:
// [T, K], to write to.
template <class T>
void attend_backward_source(const DecoderInputs<T>& a, const KeyForms<T>& key_forms, int64_t b,
                            const ScoredQueries<T>& queries, T* forms, T* dkeys, T* dv) {
  const int64_t K = a.shape.K, end = a.ends[b];
  const T* keys = a.keys + b * a.shape.S * K;
  if (!key_forms.keys || !key_forms.has[b] ||
      !within_range<T>(queries.q, queries.q_stride, nullptr, 0, queries.Q, K)) {
    additive_source_gradients<T>(queries, keys, K, nullptr, 0, end, K, a.v, dkeys, K, dv);
    return;
  }
  ScoredQueries<T> formed = queries;
  for (int64_t t = 0; t < queries.Q; ++t) {
    exponentials<T>(queries.q + t * queries.q_stride, nullptr, K, forms + t * K);
  }
  formed.q = forms;
  formed.q_stride = K;
  additive_source_gradients_by<ExponentialTerms<T>>(formed, keys, K, static_cast<const T*>(nullptr),
                                                    0, end, K, a.v, dkeys, K, dv);
}
