// Memory that the ranks of one host share: a ring of slots for each rank, and counters of how far each has come.
//
// The file behind it has no name (memfd), so nothing of it is left however the ranks end. One rank makes it, the others
// open it as /proc/PID/fd/FD, which the kernel allows to the same user alone.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace deepspeed {

// What a rank is doing, as it tells the others with each step: ranks that differ in it do not belong together.
struct Description {
    std::uint32_t kind;
    std::uint32_t dtype;
    std::uint64_t nbytes;
    std::int64_t tag;
    std::uint64_t source;

    bool operator==(const Description& other) const {
        return kind == other.kind && dtype == other.dtype && nbytes == other.nbytes && tag == other.tag &&
               source == other.source;
    }
};

// A rank's counters; a cache line pair of their own, as neighbouring lines are fetched together.
struct alignas(128) Progress {
    std::atomic<std::uint64_t> published{0};  // steps of which this rank's slot is filled
    std::atomic<std::uint64_t> consumed{0};   // steps of which this rank has read all slots that it needs
    std::atomic<std::uint32_t> bell{0};       // the futex on which this rank sleeps
    std::atomic<std::uint32_t> sleeping{0};
    std::atomic<std::uint32_t> left{0};       // this rank does nothing more here
};

// Where things lie in the memory; the same arithmetic on all ranks.
struct SegmentShape {
    std::uint32_t ranks;
    std::uint32_t slots;        // of each rank
    std::uint64_t slot_nbytes;  // a multiple of 4096

    std::size_t nbytes() const;
};

class Segment {
  public:
    // A new one. Throws std::system_error, where memory is short for instance: all of it is reserved.
    explicit Segment(const SegmentShape& shape);
    // That of which process `pid` has the descriptor `descriptor` and the token is `token`. Throws std::system_error.
    Segment(const SegmentShape& shape, int pid, int descriptor, std::uint64_t token);
    ~Segment();
    Segment(const Segment&) = delete;
    Segment& operator=(const Segment&) = delete;

    const SegmentShape& shape() const { return shape_; }
    std::uint64_t token() const;
    int descriptor() const { return descriptor_; }
    // Others can open it no more; what is mapped stays.
    void close_descriptor();

    Progress& progress(std::size_t rank) const;
    Description& description(std::size_t rank, std::uint64_t step) const;
    char* slot(std::size_t rank, std::uint64_t step) const;

    // Wakes `rank` where it sleeps.
    void ring(std::size_t rank) const;
    // Sleeps until the bell of `rank` is no more `heard`, or for some milliseconds.
    void sleep(std::size_t rank, std::uint32_t heard) const;

  private:
    void map();
    void unmap();

    SegmentShape shape_;
    int descriptor_ = -1;
    char* memory_ = nullptr;
    pid_t owner_ = 0;  // the process in which the memory is mapped: not in its children
};

// Whether processes live, by descriptors that stay theirs when a number is given to another process.
class Processes {
  public:
    // Throws std::system_error where one has ended, or the kernel has no pidfd_open.
    explicit Processes(const std::vector<int>& pids);
    ~Processes();
    Processes(const Processes&) = delete;
    Processes& operator=(const Processes&) = delete;

    // The index of one that has ended; -1 where all live.
    int ended() const;

  private:
    std::vector<int> descriptors_;
};

}  // namespace deepspeed
