// The memory traffic of an Adam step without its arithmetic: four fp32 arrays read, three of them written where they lie.
// As it comes, with memory asked for ahead, and with non-temporal stores: the fastest of these is the limit.
#include <cstddef>
#include <thread>
#include <vector>

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

constexpr std::size_t BLOCK = 512;

void plain(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v, std::size_t numel) {
    for (std::size_t i = 0; i < numel; ++i) {
        const float a = g[i];
        p[i] += a;
        m[i] += a;
        v[i] += a;
    }
}

// The addresses are aligned to 64 bytes and numel is a multiple of 16.
void non_temporal(float* p, const float* g, float* m, float* v, std::size_t numel) {
#ifdef __AVX__
    const auto line = [](float* array, __m256 low, __m256 high) {
        _mm256_stream_ps(array, _mm256_add_ps(_mm256_load_ps(array), low));
        _mm256_stream_ps(array + 8, _mm256_add_ps(_mm256_load_ps(array + 8), high));
    };
    for (std::size_t i = 0; i < numel; i += 16) {
        const __m256 low = _mm256_load_ps(g + i), high = _mm256_load_ps(g + i + 8);
        line(p + i, low, high);
        line(m + i, low, high);
        line(v + i, low, high);
    }
    _mm_sfence();
#else
    plain(p, g, m, v, numel);
#endif
}

void prefetched(float* p, const float* g, float* m, float* v, std::size_t numel) {
    constexpr std::size_t AHEAD = 256, BLOCK = 64, LINE = 16;
    for (std::size_t start = 0; start < numel; start += BLOCK) {
        for (const float* array : {static_cast<const float*>(p), g, static_cast<const float*>(m), static_cast<const float*>(v)})
            for (std::size_t i = 0; i < BLOCK; i += LINE) __builtin_prefetch(array + start + AHEAD + i, 1);
        plain(p + start, g + start, m + start, v + start, BLOCK);
    }
}

}  // namespace

// One pass in the manner `way` on `threads` threads; `way` is 0, 1 or 2, numel a multiple of 64 times threads.
extern "C" void adam_stream(float* p, const float* g, float* m, float* v, std::size_t numel, int threads, int way) {
    const auto kernel = way == 0 ? plain : way == 1 ? prefetched : non_temporal;
    const std::size_t share = numel / threads;
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t)
        others.emplace_back([=] { kernel(p + t * share, g + t * share, m + t * share, v + t * share, share); });
    kernel(p, g, m, v, share);
    for (std::thread& other : others) other.join();
}
