#pragma once

#include <nanobind/nanobind.h>

namespace deepspeed {

// Adds what is in host_module.cpp to the Python module.
void bind_hosts(nanobind::module_& module);

}  // namespace deepspeed
