// The packed product for ARM CPUs with the dot product instructions: sdot adds four products of bytes to a word.
#include "gemm_neon_impl.h"

namespace linocut {
namespace {

struct Kernel {
    static constexpr size_t kRows = 4;  // times four registers of sums, with four of weights and four of activations

    // Four steps of four neighbouring weights by the activations in one lane each.
    template <size_t R, int kLane>
    static void steps(int32x4_t (&sums)[R][4], const int8_t* weights, const int8x16_t (&x)[R]) {
        for (size_t v = 0; v < 4; ++v) {
            const int8x16_t w = vld1q_s8(weights + (kLane * 4 + v) * 16);
            for (size_t r = 0; r < R; ++r) sums[r][v] = vdotq_laneq_s32(sums[r][v], w, x[r], kLane);
        }
        if constexpr (kLane < 3) steps<R, kLane + 1>(sums, weights, x);
    }

    template <Encoding E, size_t R>
    static void tile(const Tile& t) {
        int32x4_t sums[R][4];
        for (size_t r = 0; r < R; ++r) {
            for (size_t v = 0; v < 4; ++v) sums[r][v] = vdupq_n_s32(0);
        }
        const auto* weights = reinterpret_cast<const int8_t*>(t.weights);
        for (size_t k = 0; k < group_size(E); k += 16, weights += 16 * kTileColumns) {
            int8x16_t x[R];
            for (size_t r = 0; r < R; ++r) x[r] = vld1q_s8(t.values + r * t.stride + k);
            steps<R, 0>(sums, weights, x);
        }
        for (size_t r = 0; r < R; ++r) {
            add_group(sums[r], t.scales[r * t.scales_stride], t.weight_scales, t.out + r * kColumns);
        }
    }
};

constexpr GemmVariant kVariant = {"neon-dot", "asimddp", kColumns, panel_bytes, unpack_signed<4>, multiply<Kernel>};

}  // namespace

const GemmVariant* gemm_neon_dot() { return &kVariant; }

}  // namespace linocut
