// What fastseq::recurrent_cuda_fwd and fastseq::recurrent_cuda_bwd share: what they are called
// with, and how a pass is run.
#pragma once

#include <array>

#include "../cpu/dispatch.h"
#include "../cuda/recurrent/recurrent.h"
#include "tensors.h"

namespace fastseq {
namespace ops {

inline ScalarType wide_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like,
                         ScalarType type, std::initializer_list<int64_t> sizes) {
  bool fits = t.dim() == int64_t(sizes.size()) && t.is_contiguous() && t.scalar_type() == type &&
              t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index();
  for (size_t i = 0; fits && i < sizes.size(); ++i) {
    fits = t.size(int64_t(i)) == sizes.begin()[i];
  }
  if (fits) return;
  std::ostringstream wanted;
  for (int64_t size : sizes) wanted << " " << size;
  require(false, "fastseq.", op, ": expected ", name, " contiguous, of sizes", wanted.str(),
          ", beside the input");
}

// out = a b, by torch: its own choice of algorithm, and its own switches of precision.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor scratch(const Tensor& like, ScalarType type, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), type);
}

inline Tensor zeros(const Tensor& like, ScalarType type, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_zeros(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), type);
}

template <class F>
void by_device_dtype(const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(cuda::Half{});
    case ScalarType::BFloat16:
      return f(cuda::BFloat16{});
    default:
      require(false, "fastseq: expected float64, float32, float16 or bfloat16");
  }
}

inline int64_t biases_of(int64_t cell) { return cuda::recurrent_kernels<float>(int(cell)).biases; }

// What both ops are called with.
struct Call {
  const char* op;
  int64_t cell, way;
  void* stream;
  int64_t T, B, H, D, tokens;
  int64_t biases;  // rows of them behind the parameters
  const Tensor& like;
  const Tensors& w_hh;
  const Tensors& params;
  const Tensors& masks;
  const OptionalTensor& first;
  const OptionalTensor& lengths;
  const OptionalTensor& resets;
  const Tensors& w_hr;  // [P, H] of each direction, or empty: h is not projected among the steps
  const Tensors& keep;  // with them, masks of what is handed on, [tokens, P]

  int64_t handed() const { return w_hr.empty() ? H : w_hr[0].size(0); }
  const CellInfo& info() const { return cell_info(int(cell)); }

  void check() const {
    const ScalarType type = like.scalar_type();
    require(D == 1 || D == 2, "fastseq.", op, ": expected one or two directions, got ", D);
    const int64_t P = handed();
    for (const Tensor& w : w_hh) check_device(op, "w_hh", w, like, type, {info().gates * H, P});
    for (const Tensor& w : w_hr) check_device(op, "w_hr", w, like, type, {P, H});
    for (const Tensor& m : keep) check_device(op, "keep", m, like, type, {tokens, P});
    const int64_t param_rows = info().params + biases;
    for (const Tensor& p : params) check_device(op, "params", p, like, type, {param_rows, H});
    for (const Tensor& m : masks) check_device(op, "a mask", m, like, type, {tokens, H});
    require(int64_t(params.size()) == (info().params ? D : 0) &&
                int64_t(masks.size()) == info().masks * D && int64_t(w_hh.size()) == D &&
                (w_hr.empty() || int64_t(w_hr.size()) == D) && keep.size() == w_hr.size(),
            "fastseq.", op, ": expected the weights and masks of a ", info().name);
    require(w_hr.empty() || !first, "fastseq.", op, ": expected padded rows of a projected layer");
    if (first) check_device(op, "first", *first, like, ScalarType::Long, {T});
    if (lengths) check_device(op, "lengths", *lengths, like, ScalarType::Long, {B});
    if (resets) check_device(op, "resets", *resets, like, ScalarType::Bool, {tokens});
    require(first ? lengths.has_value() : tokens == T * B, "fastseq.", op,
            ": expected T * B = ", T * B, " tokens, got ", tokens);
  }

  // Of what is handed on, a step of its own: see csrc/cell/projected.h.
  template <class T_>
  void fill_projection(cuda::Inputs<T_>& a, int64_t d) const {
    a.walk = {T, B, handed(), nullptr, read<int64_t>(lengths), read<uint8_t>(resets), d == 1};
    a.masks[0] = read<T_>(keep[size_t(d)]);
  }
  // The rows of step t.
  Tensor rows(const Tensor& tokens, int64_t t) const {
    Tensor all = tokens;
    return torch::stable::narrow(all, 0, t * B, B);
  }

  template <class T_>
  void fill(cuda::Inputs<T_>& a, int64_t d) const {
    a.walk = {T, B, H, read<int64_t>(first), read<int64_t>(lengths), read<uint8_t>(resets), d == 1};
    a.w_hh = read<T_>(w_hh[size_t(d)]);
    a.params = info().params ? read<T_>(params[size_t(d)]) : nullptr;
    for (int i = 0; i < info().masks; ++i) {
      a.masks[i] = read<T_>(masks[size_t(d * info().masks + i)]);
    }
  }

  cuda::DeviceLimits limits() const {
    const char* error = nullptr;
    const auto limits = cuda::device_limits(int(like.get_device_index()), &error);
    require(!error, "fastseq.", op, ": ", error);
    return limits;
  }

  template <class T_>
  cuda::Choice choose(const cuda::RecurrentKernels<T_>& kernels, bool backward,
                      int64_t most) const {
    // A projection among the steps is a product with each of them.
    const bool has_whole = kernels.whole_forward && w_hr.empty();
    const cuda::Choice choice =
        cuda::choose_way(kernels.size, has_whole, int(way), H, B, D, most, backward, limits());
    const char* where = way % cuda::kIfItCan == cuda::kWhole ? "a block" : "the device at once";
    require(choice.way != cuda::kNone, "fastseq.", op, ": expected weights of ", info().name,
            " that fit ", where, ", got H = ", H);
    return choice;
  }

  // Runs the directions from *done on that need no launch a step: whole(plan) all of them,
  // grid(first, how many, plan, space) some. Returns the way of what is left, or of all.
  template <class T_, class Whole, class Grid>
  int64_t run_sequences(const cuda::RecurrentKernels<T_>& kernels, bool backward, int64_t* done,
                        const Whole& whole, const Grid& grid) const {
    int64_t most = D;
    while (*done < D) {
      const cuda::Choice choice = choose(kernels, backward, most);
      if (choice.way == cuda::kWhole && *done == 0) {
        succeeded(whole(choice.whole));
        *done = D;
        return cuda::kWhole;
      }
      if (choice.way != cuda::kGrid) return cuda::kStep;
      const cuda::GridPlan& plan = choice.grid;
      const int64_t exchange = choice.together * 2 * B * plan.row * kernels.size.bytes;
      const int64_t counters = choice.together * plan.tiles * cuda::kArrivedStride * 4;
      const Tensor space = zeros(like, ScalarType::Byte, {exchange + counters});
      char* at = static_cast<char*>(space.mutable_data_ptr());
      const char* error = grid(*done, choice.together, plan,
                               cuda::GridSpace{at, reinterpret_cast<uint32_t*>(at + exchange)});
      if (error == cuda::kNotTogether) {
        most = choice.together - 1;
      } else {
        succeeded(error);
        *done += choice.together;
      }
    }
    return cuda::kGrid;
  }
  void succeeded(const char* error) const { require(!error, "fastseq.", op, ": ", error); }
};

}  // namespace ops
}  // namespace fastseq
