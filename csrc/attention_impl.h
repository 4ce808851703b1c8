// Attention of one block of queries, compiled once per instruction set (attention_*.cpp define LINOCUT_ATTENTION,
// LINOCUT_NAME and LINOCUT_NEEDS, then include this file). With LINOCUT_BF16 a unit is a pair of bfloat16, else one
// float32; both are four bytes, so that all else is the same: a product adds one unit of depth to all lanes. With
// LINOCUT_TILES products are those of AMX: a tile of units is 16 rows of 16, which is how panels lie anyway.
//
// Per tile of keys: scores = q k^T, then their exponentials as units, then out = out * correction + exponentials v.
// Both products run panel by panel (32 keys or 32 channels) over all queries: a panel is read into the first cache once.
#include "attention.h"
#include "simd.h"

namespace linocut {
namespace {

using std::size_t;
using std::uint32_t;

#if defined(LINOCUT_BF16)
constexpr size_t kPair = 2;  // elements of a unit
#else
constexpr size_t kPair = 1;
#endif

// The register tile: kRows rows times kAcross registers. It leaves registers for the operands.
#if defined(LINOCUT_TILES)
constexpr size_t kRows = 32, kAcross = 2;
#elif defined(__AVX512F__)
constexpr size_t kRows = 8, kAcross = 2;
#elif defined(__AVX2__)
constexpr size_t kRows = 4, kAcross = 2;
#else
constexpr size_t kRows = 4, kAcross = 2;
#endif
constexpr size_t kQueries = 64;  // of a task
constexpr size_t kKeys = 256;    // of a tile
constexpr size_t kDepth = kMaxHeadWidth / kPair, kTileUnits = kKeys / kPair;
static_assert(kQueries % kRows == 0 && kPanel % (kAcross * kLanes) == 0 && kKeys % kPanel == 0, "tiles must fit");

struct Scratch {
    alignas(64) uint32_t q[kQueries * kDepth];
    alignas(64) float scores[kQueries * kKeys];
    alignas(64) uint32_t weights[kQueries * kTileUnits];  // exponentials of the scores
    float highest[kQueries], total[kQueries], correction[kQueries];
};

#if defined(LINOCUT_TILES)
constexpr size_t kTile = 16;  // rows of a tile, and four-byte columns

// Tiles 0-3: c, two down and two across; 4-5: rows of a; 6-7: units of b.
void begin_products() {
    struct alignas(64) {
        std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
        std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const config;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));  // gcc 12's intrinsic says that it reads eight bytes
}

void end_products() { _tile_release(); }

// c[kRows, 32] = a[kRows, units] b[units, 32] (+ c * correction), rows of a and c at fixed distances; units in 16s.
template <size_t AStride, size_t CStride, bool Accumulate>
inline void tile(const uint32_t* a, const uint32_t* b, size_t units, const float* correction, float* c) {
    if constexpr (Accumulate) {
        for (size_t i = 0; i < kRows; ++i) {
            for (size_t j = 0; j < kPanel; j += kLanes) {
                store(c + i * CStride + j, load<Vec>(c + i * CStride + j) * correction[i]);
            }
        }
    }
    __asm__ volatile("" ::: "memory");  // the intrinsics do not say that they read what was stored until here
    if constexpr (Accumulate) {
        _tile_loadd(0, c, CStride * 4);
        _tile_loadd(1, c + kTile, CStride * 4);
        _tile_loadd(2, c + kTile * CStride, CStride * 4);
        _tile_loadd(3, c + kTile * CStride + kTile, CStride * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (size_t u = 0; u < units; u += kTile) {
        _tile_loadd(6, b + u * kPanel, kPanel * 4);
        _tile_loadd(7, b + u * kPanel + kTile, kPanel * 4);
        _tile_loadd(4, a + u, AStride * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + kTile * AStride + u, AStride * 4);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, CStride * 4);
    _tile_stored(1, c + kTile, CStride * 4);
    _tile_stored(2, c + kTile * CStride, CStride * 4);
    _tile_stored(3, c + kTile * CStride + kTile, CStride * 4);
}
#else
inline void begin_products() {}
inline void end_products() {}

#if defined(LINOCUT_BF16)
inline Vec multiply_add(Vec sum, VecBits a, VecBits b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#else
inline Vec multiply_add(Vec sum, VecBits a, VecBits b) { return fma((Vec)a, (Vec)b, sum); }
#endif

// c[kRows, 32] = a[kRows, units] b[units, 32] (+ c * correction), rows of a and c at fixed distances.
template <size_t AStride, size_t CStride, bool Accumulate>
inline void tile(const uint32_t* a, const uint32_t* b, size_t units, const float* correction, float* c) {
    for (size_t column = 0; column < kPanel; column += kAcross * kLanes) {
        Vec sum[kRows][kAcross];
        for (size_t i = 0; i < kRows; ++i) {
            for (size_t j = 0; j < kAcross; ++j) {
                sum[i][j] = Accumulate ? load<Vec>(c + i * CStride + column + j * kLanes) * correction[i] : Vec{};
            }
        }
        for (size_t u = 0; u < units; ++u) {
            VecBits right[kAcross];
            for (size_t j = 0; j < kAcross; ++j) right[j] = load<VecBits>(b + u * kPanel + column + j * kLanes);
            for (size_t i = 0; i < kRows; ++i) {
                const VecBits left = a[i * AStride + u] - VecBits{};
                for (size_t j = 0; j < kAcross; ++j) sum[i][j] = multiply_add(sum[i][j], left, right[j]);
            }
        }
        for (size_t i = 0; i < kRows; ++i) {
            for (size_t j = 0; j < kAcross; ++j) store(c + i * CStride + column + j * kLanes, sum[i][j]);
        }
    }
}

#endif

inline void store_weights(uint32_t* to, size_t element, Vec v) {
#if defined(LINOCUT_BF16)
    store(to + element / 2, (VecHalf)_mm512_cvtneps_pbh((__m512)v));
#else
    store(to + element, v);
#endif
}

constexpr float kNever = -1e30f;  // the score of a key that a query may not see

// Exponentials of `count` scores (whole panels) of one query, of which the first `seen` count.
inline void softmax(float* scores, size_t count, size_t seen, float* highest, float* total, float* correction,
                    uint32_t* weights) {
    Vec top = splat(*highest);
    for (size_t j = seen; j < count; ++j) scores[j] = kNever;
    for (size_t j = 0; j < count; j += kLanes) top = max(top, load<Vec>(scores + j));
    const float next = largest(top);
    const Vec shift = splat(next);
    Vec added = Vec{};
    for (size_t j = 0; j < count; j += kLanes) {
        const Vec weight = exp2(load<Vec>(scores + j) - shift);
        added += weight;
        store_weights(weights, j, weight);
    }
    const Vec before = exp2(splat(*highest - next));
    *correction = before[0];
    *total = *total * *correction + sum(added);
    *highest = next;
}

void run(const Heads& heads, size_t head, size_t first, size_t count, Mask mask, void* memory, float* out) {
    Scratch& s = *static_cast<Scratch*>(memory);
    const size_t depth = heads.width / kPair, padded_units = heads.padded / kPair;
    const size_t group = head / (heads.heads / heads.kv_heads);
    const uint32_t* q = static_cast<const uint32_t*>(heads.q) + (head * heads.padded + first) * depth;
    const uint32_t* k = static_cast<const uint32_t*>(heads.k) + group * heads.padded * depth;
    const uint32_t* v = static_cast<const uint32_t*>(heads.v) + group * heads.padded * depth;

    const size_t rows = (count + kRows - 1) / kRows * kRows;
    std::memset(s.q, 0, sizeof s.q);
    std::memset(out, 0, rows * kMaxHeadWidth * sizeof(float));
    for (size_t i = 0; i < count; ++i) {
        std::memcpy(s.q + i * kDepth, q + i * depth, depth * 4);
    }
    for (size_t i = 0; i < rows; ++i) {
        s.highest[i] = kNever;
        s.total[i] = 0;
    }

    begin_products();
    size_t end = mask.keys < heads.tokens ? mask.keys : heads.tokens;
    if (mask.causal && first + count < end) end = first + count;
    for (size_t start = 0; start < end; start += kKeys) {
        const size_t wanted = end - start < kKeys ? end - start : kKeys;
        const size_t keys = (wanted + kPanel - 1) / kPanel * kPanel;
        for (size_t panel = 0; panel < keys; panel += kPanel) {
            for (size_t i = 0; i < rows; i += kRows) {
                tile<kDepth, kKeys, false>(s.q + i * kDepth, k + (start + panel) * depth, depth, nullptr,
                                           s.scores + i * kKeys + panel);
            }
        }
        for (size_t i = 0; i < rows; ++i) {
            size_t seen = end;
            if (mask.causal && first + i + 1 < end) seen = first + i + 1;
            seen = seen < start ? 0 : seen - start < keys ? seen - start : keys;
            softmax(s.scores + i * kKeys, keys, seen, s.highest + i, s.total + i, s.correction + i,
                    s.weights + i * kTileUnits);
        }
        for (size_t channel = 0; channel < heads.width; channel += kPanel) {
            for (size_t i = 0; i < rows; i += kRows) {
                tile<kTileUnits, kMaxHeadWidth, true>(
                    s.weights + i * kTileUnits, v + channel * padded_units + start / kPair * kPanel, keys / kPair,
                    s.correction + i, out + i * kMaxHeadWidth + channel);
            }
        }
    }
    end_products();
    for (size_t i = 0; i < count; ++i) {
        const float inverse = 1 / s.total[i];
        for (size_t c = 0; c < heads.width; c += kLanes) {
            store(out + i * kMaxHeadWidth + c, load<Vec>(out + i * kMaxHeadWidth + c) * inverse);
        }
    }
}

constexpr AttentionVariant kVariant = {
    LINOCUT_NAME, LINOCUT_NEEDS, kPair == 2 ? Float::bf16 : Float::f32, kQueries, sizeof(Scratch), run};

}  // namespace

// A pointer, since copying the table would take this file's instructions on whatever CPU asks for it.
const AttentionVariant* LINOCUT_ATTENTION() { return &kVariant; }

}  // namespace linocut
