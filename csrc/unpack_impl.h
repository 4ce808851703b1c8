// Packed weights as bytes in their own order, the first half of every `unpack` of gemm.h; compiled once per instruction
// set (see scalar_impl.h). The second half, the order that an instruction wants them in, is the variant's own.
#pragma once

#include "scalar_impl.h"

namespace linocut {
namespace {

// What instructions that multiply unsigned by signed bytes need added to weights: -1..1, -15..15 become 0..2, 0..30.
constexpr int unsigned_offset(Encoding e) { return e == Encoding::affine4 ? 15 : 1; }

constexpr size_t kBlockRoom = kBlock + kTrits;  // the last plane of a short ternary block may run over its end

inline void ternary_block(const uint8_t* codes, size_t count, int offset, uint8_t* out) {
    const size_t stride = ceil_div(count, kTrits);
    for (size_t plane = 0; plane < kTrits; ++plane, out += stride) {
        const uint8_t power = kPower[plane];
        for (size_t j = 0; j < stride; ++j) out[j] = uint8_t(digit(codes[j], power) - 1 + offset);
    }
}

inline void binary_block(const uint8_t* codes, size_t count, int offset, uint8_t* out) {
    constexpr uint64_t kOnes = 0x0101010101010101u;
    for (size_t i = 0; i < count / 8; ++i) {
        const uint64_t bits = spread_bits(codes[i]);
        // 2 * bit - 1 + offset in each byte. The 255 of offset 0 comes from kOnes - bits as in decode_impl.h.
        const uint64_t bytes = offset == 0 ? bits + (kOnes - bits) * 0xffu : bits * 2 + kOnes * uint64_t(offset - 1);
        std::memcpy(out + 8 * i, &bytes, sizeof bytes);
    }
}

inline void affine4_block(const uint8_t* codes, const uint8_t* zeros, size_t group, size_t count, int offset,
                          uint8_t* out) {
    for (size_t i = 0; i < count; i += kAffineGroup, ++group, codes += kAffineGroup / 2) {
        const int shift = offset - (zeros[group / 2] >> (group % 2 * 4) & 15);
        for (size_t j = 0; j < kAffineGroup / 2; ++j) {
            out[i + 2 * j] = uint8_t((codes[j] & 15) + shift);
            out[i + 2 * j + 1] = uint8_t((codes[j] >> 4) + shift);
        }
    }
}

// Writes the weights [start, start + count) of one row, each plus `offset`, and returns count = min(640, n - start).
// `start` is a multiple of 640. `out` has room for kBlockRoom bytes, of which those past count are scratch.
[[maybe_unused]] inline size_t unpack_block(const Packed& w, size_t row, size_t start, int offset, uint8_t* out) {
    const size_t count = w.n - start < kBlock ? w.n - start : kBlock;
    const uint8_t* codes = w.codes + row * row_bytes(w.encoding, w.n) + row_bytes(w.encoding, start);
    switch (w.encoding) {
        case Encoding::binary: binary_block(codes, count, offset, out); break;
        case Encoding::ternary: ternary_block(codes, count, offset, out); break;
        case Encoding::affine4:
            affine4_block(codes, w.zeros + row * zero_bytes(w.encoding, w.n), start / kAffineGroup, count, offset, out);
            break;
        case Encoding::int8: break;  // has no product (gemm.h)
    }
    return count;
}

}  // namespace
}  // namespace linocut
