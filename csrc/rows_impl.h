// The row kernels, compiled once per instruction set (rows_*.cpp define LINOCUT_ROWS and include this file).
#include "quantize_impl.h"
#include "rows.h"
#include "simd.h"

namespace linocut {
namespace {

inline Vec read(const float* from) { return load<Vec>(from); }
inline Vec read(const uint16_t* from) { return load_bf16(from); }

// f(pointer to the floats of `row`), with the type that they have.
template <class F>
inline void typed_row(const Rows& rows, size_t row, F&& f) {
    if (rows.type == Float::f32) {
        f(static_cast<const float*>(rows.data) + row * rows.stride);
    } else {
        f(static_cast<const uint16_t*>(rows.data) + row * rows.stride);
    }
}

inline float* float_row(const Rows& rows, size_t row) { return static_cast<float*>(rows.data) + row * rows.stride; }

void add(const Residual& r, size_t begin, size_t end) {
    if (r.y.data == nullptr) return;
    for (size_t row = begin; row < end; ++row) {
        float* x = float_row(r.x, row);
        typed_row(r.y, row, [&](const auto* y) {
            for (size_t c = 0; c < r.x.columns; c += kLanes) {
                const Vec gate = r.gate == nullptr ? splat(1.0f) : load<Vec>(r.gate + c);
                store(x + c, fma(gate, read(y + c), load<Vec>(x + c)));
            }
        });
    }
}

inline void quantize_at(const Activations& out, size_t row, size_t column, const float* group) {
    quantize_group(group, out.values + row * out.stride + column, out.scales + (row * out.n + column) / kGroup,
                   out.sums + (row * out.n + column) / 64);
}

void normalize(const Residual& r, const Norm& norm, const Normalized& out, size_t begin, size_t end) {
    const size_t columns = r.x.columns;
    const float share = 1.0f / float(columns);
    for (size_t row = begin; row < end; ++row) {
        add(r, row, row + 1);
        const float* x = float_row(r.x, row);
        Vec mean = Vec{};
        if (norm.centered) {
            Vec total = Vec{};
            for (size_t c = 0; c < columns; c += kLanes) total += load<Vec>(x + c);
            mean = splat(sum(total) * share);
        }
        Vec squares = Vec{};
        for (size_t c = 0; c < columns; c += kLanes) {
            const Vec d = load<Vec>(x + c) - mean;
            squares = fma(d, d, squares);
        }
        const Vec inverse = splat(1.0f / __builtin_sqrtf(sum(squares) * share + norm.eps));
        for (size_t first = 0; first < columns; first += kGroup) {
            alignas(64) float group[kGroup];
            for (size_t j = 0; j < kGroup; j += kLanes) {
                const size_t c = first + j;
                const Vec shift = norm.shift == nullptr ? Vec{} : load<Vec>(norm.shift + c);
                store(group + j, fma((load<Vec>(x + c) - mean) * inverse, load<Vec>(norm.factor + c), shift));
            }
            if (out.quantized.values != nullptr) quantize_at(out.quantized, row, first, group);
            if (out.floats.data != nullptr) std::memcpy(float_row(out.floats, row) + first, group, sizeof group);
        }
    }
}

void swiglu(const Rows& gate, const Rows& value, const Activations& out, size_t first, size_t begin, size_t end) {
    const Vec log2_e = splat(1.44269504f), one = splat(1.0f);
    for (size_t row = begin; row < end; ++row) {
        typed_row(gate, row, [&](const auto* a) {
            typed_row(value, row, [&](const auto* b) {
                for (size_t k = 0; k < gate.columns; k += kGroup) {
                    alignas(64) float group[kGroup];
                    for (size_t j = 0; j < kGroup; j += kLanes) {
                        const Vec x = read(a + k + j);
                        const Vec e = exp2(min(splat(126.0f), -x * log2_e));  // beyond, x / e is nearly 0 all the same
                        store(group + j, x / (one + e) * read(b + k + j));
                    }
                    quantize_at(out, row, first + k, group);
                }
            });
        });
    }
}

inline void rotate(float* x, size_t width, const Rotation& rotation, size_t token) {
    const size_t half = width / 2;
    const float *cos = rotation.cos + token * half, *sin = rotation.sin + token * half;
    float turned[kMaxHeadWidth];
    if (rotation.pairing == Pairing::adjacent) {
        for (size_t j = 0; j < half; ++j) {
            const float a = x[2 * j], b = x[2 * j + 1];
            turned[2 * j] = a * cos[j] - b * sin[j];
            turned[2 * j + 1] = b * cos[j] + a * sin[j];
        }
    } else {
        for (size_t j = 0; j < half; ++j) {
            const float a = x[j], b = x[half + j];
            turned[j] = a * cos[j] - b * sin[j];
            turned[half + j] = b * cos[j] + a * sin[j];
        }
    }
    std::memcpy(x, turned, width * sizeof(float));
}

// One head of one token goes where attention reads it; see Heads.
template <class T>
inline void place(const float* x, Operand operand, size_t head, size_t token, const Heads& out) {
    constexpr size_t kPair = 4 / sizeof(T);
    T converted[kMaxHeadWidth];
    for (size_t c = 0; c < out.width; ++c) store(converted + c, x[c]);
    const size_t panel = token / kPanel * kPanel, at = token % kPanel;
    if (operand == Operand::q) {
        T* to = static_cast<T*>(out.q) + (head * out.padded + token) * out.width;
        std::memcpy(to, converted, out.width * sizeof(T));
    } else if (operand == Operand::k) {
        T* to = static_cast<T*>(out.k) + (head * out.padded + panel) * out.width + at * kPair;
        for (size_t c = 0; c < out.width; c += kPair) std::memcpy(to + c * kPanel, converted + c, 4);
    } else {
        T* to = static_cast<T*>(out.v) + head * out.padded * out.width + token / kPair * kPair * kPanel + token % kPair;
        for (size_t c = 0; c < out.width; c += kPanel, to += out.padded * kPanel) {
            for (size_t j = 0; j < kPanel; ++j) to[j * kPair] = converted[c + j];
        }
    }
}

void arrange(const Projected& from, Operand operand, size_t head, const Rotation& rotation, size_t first,
             const Heads& out, size_t begin, size_t end) {
    const size_t width = out.width;
    const float share = 1.0f / float(width);
    // Base-2 exponentials of scaled products: both factors go into q.
    const Vec scale = splat(operand == Operand::q ? 1.44269504f / __builtin_sqrtf(float(width)) : 1.0f);
    for (size_t row = begin; row < end; ++row) {
        alignas(64) float x[kMaxHeadWidth];
        typed_row(from.rows, row, [&](const auto* source) {
            source += head * width;
            for (size_t c = 0; c < width; c += kLanes) store(x + c, read(source + c));
        });
        Vec inverse = scale;
        if (from.weight != nullptr) {
            Vec squares = Vec{};
            for (size_t c = 0; c < width; c += kLanes) squares = fma(load<Vec>(x + c), load<Vec>(x + c), squares);
            inverse *= splat(1.0f / __builtin_sqrtf(sum(squares) * share + from.eps));
        }
        for (size_t c = 0; c < width; c += kLanes) {
            const Vec factor = from.weight == nullptr ? inverse : inverse * load<Vec>(from.weight + c);
            store(x + c, load<Vec>(x + c) * factor);
        }
        if (operand != Operand::v && rotation.cos != nullptr) rotate(x, width, rotation, first + row);
        if (out.type == Float::f32) {
            place<float>(x, operand, head, first + row, out);
        } else {
            place<uint16_t>(x, operand, head, first + row, out);
        }
    }
}

constexpr RowKernels kKernels = {add, normalize, swiglu, arrange};

}  // namespace

// A pointer, since copying the table would take this file's instructions on whatever CPU asks for it.
const RowKernels* LINOCUT_ROWS() { return &kKernels; }

}  // namespace linocut
