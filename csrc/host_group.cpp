#include "host_group.hpp"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "host_steps.hpp"

namespace deepspeed {
namespace {

// How often a waiting caller looks before it sleeps. Between looks it yields: the rank it waits for may need this core.
constexpr int LOOKS = 200;

}  // namespace

HostGroup::HostGroup(std::shared_ptr<Segment> segment, std::size_t rank, const std::vector<int>& pids, double timeout)
    : segment_(std::move(segment)),
      rank_(rank),
      processes_(pids),
      timeout_(std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout))),
      owner_(getpid()),
      thread_(new std::thread([this] { work(); })) {}

HostGroup::~HostGroup() { close(); }

void HostGroup::close() {
    if (!thread_) return;
    if (getpid() != owner_) {
        // A child of a fork has neither the thread nor the memory.
        thread_.release();
        meeting_.release();
        return;
    }
    {
        const std::lock_guard<std::mutex> lock(meeting_->mutex);
        closing_ = true;
    }
    meeting_->submitted.notify_all();
    segment_->ring(rank_);
    thread_->join();
    thread_.reset();
    std::unique_lock<std::mutex> lock(meeting_->mutex);
    meeting_->ended.wait(lock, [this] { return !driven_; });
    for (const auto& operation : queue_) fail(*operation, State::closed, -1);
    queue_.clear();
    meeting_->ended.notify_all();
    segment_->progress(rank_).left.store(1, std::memory_order_seq_cst);
    ring_others();
}

std::shared_ptr<Operation> HostGroup::submit(const Request& request) {
    auto operation = std::make_shared<Operation>(request);
    {
        const std::lock_guard<std::mutex> lock(meeting_->mutex);
        if (closing_) {
            fail(*operation, State::closed, -1);
            return operation;
        }
        if (queue_.empty()) moved_ = Clock::now();
        queue_.push_back(operation);
    }
    meeting_->submitted.notify_one();
    return operation;
}

bool HostGroup::wait(Operation& operation, double seconds) {
    const auto until = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    std::unique_lock<std::mutex> lock(meeting_->mutex);
    while (operation.state == State::waiting && Clock::now() < until) {
        if (driven_ || queue_.empty())
            meeting_->ended.wait_until(lock, until);
        else
            drive(lock, until, false);
    }
    return operation.state != State::waiting;
}

void HostGroup::work() {
    std::unique_lock<std::mutex> lock(meeting_->mutex);
    for (;;) {
        meeting_->submitted.wait(lock, [this] { return closing_ || (!queue_.empty() && !driven_); });
        if (closing_) return;
        drive(lock, Clock::time_point::max(), true);
    }
}

// Runs the operation at the head, without the lock.
void HostGroup::drive(std::unique_lock<std::mutex>& lock, Clock::time_point until, bool patient) {
    const std::shared_ptr<Operation> operation = queue_.front();
    driven_ = true;
    lock.unlock();
    run(*operation, until, patient);
    lock.lock();
    driven_ = false;
    if (operation->state != State::waiting) queue_.pop_front();
    meeting_->ended.notify_all();
    if (!queue_.empty()) meeting_->submitted.notify_one();
}

void HostGroup::run(Operation& operation, Clock::time_point until, bool patient) {
    if (broken_.state != State::waiting) {
        operation.there = broken_.there;
        return fail(operation, broken_.state, broken_.peer);
    }
    const std::uint64_t count = Steps(operation.request, *segment_, rank_, base_).count();
    while (operation.consumed < count) {
        if (advance(operation)) continue;
        if (operation.state == State::waiting && !await_progress(operation, until, patient)) return;
        if (operation.state != State::waiting) {
            broken_.state = operation.state.load();
            broken_.peer = operation.peer;
            broken_.there = operation.there;
            return;
        }
    }
    base_ += count;
    operation.state = State::done;
}

bool HostGroup::may_publish(const Operation& operation) const {
    const Steps steps(operation.request, *segment_, rank_, base_);
    const std::uint64_t step = operation.published, slots = segment_->shape().slots;
    if (step >= steps.count() || steps.needed_for(step) > operation.consumed) return false;
    for (std::size_t peer = 0; peer < segment_->shape().ranks; ++peer) {
        const std::uint64_t consumed = segment_->progress(peer).consumed.load(std::memory_order_seq_cst);
        if (peer != rank_ && consumed + slots <= base_ + step) return false;
    }
    return true;
}

