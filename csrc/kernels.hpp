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
    float second;         // 1 / sqrt(1 - beta2^step), or 1 without bias correction
    float eps;
    float step_size;      // -lr / (1 - beta1^step)
};

// Those of a step of Lion and of Adagrad (lion_step and adagrad_step in reference.py).
struct LionNumbers {
    float grad_scale;
    float decay;  // 1 - lr * weight_decay
    float lr;
    float beta1;
    float beta2;
    float one_minus_beta1;
    float one_minus_beta2;
};

struct AdagradNumbers {
    float grad_scale;
    float l2;         // weight_decay
    float eps;
    float step_size;  // lr / (1 + (step - 1) * lr_decay)
};

// What every optimizer step reads and writes beside its states, which are fp32: param, in place; out, in another dtype, or
// null. numel elements each.
struct StepTensors {
    void* param;
    Dtype param_dtype;
    const void* grad;
    Dtype grad_dtype;
    void* out;
    Dtype out_dtype;
    std::size_t numel;
};

// A generator of random numbers: 624 words, of which those before next have been drawn.
struct RandomState {
    std::uint32_t words[624];
    std::size_t next;
};

// The 8-bit codes, for magnitudes alone and with a sign, as packing.py makes them.
struct Code {
    float thresholds[8];
    float slopes[8];
    float offsets[8];
    float values[256];
};

struct CodeBook {
    Code eight;
    Code seven;
};

// Whether fp32 `bits` are just between two bf16 numbers, of which the upper one is even. NaN has none beside it.
static inline bool is_tie(std::uint32_t bits) {
    return (bits & 0x1FFFFu) == 0x18000u && (bits & 0x7FFFFFFFu) <= 0x7F800000u;
}

struct Kernels {
    const char* name;
    void (*adam_step)(const StepTensors& tensors, float* exp_avg, float* exp_avg_sq, const AdamNumbers& numbers);
    void (*lion_step)(const StepTensors& tensors, float* exp_avg, const LionNumbers& numbers);
    void (*adagrad_step)(const StepTensors& tensors, float* sum, const AdagradNumbers& numbers);
    // out = or += scale * (inputs[0] + inputs[1] + ...) over elements [begin, end).
    void (*scaled_sum)(const void* const* inputs, std::size_t count, Dtype dtype, void* out, Dtype out_dtype,
                       std::size_t begin, std::size_t end, float scale, bool accumulate);
    double (*squared_sum)(const void* data, Dtype dtype, std::size_t numel);
    // out: fp32 or bf16. fused: with a multiply-add of one rounding.
    void (*uniform)(RandomState& state, void* out, Dtype dtype, std::size_t numel, float low, float high, bool fused);
    // out: fp32 or bf16, at least 16 elements.
    void (*normal)(RandomState& state, void* out, Dtype dtype, std::size_t numel, float mean, float deviation);
    // Of whole blocks, but for the last.
    void (*quantize)(const float* values, std::uint8_t* codes, float* scales, std::size_t numel, const CodeBook& book);
    void (*dequantize)(const std::uint8_t* codes, const float* scales, float* values, std::size_t numel,
                       const CodeBook& book);
    std::size_t (*split)(const float* values, std::uint16_t* high, std::uint16_t* low, std::size_t numel);
    void (*merge)(const std::uint16_t* high, const std::uint16_t* low, float* values, std::size_t numel);
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
