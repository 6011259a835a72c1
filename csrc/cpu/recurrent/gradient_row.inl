// Where the gradients of a cell's sums lie in a token's row [blocks][H]: in order, but the input
// half of a gate in two halves first, so that those of x and those of h are each side by side. Of a
// normalised cell all gates are in two halves.
template <class Cell>
struct GradientRow {
  using L = LayoutOf<Cell>;
  static constexpr bool kHalves = cell::kNormalised<Cell>;
  static constexpr int kBlocks = kHalves ? 2 * L::kGates : L::kSums + Cell::kParams;
  static constexpr int block(int sum) {
    return L::kApart < 0 ? sum : sum == L::kApart ? 0 : sum < L::kApart ? sum + 1 : sum;
  }
  // First block of the recurrent sums; those of x begin at 0.
  static constexpr int kRecurrent = kHalves ? L::kGates : L::kApart < 0 ? 0 : 1;
  // The gate whose input sum is block i.
  static constexpr int gate(int i) { return L::kApart < 0 ? i : i == 0 ? L::kApart : i - 1; }
  // f(i, row): to which row of W_ih the i-th input sum belongs, for all i in [begin, end). (A
  // division an i would take longer than most of what is done with the row.)
  template <class F>
  static FASTSEQ_INLINE void each_row(int64_t H, int64_t begin, int64_t end, const F& f) {
    if (begin == end) return;
    int block = int(begin / H);
    int64_t unit = begin % H;
    for (int64_t i = begin; i < end; ++i) {
      f(i, gate(block) * H + unit);
      if (++unit == H) {
        unit = 0;
        ++block;
      }
    }
  }
};
