// fastseq::recurrent_cuda_fwd and fastseq::recurrent_cuda_bwd: the part of a recurrent layer on a
// GPU that goes from step to step. fastseq/ops/recurrent_cuda.py makes the rest of it, products
// over all tokens, and documents the arguments.
#include "recurrent_cuda.h"

#if defined(FASTSEQ_HAVE_CUDA) || defined(FASTSEQ_ON_HOST)

namespace fastseq {
namespace ops {

int64_t recurrent_cuda_fwd(int64_t cell, int64_t way, int64_t stream, int64_t T, Tensor zx,
                           Tensors w_hh, Tensors b_hh, Tensors params, Tensors masks,
                           OptionalTensor first, OptionalTensor lengths, OptionalTensor resets,
                           Tensor h, OptionalTensor c, Tensor y, OptionalTensor saved, Tensors w_hr,
                           Tensors keep, OptionalTensor raw, OptionalTensor handed) {
  const char* op = "recurrent_cuda_fwd";
  require(cell >= 0 && cell < cuda::recurrent_kernel_count() && h.dim() == 3, "fastseq.", op,
          ": expected a cell and h of shape [D, B, H]");
  const bool projected = !w_hr.empty();
  require(!projected || (raw && raw->dim() == 3), "fastseq.", op, ": expected raw beside w_hr");
  const int64_t D = h.size(0), B = h.size(1), P = h.size(2), tokens = zx.size(0);
  const int64_t H = projected ? raw->size(2) : P;
  const Call call{op,     cell,
                  way,    reinterpret_cast<void*>(stream),
                  T,      B,
                  H,      D,
                  tokens, biases_of(cell),
                  zx,     w_hh,
                  params, masks,
                  first,  lengths,
                  resets, w_hr,
                  keep};
  const CellInfo& info = call.info();
  const ScalarType type = zx.scalar_type();
  call.check();
  check_device(op, "zx", zx, zx, type, {tokens, D * info.gates * H});
  check_device(op, "h", h, zx, type, {D, B, P});
  check_device(op, "y", y, zx, type, {tokens, D * P});
  if (saved) check_device(op, "saved", *saved, zx, type, {D, tokens, info.saved * H});
  if (projected) check_device(op, "raw", *raw, zx, type, {D, tokens, H});
  if (handed) check_device(op, "handed", *handed, zx, type, {D, tokens, P});
  if (info.states == 2) check_device(op, "c", c.value(), zx, wide_type(zx), {D, B, H});
  for (const Tensor& b : b_hh) check_device(op, "b_hh", b, zx, type, {H});
  require(b_hh.empty() || int64_t(b_hh.size()) == D, "fastseq.", op, ": expected D biases");

  int64_t taken = cuda::kStep;
  if (B == 0 || H == 0) return taken;
  by_device_dtype(zx, [&](auto zero) {
    using T_ = decltype(zero);
    using W = cuda::Wide<T_>;
    const auto& kernels = cuda::recurrent_kernels<T_>(int(cell));
    const auto& projecting = cuda::projection_kernels<T_>();
    cuda::Forward<T_> sides[2]{}, projections[2]{};
    for (int64_t d = 0; d < D; ++d) {
      cuda::Forward<T_>&a = sides[d], &p = projections[d];
      call.fill(a, d);
      a.zx = read<T_>(zx) + d * info.gates * H;
      a.zx_row = D * info.gates * H;
      a.b_hh = b_hh.empty() ? nullptr : read<T_>(b_hh[size_t(d)]);
      a.c = info.states == 2 ? write<W>(*c) + d * B * H : nullptr;
      a.saved = saved ? write<T_>(*saved) + d * tokens * info.saved * H : nullptr;
      if (projected) {
        call.fill_projection(p, d);
        a.y = write<T_>(*raw) + d * tokens * H;
        a.y_row = H;
        p.saved = handed ? write<T_>(*handed) + d * tokens * P : nullptr;
      }
      // What hands on is the last of the two.
      cuda::Forward<T_>& last = projected ? p : a;
      last.h = write<T_>(h) + d * B * P;
      last.y = write<T_>(y) + d * P;
      last.y_row = D * P;
    }
    int64_t done = 0;
    taken = call.run_sequences(
        kernels, false, &done,
        [&](auto& plan) { return kernels.whole_forward(sides, int(D), plan, call.stream); },
        [&](int64_t from, int many, auto& plan, auto space) {
          return kernels.grid_forward(sides + from, many, plan, space, call.stream);
        });
    if (done == D) return;
    const Tensor zh = scratch(h, type, {B, info.gates * H});
    const Tensor none = zeros(h, type, {projected ? B : 0, P});
    const Tensor by_token = scratch(h, type, {projected ? tokens : 0, P});
    for (int64_t d = done; d < D; ++d) {
      cuda::Forward<T_>&a = sides[d], &p = projections[d];
      const Tensor state = torch::stable::select(h, 0, d);
      const Tensor by = torch::stable::transpose(w_hh[size_t(d)], 0, 1);
      const bool reads_h = projected || kernels.reads_h;
      Tensor wide = scratch(h, wide_type(zx), {reads_h ? B : 0, P});
      if (reads_h) torch::stable::copy_(wide, state);
      a.zh = read<T_>(zh);
      a.h_wide = write<W>(wide);
      Tensor own, own_wide, by_hr;
      if (projected) {
        own = zeros(h, type, {B, H});
        own_wide = zeros(h, wide_type(zx), {B, H});
        by_hr = torch::stable::transpose(w_hr[size_t(d)], 0, 1);
        a.h = write<T_>(own);
        a.h_wide = write<W>(own_wide);
        p.h_wide = write<W>(wide);
        p.zx = read<T_>(by_token);
        p.zx_row = P;
        p.zh = read<T_>(none);
      }
      for (int64_t step = 0; step < T; ++step) {
        const int64_t t = d ? T - 1 - step : step;
        multiply(state, by, zh);
        call.succeeded(kernels.step_forward(a, t, call.stream));
        if (!projected) continue;
        // (The state of a row may be cut at its end, what it hands on not.)
        multiply(call.rows(torch::stable::select(*raw, 0, d), t), by_hr, call.rows(by_token, t));
        call.succeeded(projecting.step_forward(p, t, call.stream));
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
                           OptionalTensor hidden, OptionalTensor dh0, OptionalTensor dc0,
                           Tensors w_hr, Tensors keep, OptionalTensor handed,
                           OptionalTensor dhanded) {
  const char* op = "recurrent_cuda_bwd";
  require(cell >= 0 && cell < cuda::recurrent_kernel_count() && saved.dim() == 3 && !w_hh.empty() &&
              w_hh[0].dim() == 2,
          "fastseq.", op, ": expected a cell and saved of shape [D, N, S*H]");
  const bool projected = !w_hr.empty();
  require(!projected || w_hr[0].dim() == 2, "fastseq.", op, ": expected w_hr of shape [P, H]");
  const int64_t D = saved.size(0), tokens = saved.size(1), P = w_hh[0].size(1);
  const int64_t H = projected ? w_hr[0].size(1) : P;
  const Call call{op,     cell,
                  way,    reinterpret_cast<void*>(stream),
                  T,      B,
                  H,      D,
                  tokens, biases_of(cell),
                  saved,  w_hh,
                  params, masks,
                  first,  lengths,
                  resets, w_hr,
                  keep};
  const CellInfo& info = call.info();
  const ScalarType type = saved.scalar_type();
  call.check();
  check_device(op, "saved", saved, saved, type, {D, tokens, info.saved * H});
  if (dy) check_device(op, "dy", *dy, saved, type, {tokens, D * P});
  if (hidden) check_device(op, "hidden", *hidden, saved, type, {D, tokens, P});
  for (const OptionalTensor* state : {&dh_n, &h0, &dh0}) {
    if (*state) check_device(op, "a state", **state, saved, type, {D, B, P});
  }
  for (const OptionalTensor* state : {&dc_n, &c0, &dc0}) {
    if (*state) check_device(op, "a cell state", **state, saved, type, {D, B, H});
  }
  if (projected) {
    check_device(op, "handed", handed.value(), saved, type, {D, tokens, P});
    check_device(op, "dhanded", dhanded.value(), saved, type, {D, tokens, P});
  }
  require(!dh0 || dc0.has_value() == (info.states == 2), "fastseq.", op,
          ": expected dc0 beside dh0 of a cell with two states");

  int64_t taken = cuda::kStep;
  by_device_dtype(saved, [&](auto zero) {
    using T_ = decltype(zero);
    using W = cuda::Wide<T_>;
    const auto& kernels = cuda::recurrent_kernels<T_>(int(cell));
    const auto& projecting = cuda::projection_kernels<T_>();
    const int64_t blocks = kernels.blocks;
    check_device(op, "dsums", dsums, saved, type, {tokens, D * blocks * H});
    if (B == 0 || H == 0) return;
    cuda::Backward<T_> sides[2]{}, projections[2]{};
    for (int64_t d = 0; d < D; ++d) {
      cuda::Backward<T_>&a = sides[d], &p = projections[d];
      const auto state = [&](const OptionalTensor& t, int64_t width) {
        return t ? read<T_>(*t) + d * B * width : nullptr;
      };
      call.fill(a, d);
      a.saved = read<T_>(saved) + d * tokens * info.saved * H;
      a.dc_n = state(dc_n, H);
      a.c0 = state(c0, H);
      a.dc0 = const_cast<T_*>(state(dc0, H));
      a.dsums = write<T_>(dsums) + d * blocks * H;
      a.dsums_row = D * blocks * H;
      if (projected) {
        call.fill_projection(p, d);
        p.saved = read<T_>(*handed) + d * tokens * P;
        p.dsums = write<T_>(*dhanded) + d * tokens * P;
        p.dsums_row = P;
      }
      cuda::Backward<T_>& last = projected ? p : a;
      last.dy = dy ? read<T_>(*dy) + d * P : nullptr;
      last.dy_row = D * P;
      last.dh_n = state(dh_n, P);
      last.h0 = state(h0, P);
      last.hidden = hidden ? write<T_>(*hidden) + d * tokens * P : nullptr;
      last.dh0 = const_cast<T_*>(state(dh0, P));
    }
    int64_t done = 0;
    taken = call.run_sequences(
        kernels, true, &done,
        [&](auto& plan) { return kernels.whole_backward(sides, int(D), plan, call.stream); },
        [&](int64_t from, int many, auto& plan, auto space) {
          return kernels.grid_backward(sides + from, many, plan, space, call.stream);
        });
    if (done == D) return;
    const Tensor dh = scratch(saved, type, {B, P}), dz = scratch(saved, type, {B, info.gates * H});
    const Tensor dc = scratch(saved, wide_type(saved), {B, H});
    const Tensor carry = scratch(saved, wide_type(saved), {B, H});
    // Of a projection: what reaches h by it, and what no product hands to the cell itself.
    const int64_t some = projected ? B : 0;
    const Tensor dp = scratch(saved, type, {some, P}), none = zeros(saved, type, {some, H});
    const Tensor carry_p = scratch(saved, wide_type(saved), {some, P});
    const Tensor unwanted = scratch(saved, type, {some, H});
    const Tensor draw = scratch(saved, type, {projected ? tokens : 0, H});
    for (int64_t d = done; d < D; ++d) {
      cuda::Backward<T_>&a = sides[d], &p = projections[d];
      a.dh = read<T_>(dh);
      a.dz = write<T_>(dz);
      a.dc = write<W>(dc);
      a.carry = write<W>(carry);
      if (projected) {
        p.dh = read<T_>(dh);
        p.dz = write<T_>(dp);
        p.carry = write<W>(carry_p);
        a.dh = read<T_>(none);
        a.dy = read<T_>(draw);
        a.dy_row = H;
        a.dh0 = dh0 ? write<T_>(unwanted) : nullptr;
      }
      for (int64_t step = 0; step < T; ++step) {
        const int64_t t = d ? step : T - 1 - step;
        if (projected) {
          call.succeeded(projecting.step_backward(p, t, false, call.stream));
          multiply(dp, w_hr[size_t(d)], call.rows(draw, t));
        }
        call.succeeded(kernels.step_backward(a, t, false, call.stream));
        if (step + 1 < T || dh0) multiply(dz, w_hh[size_t(d)], dh);
      }
      if (!dh0) continue;
      const int64_t beyond = d ? T : -1;
      if (projected) call.succeeded(projecting.step_backward(p, beyond, true, call.stream));
      call.succeeded(kernels.step_backward(a, beyond, true, call.stream));
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
      "Tensor? resets, Tensor(a!) h, Tensor(b!)? c, Tensor(c!) y, Tensor(d!)? saved, "
      "Tensor[] w_hr, Tensor[] keep, Tensor(e!)? raw, Tensor(f!)? handed) -> int");
  m.def(
      "recurrent_cuda_bwd(int cell, int way, int stream, int T, int B, Tensor saved, Tensor? dy, "
      "Tensor? dh_n, Tensor? dc_n, Tensor? h0, Tensor? c0, Tensor[] w_hh, Tensor[] params, "
      "Tensor[] masks, Tensor? first, Tensor? lengths, Tensor? resets, Tensor(a!) dsums, "
      "Tensor(b!)? hidden, Tensor(c!)? dh0, Tensor(d!)? dc0, Tensor[] w_hr, Tensor[] keep, "
      "Tensor? handed, Tensor(e!)? dhanded) -> int");
}

#endif
