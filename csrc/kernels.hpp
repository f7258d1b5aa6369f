// The kernels as the dispatcher sees them: one table of functions per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace deepspeed {

// float64 is summed between ranks, and nothing else is done with it.
enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

// Bytes of one element.
constexpr std::size_t size_of(Dtype dtype) {
    return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// The numbers of one Adam step, already combined (see adam_step in reference.py for the formula).
struct AdamNumbers {
    float grad_scale;     // multiplies the gradient first
    float decay;          // decoupled: 1 - lr * weight_decay; otherwise 1
    float l2;             // L2: weight_decay; otherwise 0
    float beta2;
    float one_minus_beta1;
    float one_minus_beta2;
    float second;         // sqrt(1 - beta2^step), or 1 without bias correction
    float eps;
    float step_size;      // -lr / (1 - beta1^step)
};

struct Kernels {
    const char* name;
    // param, exp_avg, exp_avg_sq: fp32, in place; out: 16 bit, or null.
    void (*adam_step)(float* param, const void* grad, Dtype grad_dtype, float* exp_avg, float* exp_avg_sq, void* out,
                      Dtype out_dtype, std::size_t numel, const AdamNumbers& numbers);
    // out = or += scale * (inputs[0] + inputs[1] + ...) over elements [begin, end).
    void (*scaled_sum)(const void* const* inputs, std::size_t count, Dtype dtype, void* out, Dtype out_dtype,
                       std::size_t begin, std::size_t end, float scale, bool accumulate);
    double (*squared_sum)(const void* data, Dtype dtype, std::size_t numel);
};

extern const Kernels portable_kernels;
#ifdef DEEPSPEED_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

// Those that this processor can run, slowest first.
std::vector<const Kernels*> supported_kernels();
// Those in use.
const Kernels*& active_kernels();

}  // namespace deepspeed
