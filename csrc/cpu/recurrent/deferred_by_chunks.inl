// The gradients of deferred.inl for one sequence and small weights: the loop over its steps has use
// for one thread. Others make the products of the stretches that it has left behind meanwhile.

constexpr int64_t kStretch = 128;

// By shape alone, for sums over stretches are rounded as those over all tokens are not.
template <class Cell, class T>
bool by_chunks(const RecurrentShape& s, bool projected) {
  return !cell::kNormalised<Cell> && !projected && s.B == 1 && s.tokens == s.T &&
         s.T > 2 * kStretch && Cell::kGates * s.H * s.P < 2 * kWorthMeeting;
}

template <class Cell, class T>
struct DeferredByChunks {
  static constexpr int kParts = 2;  // of a product over tokens: rows of dL/dW
  // Lanes of each direction, one kind after the other.
  enum { kLoop, kToX, kWeights, kKinds = kWeights + kParts };

  const BackwardLoop<Cell, T>& loop;
  const RecurrentShape& s;
  const Deferred<Cell, T> deferred;
  const int64_t stretches;
  GemmBlocks<T> blocks[2 * kKinds];
  Lanes lanes;

  DeferredByChunks(const BackwardLoop<Cell, T>& loop, const T** memory)
      : loop(loop),
        s(loop.a.shape),
        deferred(loop, memory),
        stretches(ceil_div(s.T, kStretch)),
        blocks{},
        lanes(s.D * kKinds, stretches) {}

  template <class Memory>
  void lay_out(Memory& memory) {
    // The second stretch is never a part of one.
    for (int lane = s.D; lane < s.D * kKinds; ++lane) {
      int64_t a_size = 0, b_size = 0;
      each_product(lane, 1, [&](const Gemm<T>& g) {
        a_size = max64(a_size, GemmBlocks<T>::a_size(g));
        b_size = max64(b_size, GemmBlocks<T>::b_size(g));
      });
      blocks[lane].a = memory.template take<T>(size_t(a_size));
      blocks[lane].b = memory.template take<T>(size_t(b_size));
    }
  }

  // The tokens of the i-th stretch that the loop of a direction comes to.
  int64_t begin(int d, int64_t i) const { return (d ? i : stretches - 1 - i) * kStretch; }
  int64_t end(int d, int64_t i) const { return min64(begin(d, i) + kStretch, s.T); }

  bool ready(int lane, int64_t i) const {
    const int d = lane % s.D, kind = lane / s.D;
    if (kind == kLoop) return true;
    // dL/dx of the second direction adds to that of the first.
    if (kind == kToX) {
      return lanes.done(d) > i && (d == 0 || lanes.done(kToX * s.D) > stretches - 1 - i);
    }
    // The h that entered a stretch may be made again by the loop's next one.
    return lanes.done(d) > min64(i + 1, stretches - 1);
  }

  // The products of a lane over its i-th stretch.
  template <class F>
  void each_product(int lane, int64_t i, const F& f) const {
    const RecurrentBackward<T>& a = loop.a;
    const int d = lane % s.D, kind = lane / s.D;
    const int64_t t = begin(d, i), tokens = end(d, i) - t;
    auto over_stretch = [&](Gemm<T> g) {
      g.K = tokens;
      g.a += t * g.a_k;
      g.b_rows += t;
      if (g.split) g.b_rows_2 += t;
      g.accumulate = i > 0;
      f(g);
    };
    if (kind == kToX) {
      if (!a.dx.base) return;
      Gemm<T> g = deferred.to_x(d);
      g.M = tokens;
      g.a += t * g.a_m;
      g.c_rows += t;
      f(g);
    } else if (a.dw_hh[d] && deferred.joined()) {
      over_stretch(deferred.by_x_and_h(d));
    } else if (a.dw_hh[d]) {
      over_stretch(deferred.by_x(d));
      over_stretch(deferred.by_h(d));
    }
  }

  void multiply(int lane, int64_t i) const {
    const int d = lane % s.D, part = lane / s.D - kWeights;
    each_product(lane, i, [&](const Gemm<T>& g) {
      // Cut in the same places whatever the length of the stretch: each part adds to its own.
      gemm_part(g, max64(part, 0), part < 0 ? 1 : kParts, blocks[lane]);
    });
    if (part >= 0 && i == stretches - 1) deferred.sums(d, part, kParts);
  }
};

// step(d, i): step i, back from the end, of the loop of direction d.
template <class Cell, class T, class Step>
void backward_by_chunks(const BackwardLoop<Cell, T>& loop, const T** memory, const Threads& threads,
                        const Step& step) {
  using Chunks = DeferredByChunks<Cell, T>;
  const RecurrentShape& s = loop.a.shape;
  Chunks chunks(loop, memory);
  ScratchSize needed;
  chunks.lay_out(needed);
  Scratch scratch(needed.bytes());
  chunks.lay_out(scratch);
  run_tasks(threads, min64(threads.count, 2 * s.D), [&](int64_t) {
    chunks.lanes.work([&](int lane, int64_t i) { return chunks.ready(lane, i); },
                      [&](int lane, int64_t i) {
                        if (lane >= s.D) return chunks.multiply(lane, i);
                        // Steps go back from the end of the direction's walk.
                        const int64_t begin = chunks.begin(lane, i), end = chunks.end(lane, i);
                        const int64_t first = lane ? begin : s.T - end;
                        for (int64_t k = first; k < first + end - begin; ++k) step(lane, k);
                        // dL/dh0, with which the loop ends.
                        if (loop.a.dh0 && i == chunks.stretches - 1) step(lane, s.T);
                      });
  });
}
