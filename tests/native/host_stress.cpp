// Ranks as threads that do the same random collectives through one segment, in any mixture of sizes and delays, and compare
// every byte with what plain arithmetic gives. Built with -fsanitize=thread it also finds races.
//
//     cd csrc && g++ -std=c++17 -O2 -pthread ../tests/native/host_stress.cpp host_group.cpp host_steps.cpp
//         host_segment.cpp dispatch.cpp kernels_portable.cpp -o /tmp/host_stress
//     /tmp/host_stress OPERATIONS RANKS SEED
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/host_group.hpp"

using namespace deepspeed;

namespace {

constexpr std::size_t SLOT = 4096;

float value(std::uint64_t operation, std::size_t rank, std::size_t index) {
    return static_cast<float>((operation * 31 + rank * 7 + index * 3) % 64);
}

struct Buffers {
    std::vector<float> in, out, expected;
    std::vector<float>* result;
    std::shared_ptr<Operation> operation;
};

// Fills `buffers` for `kind` and says what is to come out.
Request make(Buffers& buffers, Kind kind, std::uint64_t number, std::size_t slice, std::size_t rank, std::size_t ranks,
             std::size_t source) {
    const bool whole = kind == Kind::broadcast || kind == Kind::all_reduce;
    const std::size_t numel = kind == Kind::barrier ? 0 : whole ? slice : slice * ranks;
    buffers.in.resize(numel);
    for (std::size_t i = 0; i < numel; ++i) buffers.in[i] = value(number, rank, i);
    const auto sum = [&](std::size_t i) {
        float total = 0;
        for (std::size_t peer = 0; peer < ranks; ++peer) total += value(number, peer, i);
        return total;
    };
    std::vector<float>& expected = buffers.expected;
    buffers.result = &buffers.in;
    switch (kind) {
        case Kind::barrier: break;
        case Kind::broadcast:
            for (std::size_t i = 0; i < numel; ++i) expected.push_back(value(number, source, i));
            break;
        case Kind::all_reduce:
            for (std::size_t i = 0; i < numel; ++i) expected.push_back(sum(i));
            break;
        case Kind::all_gather:
            for (std::size_t i = 0; i < numel; ++i) expected.push_back(value(number, i / slice, i));
            break;
        case Kind::scatter:
        case Kind::reduce_scatter:
            buffers.out.resize(slice);
            buffers.result = &buffers.out;
            for (std::size_t i = 0; i < slice; ++i) {
                const std::size_t at = rank * slice + i;
                expected.push_back(kind == Kind::scatter ? value(number, source, at) : sum(at));
            }
            // As the Python face does: a source's own slice is put by the caller.
            if (kind == Kind::scatter && rank == source) buffers.out = expected;
            break;
        case Kind::all_to_all:
            buffers.out.resize(numel);
            buffers.result = &buffers.out;
            for (std::size_t i = 0; i < numel; ++i) expected.push_back(value(number, i / slice, rank * slice + i % slice));
            for (std::size_t i = 0; i < slice; ++i) buffers.out[rank * slice + i] = expected[rank * slice + i];
            break;
    }
    return {{static_cast<std::uint32_t>(kind), 0, numel * sizeof(float), 0, source},
            reinterpret_cast<char*>(buffers.in.data()), reinterpret_cast<char*>(buffers.out.data()),
            Dtype::float32, Dtype::float32, 1.0, false};
}

void complete(HostGroup& group, Buffers& buffers, std::size_t rank) {
    while (!group.wait(*buffers.operation, 1.0)) {}
    if (buffers.operation->state == State::done && *buffers.result == buffers.expected) return;
    std::fprintf(stderr, "rank %zu: state %d, peer %d, or wrong values in kind %u of %llu bytes\n", rank,
                 static_cast<int>(buffers.operation->state.load()), buffers.operation->peer,
                 buffers.operation->request.what.kind,
                 static_cast<unsigned long long>(buffers.operation->request.what.nbytes));
    std::_Exit(1);
}

void be_rank(const std::shared_ptr<Segment>& segment, std::size_t rank, std::uint64_t count, unsigned seed) {
    const std::size_t ranks = segment->shape().ranks;
    HostGroup group(segment, rank, {getpid()}, 60.0);
    std::mt19937 common(seed), own(seed + 1 + static_cast<unsigned>(rank));
    std::vector<std::unique_ptr<Buffers>> under_way;
    for (std::uint64_t number = 0; number < count; ++number) {
        const auto kind = static_cast<Kind>(common() % 7);
        const std::size_t source = common() % ranks;
        const std::size_t slice = 1 + common() % (common() % 16 ? 64 : 6 * SLOT / sizeof(float));
        auto buffers = std::make_unique<Buffers>();
        buffers->operation = group.submit(make(*buffers, kind, number, slice, rank, ranks, source));
        under_way.push_back(std::move(buffers));
        if (own() % 64 == 0) usleep(own() % 200);
        while (under_way.size() > own() % 4) {
            // Any of them: what was submitted before is done on the way.
            const std::size_t which = own() % under_way.size();
            complete(group, *under_way[which], rank);
            under_way.erase(under_way.begin() + static_cast<std::ptrdiff_t>(which));
        }
    }
    for (auto& buffers : under_way) complete(group, *buffers, rank);
}

}  // namespace

int main(int, char** arguments) {
    const std::uint64_t count = std::strtoull(arguments[1], nullptr, 10);
    const auto ranks = static_cast<std::uint32_t>(std::atoi(arguments[2]));
    const auto segment = std::make_shared<Segment>(SegmentShape{ranks, 3, SLOT});
    std::vector<std::thread> threads;
    for (std::size_t rank = 0; rank < ranks; ++rank)
        threads.emplace_back(be_rank, segment, rank, count, static_cast<unsigned>(std::atoi(arguments[3])));
    for (std::thread& thread : threads) thread.join();
    std::puts("as expected");
}
