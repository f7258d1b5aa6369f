#include "transfer.hpp"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace deepspeed {

Transfer::Transfer(const OpenFile& file, char* memory, std::size_t nbytes, std::uint64_t offset, bool writing)
    : file(file), memory(memory), nbytes(nbytes), offset(offset), writing(writing) {}

bool Transfer::next_block(std::size_t block_size, Block& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (outcome_.error != 0 || issued_ == nbytes) return false;
    // With O_DIRECT a boundary between blocks must be one that it can start from.
    if (file.direct >= 0) block_size -= block_size % file.offset_alignment;
    const std::size_t room = block_size - (offset + issued_) % block_size;
    block.begin = block.position = issued_;
    block.end = issued_ += std::min(room, nbytes - issued_);
    block.direct = file.direct >= 0;
    ++in_flight_;
    return true;
}

void Transfer::finish(const Block& block, int error) {
    const std::lock_guard<std::mutex> lock(mutex_);
    outcome_.transferred += block.position - block.begin;
    // Of several failures the first byte's is told, whichever block came back first.
    const bool first = outcome_.error == 0 || (outcome_.error != ECANCELED && block.position < outcome_.failed_at);
    if (error != 0 && first) {
        outcome_.error = error;
        outcome_.failed_at = block.position;
    }
    --in_flight_;
    if (ended()) end_.notify_all();
}

void Transfer::cancel() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (ended() || outcome_.error != 0) return;
    outcome_.error = ECANCELED;
    outcome_.failed_at = issued_;
    if (ended()) end_.notify_all();
}

bool Transfer::wait(double seconds) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto over = [this] { return ended(); };
    if (seconds >= 0) return end_.wait_for(lock, std::chrono::duration<double>(seconds), over);
    end_.wait(lock, over);
    return true;
}

Outcome Transfer::outcome() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return outcome_;
}

Request next_request(const Block& block) {
    const Transfer& transfer = *block.transfer;
    const OpenFile& file = transfer.file;
    char* const memory = transfer.memory + block.position;
    const std::uint64_t offset = transfer.offset + block.position;
    const std::size_t left = block.end - block.position;
    if (!block.direct) return {file.buffered, false, false, memory, left, offset};
    const std::size_t past = offset % file.offset_alignment;
    if (past != 0)  // up to where O_DIRECT can start
        return {file.buffered, false, false, memory, std::min(left, file.offset_alignment - past), offset};
    if (left < file.offset_alignment) return {file.buffered, false, false, memory, left, offset};
    const bool bounce = reinterpret_cast<std::uintptr_t>(memory) % file.memory_alignment != 0;
    return {file.direct, true, bounce, memory, left - left % file.offset_alignment, offset};
}

bool advance(Block& block, const Request& request, const char* bounce, long result, int& error) {
    error = 0;
    if (result == -EINTR || result == -EAGAIN) return false;
    if (result == -EINVAL && request.direct) {  // not here, or not for this alignment: the page cache takes everything
        block.direct = false;
        return false;
    }
    if (result < 0) {
        error = static_cast<int>(-result);
        return true;
    }
    const bool writing = block.transfer->writing;
    if (result == 0) {
        error = writing ? EIO : SHORT_FILE;
        return true;
    }
    if (request.bounce && !writing) std::memcpy(request.memory, bounce, static_cast<std::size_t>(result));
    block.position += static_cast<std::size_t>(result);
    return block.position == block.end;
}

bool BlockQueue::push(std::shared_ptr<Transfer> transfer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return false;
    transfers_.push_back(std::move(transfer));
    work_.notify_all();
    return true;
}

bool BlockQueue::take(Block& block, bool wait) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        while (!transfers_.empty()) {
            if (transfers_.front()->next_block(block_size_, block)) {
                block.transfer = transfers_.front();
                return true;
            }
            transfers_.pop_front();
        }
        if (!wait || closed_) return false;
        work_.wait(lock);
    }
}

void BlockQueue::close() {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    work_.notify_all();
}

bool BlockQueue::closed() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return closed_;
}

char* BounceBuffer::get() {
    if (!memory_) {
        void* memory = nullptr;
        if (posix_memalign(&memory, ALIGNMENT, nbytes_) != 0) throw std::bad_alloc();
        memory_.reset(static_cast<char*>(memory));
    }
    return memory_.get();
}

void BounceBuffer::Free::operator()(void* memory) const { std::free(memory); }

}  // namespace deepspeed
