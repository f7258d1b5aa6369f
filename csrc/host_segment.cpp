#include "host_segment.hpp"

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <ctime>
#include <new>
#include <string>
#include <system_error>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

namespace deepspeed {
namespace {

constexpr std::size_t PAGE = 4096;
constexpr long LONGEST_SLEEP_NANOSECONDS = 50'000'000;

[[noreturn]] void fail(const std::string& what) { throw std::system_error(errno, std::generic_category(), what); }

std::size_t whole_pages(std::size_t nbytes) { return (nbytes + PAGE - 1) / PAGE * PAGE; }

std::size_t progress_at() { return PAGE; }

std::size_t descriptions_at(const SegmentShape& shape) {
    return progress_at() + whole_pages(shape.ranks * sizeof(Progress));
}

std::size_t slots_at(const SegmentShape& shape) {
    return descriptions_at(shape) + whole_pages(std::size_t{shape.ranks} * shape.slots * sizeof(Description));
}

}  // namespace

std::size_t SegmentShape::nbytes() const { return slots_at(*this) + std::size_t{ranks} * slots * slot_nbytes; }

Segment::Segment(const SegmentShape& shape) : shape_(shape) {
    descriptor_ = memfd_create("deepspeed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (descriptor_ < 0) fail("memfd_create");
    try {
        if (fchmod(descriptor_, 0600) || ftruncate(descriptor_, static_cast<off_t>(shape.nbytes()))) fail("a new segment");
        // Reserved now: memory that is missing later would end the process with SIGBUS.
        const int error = posix_fallocate(descriptor_, 0, static_cast<off_t>(shape.nbytes()));
        if (error) throw std::system_error(error, std::generic_category(), "memory for a segment");
        fcntl(descriptor_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW);
        map();
        auto* token = reinterpret_cast<std::uint64_t*>(memory_);
        if (getrandom(token, sizeof *token, 0) != sizeof *token) fail("getrandom");
    } catch (...) {
        close_descriptor();
        throw;
    }
    for (std::size_t rank = 0; rank < shape.ranks; ++rank) new (&progress(rank)) Progress;
}

Segment::Segment(const SegmentShape& shape, int pid, int descriptor, std::uint64_t token) : shape_(shape) {
    const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(descriptor);
    descriptor_ = open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (descriptor_ < 0) fail(path);
    struct stat found {};
    const bool fits = fstat(descriptor_, &found) == 0 && static_cast<std::size_t>(found.st_size) == shape.nbytes();
    if (fits) map();
    close_descriptor();
    if (!fits || this->token() != token) {
        unmap();
        throw std::system_error(ESTALE, std::generic_category(), path + " is another file than was announced");
    }
}

Segment::~Segment() {
    close_descriptor();
    unmap();
}

void Segment::unmap() {
    if (memory_ && owner_ == getpid()) munmap(memory_, shape_.nbytes());
}

void Segment::map() {
    void* memory = mmap(nullptr, shape_.nbytes(), PROT_READ | PROT_WRITE, MAP_SHARED, descriptor_, 0);
    if (memory == MAP_FAILED) {
        const int error = errno;
        close_descriptor();
        throw std::system_error(error, std::generic_category(), "mmap of a segment");
    }
    memory_ = static_cast<char*>(memory);
    owner_ = getpid();
    // A child of a fork is no rank of this group.
    madvise(memory_, shape_.nbytes(), MADV_DONTFORK);
}

std::uint64_t Segment::token() const { return *reinterpret_cast<const std::uint64_t*>(memory_); }

void Segment::close_descriptor() {
    if (descriptor_ >= 0) close(descriptor_);
    descriptor_ = -1;
}

Progress& Segment::progress(std::size_t rank) const {
    return *reinterpret_cast<Progress*>(memory_ + progress_at() + rank * sizeof(Progress));
}

Description& Segment::description(std::size_t rank, std::uint64_t step) const {
    auto* first = reinterpret_cast<Description*>(memory_ + descriptions_at(shape_));
    return first[rank * shape_.slots + step % shape_.slots];
}

char* Segment::slot(std::size_t rank, std::uint64_t step) const {
    return memory_ + slots_at(shape_) + (rank * shape_.slots + step % shape_.slots) * shape_.slot_nbytes;
}

void Segment::ring(std::size_t rank) const {
    Progress& there = progress(rank);
    // Either the sleeper sees what was stored before, or its flag is seen here: all four accesses are in one order.
    if (!there.sleeping.load(std::memory_order_seq_cst)) return;
    there.bell.fetch_add(1, std::memory_order_seq_cst);
    syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&there.bell), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void Segment::sleep(std::size_t rank, std::uint32_t heard) const {
    const timespec longest{0, LONGEST_SLEEP_NANOSECONDS};
    syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&progress(rank).bell), FUTEX_WAIT, heard, &longest, nullptr, 0);
}

Processes::Processes(const std::vector<int>& pids) {
    for (const int pid : pids) {
        const int descriptor = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
        if (descriptor < 0) {
            const int error = errno;
            for (const int other : descriptors_) close(other);
            throw std::system_error(error, std::generic_category(), "pidfd_open of process " + std::to_string(pid));
        }
        descriptors_.push_back(descriptor);
    }
}

Processes::~Processes() {
    for (const int descriptor : descriptors_) close(descriptor);
}

int Processes::ended() const {
    std::vector<pollfd> polled;
    for (const int descriptor : descriptors_) polled.push_back({descriptor, POLLIN, 0});
    if (poll(polled.data(), polled.size(), 0) <= 0) return -1;
    for (std::size_t index = 0; index < polled.size(); ++index)
        if (polled[index].revents) return static_cast<int>(index);
    return -1;
}

}  // namespace deepspeed
