// Packed weights kept from call to call, for as long as the weights hold what they held.

// A number by which contents are told apart. That of one element changed always differs: each step
// is a bijection of what came before and of what comes in. The product spreads a difference to
// higher bits, but for that of the highest bit, a sign; what the shift makes of that, no other
// signs undo.
template <class Word>
FASTSEQ_INLINE Word mixed(Word sum, Word value) {
  sum = (sum ^ value) * uint64_t(0x9e3779b97f4a7c15u);
  return sum ^ (sum >> 29);
}
template <class T>
FASTSEQ_TILE uint64_t contents(const T* values, int64_t n) {
  using Words = Vec<uint64_t>;
  constexpr int kChains = 8;
  Words sum[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes<T> <= n; i += kChains * kLanes<T>) {
#pragma GCC unroll 8
    for (int k = 0; k < kChains; ++k) {
      sum[k] = mixed(sum[k], (Words)load(values + i + k * kLanes<T>));
    }
  }
  for (; i < n; i += kLanes<T>) {
    sum[0] = mixed(sum[0], (Words)load(values + i, int(min64(kLanes<T>, n - i))));
  }
  uint64_t all = uint64_t(n);
  for (const Words& s : sum) {
    for (int lane = 0; lane < kLanes<uint64_t>; ++lane) all = mixed<uint64_t>(all, s[lane]);
  }
  return all;
}

// Packing a short sequence's weights would cost a good part of what multiplying by them does; what
// is kept has to be compared with them, which costs a third of the packing.
template <class T>
bool worth_keeping(const RecurrentShape& s, int64_t gates) {
  constexpr int64_t kFewTokens = 512, kSmall = int64_t(128) << 10;
  return s.tokens <= kFewTokens && gates * s.H * (s.I + s.P) * int64_t(sizeof(T)) >= kSmall;
}

// The kept copy of a direction's weights, laid out in `p` where there is memory for one.
template <class Cell, class T>
void keep_packed(const RecurrentWeights<T>& w, const RecurrentShape& s, const Threads& threads,
                 KeptPack& kept, PackedForward<T>& p) {
  using L = LayoutOf<Cell>;
  static const char layout = 0;
  constexpr int64_t kParts = 16;
  const int64_t gates = Cell::kGates * s.H;
  const struct {
    const T* values;
    int64_t n;
  } all[] = {{w.w_ih, gates * s.I},
             {w.w_hh, gates * s.P},
             {w.w_hr, w.w_hr ? s.P * s.H : 0},
             {w.b_ih, w.b_ih ? gates : 0},
             {w.b_hh, w.b_hh ? gates : 0}};
  uint64_t sums[kParts];
  run_tasks(threads, kParts, [&](int64_t part) {
    sums[part] = 0;
    for (const auto& one : all) {
      const int64_t begin = one.n * part / kParts, end = one.n * (part + 1) / kParts;
      sums[part] = mixed(sums[part], contents(one.values + begin, end - begin));
    }
  });
  uint64_t check = 0;
  for (uint64_t sum : sums) check = mixed(check, sum);
  const PackedSizes<L, T> size(s, w.w_hr != nullptr);
  ScratchSize needed;
  lay_out_packed(size, needed, p);
  char* first = kept.find({&layout, {w.w_ih, w.w_hh, w.w_hr, w.b_ih, w.b_hh}, {s.I, s.P, s.H}},
                          check, needed.bytes());
  Handout memory(first);
  if (first) lay_out_packed(size, memory, p);
}
