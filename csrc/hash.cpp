#include "hash.hpp"

#include <cstring>

namespace deepspeed {
namespace {

constexpr std::uint64_t PRIME_1 = 0x9E3779B185EBCA87, PRIME_2 = 0xC2B2AE3D27D4EB4F, PRIME_3 = 0x165667B19E3779F9,
                        PRIME_4 = 0x85EBCA77C2B2AE63, PRIME_5 = 0x27D4EB2F165667C5;

std::uint64_t rotated(std::uint64_t value, int bits) { return value << bits | value >> (64 - bits); }

// Little-endian, as all machines are that this is built for.
template <typename Word>
std::uint64_t word(const unsigned char* data) {
    Word value;
    std::memcpy(&value, data, sizeof value);
    return value;
}

std::uint64_t round(std::uint64_t lane, std::uint64_t input) { return rotated(lane + input * PRIME_2, 31) * PRIME_1; }

std::uint64_t merged(std::uint64_t hash, std::uint64_t lane) { return (hash ^ round(0, lane)) * PRIME_1 + PRIME_4; }

// Lanes that do not wait for each other's multiplications.
std::uint64_t stripes(const unsigned char*& data, const unsigned char* end) {
    std::uint64_t a = PRIME_1 + PRIME_2, b = PRIME_2, c = 0, d = std::uint64_t{0} - PRIME_1;
    for (; end - data >= 32; data += 32) {
        a = round(a, word<std::uint64_t>(data));
        b = round(b, word<std::uint64_t>(data + 8));
        c = round(c, word<std::uint64_t>(data + 16));
        d = round(d, word<std::uint64_t>(data + 24));
    }
    const std::uint64_t hash = rotated(a, 1) + rotated(b, 7) + rotated(c, 12) + rotated(d, 18);
    return merged(merged(merged(merged(hash, a), b), c), d);
}

}  // namespace

std::uint64_t xxh64(const unsigned char* data, std::size_t nbytes) {
    const unsigned char* end = data + nbytes;
    std::uint64_t hash = (nbytes >= 32 ? stripes(data, end) : PRIME_5) + nbytes;
    for (; end - data >= 8; data += 8)
        hash = rotated(hash ^ round(0, word<std::uint64_t>(data)), 27) * PRIME_1 + PRIME_4;
    if (end - data >= 4) {
        hash = rotated(hash ^ word<std::uint32_t>(data) * PRIME_1, 23) * PRIME_2 + PRIME_3;
        data += 4;
    }
    for (; data < end; ++data) hash = rotated(hash ^ *data * PRIME_5, 11) * PRIME_1;
    hash = (hash ^ hash >> 33) * PRIME_2;
    hash = (hash ^ hash >> 29) * PRIME_3;
    return hash ^ hash >> 32;
}

}  // namespace deepspeed
