#include "recurrent.h"

#include <ATen/record_function.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <utility>

#include "../functions.h"

namespace fastseq {
namespace eager {

PyObject* backward_by_reference = nullptr;

namespace {

using torch::autograd::AutogradContext;

ops::Tensor stable(const at::Tensor& t) {
  return ops::Tensor(torch::aot_inductor::new_tensor_handle(at::Tensor(t)));
}
ops::OptionalTensor stable_if_any(const at::Tensor& t) {
  return t.defined() ? ops::OptionalTensor(stable(t)) : ops::OptionalTensor();
}
ops::Tensors stable(const std::vector<at::Tensor>& tensors) {
  ops::Tensors out;
  out.reserve(tensors.size());
  for (const at::Tensor& t : tensors) out.push_back(stable(t));
  return out;
}
at::Tensor unstable(const ops::Tensor& t) {
  return *torch::aot_inductor::tensor_handle_to_tensor_pointer(t.get());
}

ops::Tensors run_forward(const Settings& s, const Inputs& in, bool save) {
  RECORD_FUNCTION("fastseq::recurrent_fwd", std::vector<c10::IValue>());
  const at::AutoDispatchBelowAutograd no_autograd;
  return ops::recurrent_fwd(s.cell, stable(in.x), stable_if_any(in.h0), stable_if_any(in.c0),
                            stable(in.weights), s.has_biases, s.directions,
                            stable_if_any(s.batch_sizes), stable_if_any(s.lengths),
                            stable_if_any(s.resets), stable(s.masks), save);
}

// What autograd keeps of a call, and how it is laid out in the context's saved variables.
struct Kept {
  Settings settings;
  Inputs inputs;
  at::Tensor saved;  // by the kernel, or undefined: it runs forward again

  static constexpr size_t kWeights = 7;

  void put_into(AutogradContext* ctx) const {
    const Settings& s = settings;
    variable_list all{inputs.x, inputs.h0, inputs.c0, saved, s.batch_sizes, s.lengths, s.resets};
    all.insert(all.end(), inputs.weights.begin(), inputs.weights.end());
    all.insert(all.end(), s.masks.begin(), s.masks.end());
    ctx->save_for_backward(std::move(all));
    ctx->saved_data["settings"] =
        std::vector<int64_t>{s.cell, s.directions, s.has_biases, int64_t(inputs.weights.size())};
  }
  static Kept taken_from(AutogradContext* ctx) {
    const std::vector<int64_t> numbers = ctx->saved_data["settings"].toIntVector();
    const variable_list all = ctx->get_saved_variables();
    const auto weights = all.begin() + kWeights, masks = weights + numbers[3];
    return {{numbers[0],
             numbers[1],
             numbers[2] != 0,
             false,
             all[4],
             all[5],
             all[6],
             {masks, all.end()}},
            {all[0], all[1], all[2], {weights, masks}},
            all[3]};
  }
};

struct Recurrent : torch::autograd::Function<Recurrent> {
  // `tracked`: the defined tensors of `in`, in its order.
  static variable_list forward(AutogradContext* ctx, const Settings& settings, const Inputs& in,
                               at::TensorList tracked) {
    (void)tracked;
    ops::Tensors out = run_forward(settings, in, !settings.recompute);
    ctx->set_materialize_grads(false);
    Kept kept{settings, in, {}};
    if (!settings.recompute) {
      kept.saved = unstable(out.back());
      out.pop_back();
    }
    kept.put_into(ctx);
    variable_list results;
    for (const ops::Tensor& t : out) results.push_back(unstable(t));
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    Kept kept = Kept::taken_from(ctx);
    const Settings& s = kept.settings;
    const Inputs& in = kept.inputs;
    size_t edges = 0;
    const auto wanted = [&](const at::Tensor& t) {
      return t.defined() && ctx->needs_input_grad(edges++);
    };
    const bool need_dx = wanted(in.x), need_h0 = wanted(in.h0), need_c0 = wanted(in.c0);
    std::vector<bool> need;
    for (const at::Tensor& w : in.weights) need.push_back(wanted(w));
    // dy, which a single step has none of, dh_n, dc_n.
    variable_list given(3);
    const bool one_step = in.x.dim() == 2 && !s.batch_sizes.defined();
    bool plain = true;
    for (size_t i = 0; i < cotangents.size(); ++i) {
      if (!cotangents[i].defined()) continue;
      at::Tensor& t = given[i + one_step] = cotangents[i].resolve_neg();
      // (Every tensor has the key of autocast, in force or not.)
      plain = plain && only_plain(t.key_set() - c10::autocast_dispatch_keyset) &&
              !torch::autograd::isFwGradDefined(t);
    }

    variable_list out(2);  // of settings and inputs: none
    if (at::GradMode::is_enabled() || !plain) {
      const variable_list found =
          by_reference(s, in, {need_dx, need_h0, need_c0}, need, cotangents);
      out.push_back(found[0]);
      for (size_t i : {1, 2}) {
        if ((i == 1 ? in.h0 : in.c0).defined()) out.push_back(found[i]);
      }
      out.insert(out.end(), found.begin() + 3, found.end());
      return out;
    }
    if (!kept.saved.defined()) kept.saved = unstable(run_forward(s, in, true).back());

    const size_t per_direction = in.weights.size() / size_t(s.directions);
    const auto is_bias = [&](size_t i) {
      return s.has_biases && (i % per_direction == 2 || i % per_direction == 3);
    };
    bool need_dw = false, need_db = false;
    for (size_t i = 0; i < need.size(); ++i) (is_bias(i) ? need_db : need_dw) |= need[i];
    RECORD_FUNCTION("fastseq::recurrent_bwd", std::vector<c10::IValue>());
    const at::AutoDispatchBelowAutograd no_autograd;
    const ops::Tensors grads = ops::recurrent_bwd(
        s.cell, stable_if_any(given[0]), stable_if_any(given[1]), stable_if_any(given[2]),
        stable(in.x), stable_if_any(in.h0), stable_if_any(in.c0), stable(in.weights), s.has_biases,
        s.directions, stable_if_any(s.batch_sizes), stable_if_any(s.lengths),
        stable_if_any(s.resets), stable(s.masks), stable(kept.saved), need_dx, need_dw, need_db,
        need_h0 || need_c0);
    // The gradients asked for come in order; states' both or neither.
    size_t next = 0;
    size_t of_weights = 0;
    for (size_t i = 0; i < need.size(); ++i) of_weights += is_bias(i) ? need_db : need_dw;
    const size_t of_states = grads.size() - need_dx - of_weights;
    out.push_back(need_dx ? unstable(grads[next++]) : at::Tensor());
    if (in.h0.defined()) out.push_back(need_h0 ? unstable(grads[next]) : at::Tensor());
    if (in.c0.defined()) out.push_back(need_c0 ? unstable(grads[next + 1]) : at::Tensor());
    next += of_states;
    for (size_t i = 0; i < need.size(); ++i) {
      const bool made = is_bias(i) ? need_db : need_dw;
      out.push_back(made ? unstable(grads[next++]) : at::Tensor());
      if (!need[i]) out.back() = at::Tensor();
    }
    return out;
  }

