// Starting a kernel on a stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastseq {
namespace cuda {

// More than 48 KiB of shared memory must be asked for.
template <class Kernel>
cudaError_t allow_shared(Kernel kernel, int shared) {
  if (shared <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
}

// How a kernel starts: with `together`, all blocks at once, or none.
inline cudaLaunchConfig_t launch_config(dim3 grid, dim3 block, int shared, void* stream,
                                        cudaLaunchAttribute* together) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = size_t(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  if (together) {
    together->id = cudaLaunchAttributeCooperative;
    together->val.cooperative = 1;
    config.attrs = together;
    config.numAttrs = 1;
  }
  return config;
}

// Null, or what went wrong. Waits for nothing; may be captured into a graph.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared, void* stream,
                   const Arguments&... arguments) {
  cudaError_t error = allow_shared(kernel, shared);
  if (error == cudaSuccess) {
    const cudaLaunchConfig_t config = launch_config(grid, block, shared, stream, nullptr);
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The same for blocks that wait for each other: `otherwise` where not all of them would run at
// once, by the occupancy of the whole device or by the launch itself (part of a device may be
// taken).
template <class... Parameters, class... Arguments>
const char* launch_together(const char* otherwise, void (*kernel)(Parameters...), dim3 grid,
                            dim3 block, int shared, void* stream, const Arguments&... arguments) {
  int device = 0, processors = 0, each = 0;
  cudaError_t error = allow_shared(kernel, shared);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, int(block.x), size_t(shared));
  }
  if (error == cudaSuccess) {
    if (int64_t(grid.x) * grid.y * grid.z > int64_t(each) * processors) return otherwise;
    cudaLaunchAttribute together{};
    const cudaLaunchConfig_t config = launch_config(grid, block, shared, stream, &together);
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
    if (error == cudaErrorCooperativeLaunchTooLarge) {
      cudaGetLastError();
      return otherwise;
    }
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace fastseq
