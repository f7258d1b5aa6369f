// A ring of requests shared with the kernel: io_uring by its system calls alone. For one thread.
#pragma once

#include <cstddef>
#include <cstdint>

#include "uring_abi.hpp"

namespace deepspeed {

class Ring {
public:
    // Throws std::system_error where the kernel refuses, or is too old to read and write this way (before 5.6).
    explicit Ring(unsigned entries);
    ~Ring();
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    // Make room for registered buffers, and register one: the kernel finds and pins its pages once, not for each request.
    // False where it refuses (before 5.19, or beyond RLIMIT_MEMLOCK). Any thread may register.
    bool reserve_buffers(unsigned count);
    bool register_buffer(unsigned index, void* memory, std::size_t nbytes);

    // Put a request into the ring; at most `entries` between two calls of `enter`. `buffer` is the index of the registered
    // buffer that the memory lies in, or -1.
    void prepare(std::uint8_t operation, int descriptor, void* memory, std::uint32_t nbytes, std::uint64_t offset,
                 std::uint64_t user_data, int buffer = -1);
    // Tell the kernel of what was prepared, and wait until it has completed at least `wait` requests.
    void enter(unsigned wait);
    // Take one completed request; false if there is none.
    bool reap(std::uint64_t& user_data, std::int32_t& result);

private:
    void map();
    void check_operations() const;
    void release();

    int descriptor_ = -1;
    uring::Parameters parameters_{};
    void* sq_ring_ = nullptr;
    void* cq_ring_ = nullptr;
    uring::Submission* submissions_ = nullptr;
    std::size_t sq_nbytes_ = 0, cq_nbytes_ = 0, submissions_nbytes_ = 0;
    unsigned prepared_ = 0;  // requests that the kernel has not been told of
};

}  // namespace deepspeed
