// XXH64, a fast hash that is not cryptographic: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
#pragma once

#include <cstddef>
#include <cstdint>

namespace deepspeed {

// With the seed 0.
std::uint64_t xxh64(const unsigned char* data, std::size_t nbytes);

}  // namespace deepspeed
