#include "host_steps.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "sum.hpp"

namespace deepspeed {
namespace {

constexpr std::size_t ALIGNMENT = 64;
// Up to so many bytes all ranks add up all of an all-reduce: one step takes less time than two of half the work.
constexpr std::size_t SMALL = 16384;

std::size_t aligned_up(std::size_t nbytes) { return (nbytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

}  // namespace

// The bytes of the chunks' range: a slice, or the whole buffer where there are no slices.
std::size_t Steps::span() const {
    const Kind kind = static_cast<Kind>(request_.what.kind);
    const bool whole = kind == Kind::broadcast || kind == Kind::all_reduce || kind == Kind::barrier;
    return whole ? request_.what.nbytes : request_.what.nbytes / ranks();
}

// What a slot holds for each of the ranks, where it holds another thing for each.
std::size_t Steps::share() const { return segment_.shape().slot_nbytes / ranks() / ALIGNMENT * ALIGNMENT; }

bool Steps::in_two_phases() const {
    return static_cast<Kind>(request_.what.kind) == Kind::all_reduce && ranks() > 2 && request_.what.nbytes > SMALL;
}

std::size_t Steps::per_step() const {
    switch (static_cast<Kind>(request_.what.kind)) {
        case Kind::scatter:
        case Kind::all_to_all:
        case Kind::reduce_scatter: return share();
        case Kind::all_reduce: return in_two_phases() ? share() * ranks() : segment_.shape().slot_nbytes;
        default: return segment_.shape().slot_nbytes;
    }
}

std::uint64_t Steps::chunks() const { return std::max<std::uint64_t>((span() + per_step() - 1) / per_step(), 1); }

std::uint64_t Steps::count() const { return in_two_phases() ? 2 * chunks() : chunks(); }

// In two phases the steps are: reduce 0, reduce 1, gather 0, reduce 2, gather 1, ..., gather of the last.
bool Steps::gathers(std::uint64_t step) const {
    return in_two_phases() && step > 0 && (step % 2 == 0 || step + 1 == count());
}

std::uint64_t Steps::needed_for(std::uint64_t step) const {
    if (!gathers(step)) return 0;
    return step + 1 == count() ? step : step - 2 + (step == 2 ? 1 : 0);
}

Steps::Range Steps::chunk(std::uint64_t step) const {
    std::uint64_t index = step;
    if (in_two_phases()) {
        if (step + 1 == count()) index = chunks() - 1;
        else if (gathers(step)) index = step / 2 - 1;
        else index = (step + 1) / 2;
    }
    const std::size_t begin = index * per_step();
    return {begin, std::min(per_step(), span() - std::min(begin, span()))};
}

// The part of a chunk that `rank` adds up in an all-reduce of two phases.
Steps::Range Steps::part(const Range& chunk, std::size_t rank) const {
    const std::size_t size = aligned_up((chunk.nbytes + ranks() - 1) / ranks());
    const std::size_t begin = std::min(rank * size, chunk.nbytes);
    return {chunk.begin + begin, std::min(size, chunk.nbytes - begin)};
}

bool Steps::reads(std::size_t peer) const {
    if (peer == rank_) return false;
    const Kind kind = static_cast<Kind>(request_.what.kind);
    return (kind != Kind::broadcast && kind != Kind::scatter) || peer == request_.what.source;
}

void Steps::publish_parts(const Range& chunk, char* slot) const {
    for (std::size_t peer = 0; peer < ranks(); ++peer)
        if (peer != rank_)
            std::memcpy(slot + peer * share(), request_.buffer + peer * span() + chunk.begin, chunk.nbytes);
}

void Steps::publish(std::uint64_t step) const {
    char* slot = segment_.slot(rank_, base_ + step);
    const Range range = chunk(step);
    switch (static_cast<Kind>(request_.what.kind)) {
        case Kind::barrier: return;
        case Kind::broadcast:
            if (rank_ == request_.what.source) std::memcpy(slot, request_.buffer + range.begin, range.nbytes);
            return;
        case Kind::scatter:
            if (rank_ == request_.what.source) publish_parts(range, slot);
            return;
        case Kind::all_to_all:
        case Kind::reduce_scatter: return publish_parts(range, slot);
        case Kind::all_gather:
            std::memcpy(slot, request_.buffer + rank_ * span() + range.begin, range.nbytes);
            return;
        case Kind::all_reduce: break;
    }
    if (!in_two_phases()) {
        std::memcpy(slot, request_.buffer + range.begin, range.nbytes);
        return;
    }
    // Of a step that reduces, all but the own part; of one that gathers, the own part.
    const Range own = part(range, rank_);
    const auto put = [&](std::size_t begin, std::size_t end) {
        std::memcpy(slot + begin - range.begin, request_.buffer + begin, end - begin);
    };
    if (gathers(step)) return put(own.begin, own.begin + own.nbytes);
    put(range.begin, own.begin);
    put(own.begin + own.nbytes, range.begin + range.nbytes);
}

void Steps::add_up(std::uint64_t step, std::size_t in_slot, const char* own, char* target, std::size_t nbytes) const {
    std::vector<const void*> inputs;
    for (std::size_t peer = 0; peer < ranks(); ++peer)
        inputs.push_back(peer == rank_ ? own : read(peer, step) + in_slot);
    add_in_order(inputs.data(), inputs.size(), request_.dtype, target, request_.out_dtype,
                 nbytes / size_of(request_.dtype), request_.scale, request_.accumulate);
}

void Steps::consume_sum(std::uint64_t step, const Range& range) const {
    if (static_cast<Kind>(request_.what.kind) == Kind::reduce_scatter) {
        const char* own = request_.buffer + rank_ * span() + range.begin;
        char* target = request_.out + range.begin / size_of(request_.dtype) * size_of(request_.out_dtype);
        return add_up(step, rank_ * share(), own, target, range.nbytes);
    }
    const Range summed = in_two_phases() ? part(range, rank_) : range;
    char* own = request_.buffer + summed.begin;
    add_up(step, summed.begin - range.begin, own, own, summed.nbytes);
}

void Steps::consume_copy(std::uint64_t step, const Range& range, std::size_t peer) const {
    const char* slot = read(peer, step);
    switch (static_cast<Kind>(request_.what.kind)) {
        case Kind::broadcast: std::memcpy(request_.buffer + range.begin, slot, range.nbytes); return;
        case Kind::scatter: std::memcpy(request_.out + range.begin, slot + rank_ * share(), range.nbytes); return;
        case Kind::all_to_all:
            std::memcpy(request_.out + peer * span() + range.begin, slot + rank_ * share(), range.nbytes);
            return;
        case Kind::all_gather: std::memcpy(request_.buffer + peer * span() + range.begin, slot, range.nbytes); return;
        case Kind::all_reduce: {
            const Range there = part(range, peer);
            std::memcpy(request_.buffer + there.begin, slot + there.begin - range.begin, there.nbytes);
            return;
        }
        default: return;
    }
}

void Steps::consume(std::uint64_t step) const {
    const Range range = chunk(step);
    const Kind kind = static_cast<Kind>(request_.what.kind);
    if (!range.nbytes) return;
    if (kind == Kind::reduce_scatter || (kind == Kind::all_reduce && !gathers(step))) return consume_sum(step, range);
    // Each begins with the next rank, so that not all read the same one.
    for (std::size_t distance = 1; distance < ranks(); ++distance) {
        const std::size_t peer = (rank_ + distance) % ranks();
        if (reads(peer)) consume_copy(step, range, peer);
    }
}

}  // namespace deepspeed
