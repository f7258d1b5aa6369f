// The Python module: picks the instruction set, shares the work among threads, releases the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "file_module.hpp"
#include "hash.hpp"
#include "host_module.hpp"
#include "kernels.hpp"

namespace nb = nanobind;

namespace deepspeed {
namespace {

using Address = std::uintptr_t;

// Elements below which a further thread costs more than it saves.
constexpr std::size_t GRAIN = std::size_t{1} << 18;
// Elements of one partial sum of squares. Fixed, so that the result does not depend on the number of threads.
constexpr std::size_t NORM_BLOCK = std::size_t{1} << 16;

// Elements that share a scale.
constexpr std::size_t SCALED = 256;

// Runs work(begin, end) over [0, numel) on up to `threads` threads, boundaries at multiples of `unit`.
//
// Threads are made for the call and end with it. OpenMP would bring a second runtime into the process next to the one
// that torch bundles (two pools that oversubscribe the cores, and a fork hazard), and a pool of our own would hold idle
// threads; a std::thread costs about 20 us against the milliseconds of work that GRAIN leaves to each.
template <typename Work>
void parallel(std::size_t numel, int threads, std::size_t unit, const Work& work) {
    const std::size_t wanted = std::min<std::size_t>(std::max(threads, 1), std::max<std::size_t>(numel / GRAIN, 1));
    const std::size_t share = ((numel + wanted - 1) / wanted + unit - 1) / unit * unit;
    std::vector<std::thread> others;
    others.reserve(wanted);
    for (std::size_t begin = share; begin < numel; begin += share) {
        const std::size_t end = std::min(begin + share, numel);
        try {
            others.emplace_back([&work, begin, end] { work(begin, end); });
        } catch (const std::system_error&) {
            work(begin, end);
        }
    }
    work(0, std::min(share, numel));
    for (std::thread& other : others) other.join();
}

void* at(Address address, Dtype dtype, std::size_t element) {
    return address ? reinterpret_cast<char*>(address) + element * size_of(dtype) : nullptr;
}

// The tensors of a step, as Python names them.
struct StepAddresses {
    Address param;
    int param_dtype;
    Address grad;
    int grad_dtype;
    Address out;
    int out_dtype;
    std::size_t numel;

