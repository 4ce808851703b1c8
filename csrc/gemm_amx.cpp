// The packed product with AMX: tdpbssd multiplies 16 tokens by 16 rows of W, 64 bytes deep.
//
// A panel is 32 rows of W, as gemm_avx512vnni.cpp has them but signed: [k / 4][row][4] is the order that tdpbssd wants
// too. Group by group, the panel's weights meet up to four tiles of tokens. No other instruction reads a tile, so sums of
// a group go through memory, and those of all groups stay there; while one tile's are rescaled, the next is multiplied.
// What bounds it is to get tiles from the second-level cache, so the lines of the next group are asked for meanwhile.
#include <immintrin.h>

#include "gemm.h"
#include "store_avx512.h"
#include "unpack_avx512.h"

namespace linocut {
namespace {

constexpr size_t kTokens = 16, kDepth = 64;  // of a tile: rows, and bytes of a row
constexpr size_t kTiles = 4;                 // of tokens that meet a group's weights while these are loaded

// Tiles 0-1: sums [tokens, 16 rows of W]; 2-5: weights [64 / 4, 16 rows of W, 4]; 6-7: activations [tokens, 64].
void configure(size_t tokens) {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    for (size_t i = 0; i < 8; ++i) {
        config.row_bytes[i] = kDepth;
        config.rows[i] = i < 2 || i > 5 ? uint8_t(tokens) : kDepth / 4;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));  // gcc 12's intrinsic says that it reads eight bytes
}

template <size_t kSize>
inline void load_weights(const uint8_t* panel) {
    _tile_loadd(2, panel, kLine);
    _tile_loadd(3, panel + 64, kLine);
    if constexpr (kSize > kDepth) {
        _tile_loadd(4, panel + kDepth / 4 * kLine, kLine);
        _tile_loadd(5, panel + kDepth / 4 * kLine + 64, kLine);
    }
}

using Sums = std::int32_t[2][kTokens][kHalf];  // of one group: the two halves of a panel

template <size_t kSize>
inline void multiply_tile(const std::int8_t* values, size_t stride, Sums& sums) {
    _tile_loadd(6, values, stride);
    if constexpr (kSize > kDepth) _tile_loadd(7, values + kDepth, stride);
    _tile_zero(0);
    _tile_dpbssd(0, 6, 2);
    _tile_zero(1);
    _tile_dpbssd(1, 6, 3);
    if constexpr (kSize > kDepth) {
        _tile_dpbssd(0, 7, 4);
        _tile_dpbssd(1, 7, 5);
    }
    _tile_stored(0, sums[0], sizeof sums[0][0]);
    _tile_stored(1, sums[1], sizeof sums[1][0]);
}

inline void fetch(const void* line) { _mm_prefetch(static_cast<const char*>(line), _MM_HINT_T0); }

// `tokens` from `token` on times the panel: whole tiles, at most kTiles, or fewer tokens than one if tiles are
// configured so. kSize weights share a scale.
template <size_t kSize, class Out>
void tiles(const Activations& x, size_t token, size_t tokens, const uint8_t* panel, const __mmask16* wanted, Out* y,
           size_t y_stride) {
    constexpr size_t kPerGroup = kGroup / kSize, kBytes = kSize * kColumns;  // of a panel, for a group
    alignas(64) Sums sums[2];
    alignas(64) float totals[kTiles * kTokens][kColumns];
    const size_t steps = x.n / kGroup, stride = x.stride;
    const size_t count = ceil_div(tokens, kTokens), rows = tokens < kTokens ? tokens : kTokens;
    const std::int8_t* values = x.values + token * stride;
    const auto* weight_scales = reinterpret_cast<const float*>(panel + kColumns * x.n);
    std::memset(totals, 0, tokens * sizeof totals[0]);
    for (size_t g = 0; g < steps * kPerGroup; ++g, weight_scales += kColumns, values += kSize, panel += kBytes) {
        load_weights<kSize>(panel);
        const __m512 scale0 = _mm512_load_ps(weight_scales), scale1 = _mm512_load_ps(weight_scales + kHalf);
        const float* scales = x.scales + token * steps + g / kPerGroup;
        for (size_t i = 0; i <= count; ++i) {
            if (i < count) multiply_tile<kSize>(values + i * kTokens * stride, stride, sums[i % 2]);
            if (i == 0) continue;
            const Sums& part = sums[(i - 1) % 2];
            for (size_t t = (i - 1) * kTokens, row = 0; row < rows; ++t, ++row) {
                for (size_t line = 0; line < kSize; line += 64) {  // at the end they are beyond: only asked for
                    fetch(values + kSize + t * stride + line);
                    fetch(panel + kBytes + t % kColumns * kSize + line);
                }
                const __m512 scale = _mm512_set1_ps(scales[t * steps]);
                const __m512 part0 = _mm512_cvtepi32_ps(_mm512_load_si512(part[0][row]));
                const __m512 part1 = _mm512_cvtepi32_ps(_mm512_load_si512(part[1][row]));
                float* const total = totals[t];
                _mm512_store_ps(total, _mm512_fmadd_ps(part0, _mm512_mul_ps(scale0, scale), _mm512_load_ps(total)));
                _mm512_store_ps(total + kHalf,
                                _mm512_fmadd_ps(part1, _mm512_mul_ps(scale1, scale), _mm512_load_ps(total + kHalf)));
            }
        }
    }
    for (size_t t = 0; t < tokens; ++t, y += y_stride) {
        store16(y, wanted[0], _mm512_load_ps(totals[t]));
        store16(y + kHalf, wanted[1], _mm512_load_ps(totals[t] + kHalf));
    }
}

template <size_t kSize, class Out>
void multiply_all(const Activations& x, size_t begin, size_t end, const uint8_t* panel, size_t count, Out* y,
                  size_t y_stride) {
    const __mmask16 wanted[2] = {wanted16(count), wanted16(count < kHalf ? 0 : count - kHalf)};
    for (size_t tokens, configured = 0; begin < end; begin += tokens) {
        const size_t left = end - begin, whole = left < kTiles * kTokens ? left / kTokens * kTokens : kTiles * kTokens;
        tokens = whole == 0 ? left : whole;
        const size_t rows = tokens < kTokens ? tokens : kTokens;
        if (rows != configured) configure(configured = rows);
        tiles<kSize>(x, begin, tokens, panel, wanted, y + begin * y_stride, y_stride);
    }
    _tile_release();
}

template <class Out>
void multiply_as(const Activations& x, size_t begin, size_t end, Encoding encoding, const void* panel, size_t first,
                 size_t count, const Rows& y) {
    const auto* bytes = static_cast<const uint8_t*>(panel);
    Out* const out = static_cast<Out*>(y.data) + first;
    if (encoding == Encoding::affine4) multiply_all<kAffineGroup>(x, begin, end, bytes, count, out, y.stride);
    else multiply_all<kGroup>(x, begin, end, bytes, count, out, y.stride);
}

void multiply(const Activations& x, size_t begin, size_t end, Encoding encoding, const void* panel, size_t first,
              size_t count, const Rows& y) {
    if (y.type == Float::f32) multiply_as<float>(x, begin, end, encoding, panel, first, count, y);
    else multiply_as<uint16_t>(x, begin, end, encoding, panel, first, count, y);
}

void unpack(const Packed& w, size_t first, size_t count, void* panel) { unpack_panel(w, first, count, 0, panel); }

constexpr size_t kHeld = 1 << 20;  // half of the second-level cache of CPUs that have AMX

constexpr GemmVariant kVariant = {"amx", "avx512f avx512bw avx512dq avx512vl amxint8", kColumns, panel_bytes, unpack,
                                  multiply, kHeld};

}  // namespace

const GemmVariant* gemm_amx() { return &kVariant; }

}  // namespace linocut
