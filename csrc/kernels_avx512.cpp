#define KERNELS_NAME avx512
#define KERNELS_TABLE avx512_kernels
#include "kernels.inl"