    StepTensors part(std::size_t begin, std::size_t end) const {
        const Dtype own = static_cast<Dtype>(param_dtype), from = static_cast<Dtype>(grad_dtype);
        const Dtype to = static_cast<Dtype>(out_dtype);
        return {at(param, own, begin), own, at(grad, from, begin), from, at(out, to, begin), to, end - begin};
    }
};

float* floats(Address address, std::size_t element) {
    return static_cast<float*>(at(address, Dtype::float32, element));
}

void adam_step(const StepAddresses& tensors, Address exp_avg, Address exp_avg_sq, double grad_scale, double decay,
               double l2, double beta1, double beta2, double second, double eps, double step_size, int threads) {
    const AdamNumbers numbers{static_cast<float>(grad_scale), static_cast<float>(decay),
                              static_cast<float>(l2),         static_cast<float>(beta2),
                              static_cast<float>(1 - beta1),  static_cast<float>(1 - beta2),
                              static_cast<float>(second),     static_cast<float>(eps),
                              static_cast<float>(step_size)};
    const Kernels* kernels = active_kernels();
    parallel(tensors.numel, threads, 64, [&](std::size_t begin, std::size_t end) {
        kernels->adam_step(tensors.part(begin, end), floats(exp_avg, begin), floats(exp_avg_sq, begin), numbers);
    });
}

void lion_step(const StepAddresses& tensors, Address exp_avg, double grad_scale, double decay, double lr, double beta1,
               double beta2, int threads) {
    const LionNumbers numbers{static_cast<float>(grad_scale), static_cast<float>(decay),     static_cast<float>(lr),
                              static_cast<float>(beta1),      static_cast<float>(beta2),     static_cast<float>(1 - beta1),
                              static_cast<float>(1 - beta2)};
    const Kernels* kernels = active_kernels();
    parallel(tensors.numel, threads, 64, [&](std::size_t begin, std::size_t end) {
        kernels->lion_step(tensors.part(begin, end), floats(exp_avg, begin), numbers);
    });
}

void adagrad_step(const StepAddresses& tensors, Address sum, double grad_scale, double l2, double eps, double step_size,
                  int threads) {
    const AdagradNumbers numbers{static_cast<float>(grad_scale), static_cast<float>(l2), static_cast<float>(eps),
                                 static_cast<float>(step_size)};
    const Kernels* kernels = active_kernels();
    parallel(tensors.numel, threads, 64, [&](std::size_t begin, std::size_t end) {
        kernels->adagrad_step(tensors.part(begin, end), floats(sum, begin), numbers);
    });
}

void scaled_sum(const std::vector<Address>& inputs, int dtype, Address out, int out_dtype, std::size_t numel,
                double scale, bool accumulate, int threads) {
    std::vector<const void*> sources;
    for (const Address input : inputs) sources.push_back(reinterpret_cast<const void*>(input));
    const Kernels* kernels = active_kernels();
    parallel(numel, threads, 64, [&](std::size_t begin, std::size_t end) {
        kernels->scaled_sum(sources.data(), sources.size(), static_cast<Dtype>(dtype), reinterpret_cast<void*>(out),
                            static_cast<Dtype>(out_dtype), begin, end, static_cast<float>(scale), accumulate);
    });
}

double squared_sum(Address data, int dtype, std::size_t numel, int threads) {
    const Dtype from = static_cast<Dtype>(dtype);
    const Kernels* kernels = active_kernels();
    std::vector<double> partial((numel + NORM_BLOCK - 1) / NORM_BLOCK);
    parallel(numel, threads, NORM_BLOCK, [&](std::size_t begin, std::size_t end) {
        for (std::size_t start = begin; start < end; start += NORM_BLOCK)
            partial[start / NORM_BLOCK] =
                kernels->squared_sum(at(data, from, start), from, std::min(NORM_BLOCK, end - start));
    });
    double total = 0.0;
    for (const double sum : partial) total += sum;
    return total;
}

void hash_blocks(Address data, std::size_t nbytes, std::size_t block, Address out) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(data);
    auto* hashes = reinterpret_cast<std::uint64_t*>(out);
    for (std::size_t start = 0; start < nbytes; start += block)
        *hashes++ = xxh64(bytes + start, std::min(block, nbytes - start));
}

// Runs draw(state) on the generator whose words are 64 bits each at `words`, and puts the words after it there. Returns how
// many of them have been drawn.
template <typename Draw>
std::size_t with_state(Address words, std::size_t next, const Draw& draw) {
    std::uint64_t* wide = reinterpret_cast<std::uint64_t*>(words);
    RandomState state;
    std::copy(wide, wide + std::size(state.words), state.words);
    state.next = next;
    draw(state);
    std::copy(std::begin(state.words), std::end(state.words), wide);
    return state.next;
}

std::size_t uniform(Address words, std::size_t next, Address out, int dtype, std::size_t numel, double low, double high,
                    bool fused) {
    return with_state(words, next, [&](RandomState& state) {
        active_kernels()->uniform(state, reinterpret_cast<void*>(out), static_cast<Dtype>(dtype), numel, static_cast<float>(low),
                          static_cast<float>(high), fused);
    });
}

std::size_t normal(Address words, std::size_t next, Address out, int dtype, std::size_t numel, double mean,
                   double deviation) {
    return with_state(words, next, [&](RandomState& state) {
        active_kernels()->normal(state, reinterpret_cast<void*>(out), static_cast<Dtype>(dtype), numel, static_cast<float>(mean),
                         static_cast<float>(deviation));
    });
}

template <typename T>
T* pointer(Address address, std::size_t element) {
    return reinterpret_cast<T*>(address) + element;
}

void quantize(Address values, Address codes, Address scales, std::size_t numel, Address book, int threads) {
    const Kernels* kernels = active_kernels();
    parallel(numel, threads, SCALED, [&](std::size_t begin, std::size_t end) {
        kernels->quantize(pointer<float>(values, begin), pointer<std::uint8_t>(codes, begin),
                          pointer<float>(scales, begin / SCALED), end - begin, *pointer<CodeBook>(book, 0));
    });
}

void dequantize(Address codes, Address scales, Address values, std::size_t numel, Address book, int threads) {
    const Kernels* kernels = active_kernels();
    parallel(numel, threads, SCALED, [&](std::size_t begin, std::size_t end) {
        kernels->dequantize(pointer<std::uint8_t>(codes, begin), pointer<float>(scales, begin / SCALED),
                            pointer<float>(values, begin), end - begin, *pointer<CodeBook>(book, 0));
    });
}

// The indices of what was rounded up from just between two, in order.
std::vector<std::int64_t> split(Address values, Address high, Address low, std::size_t numel, int threads) {
    const Kernels* kernels = active_kernels();
    std::vector<std::vector<std::int64_t>> found((numel + NORM_BLOCK - 1) / NORM_BLOCK);
    parallel(numel, threads, NORM_BLOCK, [&](std::size_t begin, std::size_t end) {
        for (std::size_t start = begin; start < end; start += NORM_BLOCK) {
            const std::size_t stop = std::min(start + NORM_BLOCK, end);
            const float* part = pointer<float>(values, start);
            if (!kernels->split(part, pointer<std::uint16_t>(high, start), pointer<std::uint16_t>(low, start), stop - start))
                continue;
            for (std::size_t i = start; i < stop; ++i)
                if (is_tie(*pointer<std::uint32_t>(values, i)))
                    found[start / NORM_BLOCK].push_back(static_cast<std::int64_t>(i));
        }
    });
    std::vector<std::int64_t> all;
    for (const auto& some : found) all.insert(all.end(), some.begin(), some.end());
    return all;
}

void merge(Address high, Address low, Address values, std::size_t numel, int threads) {
    const Kernels* kernels = active_kernels();
    parallel(numel, threads, 64, [&](std::size_t begin, std::size_t end) {
        kernels->merge(pointer<std::uint16_t>(high, begin), pointer<std::uint16_t>(low, begin),
                       pointer<float>(values, begin), end - begin);
    });
}

}  // namespace
}  // namespace deepspeed

