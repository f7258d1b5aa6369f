#ifdef __linux__
#include "uring.hpp"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <ctime>
#include <initializer_list>
#include <system_error>

namespace deepspeed {
namespace {

std::uint32_t* at(void* ring, std::uint32_t offset) {
    return reinterpret_cast<std::uint32_t*>(static_cast<char*>(ring) + offset);
}

// The kernel reads and writes the rings' heads and tails meanwhile.
std::uint32_t acquire(const std::uint32_t* value) { return __atomic_load_n(value, __ATOMIC_ACQUIRE); }
void release_to(std::uint32_t* value, std::uint32_t number) { __atomic_store_n(value, number, __ATOMIC_RELEASE); }

[[noreturn]] void fail(int error, const char* what) { throw std::system_error(error, std::generic_category(), what); }

}  // namespace

Ring::Ring(unsigned entries) {
    descriptor_ = static_cast<int>(syscall(uring::SETUP, entries, &parameters_));
    if (descriptor_ < 0) fail(errno, "io_uring_setup");
    try {
        check_operations();
        map();
    } catch (...) {
        release();
        throw;
    }
}

Ring::~Ring() { release(); }

void Ring::check_operations() const {
    uring::Probe probe{};
    if (syscall(uring::REGISTER, descriptor_, uring::REGISTER_PROBE, &probe, 64) < 0) fail(errno, "io_uring_register");
    for (const std::uint8_t operation : {uring::OP_READ, uring::OP_WRITE})
        if (operation > probe.last || !(probe.operations[operation].flags & uring::OP_SUPPORTED))
            fail(EOPNOTSUPP, "io_uring without reads and writes");
}

void Ring::map() {
    const auto mapped = [this](std::size_t nbytes, std::uint64_t offset) {
        void* memory = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor_,
                            static_cast<off_t>(offset));
        if (memory == MAP_FAILED) fail(errno, "mapping the rings of io_uring");
        return memory;
    };
    const bool single = parameters_.features & uring::FEATURE_SINGLE_MMAP;
    sq_nbytes_ = parameters_.sq.array + parameters_.sq_entries * sizeof(std::uint32_t);
    cq_nbytes_ = parameters_.cq.entries + parameters_.cq_entries * sizeof(uring::Completion);
    if (single) sq_nbytes_ = cq_nbytes_ = std::max(sq_nbytes_, cq_nbytes_);
    sq_ring_ = mapped(sq_nbytes_, uring::OFFSET_SQ_RING);
    cq_ring_ = single ? sq_ring_ : mapped(cq_nbytes_, uring::OFFSET_CQ_RING);
    submissions_nbytes_ = parameters_.sq_entries * sizeof(uring::Submission);
    submissions_ = static_cast<uring::Submission*>(mapped(submissions_nbytes_, uring::OFFSET_SQES));
}

void Ring::release() {
    if (submissions_) munmap(submissions_, submissions_nbytes_);
    if (cq_ring_ && cq_ring_ != sq_ring_) munmap(cq_ring_, cq_nbytes_);
    if (sq_ring_) munmap(sq_ring_, sq_nbytes_);
    close(descriptor_);
}

bool Ring::reserve_buffers(unsigned count) {
    uring::BufferTable table{count, uring::REGISTER_SPARSE, 0, 0, 0};
    return syscall(uring::REGISTER, descriptor_, uring::REGISTER_BUFFERS, &table, sizeof table) >= 0;
}

bool Ring::register_buffer(unsigned index, void* memory, std::size_t nbytes) {
    iovec buffer{memory, nbytes};
    uring::BufferUpdate update{index, 0, reinterpret_cast<std::uintptr_t>(&buffer), 0, 1, 0};
    return syscall(uring::REGISTER, descriptor_, uring::REGISTER_BUFFERS_UPDATE, &update, sizeof update) == 1;
}

void Ring::prepare(std::uint8_t operation, int descriptor, void* memory, std::uint32_t nbytes, std::uint64_t offset,
                   std::uint64_t user_data, int buffer) {
    std::uint32_t* const tail = at(sq_ring_, parameters_.sq.tail);
    const std::uint32_t index = *tail & *at(sq_ring_, parameters_.sq.ring_mask);
    uring::Submission& submission = submissions_[index];
    submission = {};
    submission.operation = operation;
    if (buffer >= 0) {
        submission.operation = operation == uring::OP_READ ? uring::OP_READ_FIXED : uring::OP_WRITE_FIXED;
        submission.buffer = static_cast<std::uint16_t>(buffer);
    }
    submission.descriptor = descriptor;
    submission.offset = offset;
    submission.address = reinterpret_cast<std::uintptr_t>(memory);
    submission.nbytes = nbytes;
    submission.user_data = user_data;
    at(sq_ring_, parameters_.sq.array)[index] = index;
    release_to(tail, *tail + 1);
    ++prepared_;
}

void Ring::enter(unsigned wait) {
    for (;;) {
        const unsigned flags = wait ? uring::ENTER_GETEVENTS : 0;
        const long submitted = syscall(uring::ENTER, descriptor_, prepared_, wait, flags, nullptr, 0);
        if (submitted >= 0) {
            prepared_ -= static_cast<unsigned>(submitted);
            if (prepared_ == 0) return;
        } else if (errno == EAGAIN || errno == EBUSY || errno == ENOMEM) {
            // The kernel is short of memory for requests, or wants completions taken first: what it has accepted goes on.
            const timespec pause{0, 1'000'000};
            nanosleep(&pause, nullptr);
            return;
        } else if (errno != EINTR) {
            fail(errno, "io_uring_enter");  // the ring is broken: no request could be waited for, so the process ends
        }
    }
}

bool Ring::reap(std::uint64_t& user_data, std::int32_t& result) {
    std::uint32_t* const head = at(cq_ring_, parameters_.cq.head);
    if (*head == acquire(at(cq_ring_, parameters_.cq.tail))) return false;
    const std::uint32_t index = *head & *at(cq_ring_, parameters_.cq.ring_mask);
    const auto* completions = reinterpret_cast<const uring::Completion*>(at(cq_ring_, parameters_.cq.entries));
    user_data = completions[index].user_data;
    result = completions[index].result;
    release_to(head, *head + 1);
    return true;
}

}  // namespace deepspeed
#endif
