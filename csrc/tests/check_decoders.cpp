// Decoders and the quantizers of activations: each instruction set against the baseline, or the rule spelled out.
#include <cmath>
#include <vector>

#include "../cpu_features.h"
#include "../gemm.h"
#include "matrix.h"

namespace linocut {
namespace {

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
    each.decoders->f32(weight, out.data());
    each.decoders->bf16(weight, out16.data());
    decoders_baseline()->f32(weight, expected.data());
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

void quantize_case(const Variant& each, Random& random) {
    const std::size_t m = random.between(1, 9), columns = kGroup * random.between(1, 4);
    const std::size_t before = kGroup * random.below(3), after = kGroup * random.below(3), n = before + columns + after;
    const float magnitude = std::ldexp(1.0f, int(random.below(200)) - 100);
    Matrix x(either(random), m, columns, random.below(9));
    x.fill([&] {
        const std::size_t kind = random.below(2000);
        return kind == 0 ? NAN : kind == 1 ? INFINITY : kind == 2 ? 1e-41f : random.uniform() * magnitude;
    });
    for (std::size_t c = 0; m > 1 && c < columns; ++c) x.set(1, c, -0.0f);
    Quantized expected(m, n), found(m, n), threaded(m, n);
    for (std::size_t t = 0; t < m; ++t) {
        for (std::size_t g = 0; g < columns / kGroup; ++g) {
            float group[kGroup];
            for (std::size_t j = 0; j < kGroup; ++j) group[j] = x.at(t, g * kGroup + j);
            const std::size_t at = before / kGroup + g;
            quantize_group(group, expected.values(t, at), &expected.scale(t, at), expected.sums(t, at));
        }
    }
    each.quantize_rows(x.rows(), found.view(), before, 0, m);
    quantize_activations(x.rows(), threaded.view(), before, 3);
    for (std::size_t t = 0; t < m; ++t) {
        for (std::size_t g = 0; g < n / kGroup; ++g) {  // the groups beside ours must still be as they were
            if (!found.same(expected, t, g) || !threaded.same(expected, t, g)) {
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
        for (Encoding encoding : {Encoding::binary, Encoding::ternary, Encoding::affine4, Encoding::int8}) {
            for (std::size_t n = kGroup; n <= 2 * kBlock + kGroup && each.why_not.empty(); n += kGroup, ++cases) {
                decode_case(each, random, encoding, 1 + n / kGroup % 3, n);
            }
        }
        report("decoder", each.name, each.why_not, cases);
    }
}

void check_quantizers(const Plan& plan) {
    for (const auto& each : variants()) {
        Random random(plan.seed);
        std::size_t cases = 0;
        for (; each.why_not.empty() && cases < 16 + plan.random_cases / 10; ++cases) {
            quantize_case(each, random);
        }
        report("quantizer", each.name, each.why_not, cases);
    }
}

}  // namespace linocut
