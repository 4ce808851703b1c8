// Activations quantized to int8, the left operand of every packed product; see docs/kernels.md for the rule.
#pragma once

#include <cstddef>
#include <cstdint>

#include "packed.h"

namespace linocut {

// x[t, k] is about values[t * stride + k] * scales[t * (n / 128) + k / 128], with values in [-127, 127]. `sums` are the
// sums of 64 neighbouring values each: what the offset of unsigned codes and the zero points of affine4 multiply.
// n is a multiple of 128. stride >= n; activation_stride(n) keeps rows that are read together in different cache sets.
struct Activations {
    std::size_t m, n, stride;
    std::int8_t* values;   // [m, stride]
    float* scales;         // [m, n / 128]
    std::int32_t* sums;    // [m, n / 64]
};

constexpr std::size_t activation_stride(std::size_t n) { return n + 64; }

// A matrix of floats that the caller owns: rows of float32 or of bfloat16 bits, `stride` elements apart.
enum class Float : std::uint8_t { f32, bf16 };
struct Rows {
    Float type;
    std::size_t rows, columns, stride;
    void* data;
};

}  // namespace linocut
