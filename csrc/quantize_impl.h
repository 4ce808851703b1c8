// Floats to the int8 of activations.h, one group at a time, as plain loops; compiled once per instruction set (see
// scalar_impl.h) by whoever produces activations. Every build must turn off -ffp-contract: all give the same bits.
#pragma once

#include "activations.h"
#include "scalar_impl.h"

namespace linocut {
namespace {

using std::int32_t;
using std::int8_t;

// Below this 127 / max is not finite; such a group, at most 4e-37, counts as zeros.
constexpr float kSmallest = 0x1p-120f;

// Quantizes 128 floats: values[128], their scale, and the two sums of 64 values each. The rule is that of
// quantize_activations (gemm.h).
[[maybe_unused]] inline void quantize_group(const float* x, int8_t* values, float* scale, int32_t* sums) {
    // Bits of non-negative floats are ordered like the floats, with infinity and then NaN above all.
    uint32_t largest = 0;
    for (size_t j = 0; j < kGroup; ++j) {
        const uint32_t bits = bits_of_float(x[j]) & 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    const float max = float_of_bits(largest);
    if (largest >= 0x7f800000u || max < kSmallest) {
        for (size_t j = 0; j < kGroup; ++j) values[j] = 0;
        sums[0] = sums[1] = 0;
        *scale = max < kSmallest ? 0.0f : float_of_bits(0x7fc00000u);
        return;
    }
    *scale = max / 127.0f;
    const float inverse = 127.0f / max;
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, nearest even, in the low bits
    for (size_t half = 0; half < 2; ++half) {
        int32_t sum = 0;
        for (size_t j = half * 64; j < half * 64 + 64; ++j) {
            const int32_t value = int32_t(bits_of_float(x[j] * inverse + kMagic)) - 0x4b400000;
            values[j] = int8_t(value);
            sum += value;
        }
        sums[half] = sum;
    }
}

template <class In>
void quantize_row(const In* x, size_t columns, const Activations& out, size_t row, size_t first) {
    for (size_t k = 0; k < columns; k += kGroup) {
        float group[kGroup];
        for (size_t j = 0; j < kGroup; ++j) group[j] = load(x + k + j);
        const size_t at = first + k;
        quantize_group(group, out.values + row * out.stride + at, out.scales + row * (out.n / kGroup) + at / kGroup,
                       out.sums + row * (out.n / 64) + at / 64);
    }
}

}  // namespace
}  // namespace linocut
