#include "tensors.h"

#include <pthread.h>

namespace fastseq {
namespace ops {

namespace {

Tensor empty_of(const Tensor& like, std::initializer_list<int64_t> sizes, int32_t dtype) {
  constexpr size_t kMaxDims = 4;
  int64_t strides[kMaxDims];
  require(sizes.size() <= kMaxDims, "fastseq: too many dimensions");
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes.begin()[i] > 0 ? sizes.begin()[i] : 1;
  }
  int32_t device_type, device_index;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides,
                                                  dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

}  // namespace

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty_of(like, sizes, dtype);
}

Tensor empty_int64(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return empty_of(like, sizes, aoti_torch_dtype_int64());
}

namespace {
bool is_forked_child = false;
const int at_fork = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });
}  // namespace

Threads torch_threads() {
  uint32_t count = 1;
  // OpenMP waits forever for the threads its parent had: a forked child stays on one.
  if (!is_forked_child) TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&count));
  return {int(count), [](int64_t tasks, Threads::Task task, void* context) {
            TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, tasks, 1, task, context));
          }};
}

Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

Tensor with_contiguous_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

void check_tensor(const char* op, const char* argument, const Tensor& t, const Tensor& like,
                  std::initializer_list<int64_t> sizes) {
  bool same = t.dim() == int64_t(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) {
    same = sizes.begin()[i] < 0 || t.size(int64_t(i)) == sizes.begin()[i];
  }
  if (same && t.scalar_type() == like.scalar_type() && t.is_cpu()) return;
  std::ostringstream text;
  text << "fastseq." << op << ": expected " << argument << " of shape [";
  for (size_t i = 0; i < sizes.size(); ++i) {
    text << (i ? ", " : "");
    if (sizes.begin()[i] < 0) {
      text << "any";
    } else {
      text << sizes.begin()[i];
    }
  }
  text << "] on the CPU in the dtype of the input, got [";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << "]" << (t.scalar_type() == like.scalar_type() ? "" : " in another dtype")
       << (t.is_cpu() ? "" : " on another device");
  throw std::runtime_error(text.str());
}

}  // namespace ops
}  // namespace fastseq
