#define KERNELS_NAME avx2
#define KERNELS_TABLE avx2_kernels
#include "kernels.inl"
