// fastseq._eager: what fastseq/nn and fastseq/ops call of it. What is anything but plain CPU
// tensors in eager mode is refused, for the registered ops to run. This module also reads torch's
// switches of precision for them.
#include <ATen/Context.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include <utility>

#include "../functions.h"
#include "recurrent.h"

namespace fastseq {
namespace eager {
namespace {

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
  variable_list out;
  {
    const py::gil_scoped_release no_gil;
    out = run_layer(settings, in);
  }
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
};

// Whether x [T, B, I] (or [B, T, I], packed [N, I], or of a cell [B, I]), the states where they are
// given, and the weights are what the kernels take.
bool fit(const Settings& settings, const Stack& stack, const Inputs& in, bool stateful) {
  const bool packed = settings.packed();
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

// Layer after layer, as fastseq.functional.rnn.stack: y (but of a cell), and the final states of
// all.
variable_list run_layers(const Settings& settings, const Stack& stack, const Inputs& in) {
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
    if (stack.dropout != 0 && i + 1 < stack.layers) now.x = at::dropout(now.x, stack.dropout, true);
    for (int k = 0; k <= stack.two_states; ++k) finals[k].push_back(out[size_t(k) + 1]);
  }
  variable_list out{now.x};
  for (int k = 0; k <= stack.two_states; ++k) out.push_back(at::cat(finals[k]));
  return out;
}

// The same of a module's input: packed rows in their own order, batch_first.
variable_list run_module(const Settings& settings, const Stack& stack, Inputs in) {
  const py::gil_scoped_release no_gil;
  reorder(in.h0, stack.sorted);
  reorder(in.c0, stack.sorted);
  if (settings.packed() && !in.h0.defined()) {
    // Whose rows tell how many sequences there are.
    const int64_t B = *settings.batch_sizes.const_data_ptr<int64_t>();
    const int64_t cells = stack.layers * settings.directions;
    in.h0 = at::zeros({cells, B, in.weights[1].size(1)}, in.x.options());
  }
  if (stack.batch_first) in.x = in.x.transpose(0, 1);
  variable_list out = run_layers(settings, stack, in);
  if (stack.batch_first) out[0] = out[0].transpose(0, 1);
  for (size_t i = 1; i < out.size(); ++i) reorder(out[i], stack.unsorted);
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
  const variable_list out = run_module(settings, stack, std::move(in));
  if (stack.cell) return states_in_python(out.data(), stack.two_states);
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
}  // namespace eager
}  // namespace fastseq

PyMODINIT_FUNC PyInit__eager() {
  fastseq::ops::allowed_parts = fastseq::eager::parts_by_switches;
  return PyModule_Create(&fastseq::eager::definition);
}
