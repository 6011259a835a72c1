// fastseq::recurrent_cuda_fwd and fastseq::recurrent_cuda_bwd: the part of a recurrent layer on a
// GPU that goes from step to step. fastseq/ops/recurrent_cuda.py makes the rest of it, products
// over all tokens, and documents the arguments.
#include <array>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cuda/recurrent/recurrent.h"
#include "tensors.h"

#if defined(FASTSEQ_HAVE_CUDA) || defined(FASTSEQ_ON_HOST)

namespace fastseq {
namespace ops {

namespace {

constexpr int64_t kAnyWay = 0, kStep = 1, kWhole = 2, kGrid = 3;

ScalarType wide_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like,
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
void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor scratch(const Tensor& like, ScalarType type, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), type);
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

int64_t biases_of(int64_t cell) { return cuda::recurrent_kernels<float>(int(cell)).biases; }

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

  const CellInfo& info() const { return cell_info(int(cell)); }

  void check() const {
    const ScalarType type = like.scalar_type();
    require(D == 1 || D == 2, "fastseq.", op, ": expected one or two directions, got ", D);
    for (const Tensor& w : w_hh) check_device(op, "w_hh", w, like, type, {info().gates * H, H});
    const int64_t param_rows = info().params + biases;
    for (const Tensor& p : params) check_device(op, "params", p, like, type, {param_rows, H});
    for (const Tensor& m : masks) check_device(op, "a mask", m, like, type, {tokens, H});
    require(int64_t(params.size()) == (info().params ? D : 0) &&
                int64_t(masks.size()) == info().masks * D,
            "fastseq.", op, ": expected the parameters and masks of a ", info().name);
    if (first) check_device(op, "first", *first, like, ScalarType::Long, {T});
    if (lengths) check_device(op, "lengths", *lengths, like, ScalarType::Long, {B});
    if (resets) check_device(op, "resets", *resets, like, ScalarType::Bool, {tokens});
    require(first ? lengths.has_value() : tokens == T * B, "fastseq.", op,
            ": expected T * B = ", T * B, " tokens, got ", tokens);
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

  // How `whole` would run it; rows = 0 where it doesn't, or isn't to.
  template <class T_>
  cuda::WholePlan plan(const cuda::RecurrentKernels<T_>& kernels, bool backward) const {
    cuda::WholePlan plan{};
    if (way != kStep && way != kGrid && kernels.whole_forward) {
      plan = cuda::plan_whole(kernels.size, H, B, D, backward, limits());
    }
    require(way != kWhole || plan.rows, "fastseq.", op, ": expected weights of ", info().name,
            " that fit a block, got H = ", H);
    return plan;
  }

  // Runs as many directions as `grid` is to run and can, from the first on: launch(sides, how many,
  // plan, space) for both at once where they fit the device together, else for each.
  template <class T_, class Side, class Launch>
  int64_t run_grid(const cuda::RecurrentKernels<T_>& kernels, bool backward, const Side* sides,
                   const Launch& launch) const {
    if (way == kStep || !kernels.grid_forward) return 0;
    const cuda::DeviceLimits found = limits();
    const auto& size = kernels.size;
    int64_t done = 0;
    for (int64_t together = D; together >= 1 && done < D; --together) {
      const cuda::GridPlan plan = cuda::plan_grid(size, H, B, together, backward, found);
      const int64_t clocks = plan.clocks * (D / together);
      if (!plan.units) continue;
      if (way != kGrid && clocks >= cuda::step_clocks(size, H, B, D, found)) continue;
      while (done < D) {
        const int64_t exchange = together * 2 * B * plan.row * size.bytes;
        const int64_t counters = together * plan.tiles * cuda::kArrivedStride * 4;
        const Tensor space = torch::stable::new_zeros(
            like, torch::headeronly::IntHeaderOnlyArrayRef({exchange + counters}),
            ScalarType::Byte);
        char* at = static_cast<char*>(space.mutable_data_ptr());
        const char* error = launch(sides + done, int(together), plan,
                                   {at, reinterpret_cast<uint32_t*>(at + exchange)});
        if (error == cuda::kNotTogether) break;
        succeeded(error);
        done += together;
      }
    }
    return done;
  }
  // What is left for `step`, if anything: `done` directions are not.
  int64_t taken(int64_t done) const {
    require(way != kGrid || done == D, "fastseq.", op, ": expected weights of ", info().name,
            " that fit the device at once, got H = ", H);
    return done == D ? kGrid : kStep;
  }
  void succeeded(const char* error) const { require(!error, "fastseq.", op, ": ", error); }
};

}  // namespace

int64_t recurrent_cuda_fwd(int64_t cell, int64_t way, int64_t stream, int64_t T, Tensor zx,
                           Tensors w_hh, Tensors b_hh, Tensors params, Tensors masks,
                           OptionalTensor first, OptionalTensor lengths, OptionalTensor resets,
                           Tensor h, OptionalTensor c, Tensor y, OptionalTensor saved) {
  const char* op = "recurrent_cuda_fwd";
  require(cell >= 0 && cell < cuda::recurrent_kernel_count() && h.dim() == 3, "fastseq.", op,
          ": expected a cell and h of shape [D, B, H]");
  const int64_t D = h.size(0), B = h.size(1), H = h.size(2), tokens = zx.size(0);
  const Call call{op,     cell,
                  way,    reinterpret_cast<void*>(stream),
                  T,      B,
                  H,      D,
                  tokens, biases_of(cell),
                  zx,     w_hh,
                  params, masks,
                  first,  lengths,
                  resets};
  const CellInfo& info = call.info();
  const ScalarType type = zx.scalar_type();
  call.check();
  check_device(op, "zx", zx, zx, type, {tokens, D * info.gates * H});
  check_device(op, "h", h, zx, type, {D, B, H});
  check_device(op, "y", y, zx, type, {tokens, D * H});
  if (saved) check_device(op, "saved", *saved, zx, type, {D, tokens, info.saved * H});
  if (info.states == 2) check_device(op, "c", c.value(), zx, wide_type(zx), {D, B, H});
  for (const Tensor& b : b_hh) check_device(op, "b_hh", b, zx, type, {H});
  require(b_hh.empty() || int64_t(b_hh.size()) == D, "fastseq.", op, ": expected D biases");

  int64_t taken = kStep;
  by_device_dtype(zx, [&](auto zero) {
    using T_ = decltype(zero);
    using W = cuda::Wide<T_>;
    const auto& kernels = cuda::recurrent_kernels<T_>(int(cell));
    cuda::Forward<T_> sides[2]{};
    for (int64_t d = 0; d < D; ++d) {
      cuda::Forward<T_>& a = sides[d];
      call.fill(a, d);
      a.zx = read<T_>(zx) + d * info.gates * H;
      a.zx_row = D * info.gates * H;
      a.b_hh = b_hh.empty() ? nullptr : read<T_>(b_hh[size_t(d)]);
      a.h = write<T_>(h) + d * B * H;
      a.c = info.states == 2 ? write<W>(*c) + d * B * H : nullptr;
      a.y = write<T_>(y) + d * H;
      a.y_row = D * H;
      a.saved = saved ? write<T_>(*saved) + d * tokens * info.saved * H : nullptr;
    }
    const cuda::WholePlan plan = call.plan(kernels, false);
    if (plan.rows) {
      taken = kWhole;
      return call.succeeded(kernels.whole_forward(sides, int(D), plan, call.stream));
    }
    if (B == 0 || H == 0) return;
    const int64_t done = call.run_grid(
        kernels, false, sides, [&](auto* some, int many, auto& how, cuda::GridSpace space) {
          return kernels.grid_forward(some, many, how, space, call.stream);
        });
    taken = call.taken(done);
    if (done == D) return;
    const Tensor zh = scratch(h, type, {B, info.gates * H});
    for (int64_t d = done; d < D; ++d) {
      cuda::Forward<T_>& a = sides[d];
      Tensor wide = scratch(h, wide_type(zx), {B, H});
      const Tensor state = torch::stable::select(h, 0, d);
      const Tensor by = torch::stable::transpose(w_hh[size_t(d)], 0, 1);
      torch::stable::copy_(wide, state);
      a.zh = read<T_>(zh);
      a.h_wide = write<W>(wide);
      for (int64_t step = 0; step < T; ++step) {
        multiply(state, by, zh);
        call.succeeded(kernels.step_forward(a, d ? T - 1 - step : step, call.stream));
      }
    }
  });
  return taken;
}

int64_t recurrent_cuda_bwd(int64_t cell, int64_t way, int64_t stream, int64_t T, int64_t B,
                           Tensor saved, OptionalTensor dy, OptionalTensor dh_n,
                           OptionalTensor dc_n, OptionalTensor h0, OptionalTensor c0, Tensors w_hh,
                           Tensors params, Tensors masks, OptionalTensor first,
                           OptionalTensor lengths, OptionalTensor resets, Tensor dsums,
                           OptionalTensor hidden, OptionalTensor dh0, OptionalTensor dc0) {
  const char* op = "recurrent_cuda_bwd";
  require(cell >= 0 && cell < cuda::recurrent_kernel_count() && saved.dim() == 3 && !w_hh.empty() &&
              w_hh[0].dim() == 2,
          "fastseq.", op, ": expected a cell and saved of shape [D, N, S*H]");
  const int64_t D = saved.size(0), tokens = saved.size(1), H = w_hh[0].size(1);
  const Call call{op,     cell,
                  way,    reinterpret_cast<void*>(stream),
                  T,      B,
                  H,      D,
                  tokens, biases_of(cell),
                  saved,  w_hh,
                  params, masks,
                  first,  lengths,
                  resets};
  const CellInfo& info = call.info();
  const ScalarType type = saved.scalar_type();
  call.check();
  check_device(op, "saved", saved, saved, type, {D, tokens, info.saved * H});
  if (dy) check_device(op, "dy", *dy, saved, type, {tokens, D * H});
  if (hidden) check_device(op, "hidden", *hidden, saved, type, {D, tokens, H});
  for (const OptionalTensor* state : {&dh_n, &dc_n, &h0, &c0, &dh0, &dc0}) {
    if (*state) check_device(op, "a state", **state, saved, type, {D, B, H});
  }
  require(!dh0 || dc0.has_value() == (info.states == 2), "fastseq.", op,
          ": expected dc0 beside dh0 of a cell with two states");

  int64_t taken = kStep;
  by_device_dtype(saved, [&](auto zero) {
    using T_ = decltype(zero);
    using W = cuda::Wide<T_>;
    const auto& kernels = cuda::recurrent_kernels<T_>(int(cell));
    const int64_t blocks = kernels.blocks;
    check_device(op, "dsums", dsums, saved, type, {tokens, D * blocks * H});
    cuda::Backward<T_> sides[2]{};
    for (int64_t d = 0; d < D; ++d) {
      cuda::Backward<T_>& a = sides[d];
      const auto state = [&](const OptionalTensor& t) {
        return t ? read<T_>(*t) + d * B * H : nullptr;
      };
      call.fill(a, d);
      a.saved = read<T_>(saved) + d * tokens * info.saved * H;
      a.dy = dy ? read<T_>(*dy) + d * H : nullptr;
      a.dy_row = D * H;
      a.dh_n = state(dh_n);
      a.dc_n = state(dc_n);
      a.h0 = state(h0);
      a.c0 = state(c0);
      a.dsums = write<T_>(dsums) + d * blocks * H;
      a.dsums_row = D * blocks * H;
      a.hidden = hidden ? write<T_>(*hidden) + d * tokens * H : nullptr;
      a.dh0 = const_cast<T_*>(state(dh0));
      a.dc0 = const_cast<T_*>(state(dc0));
    }
    const cuda::WholePlan plan = call.plan(kernels, true);
    if (plan.rows) {
      taken = kWhole;
      return call.succeeded(kernels.whole_backward(sides, int(D), plan, call.stream));
    }
    if (B == 0 || H == 0) return;
    const int64_t done = call.run_grid(
        kernels, true, sides, [&](auto* some, int many, auto& how, cuda::GridSpace space) {
          return kernels.grid_backward(some, many, how, space, call.stream);
        });
    taken = call.taken(done);
    if (done == D) return;
    const Tensor dh = scratch(saved, type, {B, H}), dz = scratch(saved, type, {B, info.gates * H});
    const Tensor dc = scratch(saved, wide_type(saved), {B, H});
    const Tensor carry = scratch(saved, wide_type(saved), {B, H});
    for (int64_t d = done; d < D; ++d) {
      cuda::Backward<T_>& a = sides[d];
      a.dh = read<T_>(dh);
      a.dz = write<T_>(dz);
      a.dc = write<W>(dc);
      a.carry = write<W>(carry);
      for (int64_t step = 0; step < T; ++step) {
        call.succeeded(kernels.step_backward(a, d ? step : T - 1 - step, false, call.stream));
        if (step + 1 < T || dh0) multiply(dz, w_hh[size_t(d)], dh);
      }
      if (dh0) call.succeeded(kernels.step_backward(a, d ? T : -1, true, call.stream));
    }
  });
  return taken;
}

}  // namespace ops
}  // namespace fastseq

