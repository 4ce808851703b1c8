// The tile of gemm_tile_impl.h in 256-bit registers: weights as unsigned bytes, activations as signed ones. `Dot` is
// the instruction set's sum of products: add() to sums of at most kSteps steps, which widen() makes ones of 32 bits. It
// names the register to add to in an asm statement, without which gcc 12 copies every sum twice a step.
#pragma once

#include <immintrin.h>

#include "gemm_tile_impl.h"

namespace linocut {
namespace {

// Four neighbouring activations in each lane.
inline __m256i broadcast(const int8_t* x) {
    int32_t word;
    std::memcpy(&word, x, sizeof word);
    return _mm256_set1_epi32(word);
}

template <class Dot>
struct Ymm {
    static constexpr size_t kRows = Dot::kRows;

    // Not inlined: in the middle of multiply_tokens compilers run out of registers.
    template <Encoding E, size_t R>
    __attribute__((noinline)) static void tile(const Tile& t) {
        constexpr size_t kSteps = group_size(E) / 4, kShort = Dot::template kSteps<E>;
        static_assert(kSteps % kShort == 0, "a group is made of whole runs");
        const uint8_t* weights = t.weights;
        const int8_t* values = t.values;
        __m256i total[R][2];
        for (size_t step = 0; step < kSteps; step += kShort) {
            __m256i sum[R][2];
            for (size_t r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
            for (size_t k = 0; k < kShort; ++k, weights += 4 * kTileColumns, values += 4) {
                const __m256i low = _mm256_load_si256(reinterpret_cast<const __m256i*>(weights));
                const __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(weights + 32));
#pragma GCC unroll 8
                for (size_t r = 0; r < R; ++r) {
                    const __m256i x = broadcast(values + r * t.stride);
                    Dot::add(sum[r][0], low, x);
                    Dot::add(sum[r][1], high, x);
                }
            }
#pragma GCC unroll 8
            for (size_t r = 0; r < R; ++r) {
                for (size_t h = 0; h < 2; ++h) {
                    const __m256i wide = Dot::widen(sum[r][h]);
                    total[r][h] = step == 0 ? wide : _mm256_add_epi32(total[r][h], wide);
                }
            }
        }
        const __m256 low = _mm256_load_ps(t.weight_scales), high = _mm256_load_ps(t.weight_scales + 8);
#pragma GCC unroll 8
        for (size_t r = 0; r < R; ++r) {
            int32_t x_sum = t.sums[r * t.sums_stride];
            if (group_size(E) == 128) x_sum += t.sums[r * t.sums_stride + 1];
            const __m256i excess = _mm256_set1_epi32(unsigned_offset(E) * x_sum);
            const __m256 step = _mm256_broadcast_ss(t.scales + r * t.scales_stride);
            float* const out = t.out + r * kColumns;
            const __m256 first = _mm256_cvtepi32_ps(_mm256_sub_epi32(total[r][0], excess));
            const __m256 second = _mm256_cvtepi32_ps(_mm256_sub_epi32(total[r][1], excess));
            _mm256_store_ps(out, _mm256_fmadd_ps(first, _mm256_mul_ps(low, step), _mm256_load_ps(out)));
            _mm256_store_ps(out + 8, _mm256_fmadd_ps(second, _mm256_mul_ps(high, step), _mm256_load_ps(out + 8)));
        }
    }
};

// order_bytes<4>, 32 weights of eight rows at once: a transposed 8 x 8 matrix of words.
void order_words(const uint8_t (*rows)[kBlockRoom], size_t start, size_t count, uint8_t* out) {
    for (size_t k = start; k < start + count; k += 32) {
        __m256i row[8], pair[8], quad[8];
        for (size_t r = 0; r < 8; ++r) row[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[r] + k));
        for (size_t r = 0; r < 8; r += 2) {
            pair[r] = _mm256_unpacklo_epi32(row[r], row[r + 1]);
            pair[r + 1] = _mm256_unpackhi_epi32(row[r], row[r + 1]);
        }
        for (size_t r = 0; r < 8; r += 4) {
            for (size_t i = 0; i < 2; ++i) {
                quad[r + 2 * i] = _mm256_unpacklo_epi64(pair[r + i], pair[r + i + 2]);
                quad[r + 2 * i + 1] = _mm256_unpackhi_epi64(pair[r + i], pair[r + i + 2]);
            }
        }
        for (size_t i = 0; i < 4; ++i) {
            auto* const low = reinterpret_cast<__m256i*>(out + i * 4 * kTileColumns);
            auto* const high = reinterpret_cast<__m256i*>(out + (i + 4) * 4 * kTileColumns);
            _mm256_storeu_si256(low, _mm256_permute2x128_si256(quad[i], quad[i + 4], 0x20));
            _mm256_storeu_si256(high, _mm256_permute2x128_si256(quad[i], quad[i + 4], 0x31));
        }
        out += 32 * kTileColumns;
    }
}

void unpack_unsigned(const Packed& w, size_t first, size_t count, void* panel) {
    unpack_panel<4>(w, first, count, unsigned_offset(w.encoding), order_words, panel);
}

}  // namespace
}  // namespace linocut
