// fastseq._eager: recurrent layers called from eager Python, with their place in autograd's graph.
//
// The registered ops (csrc/ops/recurrent.cpp) serve every caller; on the way to them, the
// dispatcher's boxes and an autograd function in Python take ten times as long as a small layer.
// Here the same functions are called at once. That takes torch's C++ API, which is that of one
// version of torch and Python: a module of its own, loaded where both are what it was built for.
// What is anything but plain CPU tensors in eager mode is refused, for the registered ops to run.
// This module also reads torch's switches of precision for them.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <utility>
#include <vector>

#include "../functions.h"

namespace fastseq {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// fastseq.ops.recurrent.Settings, in its order.
struct Settings {
  int64_t cell, directions;
  bool has_biases, recompute;
  at::Tensor batch_sizes, lengths, resets;
  std::vector<at::Tensor> masks;
};

// What a layer is given; states that are absent are undefined.
struct Inputs {
  at::Tensor x, h0, c0;
  std::vector<at::Tensor> weights;
};

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

PyObject* in_python(const at::Tensor& t) {
  if (!t.defined()) Py_RETURN_NONE;
  return THPVariable_Wrap(t);
}
py::object object_of(const at::Tensor& t) {
  return py::reinterpret_steal<py::object>(in_python(t));
}

// Whether autograd and the CPU are all that the dispatcher would find by these keys.
bool only_plain(c10::DispatchKeySet keys) {
  constexpr c10::DispatchKeySet kPlain =
      c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                           c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::BackendSelect});
  return (keys.raw_repr() & ~kPlain.raw_repr()) == 0;
}

// fastseq.ops.recurrent's gradients by autograd through the reference.
PyObject* backward_by_reference = nullptr;

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

// Tensors as Python hands them over, as long as all are of torch's own class.
class Taken {
 public:
  at::Tensor operator()(PyObject* object) {
    if (object == Py_None) return {};
    if (!THPVariable_CheckExact(object)) {
      plain_ = false;
      return {};
    }
    const at::Tensor& t = THPVariable_Unpack(object);
    keys_ = keys_ | t.key_set();
    dual_ = dual_ || torch::autograd::isFwGradDefined(t);
    return t;
  }
  std::vector<at::Tensor> all(PyObject* sequence) {
    std::vector<at::Tensor> out;
    if (!PyList_Check(sequence) && !PyTuple_Check(sequence)) {
      plain_ = false;
      return out;
    }
    const Py_ssize_t n = PySequence_Fast_GET_SIZE(sequence);
    out.reserve(size_t(n));
    for (Py_ssize_t i = 0; i < n; ++i)
      out.push_back((*this)(PySequence_Fast_GET_ITEM(sequence, i)));
    return out;
  }
  // No subclass, no mode, no transform, no tracing, no autocast.
  bool plain() const {
    const auto local = c10::impl::tls_local_dispatch_key_set();
    return plain_ && !dual_ && only_plain((keys_ | local.included_) - local.excluded_) &&
           !at::impl::torch_function_mode_enabled();
  }

 private:
  c10::DispatchKeySet keys_;
  bool plain_ = true, dual_ = false;
};

bool take(PyObject* object, Taken& taken, Settings& s) {
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 8) return false;
  const auto item = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(object, i); };
  s.cell = PyLong_AsLongLong(item(0));
  s.has_biases = PyObject_IsTrue(item(1));
  s.directions = PyLong_AsLongLong(item(2));
  s.batch_sizes = taken(item(3));
  s.lengths = taken(item(4));
  s.resets = taken(item(5));
  s.masks = taken.all(item(6));
  s.recompute = PyObject_IsTrue(item(7));
  return !PyErr_Occurred();
}

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
  const py::gil_scoped_release no_gil;
  if (requires_grad && at::GradMode::is_enabled()) {
    return Recurrent::apply(settings, in, at::TensorList(tracked));
  }
  variable_list out;
  for (const ops::Tensor& t : run_forward(settings, in, false)) out.push_back(unstable(t));
  return out;
}

