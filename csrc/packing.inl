// Numbers held in fewer bytes (deepspeed/native/packing.py says what they mean), included by kernels.inl.

constexpr std::size_t QUANTIZED_BLOCK = 256;

// The numbers of the magnitudes x, of which `levels` bits are made. The chain of selections has no branch: it is vectorized.
template <int levels>
void encode(const float* __restrict values, std::uint8_t* __restrict codes, std::size_t numel, float inverse,
            const Code& code) {
    const float top = static_cast<float>((1 << levels) - 1);
    for (std::size_t i = 0; i < numel; ++i) {
        const std::uint32_t bits = bits_of(values[i]);
        const float x = float_of(bits & 0x7FFFFFFFu) * inverse;
        float slope = code.slopes[0], offset = code.offsets[0];
#pragma GCC unroll 8
        for (int e = 1; e < levels; ++e) {
            slope = x < code.thresholds[e - 1] ? code.slopes[e] : slope;
            offset = x < code.thresholds[e - 1] ? code.offsets[e] : offset;
        }
        const float number = x * slope + offset;
        std::int32_t whole = static_cast<std::int32_t>(number < top ? number : top);
        if (levels == 8) whole = whole < 1 && x > 0.0f ? 1 : whole;
        if (levels == 7) whole |= static_cast<std::int32_t>(bits >> 31) << 7;
        codes[i] = static_cast<std::uint8_t>(whole);
    }
}

void quantize(const float* values, std::uint8_t* codes, float* scales, std::size_t numel, const CodeBook& book) {
    for (std::size_t start = 0; start < numel; start += QUANTIZED_BLOCK) {
        const std::size_t size = numel - start < QUANTIZED_BLOCK ? numel - start : QUANTIZED_BLOCK;
        std::int32_t largest = 0x00800000;  // the smallest normal number: its inverse is finite
        std::uint32_t any = 0;
        for (std::size_t i = 0; i < size; ++i) {
            const std::uint32_t bits = bits_of(values[start + i]);
            const std::int32_t magnitude = static_cast<std::int32_t>(bits & 0x7FFFFFFFu);
            largest = magnitude > largest ? magnitude : largest;
            any |= bits;
        }
        const float scale = float_of(static_cast<std::uint32_t>(largest));
        const bool negative = any >> 31;
        scales[start / QUANTIZED_BLOCK] = negative ? scale : -scale;
        if (negative)
            encode<7>(values + start, codes + start, size, 1.0f / scale, book.seven);
        else
            encode<8>(values + start, codes + start, size, 1.0f / scale, book.eight);
    }
}

void dequantize(const std::uint8_t* codes, const float* scales, float* values, std::size_t numel, const CodeBook& book) {
    for (std::size_t start = 0; start < numel; start += QUANTIZED_BLOCK) {
        const std::size_t size = numel - start < QUANTIZED_BLOCK ? numel - start : QUANTIZED_BLOCK;
        const float signed_scale = scales[start / QUANTIZED_BLOCK];
        const float* __restrict table = signed_scale < 0.0f ? book.eight.values : book.seven.values;
        const float scale = signed_scale < 0.0f ? -signed_scale : signed_scale;
        const std::uint8_t* __restrict from = codes + start;
        float* __restrict to = values + start;
        for (std::size_t i = 0; i < size; ++i) to[i] = table[from[i]] * scale;
    }
}

// Returns how many were rounded up from just between two bf16 numbers.
std::size_t split(const float* __restrict values, std::uint16_t* __restrict high, std::uint16_t* __restrict low,
                  std::size_t numel) {
    std::uint32_t ties = 0;
    std::size_t total = 0;
    for (std::size_t start = 0; start < numel; start += BLOCK, total += ties, ties = 0) {
        const std::size_t stop = numel - start < BLOCK ? numel : start + BLOCK;
        for (std::size_t i = start; i < stop; ++i) {
            const std::uint32_t bits = bits_of(values[i]);
            high[i] = bfloat16_of(values[i]);
            low[i] = static_cast<std::uint16_t>(bits);
            ties += is_tie(bits) ? 1u : 0u;
        }
    }
    return total;
}

void merge(const std::uint16_t* __restrict high, const std::uint16_t* __restrict low, float* __restrict values,
           std::size_t numel) {
    for (std::size_t i = 0; i < numel; ++i) {
        const std::uint32_t lower = low[i];
        values[i] = float_of((static_cast<std::uint32_t>(high[i]) - (lower > 0x8000u ? 1u : 0u)) << 16 | lower);
    }
}
