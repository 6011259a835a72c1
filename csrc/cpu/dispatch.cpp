#include "dispatch.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fastseq {

// The tables of a kernel file compiled for an instruction set; which of them are linked in is the
// build's choice (FASTSEQ_HAVE_*).
#define FASTSEQ_TABLES(isa)                                                       \
  namespace isa {                                                                 \
  extern const Machine kMachine;                                                  \
  extern const Part<BasicFunctions> kBasicPart;                                   \
  extern const Part<RecurrentFunctions> kRecurrentPart;                           \
  extern const Part<DecoderFunctions> kDecoderPart;                               \
  extern const Part<AttentionFunctions> kAttentionPart;                           \
  static const Kernels kKernels = {#isa,           kMachine,     kBasicPart,      \
                                   kRecurrentPart, kDecoderPart, kAttentionPart}; \
  }

FASTSEQ_TABLES(scalar)
#if defined(FASTSEQ_HAVE_AVX2)
FASTSEQ_TABLES(avx2)
#endif
#if defined(FASTSEQ_HAVE_AVX512)
FASTSEQ_TABLES(avx512)
#endif

namespace {

#if defined(__x86_64__) || defined(__i386__)
// __builtin_cpu_supports asks the processor and the operating system (saved registers) alike.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif
bool has_scalar() { return true; }

struct Choice {
  const Kernels* kernels;
  bool (*machine_has)();
};

const Choice kBuilt[] = {
    {&scalar::kKernels, has_scalar},
#if defined(FASTSEQ_HAVE_AVX2)
    {&avx2::kKernels, has_avx2},
#endif
#if defined(FASTSEQ_HAVE_AVX512)
    {&avx512::kKernels, has_avx512},
#endif
};
constexpr int kBuiltCount = sizeof(kBuilt) / sizeof(kBuilt[0]);

struct Active {
  const Kernels* kernels;
  char reason[256];

  Active() {
    int widest = 0;
    for (int i = 0; i < kBuiltCount; ++i) {
      if (kBuilt[i].machine_has()) widest = i;
    }
    kernels = kBuilt[widest].kernels;
    std::snprintf(reason, sizeof(reason), "the widest of those built that this machine has");
    const char* wanted = std::getenv("FASTSEQ_CPU_ISA");
    if (!wanted || !*wanted) return;
    for (int i = 0; i < kBuiltCount; ++i) {
      if (std::strcmp(wanted, kBuilt[i].kernels->isa) != 0) continue;
      if (i > widest) {
        std::snprintf(reason, sizeof(reason),
                      "FASTSEQ_CPU_ISA=%s asks for more than this machine has", wanted);
        return;
      }
      kernels = kBuilt[i].kernels;
      std::snprintf(reason, sizeof(reason), "FASTSEQ_CPU_ISA=%s", wanted);
      return;
    }
    std::snprintf(reason, sizeof(reason), "FASTSEQ_CPU_ISA=%.64s names no set that was built",
                  wanted);
  }
};

Active& active() {
  static Active instance;
  return instance;
}

}  // namespace

const Kernels& kernels() { return *__atomic_load_n(&active().kernels, __ATOMIC_RELAXED); }
int built_count() { return kBuiltCount; }
const Kernels& built(int i) { return *kBuilt[i].kernels; }
bool machine_has(int i) { return kBuilt[i].machine_has(); }

bool use_isa(const char* name) {
  for (int i = 0; i < kBuiltCount; ++i) {
    if (std::strcmp(name, kBuilt[i].kernels->isa) != 0) continue;
    if (!kBuilt[i].machine_has()) return false;
    __atomic_store_n(&active().kernels, kBuilt[i].kernels, __ATOMIC_RELAXED);
    std::snprintf(active().reason, sizeof(active().reason), "set by name");
    return true;
  }
  return false;
}

const char* isa_reason() { return active().reason; }

}  // namespace fastseq
