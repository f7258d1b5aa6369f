// Workers that call pread and pwrite, and the engine's own part: starting threads, submitting and ending.
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <stdexcept>
#include <system_error>
#include <utility>
#include <vector>

#include "file_engine.hpp"

namespace deepspeed {
namespace {

// Moves the block; returns its error as in Outcome.
int move(Block& block, BounceBuffer& buffer) {
    int error = 0;
    for (;;) {
        const Request request = next_request(block);
        char* memory = request.memory;
        try {
            if (request.bounce) memory = buffer.get();
        } catch (const std::bad_alloc&) {
            return ENOMEM;
        }
        const bool writing = block.transfer->writing;
        if (request.bounce && writing) std::memcpy(memory, request.memory, request.nbytes);
        const off_t offset = static_cast<off_t>(request.offset);
        const ssize_t moved = writing ? pwrite(request.descriptor, memory, request.nbytes, offset)
                                      : pread(request.descriptor, memory, request.nbytes, offset);
        if (advance(block, request, memory, moved < 0 ? -errno : moved, error)) return error;
    }
}

class ThreadWorkers : public Workers {
public:
    ThreadWorkers(BlockQueue& queue, const EngineOptions& options) {
        const unsigned count = std::min(options.thread_count * options.queue_depth, MOST_THREADS);
        const auto work = [&queue, block_size = options.block_size] {
            BounceBuffer buffer(block_size);
            Block block;
            while (queue.take(block, true)) {
                const int error = move(block, buffer);
                std::exchange(block.transfer, nullptr)->finish(block, error);
            }
        };
        threads_.reserve(count);
        for (unsigned index = 0; index < count; ++index) {
            try {
                threads_.push_back(start_thread(work));
            } catch (const std::system_error&) {  // a limit on threads: those that there are do the work
                if (threads_.empty()) throw;
                return;
            }
        }
    }

    void wake() override {}  // the queue's condition variable has

    void join() override {
        for (std::thread& thread : threads_) thread.join();
        threads_.clear();
    }

    bool register_memory(char*, std::size_t) override { return false; }  // pread and pwrite know nothing of it

private:
    std::vector<std::thread> threads_;
};

}  // namespace

std::thread start_thread(std::function<void()> work) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // a thread inherits the mask of the one that starts it
    std::thread thread;
    try {
        thread = std::thread(std::move(work));
    } catch (...) {
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return thread;
}

std::unique_ptr<Workers> thread_workers(BlockQueue& queue, const EngineOptions& options) {
    return std::make_unique<ThreadWorkers>(queue, options);
}

FileEngine::FileEngine(const EngineOptions& options, bool uring)
    : block_size_(options.block_size),
      queue_(std::make_unique<BlockQueue>(options.block_size)),
      workers_(uring ? uring_workers(*queue_, options) : thread_workers(*queue_, options)),
      process_(getpid()) {}

FileEngine::~FileEngine() { close(); }

std::shared_ptr<Transfer> FileEngine::submit(const OpenFile& file, char* memory, std::size_t nbytes,
                                             std::uint64_t offset, bool writing) {
    OpenFile target = file;
    if (target.offset_alignment > block_size_ || target.memory_alignment > BounceBuffer::ALIGNMENT) target.direct = -1;
    auto transfer = std::make_shared<Transfer>(target, memory, nbytes, offset, writing);
    if (!workers_ || !queue_->push(transfer)) throw std::runtime_error("the file engine is closed");
    workers_->wake();
    return transfer;
}

bool FileEngine::register_memory(char* memory, std::size_t nbytes) {
    return workers_ && workers_->register_memory(memory, nbytes);
}

void FileEngine::close() {
    if (!workers_) return;
    if (getpid() != process_) {  // a fork has no threads that could be joined, and locks that nobody will release
        static_cast<void>(workers_.release());
        static_cast<void>(queue_.release());
        return;
    }
    queue_->close();
    workers_->wake();
    workers_->join();
    workers_.reset();
}

}  // namespace deepspeed
