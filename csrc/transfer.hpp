// Transfers between memory and files: what is asked for, how it is cut into blocks, and what became of it.
//
// A transfer is cut into blocks, which workers (uring.cpp, threads.cpp) take from the queue and move by one or more requests to
// the kernel: a short read or write is continued, and what O_DIRECT does not take goes through the page cache.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>

namespace deepspeed {

// Error of a transfer that reads beyond the end of its file; all others are positive numbers of errno.
constexpr int SHORT_FILE = -1;

// An open file. `direct` is a descriptor with O_DIRECT, or -1; it takes offsets, sizes and memory of these alignments only.
struct OpenFile {
    int direct;
    int buffered;
    std::size_t offset_alignment;
    std::size_t memory_alignment;
};

class Transfer;

// Bytes [position, end) of a transfer are still to be moved. A block belongs to one worker.
struct Block {
    std::shared_ptr<Transfer> transfer;
    std::size_t begin = 0;
    std::size_t position = 0;
    std::size_t end = 0;
    bool direct = true;  // false once the file system has refused O_DIRECT
};

// What the kernel is asked for next. With `bounce` the memory is not aligned: a buffer that is takes its place.
struct Request {
    int descriptor;
    bool direct;
    bool bounce;
    char* memory;
    std::size_t nbytes;
    std::uint64_t offset;
};

struct Outcome {
    int error;                // 0, an errno, or SHORT_FILE
    std::size_t failed_at;    // byte of the transfer at which it failed
    std::size_t transferred;  // bytes moved
};

class Transfer {
public:
    Transfer(const OpenFile& file, char* memory, std::size_t nbytes, std::uint64_t offset, bool writing);

    // The next block, at most `block_size` bytes and ending at a multiple of it in the file; false if none is left.
    bool next_block(std::size_t block_size, Block& block);
    // A worker is done with a block, at its position; error as in Outcome.
    void finish(const Block& block, int error);
    // Hand out no further blocks. Those that workers have are completed.
    void cancel();
    // Wait for the end, at most so long (forever if negative); whether it has come.
    bool wait(double seconds);
    Outcome outcome();

    const OpenFile file;
    char* const memory;
    const std::size_t nbytes;
    const std::uint64_t offset;
    const bool writing;

private:
    bool ended() const { return in_flight_ == 0 && (outcome_.error != 0 || issued_ == nbytes); }

    std::mutex mutex_;
    std::condition_variable end_;
    std::size_t issued_ = 0;     // bytes in blocks handed out
    std::size_t in_flight_ = 0;  // blocks that workers have
    Outcome outcome_{0, 0, 0};
};

// The request that continues `block`.
Request next_request(const Block& block);

// Take note of a request's result (bytes, or a negative errno); whether the block is finished, with `error` as in Outcome.
// `bounce` is the buffer that took the place of the memory, if one did.
bool advance(Block& block, const Request& request, const char* bounce, long result, int& error);

// Blocks of all transfers, first come, first served.
class BlockQueue {
public:
    explicit BlockQueue(std::size_t block_size) : block_size_(block_size) {}

    // False if the queue is closed.
    bool push(std::shared_ptr<Transfer> transfer);
    // The next block; false if there is none. With `wait`: false once the queue is closed and empty.
    bool take(Block& block, bool wait);
    // Accept nothing more; what is there can still be taken.
    void close();
    bool closed();

private:
    const std::size_t block_size_;
    std::mutex mutex_;
    std::condition_variable work_;
    std::deque<std::shared_ptr<Transfer>> transfers_;
    bool closed_ = false;
};

// Memory for O_DIRECT, allocated when it is first needed.
class BounceBuffer {
public:
    static constexpr std::size_t ALIGNMENT = 4096;
    explicit BounceBuffer(std::size_t nbytes) : nbytes_(nbytes) {}
    // Throws std::bad_alloc.
    char* get();

private:
    struct Free {
        void operator()(void* memory) const;
    };
    std::size_t nbytes_;
    std::unique_ptr<char, Free> memory_;
};

}  // namespace deepspeed
