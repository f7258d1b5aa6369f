// The kernels themselves, included by one source file per instruction set, which sets KERNELS_NAME and KERNELS_TABLE.
//
// Everything is static and nothing comes from the C++ library: an inline function compiled here with AVX-512 must never be
// the copy that the linker keeps for the whole module. Data goes through blocks of BLOCK elements that stay in the L1
// cache: 16-bit types are widened into a block, the arithmetic runs on fp32 in loops that the compiler vectorizes, and the
// result is narrowed from a block. The kernels are bound by memory; the trips to L1 do not show.
#include <cmath>
#include <cstring>

#include "kernels.hpp"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define KERNELS_STRING_(name) #name
#define KERNELS_STRING(name) KERNELS_STRING_(name)

namespace deepspeed {
namespace {

constexpr std::size_t BLOCK = 512;
constexpr std::size_t LANES = 16;
// Elements that a step does at a time, and how far ahead of them it asks for memory. Measured: with this many streams at once
// the processor's own guesses leave a tenth of the bandwidth unused.
constexpr std::size_t STEP_BLOCK = 64;
constexpr std::size_t AHEAD = 256;
constexpr std::size_t LINE = 64;

inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Round to nearest, ties to even; any NaN becomes the quiet one.
inline std::uint16_t bfloat16_of(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<std::uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

inline float float_of_half(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
    const std::uint32_t magnitude = half & 0x7FFFu;
    if (magnitude >= 0x7C00u) return float_of(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
    // 2^112 moves the exponent from half's bias to float's and normalizes subnormals on the way, exactly.
    return float_of(sign | bits_of(float_of(magnitude << 13) * float_of(0x77800000u)));
}

inline std::uint16_t half_of(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return static_cast<std::uint16_t>(sign | 0x7E00u);
    if (magnitude >= 0x477FF000u) return static_cast<std::uint16_t>(sign | 0x7C00u);
    if (magnitude < 0x38800000u) {
        // Adding 0.5 leaves the bits of the subnormal, rounded by the adder, at the bottom of the significand.
        return static_cast<std::uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u));
    }
    const std::uint32_t rebiased = magnitude - 0x38000000u;
    return static_cast<std::uint16_t>(sign | ((rebiased + 0xFFFu + ((rebiased >> 13) & 1u)) >> 13));
}

void widen_half(const std::uint16_t* source, float* target, std::size_t numel) {
    std::size_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= numel; i += 8) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
        _mm256_storeu_ps(target + i, _mm256_cvtph_ps(halves));
    }
#endif
    for (; i < numel; ++i) target[i] = float_of_half(source[i]);
}

void narrow_half(const float* source, std::uint16_t* target, std::size_t numel) {
    std::size_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= numel; i += 8) {
        const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), halves);
    }
#endif
    for (; i < numel; ++i) target[i] = half_of(source[i]);
}

// Elements [start, start + numel) of data as fp32: where they lie if they are fp32, otherwise converted into block.
const float* widened(const void* data, Dtype dtype, std::size_t start, std::size_t numel, float* __restrict block) {
    if (dtype == Dtype::float32) return static_cast<const float*>(data) + start;
    const std::uint16_t* __restrict source = static_cast<const std::uint16_t*>(data) + start;
    if (dtype == Dtype::float16) {
        widen_half(source, block, numel);
    } else {
        for (std::size_t i = 0; i < numel; ++i) block[i] = float_of(static_cast<std::uint32_t>(source[i]) << 16);
    }
    return block;
}

void narrowed(const float* __restrict block, void* out, Dtype dtype, std::size_t start, std::size_t numel) {
    if (dtype == Dtype::float32) {
        std::memcpy(static_cast<float*>(out) + start, block, numel * sizeof(float));
    } else if (dtype == Dtype::float16) {
        narrow_half(block, static_cast<std::uint16_t*>(out) + start, numel);
    } else {
        std::uint16_t* __restrict target = static_cast<std::uint16_t*>(out) + start;
        for (std::size_t i = 0; i < numel; ++i) target[i] = bfloat16_of(block[i]);
    }
}

template <bool l2>
void adam_block(float* __restrict param, const float* __restrict grad, float* __restrict exp_avg,
                float* __restrict exp_avg_sq, std::size_t numel, const AdamNumbers numbers) {
    for (std::size_t i = 0; i < numel; ++i) {
        float g = grad[i] * numbers.grad_scale;
        if (l2) g += numbers.l2 * param[i];
        const float m = exp_avg[i] + numbers.one_minus_beta1 * (g - exp_avg[i]);
        const float v = exp_avg_sq[i] * numbers.beta2 + numbers.one_minus_beta2 * g * g;
        const float denominator = std::sqrt(v) * numbers.second + numbers.eps;
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        param[i] = param[i] * numbers.decay + numbers.step_size * (m / denominator);
    }
}

void lion_block(float* __restrict param, const float* __restrict grad, float* __restrict exp_avg, std::size_t numel,
                const LionNumbers numbers) {
    for (std::size_t i = 0; i < numel; ++i) {
        const float g = grad[i] * numbers.grad_scale;
        const float direction = exp_avg[i] * numbers.beta1 + g * numbers.one_minus_beta1;
        const float sign = (direction > 0.0f ? 1.0f : 0.0f) - (direction < 0.0f ? 1.0f : 0.0f);
        exp_avg[i] = exp_avg[i] * numbers.beta2 + g * numbers.one_minus_beta2;
        param[i] = param[i] * numbers.decay - sign * numbers.lr;
    }
}

