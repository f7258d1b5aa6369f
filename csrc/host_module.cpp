// The Python classes of collectives among the ranks of one host. Called by deepspeed.native only, which keeps memory alive.
#include "host_module.hpp"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "host_group.hpp"

namespace nb = nanobind;

namespace deepspeed {

void bind_hosts(nb::module_& module) {
    using namespace nb::literals;
    using Address = std::uintptr_t;
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    nb::class_<Segment>(module, "Segment", "Memory that the ranks of one host share.")
        .def("__init__", [](Segment* self, std::uint32_t ranks, std::uint32_t slots, std::uint64_t slot_nbytes) {
            new (self) Segment({ranks, slots, slot_nbytes});
        }, "ranks"_a, "slots"_a, "slot_nbytes"_a)
        .def_static("attach", [](std::uint32_t ranks, std::uint32_t slots, std::uint64_t slot_nbytes, int pid,
                                 int descriptor, std::uint64_t token) {
            return std::make_shared<Segment>(SegmentShape{ranks, slots, slot_nbytes}, pid, descriptor, token);
        }, "ranks"_a, "slots"_a, "slot_nbytes"_a, "pid"_a, "descriptor"_a, "token"_a)
        .def_prop_ro("token", &Segment::token)
        .def_prop_ro("descriptor", &Segment::descriptor)
        .def_prop_ro("nbytes", [](const Segment& self) { return self.shape().nbytes(); })
        .def("close_descriptor", &Segment::close_descriptor, "Others can open it no more; what is mapped stays.");
    nb::class_<Operation>(module, "HostOperation", "A collective under way.")
        .def_prop_ro("state", [](const Operation& self) { return static_cast<int>(self.state.load()); })
        .def_prop_ro("peer", [](const Operation& self) { return self.peer; })
        .def_prop_ro("there", [](const Operation& self) {
            return std::make_tuple(self.there.kind, self.there.dtype, self.there.nbytes, self.there.tag);
        }, "Kind, dtype, bytes and tag of what the peer does where it differs.");
    nb::class_<HostGroup>(module, "HostGroup", "Collectives among the ranks of one host.")
        .def(nb::init<std::shared_ptr<Segment>, std::size_t, const std::vector<int>&, double>(), "segment"_a, "rank"_a,
             "pids"_a, "timeout"_a)
        .def("submit", [](HostGroup& self, std::uint32_t kind, std::tuple<Address, std::uint64_t, std::uint32_t> buffer,
                          std::tuple<Address, int, int> sum, double scale, bool accumulate, std::int64_t tag,
                          std::uint64_t source) {
            const auto [address, nbytes, code] = buffer;
            const auto [out, dtype, out_dtype] = sum;
            return self.submit({{kind, code, nbytes, tag, source}, reinterpret_cast<char*>(address),
                                reinterpret_cast<char*>(out), static_cast<Dtype>(dtype), static_cast<Dtype>(out_dtype),
                                scale, accumulate});
        }, "kind"_a, "buffer"_a, "sum"_a, "scale"_a, "accumulate"_a, "tag"_a, "source"_a)
        .def("wait", &HostGroup::wait, unlocked, "operation"_a, "seconds"_a)
        .def("close", &HostGroup::close, unlocked, "Fail what is under way, and tell the others that this rank has left.");
}

}  // namespace deepspeed
