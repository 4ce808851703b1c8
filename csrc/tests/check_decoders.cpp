// Decoders and the quantizers of activations: each instruction set against the baseline, or the rule spelled out.
#include <cmath>
#include <vector>

#include "../cpu_features.h"
#include "../gemm.h"
#include "check.h"

namespace linocut {
namespace {

void report(const char* kind, const Variant& each, std::size_t cases) {
    if (each.why_not.empty()) std::printf("%s %s: %zu cases agree\n", kind, each.name.c_str(), cases);
    else std::printf("%s %s: not run, %s\n", kind, each.name.c_str(), each.why_not.c_str());
}

void decode_case(const Variant& each, Random& random, Encoding encoding, std::size_t rows, std::size_t n) {
    Guarded<std::uint8_t> codes(rows * row_bytes(encoding, n)), zeros(rows * zero_bytes(encoding, n));
    Guarded<std::uint16_t> scales(rows * groups(encoding, n));
    codes.fill([&] { return random.bits(); });
    zeros.fill([&] { return random.bits(); });
    scales.fill([&] { return random.bits(); });  // NaN, infinite and negative ones too
    const Packed weight{encoding, rows, n, codes.data(), scales.data(), zeros.data()};
    Guarded<float> out(rows * n);
    Guarded<std::uint16_t> out16(rows * n);
    std::vector<float> expected(rows * n);
    each.decoders.f32(weight, out.data());
    each.decoders.bf16(weight, out16.data());
    decoders_baseline().f32(weight, expected.data());
    for (std::size_t i = 0; i < rows * n; ++i) {
        if (!same_bits(out[i], expected[i])) {
            fail("decoder %s: weight %zu is %g, not %g", each.name.c_str(), i, double(out[i]), double(expected[i]));
        }
        const std::uint16_t half = bfloat_of_float(expected[i]);
        // Values, not bits: only float32 has a negative zero, of a negative scale, which no valid file has.
        if (float_of_bfloat(out16[i]) != float_of_bfloat(half) && expected[i] == expected[i]) {
            fail("decoder %s: bfloat16 weight %zu is %04x, not %04x", each.name.c_str(), i, out16[i], half);
        }
    }
    std::vector<float> x(2 * n, 1.0f), y(2 * rows);
    linear_generic(weight, x.data(), 2, y.data());
}

// One group by the rule of quantize_activations.
void quantize_group(const float* x, std::int8_t* values, float* scale, std::int32_t* sums) {
    float largest = 0;
    bool broken = false;
    for (std::size_t j = 0; j < kGroup; ++j) {
        broken = broken || !std::isfinite(x[j]);
        largest = std::fmax(largest, std::fabs(x[j]));
    }
    const bool empty = broken || largest < 0x1p-120f;
    *scale = broken ? NAN : empty ? 0.0f : largest / 127.0f;
    const float inverse = empty ? 0.0f : 127.0f / largest;
    sums[0] = sums[1] = 0;
    for (std::size_t j = 0; j < kGroup; ++j) {
        values[j] = empty ? std::int8_t(0) : std::int8_t(std::nearbyint(x[j] * inverse));
        sums[j / 64] += values[j];
    }
}

void quantize_case(const Variant& each, Random& random, Float type, std::size_t m, std::size_t columns,
                   std::size_t before, std::size_t after, std::size_t gap) {
    const std::size_t n = before + columns + after, stride = columns + gap, out_stride = activation_stride(n);
    const std::size_t used = (m - 1) * stride + columns;
    Guarded<float> wide(type == Float::f32 ? used : 0);
    Guarded<std::uint16_t> narrow(type == Float::bf16 ? used : 0);
    const float magnitude = std::ldexp(1.0f, int(random.below(200)) - 100);
    const auto number = [&] {
        const std::size_t kind = random.below(2000);
        return kind == 0 ? NAN : kind == 1 ? INFINITY : kind == 2 ? 1e-41f : random.uniform() * magnitude;
    };
    wide.fill(number);
    narrow.fill([&] { return bfloat_of_float(number()); });
    if (m > 1) {  // a row of zeros
        for (std::size_t k = 0; k < columns; ++k) {
            if (type == Float::f32) wide[stride + k] = 0;
            else narrow[stride + k] = 0x8000;
        }
    }
    Guarded<std::int8_t> values((m - 1) * out_stride + n);
    Guarded<float> scales(m * (n / kGroup));
    Guarded<std::int32_t> sums(m * (n / 64));
    values.fill_bytes(0x55), scales.fill_bytes(0x55), sums.fill_bytes(0x55);
    const Rows x{type, m, columns, stride, type == Float::f32 ? static_cast<void*>(wide.data()) : narrow.data()};
    each.quantize_rows(x, {m, n, out_stride, values.data(), scales.data(), sums.data()}, before, 0, m);
    std::vector<std::int8_t> ours(values.begin(), values.end());
    quantize_activations(x, {m, n, out_stride, values.data(), scales.data(), sums.data()}, before, 3);
    if (std::memcmp(ours.data(), values.data(), ours.size()) != 0) fail("quantizer %s: threads matter", each.name.c_str());
    for (std::size_t t = 0; t < m; ++t) {
        for (std::size_t g = 0; g < n / kGroup; ++g) {
            float group[kGroup], scale;
            std::int8_t expected[kGroup];
            std::int32_t expected_sums[2];
            const std::size_t k = g * kGroup;
            if (k >= before && k < before + columns) {
                for (std::size_t j = 0; j < kGroup; ++j) {
                    const std::size_t at = t * stride + k - before + j;
                    group[j] = type == Float::f32 ? wide[at] : float_of_bfloat(narrow[at]);
                }
                quantize_group(group, expected, &scale, expected_sums);
            } else {  // not ours: must still be as it was
                std::memset(expected, 0x55, sizeof expected);
                std::memset(&scale, 0x55, sizeof scale);
                std::memset(expected_sums, 0x55, sizeof expected_sums);
            }
            if (std::memcmp(&values[t * out_stride + k], expected, sizeof expected) != 0 ||
                !same_bits(scales[t * (n / kGroup) + g], scale) ||
                std::memcmp(&sums[t * (n / 64) + 2 * g], expected_sums, sizeof expected_sums) != 0) {
                fail("quantizer %s: token %zu, group %zu of m %zu, n %zu, first %zu", each.name.c_str(), t, g, m, n,
                     before);
            }
        }
    }
}

}  // namespace

void check_decoders(const Plan& plan) {
    for (const auto& each : variants()) {
        Random random(plan.seed);
        std::size_t cases = 0;
        for (Encoding encoding : {Encoding::binary, Encoding::ternary, Encoding::affine4}) {
            for (std::size_t n = kGroup; n <= 2 * kBlock + kGroup && each.why_not.empty(); n += kGroup, ++cases) {
                decode_case(each, random, encoding, 1 + n / kGroup % 3, n);
            }
        }
        report("decoder", each, cases);
    }
}

void check_quantizers(const Plan& plan) {
    for (const auto& each : variants()) {
        Random random(plan.seed);
        std::size_t cases = 0;
        for (; each.why_not.empty() && cases < 12 + plan.random_cases / 10; ++cases) {
            const std::size_t columns = kGroup * random.between(1, 4);
            quantize_case(each, random, cases % 2 ? Float::bf16 : Float::f32, random.between(1, 9), columns,
                          kGroup * random.below(3), kGroup * random.below(3), random.below(9));
        }
        report("quantizer", each, cases);
    }
}

}  // namespace linocut