  static variable_list by_reference(const Settings& s, const Inputs& in,
                                    std::initializer_list<bool> need_states,
                                    const std::vector<bool>& need_weights,
                                    const variable_list& cotangents) {
    const py::gil_scoped_acquire gil;
    const auto listed = [](const std::vector<at::Tensor>& tensors) {
      py::list out;
      for (const at::Tensor& t : tensors) out.append(object_of(t));
      return out;
    };
    py::list need, inputs = listed({in.x, in.h0, in.c0});
    for (bool n : need_states) need.append(n);
    for (bool n : need_weights) need.append(n);
    for (const at::Tensor& w : in.weights) inputs.append(object_of(w));
    const auto settings =
        py::make_tuple(s.cell, s.has_biases, s.directions, object_of(s.batch_sizes),
                       object_of(s.lengths), object_of(s.resets), py::tuple(listed(s.masks)));
    const auto arguments = py::make_tuple(settings, need, inputs, listed(cotangents));
    const auto found = py::reinterpret_steal<py::list>(
        PyObject_CallObject(backward_by_reference, arguments.ptr()));
    if (!found) {
      python_error error;
      error.persist();
      throw error;
    }
    variable_list out;
    for (const py::handle t : found) {
      out.push_back(t.is_none() ? at::Tensor() : THPVariable_Unpack(t.ptr()));
    }
    return out;
  }
};

}  // namespace

variable_list run_layer(const Settings& settings, const Inputs& in) {
  variable_list tracked;
  tracked.reserve(3 + in.weights.size());
  bool requires_grad = false;
  const auto track = [&](const at::Tensor& t) {
    if (!t.defined()) return;
    requires_grad = requires_grad || t.requires_grad();
    tracked.push_back(t);
  };
  for (const at::Tensor* t : {&in.x, &in.h0, &in.c0}) track(*t);
  for (const at::Tensor& w : in.weights) track(w);
  if (requires_grad && at::GradMode::is_enabled()) {
    return Recurrent::apply(settings, in, at::TensorList(tracked));
  }
  variable_list out;
  for (const ops::Tensor& t : run_forward(settings, in, false)) out.push_back(unstable(t));
  return out;
}

}  // namespace eager
}  // namespace fastseq
