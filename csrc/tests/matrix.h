// Operands of the row kernels in guarded memory.
#pragma once

#include <cmath>

#include "../activations.h"
#include "check.h"

namespace linocut {

// Rows of either type, whose last one ends at a forbidden page.
class Matrix {
public:
    Matrix(Float type, std::size_t rows, std::size_t columns, std::size_t gap)
        : type_(type), rows_(rows), columns_(columns), stride_(columns + gap),
          wide_(type == Float::f32 ? (rows - 1) * stride_ + columns : 0),
          narrow_(type == Float::bf16 ? (rows - 1) * stride_ + columns : 0) {
        wide_.fill_bytes(0x55), narrow_.fill_bytes(0x55);
    }

    template <class F>
    void fill(F&& f) {
        for (std::size_t t = 0; t < rows_; ++t) {
            for (std::size_t c = 0; c < columns_; ++c) set(t, c, f());
        }
    }

    void set(std::size_t t, std::size_t c, float value) {
        if (type_ == Float::f32) wide_[t * stride_ + c] = value;
        else narrow_[t * stride_ + c] = bfloat_of_float(value);
    }

    float at(std::size_t t, std::size_t c) {
        return type_ == Float::f32 ? wide_[t * stride_ + c] : float_of_bfloat(narrow_[t * stride_ + c]);
    }

    Rows rows() {
        void* const data = type_ == Float::f32 ? static_cast<void*>(wide_.data()) : narrow_.data();
        return {type_, rows_, columns_, stride_, data};
    }

    // What lies between the rows is as it was.
    bool gaps_untouched() {
        for (std::size_t i = 0; i < (rows_ - 1) * stride_; ++i) {
            if (i % stride_ < columns_) continue;
            if (type_ == Float::f32 ? std::memcmp(&wide_[i], "UUUU", 4) != 0 : narrow_[i] != 0x5555) return false;
        }
        return true;
    }

private:
    Float type_;
    std::size_t rows_, columns_, stride_;
    Guarded<float> wide_;
    Guarded<std::uint16_t> narrow_;
};

// Activations whose arrays end at forbidden pages, full of a pattern until they are written.
class Quantized {
public:
    Quantized(std::size_t m, std::size_t n)
        : m_(m), n_(n), values_((m - 1) * activation_stride(n) + n), scales_(m * (n / kGroup)), sums_(m * (n / 64)) {
        values_.fill_bytes(0x55), scales_.fill_bytes(0x55), sums_.fill_bytes(0x55);
    }

    Activations view() { return {m_, n_, activation_stride(n_), values_.data(), scales_.data(), sums_.data()}; }
    std::int8_t* values(std::size_t t, std::size_t group) {
        return &values_[t * activation_stride(n_) + group * kGroup];
    }
    float& scale(std::size_t t, std::size_t group) { return scales_[t * (n_ / kGroup) + group]; }
    std::int32_t* sums(std::size_t t, std::size_t group) { return &sums_[t * (n_ / 64) + 2 * group]; }

    bool same(Quantized& other, std::size_t t, std::size_t group) {
        return std::memcmp(values(t, group), other.values(t, group), kGroup) == 0 &&
               same_bits(scale(t, group), other.scale(t, group)) &&
               std::memcmp(sums(t, group), other.sums(t, group), 8) == 0;
    }

    // Whether the group holds these 128 numbers, each known to within `error` of the largest, to half a step.
    bool holds(std::size_t t, std::size_t group, const double* expected, double error) {
        double largest = 0;
        for (std::size_t j = 0; j < kGroup; ++j) largest = std::fmax(largest, std::fabs(expected[j]));
        const double step = scale(t, group);
        std::int32_t totals[2] = {0, 0};
        bool right = std::fabs(step - largest / 127) <= error * largest + 1e-37;
        for (std::size_t j = 0; j < kGroup; ++j) {
            const int value = values(t, group)[j];
            right = right && std::fabs(value * step - expected[j]) <= 0.5 * step + error * largest + 1e-37;
            totals[j / 64] += value;
        }
        return right && totals[0] == sums(t, group)[0] && totals[1] == sums(t, group)[1];
    }

private:
    std::size_t m_, n_;
    Guarded<std::int8_t> values_;
    Guarded<float> scales_;
    Guarded<std::int32_t> sums_;
};

inline Float either(Random& random) { return random.below(2) == 0 ? Float::f32 : Float::bf16; }

}  // namespace linocut
