// Which kernels this processor runs.
#include "kernels.hpp"

namespace deepspeed {

std::vector<const Kernels*> supported_kernels() {
    std::vector<const Kernels*> kernels{&portable_kernels};
#ifdef DEEPSPEED_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2) kernels.push_back(&avx2_kernels);
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        kernels.push_back(&avx512_kernels);
#endif
    return kernels;
}

const Kernels*& active_kernels() {
    static const Kernels* kernels = supported_kernels().back();
    return kernels;
}

}  // namespace deepspeed
