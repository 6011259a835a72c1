// Starting a kernel on a stream.
#pragma once

#include <cuda_runtime.h>

namespace fastseq {
namespace cuda {

// Null, or what went wrong. Waits for nothing; may be captured into a graph.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared, void* stream,
                   const Arguments&... arguments) {
  cudaError_t error = cudaSuccess;
  // More than 48 KiB must be asked for.
  if (shared > 48 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = size_t(shared);
    config.stream = static_cast<cudaStream_t>(stream);
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace fastseq
