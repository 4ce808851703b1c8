// Bit-level pieces that decoders, unpackers and quantizers share. Like every *_impl.h this is compiled once per
// instruction set, so everything is static and no standard header with inline functions is used: an inline function
// compiled for AVX-512 must not become the copy that the linker keeps.
#pragma once

#include <cstring>

#include "packed.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the kernels, like the format, are little-endian"
#endif

namespace linocut {
namespace {

using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

[[maybe_unused]] inline float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

[[maybe_unused]] inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

[[maybe_unused]] inline float float_of_half(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, NaN
    if (magnitude < 0x400u) {  // zero and subnormals: steps of 2^-24, exact in float
        const float value = float(magnitude) * 0x1p-24f;
        return sign ? -value : value;
    }
    return float_of_bits(sign | ((magnitude << 13) + (112u << 23)));
}

[[maybe_unused]] inline float load(const float* x) { return *x; }
[[maybe_unused]] inline float load(const uint16_t* x) { return float_of_bits(uint32_t(*x) << 16); }  // bfloat16

[[maybe_unused]] inline void store(float* out, float value) { *out = value; }

// Round to nearest bfloat16, ties to even, as torch does. A NaN (from a broken scale) keeps being one.
[[maybe_unused]] inline void store(uint16_t* out, float value) {
    const uint32_t bits = bits_of_float(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    *out = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

constexpr uint8_t kPower[kTrits] = {1, 3, 9, 27, 81};

// Digit 0..2 of the fixed-point fraction `byte` / 256 in base 3, for any byte: two compares in eight-bit lanes.
[[maybe_unused]] inline int digit(uint8_t byte, uint8_t power) {
    const uint8_t fraction = uint8_t(byte * power);
    return int(fraction >= 86) + int(fraction >= 171);
}

// The eight bits of `byte` as eight bytes of 0 or 1 in a word, in memory order.
[[maybe_unused]] inline uint64_t spread_bits(uint8_t byte) {
    constexpr uint64_t kOnes = 0x0101010101010101u;
    const uint64_t picked = byte * kOnes & 0x8040201008040201u;  // byte k keeps bit k
    return (picked + 0x7f7f7f7f7f7f7f7fu) >> 7 & kOnes;          // ... which becomes 0 or 1
}

}  // namespace
}  // namespace linocut