#if defined(FASTSEQ_ON_HOST)
#define FASTSEQ_KEY CPU
#else
#define FASTSEQ_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(fastseq, FASTSEQ_KEY, m) {
  m.impl("recurrent_cuda_fwd", TORCH_BOX(&fastseq::ops::recurrent_cuda_fwd));
  m.impl("recurrent_cuda_bwd", TORCH_BOX(&fastseq::ops::recurrent_cuda_bwd));
}

#endif

#if !defined(FASTSEQ_ON_HOST)

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq, m) {
  m.def(
      "recurrent_cuda_fwd(int cell, int way, int stream, int T, Tensor zx, Tensor[] w_hh, "
      "Tensor[] b_hh, Tensor[] params, Tensor[] masks, Tensor? first, Tensor? lengths, "
      "Tensor? resets, Tensor(a!) h, Tensor(b!)? c, Tensor(c!) y, Tensor(d!)? saved) -> int");
  m.def(
      "recurrent_cuda_bwd(int cell, int way, int stream, int T, int B, Tensor saved, Tensor? dy, "
      "Tensor? dh_n, Tensor? dc_n, Tensor? h0, Tensor? c0, Tensor[] w_hh, Tensor[] params, "
      "Tensor[] masks, Tensor? first, Tensor? lengths, Tensor? resets, Tensor(a!) dsums, "
      "Tensor(b!)? hidden, Tensor(c!)? dh0, Tensor(d!)? dc0) -> int");
}

#endif
