#define FASTSEQ_VECTOR_BYTES 32
#define FASTSEQ_TABLE kKernelsAvx2
#define FASTSEQ_ISA_NAME "avx2"
#include "kernels.inl"
