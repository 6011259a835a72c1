/* A CUDA driver without a GPU: every call succeeds and does nothing; launches are counted. With it
 * Triton compiles and launches as it would, so that the time this takes on the host can be measured
 * and the calls be looked at. Signatures: only what the callers below pass. */
#include <stddef.h>
#include <stdint.h>

static long launches, asked, others;

long stub_launches(void) { return launches; }
/* How often the driver was asked to whom an address belongs. */
long stub_asked(void) { return asked; }
/* Calls of anything but a launch, or a look at which context is current. */
long stub_others(void) { return others; }

int cuInit(unsigned flags) { return others++, 0; }
int cuDriverGetVersion(int *version) { return others++, *version = 13000, 0; }
int cuGetErrorString(int code, const char **text) { return others++, *text = "stub", 0; }
int cuDeviceGet(int *device, int index) { return others++, *device = index, 0; }
/* 97 and 8: shared memory of a block; 10: threads of a warp; 16: multiprocessors. */
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  others++;
  *value = attribute == 97 || attribute == 8 ? 232448 : attribute == 10 ? 32 : attribute == 16 ? 132 : 1024;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { return others++, *context = (void *)1, 0; }
int cuCtxGetCurrent(void **context) { return *context = (void *)1, 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetDevice(int *device) { return *device = 0, 0; }
int cuCtxGetLimit(size_t *value, int limit) { return *value = 0, 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuModuleLoadData(void **module, const void *image) { return others++, *module = (void *)2, 0; }
int cuModuleUnload(void *module) { return others++, 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { return others++, *function = (void *)3, 0; }
/* 0: threads of a block at most. */
int cuFuncGetAttribute(int *value, int attribute, void *function) { return others++, *value = attribute ? 0 : 1024, 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return others++, 0; }
int cuFuncSetCacheConfig(void *function, int config) { return others++, 0; }
int cuStreamIsCapturing(void *stream, int *status) { return others++, *status = 0, 0; }
int cuPointerGetAttribute(void *data, int attribute, uint64_t address) {
  others++;
  return asked++, *(uint64_t *)data = address, 0;
}
int cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) {
  return launches++, 0;
}
int cuOccupancyMaxActiveClusters(int *number, void *function, const void *config) { return others++, *number = 1, 0; }
int cuTensorMapEncodeTiled(void) { return others++, 1; }
int cuTensorMapEncodeIm2col(void) { return others++, 1; }
