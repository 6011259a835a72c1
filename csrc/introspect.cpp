// A C interface for `fastseq doctor`, tests and benchmarks: which kernels there are, and single
// kernels called by instruction set. Called through ctypes, so that one library serves every
// Python.
#include <chrono>
#include <cstring>

#include "cpu/dispatch.h"
#include "cpu/support/tiles.h"
#include "cuda/recurrent/recurrent.h"

#define FASTSEQ_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

const fastseq::Kernels* find(const char* isa) {
  for (int i = 0; i < fastseq::built_count(); ++i) {
    if (std::strcmp(isa, fastseq::built(i).isa) == 0 && fastseq::machine_has(i)) {
      return &fastseq::built(i);
    }
  }
  return nullptr;
}

}  // namespace

FASTSEQ_EXPORT const char* fastseq_isa() { return fastseq::kernels().isa; }
FASTSEQ_EXPORT const char* fastseq_isa_reason() { return fastseq::isa_reason(); }
#if defined(__clang__)
FASTSEQ_EXPORT const char* fastseq_compiler() { return __VERSION__; }
#else
FASTSEQ_EXPORT const char* fastseq_compiler() { return "GCC " __VERSION__; }
#endif
FASTSEQ_EXPORT int fastseq_use_isa(const char* isa) { return fastseq::use_isa(isa); }
FASTSEQ_EXPORT int fastseq_built_count() { return fastseq::built_count(); }
FASTSEQ_EXPORT const char* fastseq_built_isa(int i) { return fastseq::built(i).isa; }
FASTSEQ_EXPORT int fastseq_machine_has(int i) { return fastseq::machine_has(i); }

// How products of bfloat16 are made in tiles: "amx", "emulated" or "off", and why.
FASTSEQ_EXPORT const char* fastseq_tiles() { return fastseq::tiles_name(); }
FASTSEQ_EXPORT const char* fastseq_tiles_reason() { return fastseq::tiles_reason(); }
FASTSEQ_EXPORT int fastseq_use_tiles(const char* name) { return fastseq::use_tiles(name); }
// One product as csrc/cpu/support/tiles.h lays it out. Returns 0, or 1 where the way is "off".
FASTSEQ_EXPORT int fastseq_multiply_tiles(const uint16_t* a, const uint16_t* b, int64_t blocks,
                                          int rows, int columns, int parts, float* out) {
  const fastseq::MultiplyTiles multiply = fastseq::multiply_tiles();
  if (!multiply) return 1;
  multiply({a, b, blocks, rows, columns, parts, out});
  return 0;
}

// The cells that recurrent_fwd knows, by number.
FASTSEQ_EXPORT int fastseq_cell_count() { return fastseq::cell_count(); }
FASTSEQ_EXPORT const char* fastseq_cell_name(int cell) { return fastseq::cell_info(cell).name; }
FASTSEQ_EXPORT int fastseq_cell_gates(int cell) { return fastseq::cell_info(cell).gates; }
FASTSEQ_EXPORT int fastseq_cell_states(int cell) { return fastseq::cell_info(cell).states; }
FASTSEQ_EXPORT int fastseq_cell_saved(int cell) { return fastseq::cell_info(cell).saved; }
FASTSEQ_EXPORT int fastseq_cell_params(int cell) { return fastseq::cell_info(cell).params; }
FASTSEQ_EXPORT int fastseq_cell_masks(int cell) { return fastseq::cell_info(cell).masks; }

// Whether the GPU's kernels are built in, and why they can't run here: null where there is a
// device.
//
// And which way (kStep, kWhole, kGrid of recurrent.h, or kNone) a layer of `bytes` an element would
// take from step to step on a device of such limits, which need not be here.
#if defined(FASTSEQ_HAVE_CUDA)
FASTSEQ_EXPORT int fastseq_cuda_built() { return 1; }
FASTSEQ_EXPORT int fastseq_cuda_way(int cell, int bytes, int wanted, int64_t H, int64_t B,
                                    int64_t D, int backward, int multiprocessors, int shared) {
  using namespace fastseq::cuda;
  const auto choose = [&](const auto& k) {
    const DeviceLimits limits{multiprocessors, shared, true};
    return choose_way(k.size, k.whole_forward, wanted, H, B, D, D, backward != 0, limits).way;
  };
  if (bytes == 8) return choose(recurrent_kernels<double>(cell));
  return bytes == 4 ? choose(recurrent_kernels<float>(cell))
                    : choose(recurrent_kernels<Half>(cell));
}
FASTSEQ_EXPORT const char* fastseq_cuda_obstacle() {
  const char* error = nullptr;
  fastseq::cuda::device_count(&error);
  return error;
}
#else
FASTSEQ_EXPORT int fastseq_cuda_built() { return 0; }
FASTSEQ_EXPORT int fastseq_cuda_way(int, int, int, int64_t, int64_t, int64_t, int, int, int) {
  return -1;
}
FASTSEQ_EXPORT const char* fastseq_cuda_obstacle() { return "built without nvcc"; }
#endif

// y[i] = f(x[i]) for i in [0, n). `function`: 0 sigmoid, 1 tanh. Returns 0, or 1 for an instruction
// set that is not here.
FASTSEQ_EXPORT int fastseq_map_f32(const char* isa, int function, const float* x, float* y,
                                   int64_t n) {
  const fastseq::Kernels* k = find(isa);
  if (!k) return 1;
  (function ? k->basic.f32->tanh : k->basic.f32->sigmoid)(x, y, n);
  return 0;
}
FASTSEQ_EXPORT int fastseq_map_f64(const char* isa, int function, const double* x, double* y,
                                   int64_t n) {
  const fastseq::Kernels* k = find(isa);
  if (!k) return 1;
  (function ? k->basic.f64->tanh : k->basic.f64->sigmoid)(x, y, n);
  return 0;
}

// C = A B for contiguous A [M, K], B [K, N], C [M, N], on the calling thread.
FASTSEQ_EXPORT int fastseq_gemm_f32(const char* isa, const float* a, const float* b, float* c,
                                    int64_t M, int64_t N, int64_t K) {
  const fastseq::Kernels* k = find(isa);
  if (!k) return 1;
  const fastseq::Gemm<float> g{M,       N, K, a,     K, 1, nullptr, b,       N,
                               nullptr, c, N, false, 0, 0, nullptr, nullptr, {}};
  k->basic.f32->gemm(g, fastseq::Threads{1, nullptr});
  return 0;
}

// The float32 FLOP/s one core reaches in fused multiply-adds on registers alone: the best of the
// stretches that fit into `seconds`, at least one. Negative for an instruction set that is not
// here.
FASTSEQ_EXPORT double fastseq_peak_flops_f32(const char* isa, double seconds) {
  const fastseq::Kernels* k = find(isa);
  if (!k) return -1;
  using Clock = std::chrono::steady_clock;
  // 1.2 million FMAs: about half a millisecond, long for the clock and short for the scheduler.
  const int64_t rounds = 100000;
  const double flop = 2.0 * double(rounds) * fastseq::kPeakChains * (k->machine.vector_bytes / 4);
  double best = 0;
  volatile float used = 0;
  const auto start = Clock::now();
  auto now = start;
  do {
    const auto before = Clock::now();
    used = used + k->machine.peak_f32(rounds);
    now = Clock::now();
    const double rate = flop / std::chrono::duration<double>(now - before).count();
    if (rate > best) best = rate;
  } while (std::chrono::duration<double>(now - start).count() < seconds);
  return best;
}
