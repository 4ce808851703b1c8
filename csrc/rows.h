// What a transformer block does between its products, row by row in float32 and fused where memory would be read twice:
// residual + norm + quantization, SwiGLU + quantization, and the norm, rotation and layout of attention's operands.
// Rows are independent of each other, hence results of the number of threads.
#pragma once

#include <cstddef>

#include "activations.h"
#include "attention.h"

namespace linocut {

// x[t, c] += gate[c] * y[t, c]; x is float32. gate null means 1, y.data null that nothing is added.
struct Residual {
    Rows x, y;
    const float* gate;
};

// x / rms(x), or (x - mean) / deviation if `centered`; then times factor[c], plus shift[c] unless that is null.
struct Norm {
    bool centered;
    float eps;
    const float *factor, *shift;
};

// Where normalized rows go: quantized, as float32, or both. Null pointers mean not wanted.
struct Normalized {
    Activations quantized;
    Rows floats;
};

// One of q, k and v as a projection leaves it, [tokens, heads * width]. weight [width] is that of the RMS norm over the
// channels of a head; null: no norm.
struct Projected {
    Rows rows;
    const float* weight;
    float eps;
};

// Which channels turn together: (2j, 2j + 1), or (j, j + width / 2).
enum class Pairing : std::uint8_t { adjacent, halves };

// Angles by which q and k turn after their norm: cos and sin [all tokens of the attention, width / 2]; null: none.
struct Rotation {
    Pairing pairing;
    const float *cos, *sin;
};

enum class Operand : std::uint8_t { q, k, v };

// One instruction set's kernels; each works on rows [begin, end).
struct RowKernels {
    void (*add)(const Residual&, std::size_t begin, std::size_t end);
    void (*normalize)(const Residual&, const Norm&, const Normalized&, std::size_t begin, std::size_t end);
    void (*swiglu)(const Rows& gate, const Rows& value, const Activations& out, std::size_t first, std::size_t begin,
                   std::size_t end);
    // Row t of one head becomes token first + t of `out`.
    void (*arrange)(const Projected&, Operand, std::size_t head, const Rotation&, std::size_t first, const Heads& out,
                    std::size_t begin, std::size_t end);
};

const RowKernels* row_kernels_baseline();
#if defined(LINOCUT_X86)
const RowKernels* row_kernels_avx2();
const RowKernels* row_kernels_avx512();
#endif

// All columns below are multiples of 128.
void add_rows(const RowKernels&, const Residual&, std::size_t threads);
// The addition, if any, then the norm of its result. x keeps the sum.
void normalize_rows(const RowKernels&, const Residual&, const Norm&, const Normalized& out, std::size_t threads);
// silu(gate) * value into columns [first, first + gate.columns) of `out`.
void swiglu_rows(const RowKernels&, const Rows& gate, const Rows& value, const Activations& out, std::size_t first,
                 std::size_t threads);
// Rows of q, k and v become tokens [first, first + rows) of `out`. q is scaled as Heads wants it.
void arrange_heads(const RowKernels&, const Projected& q, const Projected& k, const Projected& v, const Rotation&,
                   std::size_t first, const Heads& out, std::size_t threads);

}  // namespace linocut
