// What there is to run on. Loads and answers without a driver.
#include <cuda_runtime.h>

#include "../recurrent/recurrent.h"

namespace fastseq {
namespace cuda {

int device_count(const char** error) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) count = 0;
  *error = status != cudaSuccess ? cudaGetErrorString(status) : count == 0 ? "no device" : nullptr;
  return count;
}

DeviceLimits device_limits(int device, const char** error) {
  DeviceLimits limits{};
  cudaError_t status =
      cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess) {
    status =
        cudaDeviceGetAttribute(&limits.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  int cooperative = 0;
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  }
  limits.cooperative = cooperative != 0;
  *error = status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  return status == cudaSuccess ? limits : DeviceLimits{};
}

}  // namespace cuda
}  // namespace fastseq
