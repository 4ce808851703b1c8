// Every variant of attention against the definition in float64, in memory that ends at forbidden pages.
#include <vector>

#include "../attention.h"
#include "../cpu_features.h"
#include "../rows.h"
#include "matrix.h"

namespace linocut {
namespace {

struct Shape {
    std::size_t tokens, heads, shared, width;  // `shared`: heads of q to one of k and v
    std::size_t keys;
    bool causal;
};

// Operands in a variant's layout, and what attention must give for them as they were rounded.
template <class T>
class Case {
public:
    Case(Random& random, const Shape& shape)
        : shape_(shape), padded_(padded_tokens(shape.tokens)), q_(shape.heads * padded_ * shape.width),
          k_(q_.size() / shape.shared), v_(k_.size()) {
        const std::size_t wide = shape.heads * shape.width, narrow = wide / shape.shared;
        // A scale that makes the softmax neither flat nor a choice of one key.
        std::vector<float> q = matrix(random, wide, 3.0f), k = matrix(random, narrow, 1.5f), v = matrix(random, narrow, 1);
        const auto rows = [&](std::vector<float>& x) {
            return Projected{{Float::f32, shape_.tokens, x.size() / shape_.tokens, x.size() / shape_.tokens, x.data()},
                             nullptr, 0};
        };
        arrange_heads(*row_kernels_baseline(), rows(q), rows(k), rows(v), {Pairing::adjacent, nullptr, nullptr}, 0,
                      heads(), 1);
        const float scale = 1.44269504f / std::sqrt(float(shape.width));
        for (float& value : q) value = rounded(value * scale);
        for (float& value : k) value = rounded(value);
        for (float& value : v) value = rounded(value);
        expected_.resize(shape.tokens * wide);
        for (std::size_t head = 0; head < shape.heads; ++head) {
            for (std::size_t t = 0; t < shape.tokens; ++t) compute(q, k, v, head, t);
        }
    }

    Heads heads() {
        return {sizeof(T) == 4 ? Float::f32 : Float::bf16, shape_.heads, shape_.heads / shape_.shared, shape_.width,
                shape_.tokens, padded_, q_.data(), k_.data(), v_.data()};
    }

    void check(const AttentionVariant& variant, std::size_t threads) {
        const std::size_t columns = shape_.heads * shape_.width, stride = columns + 5;
        Guarded<float> out((shape_.tokens - 1) * stride + columns);
        attend(variant, heads(), {shape_.keys, shape_.causal}, {Float::f32, shape_.tokens, columns, stride, out.data()},
               threads);
        for (std::size_t t = 0; t < shape_.tokens; ++t) {
            for (std::size_t c = 0; c < columns; ++c) compare(variant, double(out[t * stride + c]), t, c);
        }
        if (shape_.width == kGroup) check_quantized(variant, {Float::f32, shape_.tokens, columns, stride, out.data()});
        // The last block of queries of the last head alone, in guarded scratch full of rubbish.
        const std::size_t step = variant.queries_per_task, first = (shape_.tokens - 1) / step * step;
        Guarded<std::uint8_t, 64> scratch(variant.scratch_bytes);
        Guarded<float, 64> tile(step * kMaxHeadWidth);
        scratch.fill_bytes(0xff), tile.fill_bytes(0xff);
        variant.run(heads(), shape_.heads - 1, first, shape_.tokens - first, {shape_.keys, shape_.causal},
                    scratch.data(), tile.data());
        for (std::size_t t = first; t < shape_.tokens; ++t) {
            for (std::size_t c = 0; c < shape_.width; ++c) {
                compare(variant, double(tile[(t - first) * kMaxHeadWidth + c]), t, columns - shape_.width + c);
            }
        }
    }

private:
    // Quantized output is that of the floats.
    void check_quantized(const AttentionVariant& variant, const Rows& floats) {
        Quantized direct(shape_.tokens, floats.columns + kGroup), later(shape_.tokens, floats.columns + kGroup);
        attend(variant, heads(), {shape_.keys, shape_.causal}, direct.view(), 2);
        linocut::variant("").quantize_rows(floats, later.view(), 0, 0, shape_.tokens);
        for (std::size_t t = 0; t < shape_.tokens; ++t) {
            for (std::size_t g = 0; g <= shape_.heads; ++g) {  // the last one is not attention's to write
                if (!direct.same(later, t, g)) fail("attention %s: quantized token %zu, head %zu", variant.name, t, g);
            }
        }
    }

