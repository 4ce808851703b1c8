// The packed product with AVX-512 VNNI: vpdpbusd multiplies 64 unsigned by 64 signed bytes and adds fours of products.
//
// A panel is 32 rows of W. Its bytes (weight + offset, 0..2 or 0..30) lie as [k / 4][row][4], so that two registers hold
// four neighbouring weights of all its rows; the same four activations of a token are broadcast to them. Six tokens make
// a tile: 12 registers of int32 for the group at hand, 12 of float32 for the sum of groups, 2 of weights. What bounds it
// is the instruction itself, next to which the rescaling of each group (a multiplication and an addition per register)
// costs 6%. Panels stream through from the second-level cache, which a panel of klein's longest row fits.
#include <immintrin.h>

#include "gemm.h"
#include "unpack_impl.h"

namespace linocut {
namespace {

constexpr size_t kColumns = 32, kRegisters = kColumns / 16, kTokens = 6;
constexpr size_t kAhead = 2 * kGroup;  // bytes of activations to fetch ahead: rows of tokens are too many for the hardware

size_t panel_bytes(Encoding e, size_t n) { return kColumns * (n + groups(e, n) * sizeof(float)); }

// ------------------------------------------------------------------------------------------------------- unpacking

// 16 rows of 16 words of four bytes, `stride` bytes apart, become 16 columns, kColumns * 4 bytes apart.
inline void transpose(const uint8_t* in, size_t stride, uint8_t* out) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in + size_t(i) * stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4 r + c] holds, in its lane l, the words 4 l + c of the rows 4 r .. 4 r + 3.
    for (int c = 0; c < 4; ++c) {
        const __m512i low0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44), high0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
        const __m512i low1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
        const __m512i high1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
        const auto put = [&](int word, __m512i value) { _mm512_store_si512(out + size_t(word) * kColumns * 4, value); };
        put(c, _mm512_shuffle_i32x4(low0, low1, 0x88));
        put(4 + c, _mm512_shuffle_i32x4(low0, low1, 0xdd));
        put(8 + c, _mm512_shuffle_i32x4(high0, high1, 0x88));
        put(12 + c, _mm512_shuffle_i32x4(high0, high1, 0xdd));
    }
}

void unpack(const Packed& w, size_t first, size_t count, void* panel) {
    constexpr size_t kStride = 704;  // of a row in the scratch: a block and what a short one may run over
    static_assert(kStride >= kBlockRoom && kStride % 64 == 0);
    alignas(64) uint8_t rows[16 * kStride] = {};
    auto* out = static_cast<uint8_t*>(panel);
    const int offset = unsigned_offset(w.encoding);
    for (size_t half = 0; half < kColumns; half += 16) {
        for (size_t start = 0; start < w.n; start += kBlock) {
            size_t got = w.n - start < kBlock ? w.n - start : kBlock;
            for (size_t c = half; c < half + 16 && c < count; ++c) {
                got = unpack_block(w, first + c, start, offset, rows + (c - half) * kStride);
            }
            for (size_t k = 0; k < got; k += 64) transpose(rows + k, kStride, out + (start + k) * kColumns + half * 4);
        }
    }
    auto* scales = reinterpret_cast<float*>(out + kColumns * w.n);
    const size_t per_row = groups(w.encoding, w.n);
    for (size_t c = 0; c < kColumns; ++c) {
        const uint16_t* from = w.scales + (first + c) * per_row;
        for (size_t g = 0; g < per_row; ++g) scales[g * kColumns + c] = c < count ? float_of_half(from[g]) : 0.0f;
    }
}

// ----------------------------------------------------------------------------------------------------- multiplying

// sums += weights * values, fours of bytes. An instruction of its own: gcc 12 copies every register around the intrinsic.
inline void dot(__m512i& sums, __m512i weights, __m512i values) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(values));
}

inline void store16(float* out, __mmask16 wanted, __m512 value) { _mm512_mask_storeu_ps(out, wanted, value); }

// As scalar_impl.h rounds: to nearest even, any NaN to one.
inline void store16(uint16_t* out, __mmask16 wanted, __m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i high = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16(out, wanted, _mm512_cvtepi32_epi16(high));
}

