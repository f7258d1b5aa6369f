#pragma once

#include <nanobind/nanobind.h>

namespace deepspeed {

// Adds what is in file_module.cpp to the Python module.
void bind_files(nanobind::module_& module);

}  // namespace deepspeed
