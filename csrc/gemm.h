// y[m, o] = x[m, n] @ W[o, n]^T with x in int8 (activations.h) and W packed: one driver, one table per instruction set.
//
// The driver cuts W into panels of `columns` rows of W, unpacks one panel of a whole row length into scratch that stays
// in a core's own cache, and multiplies as many tokens by it as fit the cache that cores share. Sums of int8 products
// are exact in int32 within a group of weights (128, or 64 for affine4); groups are added in float32 from the first to
// the last. So a result depends neither on the number of threads nor on how tokens or rows are cut, and every variant
// gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "activations.h"
#include "packed.h"

namespace linocut {

struct GemmVariant {
    const char* name;
    const char* needs;       // instruction sets, for people
    std::size_t columns;     // rows of W in a panel
    // Bytes of scratch for one panel of rows of length n.
    std::size_t (*panel_bytes)(Encoding, std::size_t n);
    // Unpacks W's rows [first, first + count), count <= columns, into `panel` (64-byte aligned). Missing rows become anything.
    void (*unpack)(const Packed& w, std::size_t first, std::size_t count, void* panel);
    // y[token, first + c] for tokens [begin, end) and the panel's `count` rows.
    void (*multiply)(const Activations& x, std::size_t begin, std::size_t end, Encoding, const void* panel,
                     std::size_t first, std::size_t count, const Rows& y);
    // Bytes of unpacked panels that a core's own cache holds beside some tokens. A variant so fast that it would wait for
    // tokens from the shared cache has several panels at once, so that each token is read once for all of them; else 0.
    std::size_t held = 0;
};

// The table of each instruction set, a pointer as all tables: to ask for one must run no instruction of its set, which
// gcc takes even to copy one. Which ones are compiled in is up to CMakeLists.txt. generic always is.
const GemmVariant* gemm_generic();
const GemmVariant* gemm_avx2();
const GemmVariant* gemm_avxvnni();
const GemmVariant* gemm_avx512vnni();
const GemmVariant* gemm_amx();
const GemmVariant* gemm_neon_dot();
const GemmVariant* gemm_neon_i8mm();

struct GemmChoice {
    const GemmVariant* variant;
    std::string why_not;  // empty: can run here
};

// All compiled variants, best first; generic comes last and always can.
const std::vector<GemmChoice>& gemm_variants();
// The variant called `name`, or the best one that can run if `name` is empty. Throws std::invalid_argument.
const GemmVariant& gemm_variant(const std::string& name);

// y[m, rows of w] = x @ W^T. y is float32 or bfloat16 (rounded to nearest even). Throws std::invalid_argument for int8
// weights: they are for layers whose activations are not rounded, and most variants could not add them exactly.
void gemm(const GemmVariant&, const Activations& x, const Packed& w, const Rows& y, std::size_t threads);

// Fills `out` (columns [first, first + x.columns) of it; both multiples of 128) from rows of floats: per token and
// group, scale = max|x| / 127 and value = x * (127 / max|x|) rounded to nearest even. A group of zeros, or of nothing
// above 2^-120, has scale 0; one with an infinity or a NaN has scale NaN, so that the result says so.
void quantize_activations(const Rows& x, const Activations& out, std::size_t first, std::size_t threads);

}  // namespace linocut
