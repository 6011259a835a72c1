// Recurrent layers called from eager Python, with their place in autograd's graph.
//
// The registered ops (csrc/ops/recurrent.cpp) serve every caller; on the way to them, the
// dispatcher's boxes and an autograd function in Python take ten times as long as a small layer.
// Here the same functions are called at once. That takes torch's C++ API, which is that of one
// version of torch and Python: a module of its own, loaded where both are what it was built for.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <vector>

namespace fastseq {
namespace eager {

using torch::autograd::variable_list;

// fastseq.ops.recurrent.Settings, in its order.
struct Settings {
  int64_t cell, directions;
  bool has_biases, recompute;
  at::Tensor batch_sizes, lengths, resets;
  std::vector<at::Tensor> masks;

  bool packed() const { return batch_sizes.defined(); }
};

// What a layer is given; states that are absent are undefined.
struct Inputs {
  at::Tensor x, h0, c0;
  std::vector<at::Tensor> weights;
};

// y (but of a single step), h_n and, of cells with two states, c_n; differentiable. Without
// Python's lock.
variable_list run_layer(const Settings& settings, const Inputs& in);

// fastseq.ops.recurrent's gradients by autograd through the reference, for run_layer's backward
// pass.
extern PyObject* backward_by_reference;

// Whether autograd and the CPU are all that the dispatcher would find by these keys.
inline bool only_plain(c10::DispatchKeySet keys) {
  constexpr c10::DispatchKeySet kPlain =
      c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                           c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::BackendSelect});
  return (keys.raw_repr() & ~kPlain.raw_repr()) == 0;
}

inline PyObject* in_python(const at::Tensor& t) {
  if (!t.defined()) Py_RETURN_NONE;
  return THPVariable_Wrap(t);
}
inline py::object object_of(const at::Tensor& t) {
  return py::reinterpret_steal<py::object>(in_python(t));
}

}  // namespace eager
}  // namespace fastseq
