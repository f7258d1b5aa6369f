// What torch draws, faster: the numbers of its CPU generator (MT19937), and its uniform and normal samples, bit for bit.
// Part of kernels.inl. Whether the bits are those of the torch that is installed is for the caller to find out.
//
// Sources: Matsumoto & Nishimura, "Mersenne Twister" (1998); Box & Muller (1958); the polynomials of Moshier's Cephes
// library (logf, sinf, cosf). Fused multiply-adds stand where compilers contract torch's kernel to them.

constexpr std::size_t WORDS = 624;
constexpr std::size_t MIDDLE = 397;
constexpr std::size_t GROUP = 16;                // numbers from which torch makes as many normal ones at once
constexpr std::size_t PIECE = 128 * GROUP;       // numbers that stay in the L1 cache between two passes

inline std::uint32_t mixed(std::uint32_t word, std::uint32_t following) {
    const std::uint32_t both = (word & 0x80000000u) | (following & 0x7FFFFFFFu);
    return (both >> 1) ^ ((0u - (following & 1u)) & 0x9908B0DFu);
}

// The next 624 words.
void twist(std::uint32_t* words) {
    for (std::size_t i = 0; i < WORDS - MIDDLE; ++i) words[i] = words[i + MIDDLE] ^ mixed(words[i], words[i + 1]);
    for (std::size_t i = WORDS - MIDDLE; i < WORDS - 1; ++i)
        words[i] = words[i - (WORDS - MIDDLE)] ^ mixed(words[i], words[i + 1]);
    words[WORDS - 1] = words[MIDDLE - 1] ^ mixed(words[WORDS - 1], words[0]);
}

// out[i] = scaled(the next sample of [0, 1)), which is a multiple of 2^-24.
template <typename Scaled>
void draw(RandomState& state, float* __restrict out, std::size_t numel, const Scaled scaled) {
    while (numel > 0) {
        if (state.next == WORDS) {
            twist(state.words);
            state.next = 0;
        }
        const std::uint32_t* __restrict words = state.words + state.next;
        const std::size_t size = numel < WORDS - state.next ? numel : WORDS - state.next;
        for (std::size_t i = 0; i < size; ++i) {
            std::uint32_t word = words[i];
            word ^= word >> 11;
            word ^= (word << 7) & 0x9D2C5680u;
            word ^= (word << 15) & 0xEFC60000u;
            word ^= word >> 18;
            out[i] = scaled(static_cast<float>(static_cast<std::int32_t>(word & 0xFFFFFFu)) * 0x1p-24f);
        }
        state.next += size;
        out += size;
        numel -= size;
    }
}

inline float unscaled(float sample) { return sample; }

inline float as_bfloat16(float value) { return float_of(static_cast<std::uint32_t>(bfloat16_of(value)) << 16); }

// Samples of [low, high), where rounding does not reach it.
template <bool fused, bool narrow>
void uniform_samples(RandomState& state, void* out, std::size_t numel, float low, float high) {
    const float width = high - low;
    const float first = narrow ? as_bfloat16(low) : low, end = narrow ? as_bfloat16(high) : high;
    const auto scaled = [=](float sample) {
        float value = fused ? __builtin_fmaf(sample, width, low) : sample * width + low;
        if (narrow) value = as_bfloat16(value);
        return value == end ? first : value;
    };
    if (!narrow) {
        draw(state, static_cast<float*>(out), numel, scaled);
        return;
    }
    alignas(64) float block[PIECE];
    for (std::size_t start = 0; start < numel; start += PIECE) {
        const std::size_t size = numel - start < PIECE ? numel - start : PIECE;
        draw(state, block, size, scaled);
        narrowed(block, out, Dtype::bfloat16, start, size);
    }
}

void uniform(RandomState& state, void* out, Dtype dtype, std::size_t numel, float low, float high, bool fused) {
    const bool narrow = dtype == Dtype::bfloat16;
    const auto samples = fused ? (narrow ? uniform_samples<true, true> : uniform_samples<true, false>)
                               : (narrow ? uniform_samples<false, true> : uniform_samples<false, false>);
    samples(state, out, numel, low, high);
}