// T tokens from `token` on times the panel; kSize weights share a scale.
template <int T, size_t kSize, class Out>
void tile(const Activations& x, size_t token, const uint8_t* panel, int offset, const __mmask16* wanted, Out* y,
          size_t y_stride) {
    constexpr size_t kSums = kSize / 64, kPerGroup = kGroup / kSize;
    const size_t steps = x.n / kGroup, stride = x.stride;
    const std::int8_t* values = x.values + token * stride;
    const float* scales = x.scales + token * steps;
    const std::int32_t* sums = x.sums + token * 2 * steps;
    const auto* weight_scales = reinterpret_cast<const float*>(panel + kColumns * x.n);
    __m512 total[T][kRegisters];
    for (int t = 0; t < T; ++t) {
        for (size_t r = 0; r < kRegisters; ++r) total[t][r] = _mm512_setzero_ps();
    }
    for (size_t g = 0; g < steps * kPerGroup; ++g) {
        __m512i part[T][kRegisters];
        for (int t = 0; t < T; ++t) {
            const std::int32_t* own = sums + size_t(t) * 2 * steps + g * kSums;
            const __m512i correction = _mm512_set1_epi32(-offset * (kSums == 2 ? own[0] + own[1] : own[0]));
            for (size_t r = 0; r < kRegisters; ++r) part[t][r] = correction;
            for (size_t line = 0; line < kSize; line += 64) {
                _mm_prefetch(reinterpret_cast<const char*>(values + size_t(t) * stride + kAhead + line), _MM_HINT_T0);
            }
        }
#pragma GCC unroll 2
        for (size_t k = 0; k < kSize; k += 4, values += 4, panel += 4 * kColumns) {
            __m512i weights[kRegisters];
            for (size_t r = 0; r < kRegisters; ++r) weights[r] = _mm512_load_si512(panel + 64 * r);
            for (int t = 0; t < T; ++t) {
                std::int32_t four;
                std::memcpy(&four, values + size_t(t) * stride, sizeof four);
                const __m512i broadcast = _mm512_set1_epi32(four);
                for (size_t r = 0; r < kRegisters; ++r) dot(part[t][r], weights[r], broadcast);
            }
        }
        for (int t = 0; t < T; ++t) {
            const __m512 scale = _mm512_set1_ps(scales[size_t(t) * steps + g / kPerGroup]);
            for (size_t r = 0; r < kRegisters; ++r) {
                const __m512 both = _mm512_mul_ps(_mm512_load_ps(weight_scales + 16 * r), scale);
                total[t][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[t][r]), both, total[t][r]);
            }
        }
        weight_scales += kColumns;
    }
    for (int t = 0; t < T; ++t) {
        for (size_t r = 0; r < kRegisters; ++r) store16(y + size_t(t) * y_stride + 16 * r, wanted[r], total[t][r]);
    }
}

// All tokens in tiles of T, and the rest, fewer than T, in one smaller tile.
template <int T, size_t kSize, class Out>
void tiles(const Activations& x, size_t begin, size_t end, const uint8_t* panel, int offset, const __mmask16* wanted,
           Out* y, size_t y_stride) {
    for (; begin + T <= end; begin += T) {
        tile<T, kSize>(x, begin, panel, offset, wanted, y + begin * y_stride, y_stride);
    }
    if constexpr (T > 1) tiles<T - 1, kSize>(x, begin, end, panel, offset, wanted, y, y_stride);
}

template <class Out>
void multiply(const Activations& x, size_t begin, size_t end, Encoding encoding, const void* panel, size_t count,
              Out* y, size_t y_stride) {
    const auto* bytes = static_cast<const uint8_t*>(panel);
    const int offset = unsigned_offset(encoding);
    const __mmask16 wanted[kRegisters] = {__mmask16(count >= 16 ? 0xffff : (1u << count) - 1),
                                          __mmask16(count <= 16 ? 0 : (1u << (count - 16)) - 1)};
    if (encoding == Encoding::affine4) {
        tiles<kTokens, kAffineGroup>(x, begin, end, bytes, offset, wanted, y, y_stride);
    } else {
        tiles<kTokens, kGroup>(x, begin, end, bytes, offset, wanted, y, y_stride);
    }
}

void multiply(const Activations& x, size_t begin, size_t end, Encoding encoding, const void* panel, size_t first,
              size_t count, const Rows& y) {
    if (y.type == Float::f32) {
        multiply(x, begin, end, encoding, panel, count, static_cast<float*>(y.data) + first, y.stride);
    } else {
        multiply(x, begin, end, encoding, panel, count, static_cast<uint16_t*>(y.data) + first, y.stride);
    }
}

constexpr GemmVariant kVariant = {"avx512vnni", "avx512f avx512bw avx512dq avx512vl avx512vnni", kColumns, panel_bytes,
                                  unpack, multiply};

}  // namespace

const GemmVariant* gemm_avx512vnni() { return &kVariant; }

}  // namespace linocut