bool HostGroup::may_consume(const Operation& operation) const {
    if (operation.consumed >= operation.published) return false;
    const Steps steps(operation.request, *segment_, rank_, base_);
    for (std::size_t peer = 0; peer < segment_->shape().ranks; ++peer) {
        const std::uint64_t published = segment_->progress(peer).published.load(std::memory_order_seq_cst);
        if (steps.reads(peer) && published <= base_ + operation.consumed) return false;
    }
    return true;
}

// Whether all whose slots are read do the same.
bool HostGroup::matches(Operation& operation) {
    const Steps steps(operation.request, *segment_, rank_, base_);
    for (std::size_t peer = 0; peer < segment_->shape().ranks; ++peer) {
        if (!steps.reads(peer)) continue;
        const Description& there = segment_->description(peer, base_ + operation.consumed);
        if (there == operation.request.what) continue;
        operation.there = there;
        fail(operation, State::differs, static_cast<int>(peer));
        return false;
    }
    return true;
}

// Consumes or publishes one step; false where neither can be done.
bool HostGroup::advance(Operation& operation) {
    const Steps steps(operation.request, *segment_, rank_, base_);
    Progress& own = segment_->progress(rank_);
    if (may_consume(operation)) {
        if (!matches(operation)) return false;
        steps.consume(operation.consumed);
        ++operation.consumed;
        own.consumed.store(base_ + operation.consumed, std::memory_order_seq_cst);
    } else if (may_publish(operation)) {
        segment_->description(rank_, base_ + operation.published) = operation.request.what;
        steps.publish(operation.published);
        ++operation.published;
        own.published.store(base_ + operation.published, std::memory_order_seq_cst);
    } else {
        return false;
    }
    moved_ = Clock::now();
    ring_others();
    return true;
}

// Sleeps until something can be done or has failed; false where the time is up.
bool HostGroup::await_progress(Operation& operation, Clock::time_point until, bool patient) {
    const auto ready = [&] { return may_consume(operation) || may_publish(operation); };
    for (int look = 0; !patient && look < LOOKS; ++look) {
        if (ready()) return true;
        sched_yield();
    }
    Progress& own = segment_->progress(rank_);
    while (Clock::now() < until) {
        const std::uint32_t heard = own.bell.load(std::memory_order_seq_cst);
        own.sleeping.store(1, std::memory_order_seq_cst);
        const bool found = ready();
        if (!found && !closing_) segment_->sleep(rank_, heard);
        own.sleeping.store(0, std::memory_order_seq_cst);
        if (found || ready()) return true;
        look_for_the_missing(operation);
        if (operation.state != State::waiting) return true;
    }
    return false;
}

void HostGroup::look_for_the_missing(Operation& operation) const {
    if (closing_) return fail(operation, State::closed, -1);
    int missing = -1;
    for (std::size_t peer = 0; peer < segment_->shape().ranks && missing < 0; ++peer) {
        const bool read = Steps(operation.request, *segment_, rank_, base_).reads(peer);
        const Progress& there = segment_->progress(peer);
        const bool behind = read && there.published.load() <= base_ + operation.consumed;
        const bool full = there.consumed.load() + segment_->shape().slots <= base_ + operation.published;
        if (peer != rank_ && (behind || full)) missing = static_cast<int>(peer);
        if (missing >= 0 && there.left.load()) return fail(operation, State::left, missing);
    }
    const int ended = processes_.ended();
    // What it had published before it ended is there to be read.
    if (ended >= 0 && missing >= 0 && !may_consume(operation) && !may_publish(operation))
        return fail(operation, State::ended, ended);
    if (Clock::now() - moved_ > timeout_) fail(operation, State::timeout, missing);
}

void HostGroup::fail(Operation& operation, State state, int peer) const {
    operation.peer = peer;
    operation.state = state;
}

void HostGroup::ring_others() const {
    for (std::size_t peer = 0; peer < segment_->shape().ranks; ++peer)
        if (peer != rank_) segment_->ring(peer);
}

}  // namespace deepspeed
