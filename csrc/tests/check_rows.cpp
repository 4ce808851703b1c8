// The row kernels of each instruction set against their definitions in float64.
#include <vector>

#include "../cpu_features.h"
#include "../rows.h"
#include "matrix.h"

namespace linocut {
namespace {

constexpr double kError = 1e-5;  // float32 sums of up to 640 numbers, and an exponential good to 2e-7

void normalize_case(const Variant& each, Random& random) {
    const std::size_t m = random.between(1, 20), n = kGroup * random.between(1, 5), gap = random.below(3) * 8;
    const bool add = random.below(3) != 0, gated = random.below(2) != 0, centered = random.below(2) != 0;
    const bool shifted = random.below(2) != 0, quantized = random.below(2) != 0, floats = !quantized || random.below(2);
    Matrix x(Float::f32, m, n, gap), y(either(random), m, n, gap), out(Float::f32, m, n, random.below(5));
    Guarded<float> gate(n), factor(n), shift(n);
    x.fill([&] { return 3 * random.uniform() + 1; });
    y.fill([&] { return random.uniform(); });
    for (Guarded<float>* vector : {&gate, &factor, &shift}) vector->fill([&] { return random.uniform(); });
    std::vector<double> sums(m * n), normed(m * n);
    const float eps = 0.25f;
    for (std::size_t t = 0; t < m; ++t) {
        double mean = 0, squares = 0;
        for (std::size_t c = 0; c < n; ++c) {
            sums[t * n + c] = double(x.at(t, c)) + (add ? (gated ? double(gate[c]) : 1.0) * double(y.at(t, c)) : 0.0);
            mean += sums[t * n + c] / double(n);
        }
        if (!centered) mean = 0;
        for (std::size_t c = 0; c < n; ++c) squares += std::pow(sums[t * n + c] - mean, 2) / double(n);
        for (std::size_t c = 0; c < n; ++c) {
            normed[t * n + c] = (sums[t * n + c] - mean) / std::sqrt(squares + double(eps)) * double(factor[c]) +
                                (shifted ? double(shift[c]) : 0.0);
        }
    }
    Quantized activations(m, n);
    const Residual residual{x.rows(), add ? y.rows() : Rows{}, gated ? gate.data() : nullptr};
    Normalized target{};
    if (quantized) target.quantized = activations.view();
    if (floats) target.floats = out.rows();
    normalize_rows(*each.rows, residual, {centered, eps, factor.data(), shifted ? shift.data() : nullptr}, target, 3);
    for (std::size_t t = 0; t < m; ++t) {
        for (std::size_t c = 0; c < n; ++c) {
            if (std::fabs(double(x.at(t, c)) - sums[t * n + c]) > 1e-5) fail("rows %s: the sum", each.name.c_str());
            if (floats && std::fabs(double(out.at(t, c)) - normed[t * n + c]) > kError * 10) {
                fail("rows %s: norm of token %zu, channel %zu of %zu: %g, not %g", each.name.c_str(), t, c, n,
                     double(out.at(t, c)), normed[t * n + c]);
            }
        }
        for (std::size_t g = 0; quantized && g < n / kGroup; ++g) {
            if (!activations.holds(t, g, &normed[t * n + g * kGroup], kError)) {
                fail("rows %s: quantized norm of token %zu, group %zu of %zu", each.name.c_str(), t, g, n / kGroup);
            }
        }
    }
    if (!x.gaps_untouched() || !out.gaps_untouched()) fail("rows %s: wrote between rows", each.name.c_str());
    if (add) {
        Matrix again(Float::f32, m, n, gap);
        again.fill([] { return 1.0f; });
        add_rows(*each.rows, {again.rows(), y.rows(), nullptr}, 3);
        for (std::size_t t = 0; t < m; ++t) {
            for (std::size_t c = 0; c < n; ++c) {
                if (again.at(t, c) != 1.0f + y.at(t, c)) fail("rows %s: the addition", each.name.c_str());
            }
        }
    }
}

void swiglu_case(const Variant& each, Random& random) {
    const std::size_t m = random.between(1, 9), columns = kGroup * random.between(1, 4);
    const std::size_t before = kGroup * random.below(3), after = kGroup * random.below(2), n = before + columns + after;
    Matrix gate(either(random), m, columns, random.below(5)), value(either(random), m, columns, random.below(5));
    const float magnitude = std::ldexp(1.0f, int(random.below(12)));  // up to 2^11: exponentials that overflow
    gate.fill([&] { return magnitude * random.uniform(); });
    value.fill([&] { return random.uniform(); });
    Quantized out(m, n), untouched(m, n);
    swiglu_rows(*each.rows, gate.rows(), value.rows(), out.view(), before, 2);
    for (std::size_t t = 0; t < m; ++t) {
        for (std::size_t g = 0; g < n / kGroup; ++g) {
            const std::size_t start = g * kGroup;
            if (start < before || start >= before + columns) {
                if (!out.same(untouched, t, g)) fail("rows %s: SwiGLU wrote elsewhere", each.name.c_str());
                continue;
            }
            double expected[kGroup];
            for (std::size_t j = 0; j < kGroup; ++j) {
                const double x = gate.at(t, start - before + j);
                expected[j] = x / (1 + std::exp(-x)) * double(value.at(t, start - before + j));
            }
            if (!out.holds(t, g, expected, kError)) {
                fail("rows %s: SwiGLU of token %zu, gates up to %g", each.name.c_str(), t, double(magnitude));
            }
        }
    }
}

// Where attention.h says that a channel of a token lies, in elements.
std::size_t place_of(Operand operand, const Heads& heads, std::size_t head, std::size_t token, std::size_t channel) {
    const std::size_t pair = heads.type == Float::f32 ? 1 : 2, start = head * heads.padded * heads.width;
    if (operand == Operand::q) return start + token * heads.width + channel;
    if (operand == Operand::k) {
        const std::size_t unit = token / kPanel * heads.width / pair + channel / pair;
        return start + (unit * kPanel + token % kPanel) * pair + channel % pair;
    }
    const std::size_t unit = channel / kPanel * heads.padded / pair + token / pair;
    return start + (unit * kPanel + channel % kPanel) * pair + token % pair;
}

void arrange_case(const Variant& each, Random& random) {
    const std::size_t kv_heads = random.between(1, 2), query_heads = kv_heads * random.between(1, 3);
    const std::size_t width = 32 * random.between(1, 4), rows = random.between(1, 70), first = random.below(50);
    const std::size_t tokens = first + rows + random.below(20), padded = padded_tokens(tokens);
    const Float type = either(random);
    const bool normed = random.below(2) != 0, turned = random.below(2) != 0;
    const Pairing pairing = random.below(2) != 0 ? Pairing::adjacent : Pairing::halves;
    Matrix sources[3] = {{either(random), rows, query_heads * width, random.below(3)},
                         {either(random), rows, kv_heads * width, random.below(3)},
                         {either(random), rows, kv_heads * width, random.below(3)}};
    for (Matrix& source : sources) source.fill([&] { return random.uniform(); });
    Guarded<float> weights[2] = {Guarded<float>(width), Guarded<float>(width)};
    for (auto& weight : weights) weight.fill([&] { return random.uniform(); });
    Guarded<float> cos(tokens * width / 2), sin(tokens * width / 2);
    cos.fill([&] { return random.uniform(); });
    sin.fill([&] { return random.uniform(); });
    // Rows of a Matrix serve as memory: [heads * padded, width] without gaps.
    Matrix q(type, query_heads * padded, width, 0), k(type, kv_heads * padded, width, 0),
        v(type, kv_heads * padded, width, 0);
    Matrix* const targets[3] = {&q, &k, &v};
    for (Matrix* target : targets) target->fill([] { return 7.0f; });
    const Heads heads{type, query_heads, kv_heads, width, tokens, padded, q.rows().data, k.rows().data, v.rows().data};
    const float eps = 0.25f;
    arrange_heads(*each.rows, {sources[0].rows(), normed ? weights[0].data() : nullptr, eps},
                  {sources[1].rows(), normed ? weights[1].data() : nullptr, eps}, {sources[2].rows(), nullptr, eps},
                  {pairing, turned ? cos.data() : nullptr, turned ? sin.data() : nullptr}, first, heads, 3);
    for (int which = 0; which < 3; ++which) {
        const Operand operand = which == 0 ? Operand::q : which == 1 ? Operand::k : Operand::v;
        for (std::size_t head = 0; head < (which == 0 ? query_heads : kv_heads); ++head) {
            for (std::size_t token = 0; token < padded; ++token) {
                std::vector<double> x(width, 7.0);
                if (token >= first && token < first + rows) {
                    double squares = 0;
                    for (std::size_t c = 0; c < width; ++c) {
                        x[c] = sources[which].at(token - first, head * width + c);
                        squares += x[c] * x[c] / double(width);
                    }
                    for (std::size_t c = 0; c < width && normed && which < 2; ++c) {
                        x[c] *= double(weights[which][c]) / std::sqrt(squares + double(eps));
                    }
                    const std::vector<double> straight = x;
                    for (std::size_t j = 0; j < width / 2 && turned && which < 2; ++j) {
                        const std::size_t a = pairing == Pairing::adjacent ? 2 * j : j;
                        const std::size_t b = pairing == Pairing::adjacent ? 2 * j + 1 : j + width / 2;
                        const double cosine = cos[token * (width / 2) + j], sine = sin[token * (width / 2) + j];
                        x[a] = straight[a] * cosine - straight[b] * sine;
                        x[b] = straight[b] * cosine + straight[a] * sine;
                    }
                    const double scale = which == 0 ? 1.4426950408889634 / std::sqrt(double(width)) : 1.0;
                    for (double& channel : x) channel *= scale;
                }
                for (std::size_t c = 0; c < width; ++c) {
                    const std::size_t place = place_of(operand, heads, head, token, c);
                    const double found = targets[which]->at(place / width, place % width);
                    if (std::fabs(found - x[c]) > (type == Float::f32 ? 1e-5 : 4e-3) * (1 + std::fabs(x[c]))) {
                        fail("rows %s: operand %d, head %zu, token %zu, channel %zu: %g, not %g", each.name.c_str(),
                             which, head, token, c, found, x[c]);
                    }
                }
            }
        }
    }
}

}  // namespace

void check_rows(const Plan& plan) {
    for (const auto& each : variants()) {
        Random random(plan.seed);
        std::size_t cases = 0;
        for (; each.why_not.empty() && cases < 24 + plan.random_cases; ++cases) {
            normalize_case(each, random);
            swiglu_case(each, random);
            if (cases % 3 == 0) arrange_case(each, random);
        }
        report("rows", each.name, each.why_not, cases);
    }
}

}  // namespace linocut
