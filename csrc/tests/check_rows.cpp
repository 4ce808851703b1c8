// The row kernels of each instruction set against the same in float64, in memory that ends at forbidden pages.
#include <cmath>
#include <vector>

#include "../cpu_features.h"
#include "../rows.h"
#include "check.h"

namespace linocut {
namespace {

// A matrix of either type whose rows lie `gap` elements apart.
class Floats {
public:
    Floats(Random& random, Float type, std::size_t rows, std::size_t columns, float magnitude)
        : type_(type), rows_(rows), columns_(columns), stride_(columns + random.below(9)),
          wide_(type == Float::f32 ? used() : 0), narrow_(type == Float::bf16 ? used() : 0) {
        wide_.fill([&] { return random.uniform() * magnitude; });
        narrow_.fill([&] { return bfloat_of_float(random.uniform() * magnitude); });
    }
    double at(std::size_t t, std::size_t c) {
        const std::size_t i = t * stride_ + c;
        return type_ == Float::f32 ? double(wide_[i]) : double(float_of_bfloat(narrow_[i]));
    }
    Rows rows() {
        void* const data = type_ == Float::f32 ? static_cast<void*>(wide_.data()) : narrow_.data();
        return {type_, rows_, columns_, stride_, data};
    }

private:
    std::size_t used() const { return (rows_ - 1) * stride_ + columns_; }
    Float type_;
    std::size_t rows_, columns_, stride_;
    Guarded<float> wide_;
    Guarded<std::uint16_t> narrow_;
};

Float either(Random& random) { return random.below(2) ? Float::bf16 : Float::f32; }

// Results carry the rounding of a few float32 operations; `size` is that of the largest number on the way.
void expect_near(const Variant& each, const char* what, double found, double expected, double size) {
    if (!(std::fabs(found - expected) <= 1e-5 * size)) {
        fail("rows %s: %s is %.9g, not %.9g", each.name.c_str(), what, found, expected);
    }
}

struct Quantized {
    Quantized(std::size_t m, std::size_t n)
        : m_(m), n_(n), values((m - 1) * activation_stride(n) + n), scales(m * (n / kGroup)), sums(m * (n / 64)) {
        values.fill_bytes(0x55), scales.fill_bytes(0x55), sums.fill_bytes(0x55);
    }
    Activations view() { return {m_, n_, activation_stride(n_), values.data(), scales.data(), sums.data()}; }
    float scale(std::size_t t, std::size_t c) { return scales[(t * n_ + c) / kGroup]; }
    double at(std::size_t t, std::size_t c) { return double(values[t * activation_stride(n_) + c]) * scale(t, c); }
    std::size_t m_, n_;
    Guarded<std::int8_t> values;
    Guarded<float> scales;
    Guarded<std::int32_t> sums;
};

void normalize_case(const Variant& each, Random& random) {
    const std::size_t m = random.between(1, 5), columns = kGroup * random.between(1, 5);
    const bool centered = random.below(2), adds = random.below(2), gated = random.below(2), shifted = random.below(2);
    Floats x(random, Float::f32, m, columns, 3), y(random, either(random), m, columns, 2);
    Guarded<float> gate(columns), factor(columns), shift(columns), out(m * columns);
    for (auto* vector : {&gate, &factor, &shift}) vector->fill([&] { return random.uniform(); });
    std::vector<double> sum(m * columns);
    for (std::size_t i = 0; i < sum.size(); ++i) {
        const std::size_t t = i / columns, c = i % columns;
        sum[i] = x.at(t, c) + (adds ? (gated ? double(gate[c]) : 1.0) * y.at(t, c) : 0.0);
    }
    const Residual residual{x.rows(), adds ? y.rows() : Rows{}, gated ? gate.data() : nullptr};
    const Norm norm{centered, 1e-6f, factor.data(), shifted ? shift.data() : nullptr};
    Quantized quantized(m, columns);
    each.rows->normalize(residual, norm, {quantized.view(), {Float::f32, m, columns, columns, out.data()}}, 0, m);
    for (std::size_t t = 0; t < m; ++t) {
        double mean = 0, squares = 0;
        for (std::size_t c = 0; c < columns && centered; ++c) mean += sum[t * columns + c] / double(columns);
        for (std::size_t c = 0; c < columns; ++c) {
            squares += (sum[t * columns + c] - mean) * (sum[t * columns + c] - mean) / double(columns);
        }
        for (std::size_t c = 0; c < columns; ++c) {
            const double value = (sum[t * columns + c] - mean) / std::sqrt(squares + 1e-6);
            const double expected = value * double(factor[c]) + (shifted ? double(shift[c]) : 0.0);
            expect_near(each, "the sum", x.at(t, c), sum[t * columns + c], 5);
            expect_near(each, "a normalized value", double(out[t * columns + c]), expected, 5);
            const double step = double(quantized.scale(t, c));
            expect_near(each, "a quantized value", quantized.at(t, c), double(out[t * columns + c]), 0.501e5 * step);
        }
    }
}

void swiglu_case(const Variant& each, Random& random) {
    const std::size_t m = random.between(1, 5), columns = kGroup * random.between(1, 3);
    const std::size_t before = kGroup * random.below(3), n = before + columns + kGroup * random.below(3);
    Floats gate(random, either(random), m, columns, random.below(3) ? 10.0f : 1e5f);
    Floats value(random, either(random), m, columns, 2);
    Quantized out(m, n);
    each.rows->swiglu(gate.rows(), value.rows(), out.view(), before, 0, m);
    for (std::size_t t = 0; t < m; ++t) {
        for (std::size_t c = 0; c < n; ++c) {
            if (c >= before && c < before + columns) {
                const double x = gate.at(t, c - before);
                const double expected = x / (1 + std::exp(-x)) * value.at(t, c - before);
                expect_near(each, "a gated value", out.at(t, c), expected, 0.501e5 * double(out.scale(t, c)));
            } else if (out.values[t * activation_stride(n) + c] != 0x55) {
                fail("rows %s: the gates write past their columns", each.name.c_str());
            }
        }
    }
}

// Where csrc/attention.h says that channel c of `token` lies, in elements.
std::size_t place(Operand operand, const Heads& out, std::size_t head, std::size_t token, std::size_t c) {
    const std::size_t pair = out.type == Float::bf16 ? 2 : 1, start = head * out.padded * out.width;
    if (operand == Operand::q) return start + token * out.width + c;
    if (operand == Operand::k) {
        return start + ((token / 32 * (out.width / pair) + c / pair) * 32 + token % 32) * pair + c % pair;
    }
    return start + ((c / 32 * (out.padded / pair) + token / pair) * 32 + c % 32) * pair + token % pair;
}

void arrange_case(const Variant& each, Random& random) {
    const std::size_t width = 32 * random.between(1, 4), heads = random.between(1, 3), m = random.between(1, 40);
    const std::size_t first = random.below(40), tokens = first + m + random.below(9), half = width / 2;
    const auto operand = static_cast<Operand>(random.below(3));
    const auto pairing = static_cast<Pairing>(random.below(2));
    const Float type = either(random);
    const bool normed = operand != Operand::v && random.below(2), turned = operand != Operand::v && random.below(2);
    Floats x(random, either(random), m, heads * width, 3);
    Guarded<float> weight(width), cos(tokens * half), sin(tokens * half);
    weight.fill([&] { return 1 + 0.3f * random.uniform(); });
    for (std::size_t i = 0; i < cos.size(); ++i) {
        const float angle = 4 * random.uniform();
        cos[i] = std::cos(angle), sin[i] = std::sin(angle);
    }
    const std::size_t count = heads * padded_tokens(tokens) * width;
    Guarded<float> wide(type == Float::f32 ? count : 0);
    Guarded<std::uint16_t> narrow(type == Float::bf16 ? count : 0);
    void* const data = type == Float::f32 ? static_cast<void*>(wide.data()) : narrow.data();
    const Heads out{type, heads, heads, width, tokens, padded_tokens(tokens), data, data, data};
    const Rotation rotation{pairing, turned ? cos.data() : nullptr, turned ? sin.data() : nullptr};
    for (std::size_t head = 0; head < heads; ++head) {
        each.rows->arrange({x.rows(), normed ? weight.data() : nullptr, 1e-6f}, operand, head, rotation, first, out, 0,
                           m);
        for (std::size_t t = 0; t < m; ++t) {
            std::vector<double> row(width), expected(width);
            double squares = 0;
            for (std::size_t c = 0; c < width; ++c) row[c] = x.at(t, head * width + c);
            for (double value : row) squares += value * value / double(width);
            for (std::size_t c = 0; c < width; ++c) {
                if (normed) row[c] *= double(weight[c]) / std::sqrt(squares + 1e-6);
                if (operand == Operand::q) row[c] *= 1.4426950408889634 / std::sqrt(double(width));
            }
            expected = row;
            for (std::size_t j = 0; j < half && turned; ++j) {
                const std::size_t a = pairing == Pairing::adjacent ? 2 * j : j;
                const std::size_t b = pairing == Pairing::adjacent ? 2 * j + 1 : j + half;
                const double c = double(cos[(first + t) * half + j]), s = double(sin[(first + t) * half + j]);
                expected[a] = row[a] * c - row[b] * s, expected[b] = row[b] * c + row[a] * s;
            }
            for (std::size_t c = 0; c < width; ++c) {
                const std::size_t at = place(operand, out, head, first + t, c);
                const double found = type == Float::f32 ? double(wide[at]) : double(float_of_bfloat(narrow[at]));
                // bfloat16: half of its last place, which is at most 2^-8 of the value
                expect_near(each, "an arranged value", found, expected[c],
                            1 + (type == Float::bf16 ? 1e5 * std::fabs(expected[c]) / 256 : 0));
            }
        }
    }
}

}  // namespace

void check_rows(const Plan& plan) {
    for (const auto& each : variants()) {
        Random random(plan.seed);
        std::size_t cases = 0;
        for (; each.why_not.empty() && cases < 30 + plan.random_cases; ++cases) {
            if (cases % 3 == 0) normalize_case(each, random);
            else if (cases % 3 == 1) swiglu_case(each, random);
            else arrange_case(each, random);
        }
        if (each.why_not.empty()) std::printf("rows %s: %zu cases agree\n", each.name.c_str(), cases);
        else std::printf("rows %s: not run, %s\n", each.name.c_str(), each.why_not.c_str());
    }
}

}  // namespace linocut
