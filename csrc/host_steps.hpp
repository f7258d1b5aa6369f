// What an operation does in each of its steps: pure arithmetic, and copies between buffers and slots.
#pragma once

#include <cstddef>
#include <cstdint>

#include "host_group.hpp"

namespace deepspeed {

class Steps {
  public:
    Steps(const Request& request, const Segment& segment, std::size_t rank, std::uint64_t base)
        : request_(request), segment_(segment), rank_(rank), base_(base) {}

    std::uint64_t count() const;
    // How many steps have to be consumed before `step` can be published.
    std::uint64_t needed_for(std::uint64_t step) const;
    // Whether this rank reads `peer`'s slot.
    bool reads(std::size_t peer) const;
    void publish(std::uint64_t step) const;
    void consume(std::uint64_t step) const;

  private:
    struct Range {
        std::size_t begin, nbytes;
    };

    std::size_t ranks() const { return segment_.shape().ranks; }
    std::size_t share() const;
    std::size_t span() const;
    std::size_t per_step() const;
    bool in_two_phases() const;
    std::uint64_t chunks() const;
    bool gathers(std::uint64_t step) const;
    Range chunk(std::uint64_t step) const;
    Range part(const Range& chunk, std::size_t rank) const;
    const char* read(std::size_t peer, std::uint64_t step) const { return segment_.slot(peer, base_ + step); }
    void publish_parts(const Range& chunk, char* slot) const;
    void consume_sum(std::uint64_t step, const Range& chunk) const;
    void consume_copy(std::uint64_t step, const Range& chunk, std::size_t peer) const;
    void add_up(std::uint64_t step, std::size_t in_slot, const char* own, char* target, std::size_t nbytes) const;

    const Request& request_;
    const Segment& segment_;
    const std::size_t rank_;
    const std::uint64_t base_;
};

}  // namespace deepspeed
