#define FASTSEQ_VECTOR_BYTES 64
#define FASTSEQ_TABLE kKernelsAvx512
#define FASTSEQ_ISA_NAME "avx512"
#include "kernels.inl"
