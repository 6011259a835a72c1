// One recurrent layer on a GPU: what its kernels are given, and the table of them.
//
// T steps, B sequences, H units, G gates of the cell, blocks in torch's order; D directions. No
// torch in here: pointers of the device and a stream. The sums of x with W_ih and all biases but
// one come made (zx): they are one product over all tokens, and so are, afterwards, the gradients
// of x and of every weight, from the gradients of the sums (dsums). Three ways between:
//
//   step    one launch a step after the caller's product with W_hh: any H
//   whole   one launch a sequence: a block of threads holds W_hh in its shared memory and runs R
//           sequences from their first step to their last, meeting nobody
//   grid    one launch a sequence: several blocks hold W_hh between them, a few units each, and
//           meet once a step
//
// A token is one (step, sequence) pair: t * B + b, or first[t] + b where tokens are packed.
#pragma once

#include <cstdint>

#include "../support/scalar.h"

namespace fastseq {
namespace cuda {

// A direction's walk over the sequence. The same rules as csrc/cpu/recurrent/plan.inl, with lengths
// that only the device knows.
struct Walk {
  int64_t T, B, H;
  const int64_t* first;    // [T] or null
  const int64_t* lengths;  // [B], 0 to T, or null: all T
  const uint8_t* resets;   // [tokens] or null
  bool reverse;

