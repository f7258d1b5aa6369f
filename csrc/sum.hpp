// Sums of the ranks' parts.
#pragma once

#include <cstddef>

#include "kernels.hpp"

namespace deepspeed {

// out = or += scale * (inputs[0] + inputs[1] + ...), added in that order, in fp64 for fp64 and else in fp32.
inline void add_in_order(const void* const* inputs, std::size_t count, Dtype dtype, void* out, Dtype out_dtype,
                         std::size_t numel, double scale, bool accumulate) {
    if (dtype != Dtype::float64) {
        active_kernels()->scaled_sum(inputs, count, dtype, out, out_dtype, 0, numel, static_cast<float>(scale), accumulate);
        return;
    }
    double* result = static_cast<double*>(out);
    for (std::size_t i = 0; i < numel; ++i) {
        double total = static_cast<const double*>(inputs[0])[i];
        for (std::size_t k = 1; k < count; ++k) total += static_cast<const double*>(inputs[k])[i];
        total *= scale;
        result[i] = accumulate ? result[i] + total : total;
    }
}

}  // namespace deepspeed