void adagrad_block(float* __restrict param, const float* __restrict grad, float* __restrict sum, std::size_t numel,
                   const AdagradNumbers numbers) {
    for (std::size_t i = 0; i < numel; ++i) {
        const float g = grad[i] * numbers.grad_scale + param[i] * numbers.l2;
        const float s = sum[i] + g * g;
        sum[i] = s;
        param[i] = param[i] - g / (std::sqrt(s) + numbers.eps) * numbers.step_size;
    }
}

// Asks for the elements that a step comes to AHEAD elements after `start`. Memory beyond the end is not touched by that.
inline void prefetch(const void* data, Dtype dtype, std::size_t start) {
    const char* first = static_cast<const char*>(data) + (start + AHEAD) * size_of(dtype);
    for (std::size_t byte = 0; byte < STEP_BLOCK * size_of(dtype); byte += LINE) __builtin_prefetch(first + byte, 1);
}

// Calls step(param, grad, start, size), with fp32 blocks, for each block of tensors, whose states are `states`.
template <std::size_t count, typename Step>
void in_blocks(const StepTensors& tensors, float* const (&states)[count], const Step& step) {
    alignas(64) float grads[STEP_BLOCK];
    alignas(64) float params[STEP_BLOCK];
    for (std::size_t start = 0; start < tensors.numel; start += STEP_BLOCK) {
        const std::size_t size = tensors.numel - start < STEP_BLOCK ? tensors.numel - start : STEP_BLOCK;
        prefetch(tensors.param, tensors.param_dtype, start);
        prefetch(tensors.grad, tensors.grad_dtype, start);
        for (const float* state : states) prefetch(state, Dtype::float32, start);
        if (tensors.out) prefetch(tensors.out, tensors.out_dtype, start);
        const float* grad = widened(tensors.grad, tensors.grad_dtype, start, size, grads);
        // Where it is fp32 it is stepped where it lies.
        float* param = const_cast<float*>(widened(tensors.param, tensors.param_dtype, start, size, params));
        step(param, grad, start, size);
        if (param == params) narrowed(params, tensors.param, tensors.param_dtype, start, size);
        if (tensors.out) narrowed(param, tensors.out, tensors.out_dtype, start, size);
    }
}

void adam_step(const StepTensors& tensors, float* exp_avg, float* exp_avg_sq, const AdamNumbers& numbers) {
    const auto block = numbers.l2 != 0.0f ? adam_block<true> : adam_block<false>;
    in_blocks(tensors, {exp_avg, exp_avg_sq}, [&](float* param, const float* grad, std::size_t start, std::size_t size) {
        block(param, grad, exp_avg + start, exp_avg_sq + start, size, numbers);
    });
}

void lion_step(const StepTensors& tensors, float* exp_avg, const LionNumbers& numbers) {
    in_blocks(tensors, {exp_avg}, [&](float* param, const float* grad, std::size_t start, std::size_t size) {
        lion_block(param, grad, exp_avg + start, size, numbers);
    });
}

void adagrad_step(const StepTensors& tensors, float* sum, const AdagradNumbers& numbers) {
    in_blocks(tensors, {sum}, [&](float* param, const float* grad, std::size_t start, std::size_t size) {
        adagrad_block(param, grad, sum + start, size, numbers);
    });
}

void scaled_sum(const void* const* inputs, std::size_t count, Dtype dtype, void* out, Dtype out_dtype,
                std::size_t begin, std::size_t end, float scale, bool accumulate) {
    alignas(64) float total[BLOCK];
    alignas(64) float block[BLOCK];
    for (std::size_t start = begin; start < end; start += BLOCK) {
        const std::size_t size = end - start < BLOCK ? end - start : BLOCK;
        // The sum is complete before anything of out is written, so out may be one of the inputs.
        std::memcpy(total, widened(inputs[0], dtype, start, size, block), size * sizeof(float));
        for (std::size_t k = 1; k < count; ++k) {
            const float* addend = widened(inputs[k], dtype, start, size, block);
            for (std::size_t i = 0; i < size; ++i) total[i] += addend[i];
        }
        for (std::size_t i = 0; i < size; ++i) total[i] *= scale;
        if (accumulate) {
            const float* current = static_cast<const float*>(out) + start;
            for (std::size_t i = 0; i < size; ++i) total[i] += current[i];
        }
        narrowed(total, out, out_dtype, start, size);
    }
}

// The squares are exact in fp64; lane l adds up the elements l, l + LANES, ... so that the order is the same everywhere.
double squared_sum(const void* data, Dtype dtype, std::size_t numel) {
    alignas(64) float block[BLOCK];
    alignas(64) double lanes[LANES] = {};
    for (std::size_t start = 0; start < numel; start += BLOCK) {
        const std::size_t size = numel - start < BLOCK ? numel - start : BLOCK;
        const float* values = widened(data, dtype, start, size, block);
        const std::size_t whole = size - size % LANES;
        for (std::size_t i = 0; i < whole; i += LANES) {
            for (std::size_t lane = 0; lane < LANES; ++lane) {
                const double value = values[i + lane];
                lanes[lane] += value * value;
            }
        }
        for (std::size_t i = whole; i < size; ++i) {
            const double value = values[i];
            lanes[i - whole] += value * value;
        }
    }
    double total = 0.0;
    for (std::size_t lane = 0; lane < LANES; ++lane) total += lanes[lane];
    return total;
}

#include "random.inl"

#include "packing.inl"

}  // namespace

extern const Kernels KERNELS_TABLE = {
    KERNELS_STRING(KERNELS_NAME), adam_step, lion_step, adagrad_step, scaled_sum, squared_sum, uniform, normal,
    quantize, dequantize, split, merge,
};

}  // namespace deepspeed
