// Workers with an io_uring each: a thread keeps up to `queue_depth` requests in flight and sleeps in the kernel meanwhile.
#include <cerrno>
#include <system_error>

#include "file_engine.hpp"

#ifdef __linux__
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "uring.hpp"

namespace deepspeed {
namespace {

// Memory that every ring has registered, by its index there.
class RegisteredMemory {
public:
    static constexpr unsigned MOST = 64;
    static constexpr std::size_t MOST_NBYTES = std::size_t{1} << 30;  // the kernel's limit

    // The index of what holds [memory, memory + nbytes), or -1.
    int find(const char* memory, std::size_t nbytes) {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (std::size_t index = 0; index < regions_.size(); ++index)
            if (memory >= regions_[index].first && memory + nbytes <= regions_[index].first + regions_[index].second)
                return static_cast<int>(index);
        return -1;
    }

    // Adds a region if `apply`, given its index, returns true.
    template <typename Apply>
    bool add(char* memory, std::size_t nbytes, const Apply& apply) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (regions_.size() == MOST || nbytes == 0 || nbytes > MOST_NBYTES) return false;
        if (!apply(static_cast<unsigned>(regions_.size()))) return false;
        regions_.emplace_back(memory, nbytes);
        return true;
    }

private:
    std::mutex mutex_;
    std::vector<std::pair<char*, std::size_t>> regions_;
};

// One thread's requests. Files are not registered with the ring: that saves nothing that shows at a block's size.
class UringWorker {
public:
    UringWorker(BlockQueue& queue, const EngineOptions& options, RegisteredMemory& registered)
        : queue_(queue), options_(options), registered_(registered), ring_(options.queue_depth + 1), event_(eventfd(0, EFD_CLOEXEC)) {
        if (event_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
        has_buffers_ = ring_.reserve_buffers(RegisteredMemory::MOST);
        for (unsigned index = 0; index < options.queue_depth; ++index) {
            slots_.push_back({{}, {}, BounceBuffer(options.block_size)});
            free_.push_back(index);
        }
    }

    ~UringWorker() { ::close(event_); }

    // Called by other threads. The thread waits for completions only: the read of `event_` is always one of its requests.
    void wake() {
        const std::uint64_t one = 1;
        static_cast<void>(!write(event_, &one, sizeof one));
    }

    // Called by other threads.
    bool register_memory(unsigned index, char* memory, std::size_t nbytes) {
        return has_buffers_ && ring_.register_buffer(index, memory, nbytes);
    }

    void run() {
        listen();
        for (;;) {
            fill();
            if (!listening_ && in_flight() == 0) return;
            ring_.enter(1);
            std::uint64_t user_data;
            std::int32_t result;
            while (ring_.reap(user_data, result)) {
                if (user_data == WAKE)
                    woken();
                else
                    complete(static_cast<unsigned>(user_data), result);
            }
        }
    }

private:
    struct Slot {
        Block block;
        Request request;
        BounceBuffer buffer;
    };
    static constexpr std::uint64_t WAKE = ~std::uint64_t{0};

    std::size_t in_flight() const { return slots_.size() - free_.size(); }

    void listen() {
        ring_.prepare(uring::OP_READ, event_, &wakes_, sizeof wakes_, 0, WAKE);
        listening_ = true;
    }

    // A closed queue gets nothing more: `fill` takes what it has, and then the thread ends.
    void woken() {
        listening_ = false;
        if (!queue_.closed()) listen();
    }

    void fill() {
        if (!options_.overlap_events && in_flight() > 0) return;
        while (!free_.empty()) {
            const unsigned index = free_.back();
            if (!queue_.take(slots_[index].block, false)) return;
            free_.pop_back();
            start(index);
        }
    }

    void start(unsigned index) {
        Slot& slot = slots_[index];
        slot.request = next_request(slot.block);
        const Request& request = slot.request;
        const bool writing = slot.block.transfer->writing;
        char* memory = request.memory;
        if (request.bounce) {
            try {
                memory = slot.buffer.get();
            } catch (const std::bad_alloc&) {
                return finish(index, ENOMEM);
            }
            if (writing) std::memcpy(memory, request.memory, request.nbytes);
        }
        ring_.prepare(writing ? uring::OP_WRITE : uring::OP_READ, request.descriptor, memory,
                      static_cast<std::uint32_t>(request.nbytes), request.offset, index,
                      has_buffers_ ? registered_.find(memory, request.nbytes) : -1);
        if (options_.single_submit) ring_.enter(0);
    }

    void complete(unsigned index, std::int32_t result) {
        Slot& slot = slots_[index];
        int error = 0;
        if (advance(slot.block, slot.request, slot.request.bounce ? slot.buffer.get() : nullptr, result, error))
            finish(index, error);
        else
            start(index);
    }

    void finish(unsigned index, int error) {
        Block& block = slots_[index].block;
        free_.push_back(index);
        std::exchange(block.transfer, nullptr)->finish(block, error);
    }

    BlockQueue& queue_;
    const EngineOptions options_;
    RegisteredMemory& registered_;
    bool has_buffers_ = false;
    std::vector<Slot> slots_;
    std::vector<unsigned> free_;
    std::uint64_t wakes_ = 0;
    bool listening_ = false;
    Ring ring_;
    const int event_;
};

class UringWorkers : public Workers {
public:
    UringWorkers(BlockQueue& queue, const EngineOptions& options) {
        for (unsigned index = 0; index < options.thread_count; ++index)
            workers_.push_back(std::make_unique<UringWorker>(queue, options, registered_));
        try {
            for (const auto& worker : workers_)
                threads_.push_back(start_thread([&worker = *worker] { worker.run(); }));
        } catch (...) {  // no thread may outlive what it works on
            queue.close();
            wake();
            join();
            throw;
        }
    }

