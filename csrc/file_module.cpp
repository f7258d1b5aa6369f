// The Python classes of file I/O. Called by deepspeed.native only, which keeps memory and descriptors alive meanwhile.
#include "file_module.hpp"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <tuple>
#include <utility>

#include "file_engine.hpp"

namespace nb = nanobind;

namespace deepspeed {

void bind_files(nb::module_& module) {
    using namespace nb::literals;
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    nb::class_<Transfer>(module, "Transfer", "One read or write of a file.")
        .def("wait", &Transfer::wait, unlocked, "seconds"_a, "Whether it ended within so long (negative: forever).")
        .def("cancel", &Transfer::cancel, "Begin no further blocks.")
        .def("outcome", [](Transfer& transfer) {
            const Outcome outcome = transfer.outcome();
            return std::make_tuple(outcome.error, outcome.failed_at, outcome.transferred);
        }, "Once it has ended: 0, an errno, or -1 for the end of the file; the byte that failed; bytes moved.");
    nb::class_<FileEngine>(module, "FileEngine", "Threads that move blocks between memory and files.")
        .def("__init__", [](FileEngine* self, std::size_t block_size, unsigned queue_depth, unsigned thread_count,
                            bool single_submit, bool overlap_events, bool uring) {
            new (self) FileEngine({block_size, queue_depth, thread_count, single_submit, overlap_events}, uring);
        }, "block_size"_a, "queue_depth"_a, "thread_count"_a, "single_submit"_a, "overlap_events"_a, "uring"_a)
        .def("submit", [](FileEngine& self, const std::tuple<int, int, std::size_t, std::size_t>& file,
                          std::uintptr_t address, std::size_t nbytes, std::uint64_t offset, bool writing) {
            const auto [direct, buffered, offset_alignment, memory_alignment] = file;
            return self.submit({direct, buffered, offset_alignment, memory_alignment},
                               reinterpret_cast<char*>(address), nbytes, offset, writing);
        }, "file"_a, "address"_a, "nbytes"_a, "offset"_a, "writing"_a)
        .def("register_memory", [](FileEngine& self, std::uintptr_t address, std::size_t nbytes) {
            return self.register_memory(reinterpret_cast<char*>(address), nbytes);
        }, "address"_a, "nbytes"_a, "Whether later transfers of this memory, which must live until close, cost less.")
        .def("close", &FileEngine::close, unlocked, "Complete what was submitted and end the threads.");
    module.def("uring_refusal", &uring_refusal, "Why io_uring cannot be used here; empty if it can.");
    module.def("direct_alignments", [](int descriptor) {
        const Alignments found = direct_alignments(descriptor);
        return std::make_pair(found.offset, found.memory);
    }, "descriptor"_a, "The alignments of offsets and memory for O_DIRECT; (0, 0) where the kernel does not say.");
}

}  // namespace deepspeed
