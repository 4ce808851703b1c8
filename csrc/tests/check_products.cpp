// Every variant of the packed product against the rule of gemm.h spelled out, down to the last bit.
#include <cmath>
#include <vector>

#include "../cpu_features.h"
#include "../gemm.h"
#include "check.h"

namespace linocut {
namespace {

enum class Fill { random, largest, smallest };  // the last two drive every sum to its limit

struct Shape {
    std::size_t m, n, rows;
    std::size_t gap = 64;      // between rows of activations
    std::size_t out_gap = 0;   // between rows of results
    Fill fill = Fill::random;
};

// The operands of one product, and what it must give.
class Case {
public:
    Case(Random& random, Encoding encoding, const Shape& shape)
        : shape_(shape), encoding_(encoding), codes_(shape.rows * row_bytes(encoding, shape.n)),
          zeros_(shape.rows * zero_bytes(encoding, shape.n)),
          weight_scales_(shape.rows * groups(encoding, shape.n)),
          values_((shape.m - 1) * (shape.n + shape.gap) + shape.n), scales_(shape.m * (shape.n / kGroup)),
          sums_(shape.m * (shape.n / 64)), expected_(shape.m * shape.rows) {
        codes_.fill([&] { return shape.fill == Fill::random ? random.bits() : 0xff; });
        zeros_.fill([&] { return shape.fill == Fill::random ? random.bits() : 0; });
        // One in 64 anything at all, infinities and NaN among them.
        weight_scales_.fill([&] { return random.below(64) == 0 ? random.bits() : 0x2000 + random.below(0x1c00); });
        values_.fill([&] {
            const int any = int(random.below(255)) - 127;
            return shape.fill == Fill::largest ? 127 : shape.fill == Fill::smallest ? -127 : any;
        });
        scales_.fill([&] { return random.below(64) == 0 ? NAN : std::fabs(random.uniform()); });
        for (std::size_t t = 0; t < shape.m; ++t) {
            for (std::size_t k = 0; k < shape.n; ++k) sums_[t * (shape.n / 64) + k / 64] += values_[t * stride() + k];
        }
        compute();
    }

    const Shape& shape() const { return shape_; }
    Encoding encoding() const { return encoding_; }
    float expected(std::size_t t, std::size_t row) const { return expected_[t * shape_.rows + row]; }
    Activations x() { return {shape_.m, shape_.n, stride(), values_.data(), scales_.data(), sums_.data()}; }
    Packed w() { return {encoding_, shape_.rows, shape_.n, codes_.data(), weight_scales_.data(), zeros_.data()}; }

private:
    std::size_t stride() const { return shape_.n + shape_.gap; }

    void compute() {
        const std::size_t n = shape_.n, size = group_size(encoding_);
        // The decoder of floats, which shares no code with the unpackers, at scales of one.
        std::vector<std::uint16_t> ones(weight_scales_.size(), 0x3c00);
        std::vector<float> weights(shape_.rows * n);
        const Packed unscaled{encoding_, shape_.rows, n, codes_.data(), ones.data(), zeros_.data()};
        decoders_baseline()->f32(unscaled, weights.data());
        const std::vector<std::int8_t> integers(weights.begin(), weights.end());
        for (std::size_t t = 0; t < shape_.m; ++t) {
            for (std::size_t row = 0; row < shape_.rows; ++row) {
                float sum = 0;
                for (std::size_t g = 0; g < n / size; ++g) {
                    std::int32_t dot = 0;
                    for (std::size_t k = g * size; k < (g + 1) * size; ++k) {
                        dot += std::int32_t(values_[t * stride() + k]) * integers[row * n + k];
                    }
                    const float scale = value_of_half(weight_scales_[row * (n / size) + g]);
                    sum = std::fma(float(dot), scale * scales_[t * (n / kGroup) + g * size / kGroup], sum);
                }
                expected_[t * shape_.rows + row] = sum;
            }
        }
    }

    Shape shape_;
    Encoding encoding_;
    Guarded<std::uint8_t> codes_, zeros_;
    Guarded<std::uint16_t> weight_scales_;
    Guarded<std::int8_t> values_;
    Guarded<float> scales_;
    Guarded<std::int32_t> sums_;
    std::vector<float> expected_;
};

template <class T>
class Result {
public:
    Result(const GemmVariant& variant, Case& each)
        : variant_(variant), case_(each), stride_(each.shape().rows + each.shape().out_gap),
          y_((each.shape().m - 1) * stride_ + each.shape().rows) {
        y_.fill_bytes(0x55);
    }

    Rows rows() {
        return {sizeof(T) == 4 ? Float::f32 : Float::bf16, case_.shape().m, case_.shape().rows, stride_, y_.data()};
    }