    void wake() override {
        for (const auto& worker : workers_) worker->wake();
    }

    void join() override {
        for (std::thread& thread : threads_) thread.join();
        threads_.clear();
    }

    bool register_memory(char* memory, std::size_t nbytes) override {
        return registered_.add(memory, nbytes, [&](unsigned index) {
            for (const auto& worker : workers_)
                if (!worker->register_memory(index, memory, nbytes)) return false;
            return true;
        });
    }

private:
    RegisteredMemory registered_;
    std::vector<std::unique_ptr<UringWorker>> workers_;
    std::vector<std::thread> threads_;
};

// What statx(2) says since Linux 6.1, at its place in struct statx.
struct Statx {
    std::uint32_t mask;
    char other[148];
    std::uint32_t memory_alignment, offset_alignment;
    char rest[96];
};
static_assert(sizeof(Statx) == 256, "the kernel's layout");
constexpr unsigned STATX_ALIGNMENTS = 0x2000;

}  // namespace

std::unique_ptr<Workers> uring_workers(BlockQueue& queue, const EngineOptions& options) {
    return std::make_unique<UringWorkers>(queue, options);
}

std::string uring_refusal() {
    try {
        const Ring ring(1);
        return "";
    } catch (const std::system_error& error) {
        return error.what();
    }
}

Alignments direct_alignments(int descriptor) {
#ifdef SYS_statx
    Statx found{};
    if (syscall(SYS_statx, descriptor, "", AT_EMPTY_PATH, STATX_ALIGNMENTS, &found) == 0 &&
        (found.mask & STATX_ALIGNMENTS))
        return {found.offset_alignment, found.memory_alignment};
#endif
    return {0, 0};
}

}  // namespace deepspeed

#else  // not Linux

namespace deepspeed {

std::unique_ptr<Workers> uring_workers(BlockQueue&, const EngineOptions&) {
    throw std::system_error(ENOSYS, std::generic_category(), "io_uring is Linux's");
}

std::string uring_refusal() { return "io_uring is Linux's"; }

Alignments direct_alignments(int) { return {0, 0}; }

}  // namespace deepspeed
#endif
