#define FASTSEQ_VECTOR_BYTES 16
#define FASTSEQ_TABLE kKernelsScalar
#define FASTSEQ_ISA_NAME "scalar"
#include "kernels.inl"