NB_MODULE(_core, module) {
    // What the program still has at its end, a queue of files say, is no error of the program.
    nb::set_leak_warnings(false);
    using namespace deepspeed;
    using namespace nb::literals;
    module.doc() = "Kernels over flat CPU memory, file I/O and collectives of one host, given addresses. Called by deepspeed.native only, "
                   "which checks.";
    module.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Kernels* kernels : supported_kernels()) names.push_back(kernels->name);
        return names;
    }, "The instruction sets that this processor can run, slowest first.");
    module.def("instruction_set", [] { return std::string(active_kernels()->name); }, "The one in use.");
    module.def("select", [](const std::string& name) {
        for (const Kernels* kernels : supported_kernels())
            if (name == kernels->name) {
                active_kernels() = kernels;
                return;
            }
        throw nb::value_error(("this processor does not run the kernels named '" + name + "'").c_str());
    }, "name"_a, "Use the named instruction set from now on.");
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    nb::class_<StepAddresses>(module, "StepTensors")
        .def(nb::init<Address, int, Address, int, Address, int, std::size_t>(), "param"_a, "param_dtype"_a, "grad"_a,
             "grad_dtype"_a, "out"_a, "out_dtype"_a, "numel"_a);
    module.def("adam_step", &adam_step, unlocked, "tensors"_a, "exp_avg"_a, "exp_avg_sq"_a, "grad_scale"_a, "decay"_a,
               "l2"_a, "beta1"_a, "beta2"_a, "second"_a, "eps"_a, "step_size"_a, "threads"_a);
    module.def("lion_step", &lion_step, unlocked, "tensors"_a, "exp_avg"_a, "grad_scale"_a, "decay"_a, "lr"_a,
               "beta1"_a, "beta2"_a, "threads"_a);
    module.def("adagrad_step", &adagrad_step, unlocked, "tensors"_a, "sum"_a, "grad_scale"_a, "l2"_a, "eps"_a,
               "step_size"_a, "threads"_a);
    module.def("scaled_sum", &scaled_sum, unlocked, "inputs"_a, "dtype"_a, "out"_a, "out_dtype"_a, "numel"_a,
               "scale"_a, "accumulate"_a, "threads"_a);
    module.def("squared_sum", &squared_sum, unlocked, "data"_a, "dtype"_a, "numel"_a, "threads"_a);
    module.def("hash_blocks", &hash_blocks, unlocked, "data"_a, "nbytes"_a, "block"_a, "out"_a,
               "The XXH64 of each block of bytes, the last of which may be shorter.");
    module.def("uniform", &uniform, unlocked, "words"_a, "next"_a, "out"_a, "dtype"_a, "numel"_a, "low"_a, "high"_a,
               "fused"_a);
    module.def("normal", &normal, unlocked, "words"_a, "next"_a, "out"_a, "dtype"_a, "numel"_a, "mean"_a, "deviation"_a);
    module.def("quantize", &quantize, unlocked, "values"_a, "codes"_a, "scales"_a, "numel"_a, "book"_a, "threads"_a);
    module.def("dequantize", &dequantize, unlocked, "codes"_a, "scales"_a, "values"_a, "numel"_a, "book"_a, "threads"_a);
    module.def("split", &split, unlocked, "values"_a, "high"_a, "low"_a, "numel"_a, "threads"_a);
    module.def("merge", &merge, unlocked, "high"_a, "low"_a, "values"_a, "numel"_a, "threads"_a);
    bind_files(module);
    bind_hosts(module);
}