// The natural logarithm of a value in (0, 1].
inline float logarithm(float value) {
    const std::uint32_t bits = bits_of(value);
    float exponent = static_cast<float>(static_cast<std::int32_t>(bits >> 23) - 127) + 1.0f;
    float x = float_of((bits & 0x807FFFFFu) | 0x3F000000u);
    const bool small = x < 0.707106781186547524f;
    const float again = small ? x : 0.0f;
    x = (x - 1.0f) + again;
    exponent -= small ? 1.0f : 0.0f;
    const float z = x * x;
    float y = 7.0376836292E-2f;
    y = __builtin_fmaf(y, x, -1.1514610310E-1f);
    y = __builtin_fmaf(y, x, 1.1676998740E-1f);
    y = __builtin_fmaf(y, x, -1.2420140846E-1f);
    y = __builtin_fmaf(y, x, 1.4249322787E-1f);
    y = __builtin_fmaf(y, x, -1.6668057665E-1f);
    y = __builtin_fmaf(y, x, 2.0000714765E-1f);
    y = __builtin_fmaf(y, x, -2.4999993993E-1f);
    y = __builtin_fmaf(y, x, 3.3333331174E-1f);
    y = __builtin_fmaf(y * x, z, exponent * -2.12194440e-4f);
    y = __builtin_fmaf(z, -0.5f, y);
    return __builtin_fmaf(exponent, 0.693359375f, x + y);
}

struct SineCosine {
    float sine, cosine;
};

// Of an angle in [0, 2 pi].
inline SineCosine sine_cosine(float angle) {
    const std::int32_t octant = (static_cast<std::int32_t>(angle * 1.27323954473516f) + 1) & ~1;
    const float turns = static_cast<float>(octant);
    float x = __builtin_fmaf(turns, -0.78515625f, angle);
    x = __builtin_fmaf(turns, -2.4187564849853515625e-4f, x);
    x = __builtin_fmaf(turns, -3.77489497744594108e-8f, x);
    const float z = x * x;
    float even = __builtin_fmaf(2.443315711809948E-005f, z, -1.388731625493765E-003f);
    even = __builtin_fmaf(even, z, 4.166664568298827E-002f);
    even = __builtin_fmaf(even * z, z, z * -0.5f) + 1.0f;
    float odd = __builtin_fmaf(-1.9515295891E-4f, z, 8.3321608736E-3f);
    odd = __builtin_fmaf(odd, z, -1.6666654611E-1f);
    odd = __builtin_fmaf(odd * z, x, x);
    const bool swapped = (octant & 2) != 0;
    const std::uint32_t turned = static_cast<std::uint32_t>(octant);
    const float sine = swapped ? even : odd, cosine = swapped ? odd : even;
    return {float_of(bits_of(sine) ^ ((turned & 4u) << 29)), float_of(bits_of(cosine) ^ ((~(turned - 2u) & 4u) << 29))};
}

// Makes each GROUP of samples of [0, 1) one of normal samples.
void box_muller(float* __restrict block, std::size_t numel, float mean, float deviation) {
    constexpr std::size_t HALF = GROUP / 2;
    for (std::size_t start = 0; start < numel; start += GROUP) {
        float* __restrict group = block + start;
        for (std::size_t lane = 0; lane < HALF; ++lane) {
            const float radius = std::sqrt(-2.0f * logarithm(1.0f - group[lane]));
            const SineCosine direction = sine_cosine(6.283185307179586f * group[lane + HALF]);
            group[lane] = __builtin_fmaf(radius * direction.cosine, deviation, mean);
            group[lane + HALF] = __builtin_fmaf(radius * direction.sine, deviation, mean);
        }
    }
}

// Normal samples, at least GROUP: fp32 or bf16. The last GROUP is drawn anew where numel is no multiple of it.
void normal(RandomState& state, void* out, Dtype dtype, std::size_t numel, float mean, float deviation) {
    alignas(64) float block[PIECE];
    const std::size_t rest = numel % GROUP, whole = numel - rest;
    for (std::size_t start = 0; start < whole; start += PIECE) {
        const std::size_t size = whole - start < PIECE ? whole - start : PIECE;
        draw(state, block, size, unscaled);
        box_muller(block, size, mean, deviation);
        narrowed(block, out, dtype, start, size);
    }
    if (rest == 0) return;
    // What torch draws in fp32 for the rest, and then does not use.
    if (dtype == Dtype::float32) draw(state, block, rest, unscaled);
    draw(state, block, GROUP, unscaled);
    box_muller(block, GROUP, mean, deviation);
    narrowed(block, out, dtype, numel - GROUP, GROUP);
}