// run(settings, x, h0, c0, weights): what fastseq.ops.recurrent.run returns, or None.
PyObject* run(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 5, "fastseq._eager.run: expected 5 arguments, got ", count);
  Taken taken;
  Settings settings;
  if (!take(arguments[0], taken, settings)) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }
  const Inputs in{taken(arguments[1]), taken(arguments[2]), taken(arguments[3]),
                  taken.all(arguments[4])};
  if (!taken.plain()) Py_RETURN_NONE;
  const variable_list out = run_layer(settings, in);
  PyObject* list = PyList_New(Py_ssize_t(out.size()));
  for (size_t i = 0; i < out.size(); ++i) PyList_SET_ITEM(list, i, in_python(out[i]));
  return list;
  END_HANDLE_TH_ERRORS
}

// What a module calls, beyond a layer's settings.
struct Stack {
  bool cell, batch_first, two_states;
  int64_t layers;
  double dropout;               // between layers, 0 where none is drawn
  at::Tensor sorted, unsorted;  // of packed input: its sequences' order and back, or undefined

  // Packed input has batch_sizes in `s`.
  bool packed(const Settings& s) const { return s.batch_sizes.defined(); }
};

// Whether x [T, B, I] (or [B, T, I], packed [N, I], or of a cell [B, I]), the states where they are
// given, and the weights are what the kernels take.
bool fit(const Settings& settings, const Stack& stack, const Inputs& in, bool stateful) {
  const bool packed = stack.packed(settings);
  if (!in.x.defined() || in.x.dim() != (stack.cell || packed ? 2 : 3)) return false;
  const size_t n = in.weights.size();
  if (n < 2 || stack.layers < 1 || n % size_t(stack.layers)) return false;
  const at::Tensor &x = in.x, &w_ih = in.weights[0], &w_hh = in.weights[1];
  for (const at::Tensor& w : in.weights) {
    if (!w.defined() || w.scalar_type() != x.scalar_type()) return false;
  }
  if ((x.scalar_type() != at::kFloat && x.scalar_type() != at::kDouble) || w_ih.dim() != 2 ||
      w_hh.dim() != 2 || x.size(-1) != w_ih.size(1)) {
    return false;
  }
  const at::Tensor& sizes = settings.batch_sizes;
  if (packed && (sizes.dim() != 1 || sizes.scalar_type() != at::kLong)) return false;
  if (packed ? sizes.size(0) == 0 : x.size(stack.batch_first ? 1 : 0) == 0) return false;
  if (!stateful) return true;
  const int64_t B = packed ? *sizes.const_data_ptr<int64_t>() : x.size(stack.batch_first ? 0 : -2);
  const auto is_state = [&](const at::Tensor& t, int64_t width) {
    return t.defined() && t.dim() == (stack.cell ? 2 : 3) && t.size(-1) == width &&
           t.size(-2) == B && (stack.cell || t.size(0) == stack.layers * settings.directions) &&
           t.scalar_type() == x.scalar_type();
  };
  // (Every cell with two states has four gates.)
  return is_state(in.h0, w_hh.size(1)) && (!stack.two_states || is_state(in.c0, w_ih.size(0) / 4));
}

// The order of a packed input's sequences, for states [L*D, B, ..] and back.
void reorder(at::Tensor& state, const at::Tensor& order) {
  if (state.defined() && order.defined()) state = state.index_select(1, order);
}

// Layer after layer: y (but of a cell), and the final states of all.
variable_list run_stack(const Settings& settings, const Stack& stack, const Inputs& in) {
  if (stack.layers == 1) return run_layer(settings, in);
  const size_t per_layer = in.weights.size() / size_t(stack.layers);
  Inputs now{in.x, {}, {}, {}};
  variable_list finals[2];
  for (int64_t i = 0; i < stack.layers; ++i) {
    const auto of_layer = [&](const at::Tensor& states) {
      const int64_t D = settings.directions;
      return states.defined() ? states.narrow(0, i * D, D) : at::Tensor();
    };
    const auto first = in.weights.begin() + std::ptrdiff_t(size_t(i) * per_layer);
    now = {now.x, of_layer(in.h0), of_layer(in.c0), {first, first + std::ptrdiff_t(per_layer)}};
    const variable_list out = run_layer(settings, now);
    now.x = out[0];
    if (stack.dropout > 0 && i + 1 < stack.layers) now.x = at::dropout(now.x, stack.dropout, true);
    for (int k = 0; k <= stack.two_states; ++k) finals[k].push_back(out[size_t(k) + 1]);
  }
  variable_list out{now.x};
  for (int k = 0; k <= stack.two_states; ++k) out.push_back(at::cat(finals[k]));
  return out;
}

