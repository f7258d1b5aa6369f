// The kernel's interface of io_uring, as in io_uring_setup(2), io_uring_enter(2) and io_uring_register(2), as far as it is used
// here. Written out, since the headers that wheels are built with are older than the kernels that they run on.
#pragma once

#include <cstdint>

namespace deepspeed::uring {

constexpr long SETUP = 425, ENTER = 426, REGISTER = 427;  // system calls, the same on every architecture

constexpr std::uint64_t OFFSET_SQ_RING = 0, OFFSET_CQ_RING = 0x8000000, OFFSET_SQES = 0x10000000;
constexpr std::uint32_t ENTER_GETEVENTS = 1;
constexpr std::uint32_t FEATURE_SINGLE_MMAP = 1;
constexpr std::uint32_t SQ_CQ_OVERFLOW = 2;
constexpr std::uint8_t OP_READ = 22, OP_WRITE = 23;  // since Linux 5.6
constexpr std::uint8_t OP_READ_FIXED = 4, OP_WRITE_FIXED = 5;
constexpr unsigned REGISTER_PROBE = 8;
constexpr std::uint16_t OP_SUPPORTED = 1;
constexpr unsigned REGISTER_BUFFERS = 15, REGISTER_BUFFERS_UPDATE = 16;  // with tables to be filled, since Linux 5.19
constexpr std::uint32_t REGISTER_SPARSE = 1;

struct SubmissionOffsets {
    std::uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, reserved;
    std::uint64_t address;
};

struct CompletionOffsets {
    std::uint32_t head, tail, ring_mask, ring_entries, overflow, entries, flags, reserved;
    std::uint64_t address;
};

struct Parameters {
    std::uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_descriptor, reserved[3];
    SubmissionOffsets sq;
    CompletionOffsets cq;
};

struct Submission {
    std::uint8_t operation, flags;
    std::uint16_t priority;
    std::int32_t descriptor;
    std::uint64_t offset, address;
    std::uint32_t nbytes, operation_flags;
    std::uint64_t user_data;
    std::uint16_t buffer;
    std::uint16_t unused[11];
};

struct BufferTable {
    std::uint32_t count, flags;
    std::uint64_t reserved, data, tags;
};

struct BufferUpdate {
    std::uint32_t index, reserved;
    std::uint64_t data, tags;
    std::uint32_t count, reserved2;
};

struct Completion {
    std::uint64_t user_data;
    std::int32_t result;
    std::uint32_t flags;
};

struct ProbedOperation {
    std::uint8_t operation, reserved;
    std::uint16_t flags;
    std::uint32_t reserved2;
};

struct Probe {
    std::uint8_t last, count;
    std::uint16_t reserved;
    std::uint32_t reserved2[3];
    ProbedOperation operations[64];
};

static_assert(sizeof(Parameters) == 120 && sizeof(Submission) == 64 && sizeof(Completion) == 16 &&
                  sizeof(BufferTable) == 32 && sizeof(BufferUpdate) == 32, "the kernel's layout");

}  // namespace deepspeed::uring
