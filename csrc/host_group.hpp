// Collectives among the ranks of one host, through a segment of shared memory.
//
// An operation is a number of *steps*, the same on all ranks. In a step a rank publishes a slot of its ring (data for the
// others, or none), and consumes what it needs of the others' slots. It publishes ahead of what it consumes as far as its
// ring goes, so that copies in and out overlap on different ranks. What is sent is copied: an operation ends when this
// rank has its result, whether the others have read theirs or not.
//
// Operations run in the order in which they were submitted: on a thread of the group, or on a thread that waits for one.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "host_segment.hpp"
#include "kernels.hpp"

namespace deepspeed {

enum class Kind : std::uint32_t { barrier, broadcast, scatter, all_gather, all_to_all, reduce_scatter, all_reduce };

enum class State : int { waiting, done, ended, left, timeout, differs, closed };

// What a rank asks for. `nbytes` is that of the whole `buffer`, of `ranks` equal slices where the kind has slices;
// `out` is one slice (scatter, reduce_scatter), or the whole (all_to_all).
struct Request {
    Description what;
    char* buffer;
    char* out;
    Dtype dtype;
    Dtype out_dtype;
    double scale;
    bool accumulate;
};

// An operation and how far it has come. `peer` is the rank on which it failed, `there` what that one does where it differs.
struct Operation {
    explicit Operation(const Request& request) : request(request) {}

    const Request request;
    std::uint64_t published = 0;
    std::uint64_t consumed = 0;
    std::atomic<State> state{State::waiting};
    int peer = -1;
    Description there{};
};

class HostGroup {
  public:
    // This is `rank` of the segment's, whose processes are `pids`. A wait of longer than `timeout` is a failure.
    HostGroup(std::shared_ptr<Segment> segment, std::size_t rank, const std::vector<int>& pids, double timeout);
    ~HostGroup();
    HostGroup(const HostGroup&) = delete;
    HostGroup& operator=(const HostGroup&) = delete;

    // Memory has to stay until the operation has ended, or the group was closed.
    std::shared_ptr<Operation> submit(const Request& request);
    // Whether it ended within so long. Afterwards its state stays.
    bool wait(Operation& operation, double seconds);
    // Fail what is under way here, and tell the others that this rank has left.
    void close();

  private:
    using Clock = std::chrono::steady_clock;

    void work();
    void drive(std::unique_lock<std::mutex>& lock, Clock::time_point until, bool patient);
    void run(Operation& operation, Clock::time_point until, bool patient);
    bool advance(Operation& operation);
    bool may_publish(const Operation& operation) const;
    bool may_consume(const Operation& operation) const;
    bool matches(Operation& operation);
    bool await_progress(Operation& operation, Clock::time_point until, bool patient);
    void fail(Operation& operation, State state, int peer) const;
    void look_for_the_missing(Operation& operation) const;
    void ring_others() const;

    const std::shared_ptr<Segment> segment_;
    const std::size_t rank_;
    const Processes processes_;
    const Clock::duration timeout_;
    const int owner_;
    std::uint64_t base_ = 0;     // steps of the operations that have ended
    Clock::time_point moved_{};  // when the operation at the head last got on
    Operation broken_{Request{}};

    // What threads wait on. A child of a fork leaves it where it is: a condition that has waiters cannot be destroyed.
    struct Meeting {
        std::mutex mutex;
        std::condition_variable submitted, ended;
    };
    std::unique_ptr<Meeting> meeting_{new Meeting};
    std::deque<std::shared_ptr<Operation>> queue_;
    bool driven_ = false;
    std::atomic<bool> closing_{false};
    std::unique_ptr<std::thread> thread_;
};

}  // namespace deepspeed