PyObject* states_in_python(const at::Tensor* states, bool two) {
  if (!two) return in_python(states[0]);
  return PyTuple_Pack(2, object_of(states[0]).ptr(), object_of(states[1]).ptr());
}

// layer(settings, states, input, hx, weights, batch_first, layers, dropout[, batch_sizes,
// sorted_indices, unsorted_indices]): what a module returns of input, or of the rows of packed
// input, or, where batch_first is None, a cell; None where anything is not as it should be or not
// for here.
PyObject* layer(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 8 || count == 11,
                   "fastseq._eager.layer: expected 8 or 11 arguments, got ", count);
  Taken taken;
  Settings settings;
  PyObject *hx = arguments[3], *by_row = arguments[5];
  Stack stack{by_row == Py_None,
              by_row == Py_True,
              PyLong_AsLong(arguments[1]) == 2,
              PyLong_AsLongLong(arguments[6]),
              PyFloat_AsDouble(arguments[7]),
              {},
              {}};
  if (PyErr_Occurred() || !take(arguments[0], taken, settings)) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }
  if (count == 11) {
    settings.batch_sizes = taken(arguments[8]);
    stack.sorted = taken(arguments[9]);
    stack.unsorted = taken(arguments[10]);
  }
  const bool stateful = hx != Py_None, pair = stateful && stack.two_states;
  if (pair && !((PyTuple_Check(hx) || PyList_Check(hx)) && PySequence_Fast_GET_SIZE(hx) == 2)) {
    Py_RETURN_NONE;
  }
  Inputs in{taken(arguments[2]), taken(pair ? PySequence_Fast_GET_ITEM(hx, 0) : hx),
            taken(pair ? PySequence_Fast_GET_ITEM(hx, 1) : Py_None), taken.all(arguments[4])};
  if (!taken.plain() || !fit(settings, stack, in, stateful)) Py_RETURN_NONE;
  if (stack.packed(settings) && !stateful) {
    // Whose rows tell how many sequences there are.
    const int64_t B = *settings.batch_sizes.const_data_ptr<int64_t>();
    const int64_t cells = stack.layers * settings.directions;
    in.h0 = at::zeros({cells, B, in.weights[1].size(1)}, in.x.options());
  }
  reorder(in.h0, stack.sorted);
  reorder(in.c0, stack.sorted);
  if (stack.batch_first) in.x = in.x.transpose(0, 1);
  variable_list out = run_stack(settings, stack, in);
  if (stack.cell) return states_in_python(out.data(), stack.two_states);
  if (stack.batch_first) out[0] = out[0].transpose(0, 1);
  for (size_t i = 1; i < out.size(); ++i) reorder(out[i], stack.unsorted);
  PyObject* result = PyTuple_New(2);
  PyTuple_SET_ITEM(result, 0, in_python(out[0]));
  PyTuple_SET_ITEM(result, 1, states_in_python(&out[1], stack.two_states));
  return result;
  END_HANDLE_TH_ERRORS
}

PyObject* on_backward_by_reference(PyObject*, PyObject* function) {
  Py_INCREF(function);
  Py_XSETREF(backward_by_reference, function);
  Py_RETURN_NONE;
}

template <class F>
PyCFunction fast_call(F f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(f));
}

PyMethodDef methods[] = {{"run", fast_call(&run), METH_FASTCALL, nullptr},
                         {"layer", fast_call(&layer), METH_FASTCALL, nullptr},
                         {"on_backward_by_reference", &on_backward_by_reference, METH_O, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "fastseq._eager",
                          nullptr,
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

// torch.backends.mkldnn.rnn.fp32_precision; where that is "none", what
// torch.set_float32_matmul_precision sets for products on the CPU.
int parts_by_switches() {
  const at::Context& torch = at::globalContext();
  auto precision = torch.float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::RNN);
  if (precision == at::Float32Precision::NONE) {
    precision = torch.float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  }
  return precision == at::Float32Precision::BF16   ? 1
         : precision == at::Float32Precision::TF32 ? 2
                                                   : 0;
}

}  // namespace
}  // namespace fastseq

PyMODINIT_FUNC PyInit__eager() {
  fastseq::ops::allowed_parts = fastseq::parts_by_switches;
  return PyModule_Create(&fastseq::definition);
}
