// The packed product with AVX-512 VNNI: vpdpbusd multiplies 64 unsigned by 64 signed bytes and adds fours of products.
//
// A panel is 32 rows of W. Its bytes (weight + offset, 0..2 or 0..30) lie as [k / 4][row][4], so that two registers
// hold four neighbouring weights of all its rows; the same four activations of a token are broadcast to them. Six
// tokens make a tile: 12 registers of int32 for the group at hand, 12 of float32 for the sum of groups, 2 of weights.
// What bounds it is the instruction itself, next to which the rescaling of each group (a multiplication and an addition
// per register) costs 6%. Panels stream from the second-level cache, which a panel of klein's longest row fits.
#include <immintrin.h>

#include "gemm.h"
#include "store_avx512.h"
#include "unpack_avx512.h"

namespace linocut {
namespace {

constexpr int kTokens = 6;
constexpr size_t kAhead = 2 * kGroup;  // bytes of activations to fetch ahead: too many rows at once for the hardware

// sums += weights * values, fours of bytes. Written out, since gcc 12 copies every register around the intrinsic.
inline void dot(__m512i& sums, __m512i weights, __m512i values) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(values));
}

// T tokens from `token` on times the panel; kSize weights share a scale. gcc keeps an array in registers only if it is
// told to unroll the loops over it.
template <int T, size_t kSize, class Out>
void tile(const Activations& x, size_t token, const uint8_t* panel, int offset, const __mmask16* wanted, Out* y,
          size_t y_stride) {
    constexpr size_t kSums = kSize / 64, kPerGroup = kGroup / kSize;
    const size_t steps = x.n / kGroup, stride = x.stride;
    const std::int8_t* values = x.values + token * stride;
    const float* scales = x.scales + token * steps;
    const std::int32_t* sums = x.sums + token * 2 * steps;
    const auto* weight_scales = reinterpret_cast<const float*>(panel + kColumns * x.n);
    __m512 total0[T], total1[T];  // rows 0-15 and 16-31 of the panel
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) total0[t] = total1[t] = _mm512_setzero_ps();
    for (size_t g = 0; g < steps * kPerGroup; ++g, weight_scales += kColumns) {
        __m512i part0[T], part1[T];
        // Further on in these rows, or at their end the beginning of the next tile's.
        const size_t ahead = g * kSize + kAhead < x.n ? kAhead : kAhead - x.n + size_t(T) * stride;
        const std::int8_t* const soon = values + ahead;
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const std::int32_t* own = sums + size_t(t) * 2 * steps + g * kSums;
            part0[t] = part1[t] = _mm512_set1_epi32(-offset * (kSums == 2 ? own[0] + own[1] : own[0]));
            for (size_t line = 0; line < kSize; line += 64) {
                _mm_prefetch(reinterpret_cast<const char*>(soon + size_t(t) * stride + line), _MM_HINT_T0);
            }
        }
#pragma GCC unroll 2
        for (size_t k = 0; k < kSize; k += 4, values += 4, panel += kLine) {
            const __m512i weights0 = _mm512_load_si512(panel), weights1 = _mm512_load_si512(panel + 64);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                std::int32_t four;
                std::memcpy(&four, values + size_t(t) * stride, sizeof four);
                const __m512i broadcast = _mm512_set1_epi32(four);
                dot(part0[t], weights0, broadcast);
                dot(part1[t], weights1, broadcast);
            }
        }
        const __m512 scale0 = _mm512_load_ps(weight_scales), scale1 = _mm512_load_ps(weight_scales + 16);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const __m512 scale = _mm512_set1_ps(scales[size_t(t) * steps + g / kPerGroup]);
            total0[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part0[t]), _mm512_mul_ps(scale0, scale), total0[t]);
            total1[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part1[t]), _mm512_mul_ps(scale1, scale), total1[t]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        store16(y + size_t(t) * y_stride, wanted[0], total0[t]);
        store16(y + size_t(t) * y_stride + 16, wanted[1], total1[t]);
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
    const __mmask16 wanted[2] = {wanted16(count), wanted16(count < kHalf ? 0 : count - kHalf)};
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

void unpack(const Packed& w, size_t first, size_t count, void* panel) {
    unpack_panel(w, first, count, unsigned_offset(w.encoding), panel);
}

constexpr GemmVariant kVariant = {"avx512vnni", "avx512f avx512bw avx512dq avx512vl avx512vnni", kColumns, panel_bytes,
                                  unpack, multiply};

}  // namespace

const GemmVariant* gemm_avx512vnni() { return &kVariant; }

}  // namespace linocut
