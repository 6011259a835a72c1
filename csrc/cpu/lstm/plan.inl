// What the two passes over an LSTM layer share: where rows are, and how work is split.
//
// Work is split among threads by sequences, which need nothing from each other, or, where there are
// few sequences or the weights outgrow a core's cache, by units with a meeting at every step.

template <class T>
FASTSEQ_INLINE T* at(const LstmRows<T>& r, const LstmShape& s, int64_t t, int64_t b) {
  const int64_t row = r.step == LstmRows<T>::kPacked ? s.first[t] * r.row : t * r.step;
  return r.base + row + b * r.row;
}

FASTSEQ_INLINE int64_t rows_at(const LstmShape& s, int64_t t) {
  return t >= 0 && t < s.T ? s.rows[t] : 0;
}

// How a loop over steps is shared out.
struct LstmPlan {
  bool by_units;
  int tasks;      // a direction
  int64_t chunk;  // sequences, or vectors of units, a task
};

template <class T>
LstmPlan plan_lstm(const LstmShape& s, int64_t weights, int threads) {
  const int64_t vectors = ceil_div(s.H, kLanes<T>);
  // Below this many multiply-adds in all, handing out work costs more than it saves.
  constexpr int64_t kWorthSharing = int64_t(1) << 18;
  if (threads <= 1 || weights * s.tokens * s.D < kWorthSharing) return {false, 1, s.B};
  const int64_t each = ceil_div(threads, s.D);
  // Half of a 1 MiB second-level cache: beyond, every step would stream the weights from memory
  // once a thread.
  constexpr int64_t kCache = int64_t(512) << 10;
  // A step smaller than this is over before two threads have met.
  constexpr int64_t kWorthMeeting = int64_t(1) << 16;
  const int64_t by_rows = min64(each, s.B);
  const bool fits = weights * int64_t(sizeof(T)) <= kCache;
  const bool balanced = by_rows == each && s.B >= 4 * by_rows;
  if ((!fits || !balanced) && weights * s.B >= kWorthMeeting && vectors > 1 &&
      each * s.D <= Steps::kMaxShares) {
    const int64_t chunk = ceil_div(vectors, min64(each, vectors));
    return {true, int(ceil_div(vectors, chunk)), chunk};
  }
  const int64_t chunk = ceil_div(s.B, max64(by_rows, 1));
  return {false, int(max64(1, ceil_div(s.B, max64(chunk, 1)))), max64(chunk, 1)};
}

// What the tile of this order should fetch: half of the panel after `panel`, or nothing new.
template <class T>
FASTSEQ_INLINE const T* fetch_soon(const T* panel, int64_t panel_size, int order) {
  return order < 2 ? panel + panel_size + order * (panel_size / 2) : nullptr;
}
