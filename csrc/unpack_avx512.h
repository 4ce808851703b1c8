// Packed weights to the panels of gemm_avx512vnni.cpp and gemm_amx.cpp: [k / 4][32 rows][4] bytes of weight + offset,
// then a float scale per group and row, [group][32 rows].
//
// What makes it cheap is to turn codes round before they are widened. A ternary byte holds five weights 128 apart, so
// turning fours of code bytes turns five fours of weights at once; four binary weights are four bits, and sixteen fours
// are just a mask register.
#pragma once

#include <immintrin.h>

#include "unpack_impl.h"

namespace linocut {
namespace {

constexpr size_t kColumns = 32, kHalf = 16;     // rows of W in a panel, and in a register
constexpr size_t kLine = kColumns * 4;          // bytes of a panel for four weights of all its rows

// `count` <= 16 rows of up to 64 bytes, `stride` apart, as 16 words of four bytes each; words past `bytes` are zero and
// not read, as are missing rows.
inline void load_rows(const uint8_t* in, size_t stride, size_t count, size_t bytes, __m512i* rows) {
    const __mmask64 wanted = bytes >= 64 ? ~__mmask64(0) : (__mmask64(1) << bytes) - 1;
    for (size_t i = 0; i < kHalf; ++i) {
        rows[i] = i < count ? _mm512_maskz_loadu_epi8(wanted, in + i * stride) : _mm512_setzero_si512();
    }
}

// 16 rows of 16 words become 16 columns of 16 words.
inline void turn(__m512i* a) {
    __m512i b[kHalf];
    for (size_t i = 0; i < kHalf; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (size_t i = 0; i < kHalf; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4 r + c] holds, in its lane l, the words 4 l + c of the rows 4 r .. 4 r + 3: now the lanes change places.
    for (size_t c = 0; c < 4; ++c) {
        const __m512i low0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44);
        const __m512i low1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
        const __m512i high0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
        const __m512i high1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
        b[c] = _mm512_shuffle_i32x4(low0, low1, 0x88);
        b[4 + c] = _mm512_shuffle_i32x4(low0, low1, 0xdd);
        b[8 + c] = _mm512_shuffle_i32x4(high0, high1, 0x88);
        b[12 + c] = _mm512_shuffle_i32x4(high0, high1, 0xdd);
    }
    for (size_t i = 0; i < kHalf; ++i) a[i] = b[i];
}

// 640 ternary weights of up to 16 rows: 128 bytes of codes each.
inline void turn_ternary_block(const uint8_t* codes, size_t stride, size_t count, int offset, uint8_t* out) {
    const __m512i zero = _mm512_set1_epi8(char(offset - 1)), one = _mm512_set1_epi8(char(offset));
    const __m512i two = _mm512_set1_epi8(char(offset + 1));
    const __m512i third = _mm512_set1_epi8(85), two_thirds = _mm512_set1_epi8(char(170));
    for (size_t part = 0; part < 2; ++part) {
        __m512i words[kHalf];
        load_rows(codes + part * 64, stride, count, 64, words);
        turn(words);
        for (size_t i = 0; i < kHalf; ++i) {
            __m512i fraction = words[i];
            for (size_t plane = 0; plane < kTrits; ++plane) {
                const __m512i some = _mm512_mask_mov_epi8(zero, _mm512_cmpgt_epu8_mask(fraction, third), one);
                const __m512i digits = _mm512_mask_mov_epi8(some, _mm512_cmpgt_epu8_mask(fraction, two_thirds), two);
                _mm512_store_si512(out + (plane * 32 + part * 16 + i) * kLine, digits);
                fraction = _mm512_add_epi8(fraction, _mm512_add_epi8(fraction, fraction));
            }
        }
    }
}

// 64 binary weights of 16 rows, eight bytes each: 16 masks of 64 bits, of which four belong to a row.
inline void turn_binary(const uint8_t* codes, size_t stride, size_t count, int offset, uint8_t* out) {
    alignas(64) uint64_t rows[kHalf] = {};
    for (size_t i = 0; i < count; ++i) std::memcpy(rows + i, codes + i * stride, sizeof *rows);
    // Bytes of two rows side by side, within 16 bytes; then all rows' first bytes, second bytes, ...
    const __m512i pair = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
    const __m512i low = _mm512_shuffle_epi8(_mm512_load_si512(rows), pair);
    const __m512i high = _mm512_shuffle_epi8(_mm512_load_si512(rows + 8), pair);
    const __m512i first = _mm512_set_epi16(59, 51, 43, 35, 27, 19, 11, 3, 58, 50, 42, 34, 26, 18, 10, 2,
                                           57, 49, 41, 33, 25, 17, 9, 1, 56, 48, 40, 32, 24, 16, 8, 0);
    const __m512i minus = _mm512_set1_epi8(char(offset - 1)), plus = _mm512_set1_epi8(char(offset + 1));
    for (int part = 0; part < 2; ++part) {
        // 16 bytes, one of each row, for each of four places: their low and their high halves are two masks.
        const __m512i index = _mm512_add_epi16(first, _mm512_set1_epi16(short(4 * part)));
        const __m512i bytes = _mm512_permutex2var_epi16(low, index, high);
        const __m512i below = _mm512_and_si512(bytes, _mm512_set1_epi8(0x0f));
        const __m512i above = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(0x0f));
        alignas(32) uint64_t masks[2][4];
        const auto join = [](__m512i halves) {
            return _mm512_cvtepi16_epi8(_mm512_or_si512(halves, _mm512_srli_epi16(halves, 4)));
        };
        _mm256_store_si256(reinterpret_cast<__m256i*>(masks[0]), join(below));
        _mm256_store_si256(reinterpret_cast<__m256i*>(masks[1]), join(above));
        for (size_t i = 0; i < 8; ++i) {
            _mm512_store_si512(out + (size_t(part) * 8 + i) * kLine, _mm512_mask_mov_epi8(minus, masks[i % 2][i / 2], plus));
        }
    }
}

// Whatever the encoding, a block at a time through bytes in their own order.
inline void turn_any_block(const Packed& w, size_t row, size_t count, size_t start, int offset, uint8_t* out) {
    constexpr size_t kStride = 704;
    static_assert(kStride >= kBlockRoom && kStride % 64 == 0);
    alignas(64) uint8_t rows[kHalf * kStride];
    size_t got = 0;
    for (size_t i = 0; i < count; ++i) {
        got = unpack_block(w, row + i, start, offset, rows + i * kStride);
    }
    for (size_t k = 0; k < got; k += 64) {
        __m512i words[kHalf];
        load_rows(rows + k, kStride, count, 64, words);
        turn(words);
        for (size_t i = 0; i < kHalf; ++i) _mm512_store_si512(out + (k / 4 + i) * kLine, words[i]);
    }
}

// FP16 scales of up to 16 rows, as floats with a register per group. `out` has room for a multiple of 16 groups.
inline void turn_scales(const uint16_t* scales, size_t per_row, size_t count, float* out) {
    for (size_t start = 0; start < per_row; start += kHalf) {
        const size_t here = per_row - start < kHalf ? per_row - start : kHalf;
        const __mmask16 wanted = __mmask16((1u << here) - 1);
        __m512i words[kHalf];
        for (size_t i = 0; i < kHalf; ++i) {
            const __m256i halves = i < count ? _mm256_maskz_loadu_epi16(wanted, scales + i * per_row + start)
                                             : _mm256_setzero_si256();
            words[i] = _mm512_castps_si512(_mm512_cvtph_ps(halves));
        }
        turn(words);
        for (size_t i = 0; i < kHalf; ++i) _mm512_store_si512(out + (start + i) * kColumns, words[i]);
    }
}

inline size_t panel_groups(Encoding e, size_t n) { return ceil_div(groups(e, n), kHalf) * kHalf; }

inline size_t panel_bytes(Encoding e, size_t n) { return kColumns * (n + panel_groups(e, n) * sizeof(float)); }

inline void unpack_panel(const Packed& w, size_t first, size_t count, int offset, void* panel) {
    auto* out = static_cast<uint8_t*>(panel);
    auto* scales = reinterpret_cast<float*>(out + kColumns * w.n);
    const size_t bytes = row_bytes(w.encoding, w.n), per_row = groups(w.encoding, w.n);
    for (size_t at = 0; at < count * bytes; at += 64) {  // rows are read in pieces, which no hardware guesses
        _mm_prefetch(reinterpret_cast<const char*>(w.codes + first * bytes + at), _MM_HINT_T1);
    }
    for (size_t half = 0; half < kColumns; half += kHalf) {
        const size_t row = first + half;
        const size_t rows = count <= half ? 0 : count - half < kHalf ? count - half : kHalf;
        const uint8_t* codes = w.codes + row * bytes;
        uint8_t* const to = out + half * 4;
        size_t k = 0;
        if (w.encoding == Encoding::binary) {
            for (; k < w.n; k += 64) turn_binary(codes + k / 8, bytes, rows, offset, to + k / 4 * kLine);
        } else if (w.encoding == Encoding::ternary) {
            for (; k + kBlock <= w.n; k += kBlock) {
                turn_ternary_block(codes + k / kTrits, bytes, rows, offset, to + k / 4 * kLine);
            }
        }
        for (; k < w.n; k += kBlock) turn_any_block(w, row, rows, k, offset, to + k / 4 * kLine);
        turn_scales(w.scales + row * per_row, per_row, rows, scales + half);
    }
}

}  // namespace
}  // namespace linocut
