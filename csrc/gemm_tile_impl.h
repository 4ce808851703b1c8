// The part of a fast packed product that instruction sets with short registers share: the order of a panel in memory,
// and the loops around a tile of a few tokens by kTileColumns columns of one group. Compiled once per instruction set
// (see scalar_impl.h). A tile's integer sums stay in registers; its float sums go through the first-level cache once a
// group, for 16 registers hold no second set.
//
// Panel: group after group; a group is the weights of its tiles, then one float scale per column. Weights of a tile are
// in the order in which they are read: kUnit neighbours of its first column, of its next one, ..., then the next kUnit.
#pragma once

#include "gemm.h"
#include "unpack_impl.h"

namespace linocut {
namespace {

using std::int32_t;
using std::int8_t;

constexpr size_t kColumns = 128;     // of a panel
constexpr size_t kTileColumns = 16;  // of a tile
constexpr size_t kTokens = 32;       // whose slices of one group, with their sums, leave room in a first-level cache

// What a tile of R tokens reads and writes. Pointers are those of its first token, column and weight.
struct Tile {
    const int8_t* values;    // [R, stride]
    const float* scales;     // [R, scales_stride]
    const int32_t* sums;     // [R, sums_stride], of 64 activations each
    size_t stride, scales_stride, sums_stride;
    const uint8_t* weights;      // [group / kUnit, kTileColumns, kUnit]
    const float* weight_scales;  // [kTileColumns]
    float* out;                  // [R, kColumns], added to
};

inline size_t group_bytes(Encoding e) { return kColumns * (group_size(e) + sizeof(float)); }

size_t panel_bytes(Encoding e, size_t n) { return groups(e, n) * group_bytes(e); }

constexpr size_t kUnpackRows = 8;  // rows of W that are put between each other at once

// Weights [start, start + count) of kUnpackRows rows into a tile: weight start + k of row r goes to
// out[k / kUnit * kUnit * kTileColumns + r * kUnit + k % kUnit].
using Order = void (*)(const uint8_t (*rows)[kBlockRoom], size_t start, size_t count, uint8_t* out);

template <size_t kUnit>
void order_bytes(const uint8_t (*rows)[kBlockRoom], size_t start, size_t count, uint8_t* out) {
    for (size_t k = 0; k < count; k += kUnit, out += kUnit * kTileColumns) {
        for (size_t r = 0; r < kUnpackRows; ++r) std::memcpy(out + r * kUnit, rows[r] + start + k, kUnit);
    }
}

// Each weight plus `offset` in the order of a panel whose tiles have units of kUnit. Rows that W lacks are zeros.
template <size_t kUnit>
void unpack_panel(const Packed& w, size_t first, size_t count, int offset, Order order, void* panel) {
    const size_t size = group_size(w.encoding), per_row = groups(w.encoding, w.n), stride = group_bytes(w.encoding);
    auto* const out = static_cast<uint8_t*>(panel);
    for (size_t c = 0; c < ceil_div(count, kTileColumns) * kTileColumns; c += kUnpackRows) {
        uint8_t* const column = out + c / kTileColumns * kTileColumns * size + c % kTileColumns * kUnit;
        for (size_t start = 0; start < w.n; start += kBlock) {
            uint8_t rows[kUnpackRows][kBlockRoom];
            const size_t length = w.n - start < kBlock ? w.n - start : kBlock;
            for (size_t r = 0; r < kUnpackRows; ++r) {
                if (c + r < count) unpack_block(w, first + c + r, start, offset, rows[r]);
                else std::memset(rows[r], 0, length);
            }
            for (size_t k = 0; k < length; k += size) order(rows, k, size, column + (start + k) / size * stride);
        }
    }
    for (size_t g = 0; g < per_row; ++g) {
        auto* const scales = reinterpret_cast<float*>(out + g * stride + size * kColumns);
        for (size_t c = 0; c < kColumns; ++c) {
            scales[c] = c < count ? float_of_half(w.scales[(first + c) * per_row + g]) : 0.0f;
        }
    }
}

template <class Out>
void store_rows(const float* sums, size_t rows, size_t count, Out* out, size_t stride) {
    for (size_t r = 0; r < rows; ++r) {
        for (size_t c = 0; c < count; ++c) store(out + r * stride + c, sums[r * kColumns + c]);
    }
}

// `Kernel` computes tiles: Kernel::kRows tokens at most, and Kernel::tile<E, R>(const Tile&) for R tokens.
template <class Kernel, Encoding E, size_t R>
void tile_of(const Tile& tile, size_t rows) {
    if constexpr (R > 0) {
        if (rows == R) Kernel::template tile<E, R>(tile);
        else tile_of<Kernel, E, R - 1>(tile, rows);
    }
}

template <class Kernel, Encoding E>
void multiply_tokens(const Activations& x, size_t token, size_t tokens, const uint8_t* panel, size_t count,
                     float* sums) {
    constexpr size_t kSize = group_size(E), kRows = Kernel::kRows;
    const size_t scales_stride = x.n / kGroup, sums_stride = x.n / 64;
    for (size_t g = 0; g < x.n / kSize; ++g, panel += group_bytes(E)) {
        const auto* const weight_scales = reinterpret_cast<const float*>(panel + kSize * kColumns);
        for (size_t c = 0; c < count; c += kTileColumns) {
            for (size_t t = 0; t < tokens; t += kRows) {
                const size_t rows = tokens - t < kRows ? tokens - t : kRows;
                const size_t at = token + t;
                const Tile tile = {x.values + at * x.stride + g * kSize,
                                   x.scales + at * scales_stride + g * kSize / kGroup,
                                   x.sums + at * sums_stride + g * kSize / 64,
                                   x.stride, scales_stride, sums_stride,
                                   panel + c * kSize, weight_scales + c, sums + t * kColumns + c};
                // Rows are far apart, which no hardware prefetcher follows: ask for the next group's slices.
                if (c == 0 && (g + 1) * kSize < x.n) {
                    for (size_t r = 0; r < rows; ++r) {
                        const int8_t* const next = tile.values + r * x.stride + kSize;
                        for (size_t k = 0; k < kSize; k += 64) __builtin_prefetch(next + k);
                    }
                }
                tile_of<Kernel, E, kRows>(tile, rows);
            }
        }
    }
}

template <class Kernel>
void multiply(const Activations& x, size_t begin, size_t end, Encoding encoding, const void* panel, size_t first,
              size_t count, const Rows& y) {
    alignas(64) float sums[kTokens * kColumns];
    for (size_t token = begin; token < end; token += kTokens) {
        const size_t tokens = end - token < kTokens ? end - token : kTokens;
        std::memset(sums, 0, tokens * kColumns * sizeof(float));
        const auto* const bytes = static_cast<const uint8_t*>(panel);
        if (encoding == Encoding::affine4) {
            multiply_tokens<Kernel, Encoding::affine4>(x, token, tokens, bytes, count, sums);
        } else {
            multiply_tokens<Kernel, Encoding::ternary>(x, token, tokens, bytes, count, sums);
        }
        const size_t at = token * y.stride + first;
        if (y.type == Float::f32) store_rows(sums, tokens, count, static_cast<float*>(y.data) + at, y.stride);
        else store_rows(sums, tokens, count, static_cast<uint16_t*>(y.data) + at, y.stride);
    }
}

}  // namespace
}  // namespace linocut
