// Small helpers between torch's stable ABI and the kernels' raw pointers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "../cpu/support/threads.h"

namespace fastseq {
namespace ops {

using OptionalTensor = std::optional<torch::stable::Tensor>;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// A new contiguous tensor of like's dtype and device, uninitialised.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes);
// The same of int64.
Tensor empty_int64(const Tensor& like, std::initializer_list<int64_t> sizes);

// torch's own thread pool and thread count.
Threads torch_threads();

// The tensor itself where its last dimension is contiguous, else a contiguous copy.
Tensor with_contiguous_rows(const Tensor& t);
Tensor as_contiguous(const Tensor& t);

// RuntimeError "fastseq.<op>: expected <argument> of shape [..], got [..]" unless shapes, dtype and
// device agree; sizes of -1 match anything.
void check_tensor(const char* op, const char* argument, const Tensor& t, const Tensor& like,
                  std::initializer_list<int64_t> sizes);

// RuntimeError of the parts put together, unless `holds`; unlike torch's own check it names no
// file.
template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <class T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}
template <class T>
const T* read(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}
template <class T>
T* write(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// f(double{}) for a float64 tensor, else f(float{}): the dtypes that CPU kernels have.
template <class F>
void by_dtype(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Double) {
    f(double{});
  } else {
    f(float{});
  }
}

}  // namespace ops
}  // namespace fastseq
