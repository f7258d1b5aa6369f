// The workers that move blocks between memory and files, and the engine that owns them.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "transfer.hpp"

namespace deepspeed {

struct EngineOptions {
    std::size_t block_size;  // bytes of a request
    unsigned queue_depth;    // requests of one thread in flight
    unsigned thread_count;
    bool single_submit;      // tell the kernel of requests one by one, not in batches
    bool overlap_events;     // refill as requests end, rather than after all of a batch
};

// Takes blocks from a queue and moves them, in threads of its own.
class Workers {
public:
    virtual ~Workers() = default;
    // The queue has got work, or was closed.
    virtual void wake() = 0;
    // Wait until the closed queue is empty and every block finished.
    virtual void join() = 0;
    // Prepare memory for many transfers; false where that is not possible or has no use. It must live until `join` is done.
    virtual bool register_memory(char* memory, std::size_t nbytes) = 0;
};

// Threads that call pread and pwrite: `queue_depth` for each of `thread_count`, at most MOST_THREADS.
constexpr unsigned MOST_THREADS = 64;
std::unique_ptr<Workers> thread_workers(BlockQueue& queue, const EngineOptions& options);

// `thread_count` threads with an io_uring each. Throws std::system_error where the kernel refuses.
std::unique_ptr<Workers> uring_workers(BlockQueue& queue, const EngineOptions& options);
// Why io_uring cannot be used here; empty if it can.
std::string uring_refusal();

// The alignments that O_DIRECT needs on this descriptor, of offsets and of memory; {0, 0} where the kernel does not say.
struct Alignments {
    std::size_t offset;
    std::size_t memory;
};
Alignments direct_alignments(int descriptor);

class FileEngine {
public:
    FileEngine(const EngineOptions& options, bool uring);
    ~FileEngine();

    std::shared_ptr<Transfer> submit(const OpenFile& file, char* memory, std::size_t nbytes, std::uint64_t offset,
                                     bool writing);
    // As Workers: later transfers from and to this memory cost less. It must live until `close` is done.
    bool register_memory(char* memory, std::size_t nbytes);
    // Complete what was submitted and end the threads. A second call does nothing.
    void close();

private:
    const std::size_t block_size_;
    std::unique_ptr<BlockQueue> queue_;
    std::unique_ptr<Workers> workers_;
    pid_t process_;
};

// Starts a thread that leaves signals to the others: Python's handlers run where Python runs.
std::thread start_thread(std::function<void()> work);

}  // namespace deepspeed