  FASTSEQ_BOTH int64_t token(int64_t t, int64_t b) const { return (first ? first[t] : t * B) + b; }
  FASTSEQ_BOTH int64_t length(int64_t b) const { return lengths ? lengths[b] : T; }
  // Steps of the longest of some rows.
  FASTSEQ_BOTH int64_t longest(int64_t row0, int rows) const {
    int64_t most = 0;
    FASTSEQ_ROLLED
    for (int r = 0; r < rows; ++r) most = length(row0 + r) > most ? length(row0 + r) : most;
    return most;
  }
  FASTSEQ_BOTH bool runs(int64_t t, int64_t b) const { return t >= 0 && t < length(b); }
  FASTSEQ_BOTH int64_t before(int64_t t) const { return reverse ? t + 1 : t - 1; }
  FASTSEQ_BOTH int64_t after(int64_t t) const { return reverse ? t - 1 : t + 1; }
  // Whether the state that enters step t of row b is zero, whatever came before. A reset stands at
  // the later of two steps, in time, for both directions.
  FASTSEQ_BOTH bool cut(int64_t t, int64_t b) const {
    if (!resets) return false;
    const int64_t later = reverse ? t + 1 : t;
    return runs(later, b) && resets[token(later, b)];
  }
  // Whether the final state of row b is zero: in reverse it is handed on across a reset at step 0.
  FASTSEQ_BOTH bool cut_at_end(int64_t b) const {
    return resets && reverse && runs(0, b) && resets[token(0, b)];
  }
};

constexpr int kMostMasks = 2;

// What both passes read, of one direction. Nothing aliases; the caller owns everything.
template <class T>
struct Inputs {
  Walk walk;
  const T* w_hh;               // [G*H, H]; for `whole` and `grid`
  const T* params;             // [the cell's kParams (and biases), H] or null
  const T* masks[kMostMasks];  // [tokens, H]
};

template <class T>
struct Forward : Inputs<T> {
  const T* zx;      // [tokens, G*H], rows zx_row apart
  const T* b_hh;    // [H]: the recurrent bias of gate kApart; or null
  const T* zh;      // [B, G*H]: h of the step before by W_hh; for `step`
  T* h;             // [B, H]: in the initial state, out the final one
  Wide<T>* h_wide;  // the same, not rounded; for `step` of cells that read h
  Wide<T>* c;       // [B, H]: likewise; null for cells without
  T* y;             // [tokens, H], rows y_row apart
  T* saved;         // [tokens, kSaved * H] or null
  int64_t zx_row, y_row;
};

template <class T>
struct Backward : Inputs<T> {
  const T* saved;
  const T* dy;     // [tokens, H], rows dy_row apart, or null: zero
  const T* dh_n;   // [B, H] or null: zero
  const T* dc_n;   // [B, H] or null: zero
  const T* h0;     // [B, H] or null: zero
  const T* c0;     // [B, H] or null: zero
  const T* dh;     // [B, H]: dz of the later step by W_hh; for `step`
  T* dz;           // [B, G*H]: of the recurrent sums of this step; for `step`
  Wide<T>* dc;     // [B, H]: scratch; null for cells without c. For `step`
  Wide<T>* carry;  // [B, H]: scratch of cells that carry h. For `step`
  T* dsums;        // [tokens, GradientRow::kBlocks * H], rows dsums_row apart
  T* hidden;       // [tokens, H]: the h that entered each token; or null
  T* dh0;          // [B, H] or null: not wanted
  T* dc0;          // [B, H]; with dh0, of cells with c
  int64_t dy_row, dsums_row;
};

// How `whole` shares out a block: `rows` sequences, and for each unit `slices` threads that take a
// part of its sums each; `threads` of them in all (unit_threads, a whole number of warps, a slice).
struct WholePlan {
  int rows, slices, unit_threads, threads;
  int shared;  // bytes
};

// How `grid` shares out a layer: each direction's sequences in `tiles` tiles of `rows`, each tile
// to `blocks` blocks of `units` units. Of a block's threads `slices` share the depth of the sums of
// each of `groups` groups of columns, and take `packs` packs of 16 bytes of it each, `part` of them
// at a time.
struct GridPlan {
  int units, blocks, tiles, rows;
  int groups, slices, packs, part;
  int row;         // elements of a row of the exchange: the depth, and what fills its last pack
  int shared;      // bytes
  int64_t clocks;  // that a step should take, by the model of plan_grid
};

// In the device's memory, for one launch of `grid`, zeros at first.
struct GridSpace {
  void* exchange;     // [D][2][B][plan.row] of the type of h
  uint32_t* arrived;  // [D * tiles][kArrivedStride]
};
// A counter has a line of the cache to itself.
constexpr int kArrivedStride = 32;

struct DeviceLimits {
  int multiprocessors;
  int shared;        // bytes a block may have
  bool cooperative;  // whether it starts grids whose blocks all run at once
};

// What the plan needs to know of a cell.
struct WholeSize {
  int gates, states;
  bool carries_h;
  int bytes, wide_bytes;  // of a weight and of a sum
};

// The plan of most threads with few enough sequences a block to keep every multiprocessor at work;
// rows = 0 where the weights don't fit.
WholePlan plan_whole(const WholeSize& size, int64_t H, int64_t B, int64_t D, bool backward,
                     const DeviceLimits& limits);

// The plan of fewest clocks with a multiprocessor for every block of D directions; units = 0 where
// the weights don't fit. And the clocks that `step` should take, by the same reckoning.
GridPlan plan_grid(const WholeSize& size, int64_t H, int64_t B, int64_t D, bool backward,
                   const DeviceLimits& limits);
int64_t step_clocks(const WholeSize& size, int64_t H, int64_t B, int64_t D,
                    const DeviceLimits& limits);

// How a layer goes from step to step. A wanted way that can't run is none (kNone); with kIfItCan
// added, it is left for the one that costs least by the plans' own reckoning, as with kAnyWay.
constexpr int kNone = -1, kAnyWay = 0, kStep = 1, kWhole = 2, kGrid = 3, kIfItCan = 4;

struct Choice {
  int way;
  WholePlan whole;
  GridPlan grid;
  int together;  // directions that `grid` runs at once
};

// The one place that chooses. has_whole: whether the cell and type have `whole` and `grid` at all;
// most: directions that `grid` may run at once, 0 to D.
Choice choose_way(const WholeSize& size, bool has_whole, int wanted, int64_t H, int64_t B,
                  int64_t D, int64_t most, bool backward, const DeviceLimits& limits);

// What `grid` returns, having done nothing, where the device can't run all its blocks at once.
extern const char* const kNotTogether;

// The kernels of a cell. They return null, or what went wrong. `whole` and `grid` may be null.
template <class T>
struct RecurrentKernels {
  const char* (*step_forward)(const Forward<T>&, int64_t t, void* stream);
  // t one beyond the last: what leads to h0 and c0.
  const char* (*step_backward)(const Backward<T>&, int64_t t, bool initial, void* stream);
  const char* (*whole_forward)(const Forward<T>*, int D, const WholePlan&, void* stream);
  const char* (*whole_backward)(const Backward<T>*, int D, const WholePlan&, void* stream);
  const char* (*grid_forward)(const Forward<T>*, int D, const GridPlan&, const GridSpace&,
                              void* stream);
  const char* (*grid_backward)(const Backward<T>*, int D, const GridPlan&, const GridSpace&,
                               void* stream);
  WholeSize size;
  bool reads_h;  // whether `step` wants h_wide
  int blocks;    // of a token's row of dsums: see GradientRow, NormalisedGradientRow
  int biases;    // rows of biases behind the cell's parameters
};

// By number, as in csrc/cell/cells.h; T: double, float, Half, BFloat16.
int recurrent_kernel_count();
template <class T>
const RecurrentKernels<T>& recurrent_kernels(int cell);
// Those of what a projection hands on, Zoneout<Projected> of csrc/cell.
template <class T>
const RecurrentKernels<T>& projection_kernels();

// Of a device, by torch's number; multiprocessors = 0 where there is none, and *error says why.
DeviceLimits device_limits(int device, const char** error);
// How many devices, and why there are none (null where there are).
int device_count(const char** error);

}  // namespace cuda
}  // namespace fastseq