    std::vector<float> matrix(Random& random, std::size_t columns, float magnitude) {
        std::vector<float> x(shape_.tokens * columns);
        for (float& value : x) value = random.uniform() * magnitude;
        return x;
    }

    static float rounded(float value) { return sizeof(T) == 4 ? value : float_of_bfloat(bfloat_of_float(value)); }

    void compute(const std::vector<float>& q, const std::vector<float>& k, const std::vector<float>& v,
                 std::size_t head, std::size_t t) {
        const std::size_t wide = shape_.heads * shape_.width, narrow = wide / shape_.shared;
        const std::size_t from = head * shape_.width, group = head / shape_.shared * shape_.width;
        std::vector<double> weights;
        double total = 0;
        for (std::size_t key = 0; key < shape_.keys && (!shape_.causal || key <= t); ++key) {
            double score = 0;
            for (std::size_t c = 0; c < shape_.width; ++c) {
                score += double(q[t * wide + from + c]) * double(k[key * narrow + group + c]);
            }
            weights.push_back(std::exp2(score));
            total += weights.back();
        }
        for (std::size_t c = 0; c < shape_.width; ++c) {
            double sum = 0;
            for (std::size_t key = 0; key < weights.size(); ++key) {
                sum += weights[key] / total * double(v[key * narrow + group + c]);
            }
            expected_[t * wide + from + c] = sum;
        }
    }

    void compare(const AttentionVariant& variant, double found, std::size_t t, std::size_t c) {
        const double expected = expected_[t * shape_.heads * shape_.width + c];
        // |v| is at most 1, and bfloat16 rounds each weight by 2^-8 of it at most.
        if (!(std::fabs(found - expected) <= (sizeof(T) == 4 ? 1e-5 : 4e-3))) {
            fail("attention %s, tokens %zu, heads %zu / %zu, width %zu, keys %zu%s: token %zu, column %zu is %.9g, not "
                 "%.9g", variant.name, shape_.tokens, shape_.heads, shape_.shared, shape_.width, shape_.keys,
                 shape_.causal ? ", causal" : "", t, c, found, expected);
        }
    }

    Shape shape_;
    std::size_t padded_;
    Guarded<T, 64> q_, k_, v_;
    std::vector<double> expected_;
};

}  // namespace

void check_attention(const Plan& plan) {
    const Shape fixed[] = {{1, 1, 1, 32, 1, false},   {33, 2, 2, 64, 33, true}, {70, 2, 1, 128, 41, true},
                           {65, 1, 1, 96, 65, false}, {20, 4, 2, 32, 3, true},  {300, 1, 1, 64, 290, false},
                           {32, 1, 1, 128, 32, false}, {260, 2, 2, 32, 258, true}};
    std::vector<std::size_t> cases(attention_variants().size());
    Random random(plan.seed);
    for (std::size_t i = 0; i < std::size(fixed) + 2 + plan.random_cases; ++i) {
        Shape shape = i < std::size(fixed) ? fixed[i] : Shape{};
        if (i >= std::size(fixed)) {
            const std::size_t tokens = random.between(1, 90), shared = random.between(1, 3);
            shape = {tokens, shared * random.between(1, 2), shared, 32 * random.between(1, 4),
                     random.between(1, tokens), random.below(2) == 0};
        }
        Case<float> wide(random, shape);
        Case<std::uint16_t> narrow(random, shape);
        for (std::size_t v = 0; v < cases.size(); ++v) {
            const auto& choice = attention_variants()[v];
            if (!choice.why_not.empty()) continue;
            if (choice.variant->type == Float::f32) wide.check(*choice.variant, random.between(1, 3));
            else narrow.check(*choice.variant, random.between(1, 3));
            ++cases[v];
        }
    }
    for (std::size_t v = 0; v < cases.size(); ++v) {
        const auto& choice = attention_variants()[v];
        report("attention", choice.variant->name, choice.why_not, cases[v]);
    }
}

}  // namespace linocut