    // All of y, of which only tokens [begin, end) of columns [first, stop) were to be written.
    void compare(const char* how, std::size_t begin, std::size_t end, std::size_t first, std::size_t stop) {
        for (std::size_t i = 0; i < y_.size(); ++i) {
            const std::size_t t = i / stride_, row = i % stride_;
            T expected;
            std::memset(&expected, 0x55, sizeof expected);
            if (t >= begin && t < end && row >= first && row < stop) expected = convert(case_.expected(t, row));
            if (!same(y_[i], expected)) {
                const Shape& shape = case_.shape();
                fail("product %s, %s, encoding %d, m %zu, n %zu, rows %zu: y[%zu, %zu] is %.9g, not %.9g",
                     variant_.name, how, int(case_.encoding()), shape.m, shape.n, shape.rows, t, row, double(y_[i]),
                     double(expected));
            }
        }
    }

private:
    static T convert(float value) {
        if constexpr (sizeof(T) == 4) return value;
        else return bfloat_of_float(value);
    }
    static bool same(T a, T b) {
        if constexpr (sizeof(T) == 4) return same_bits(a, b);
        else return a == b;
    }

    const GemmVariant& variant_;
    Case& case_;
    std::size_t stride_;
    Guarded<T> y_;
};

template <class T>
void check_case(const GemmVariant& variant, Case& each, std::size_t threads) {
    const Shape& shape = each.shape();
    Result<T> whole(variant, each);
    gemm(variant, each.x(), each.w(), whole.rows(), threads);
    whole.compare("driver", 0, shape.m, 0, shape.rows);
    // Several panels of a task, which the driver of a variant without a need for them never holds.
    GemmVariant holding = variant;
    holding.held = 1 << 20;
    Result<T> together(variant, each);
    gemm(holding, each.x(), each.w(), together.rows(), 1);
    together.compare("several panels", 0, shape.m, 0, shape.rows);
    // The last panel alone, in guarded scratch full of rubbish, for the tokens but the first.
    const std::size_t bytes = variant.panel_bytes(each.encoding(), shape.n), begin = shape.m > 1;
    const std::size_t first = (shape.rows - 1) / variant.columns * variant.columns;
    Guarded<std::uint8_t, 64> panel(bytes);
    panel.fill_bytes(0xff);
    variant.unpack(each.w(), first, shape.rows - first, panel.data());
    Result<T> part(variant, each);
    variant.multiply(each.x(), begin, shape.m, each.encoding(), panel.data(), first, shape.rows - first, part.rows());
    part.compare("panel", begin, shape.m, first, shape.rows);
}

}  // namespace

void check_products(const Plan& plan) {
    const Shape fixed[] = {{1, 128, 1},          {2, 256, 16},  {3, 640, 17, 0, 3}, {7, 768, 129, 64, 1},
                           {16, 1280, 15, 1, 0}, {33, 384, 48}, {17, 1408, 33, 3, 7}, {5, 512, 144, 64, 16},
                           {70, 128, 5}, {130, 256, 300},         {13, 256, 7, 64, 0, Fill::largest},
                           {13, 256, 7, 64, 0, Fill::smallest}};
    std::vector<std::size_t> cases(gemm_variants().size());
    Random random(plan.seed);
    const std::size_t total = std::size(fixed) + plan.random_cases;
    for (std::size_t i = 0; i < total; ++i) {
        Shape shape = i < std::size(fixed) ? fixed[i] : Shape{};
        if (i >= std::size(fixed)) {
            shape = {random.between(1, 70), kGroup * random.between(1, 12), random.between(1, 150), random.below(80),
                     random.below(5)};
        }
        for (Encoding encoding : {Encoding::binary, Encoding::ternary, Encoding::affine4}) {
            Case each(random, encoding, shape);
            for (std::size_t v = 0; v < cases.size(); ++v) {
                const auto& choice = gemm_variants()[v];
                // A signal per instruction: small cases only.
                const bool emulated = plan.emulate_avxvnni && shape.m * shape.n * shape.rows < 400000 &&
                                      std::strcmp(choice.variant->name, "avxvnni") == 0;
                if (!choice.why_not.empty() && !emulated) continue;
                if (random.below(2) == 0) check_case<float>(*choice.variant, each, random.between(1, 3));
                else check_case<std::uint16_t>(*choice.variant, each, random.between(1, 3));
                ++cases[v];
            }
        }
    }
    for (std::size_t v = 0; v < cases.size(); ++v) {
        const auto& choice = gemm_variants()[v];
        report("product", choice.variant->name, choice.why_not, cases[v]);
    }
}

}  // namespace linocut
