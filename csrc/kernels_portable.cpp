#define KERNELS_NAME portable
#define KERNELS_TABLE portable_kernels
#include "kernels.inl"
