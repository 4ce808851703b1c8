// The packed product for ARM CPUs with the matrix instructions for bytes: smmla multiplies eight bytes of two tokens by
// those of two columns, which gives four sums.
#include "gemm_neon_impl.h"

namespace linocut {
namespace {

struct Kernel {
    static constexpr size_t kRows = 4;  // two pairs, times eight registers of sums

    template <Encoding E, size_t R>
    static void tile(const Tile& t) {
        constexpr size_t kPairs = ceil_div(R, 2);
        int32x4_t sums[kPairs][8];  // [token 0: column 0, 1; token 1: column 0, 1] of each pair of columns
        for (size_t p = 0; p < kPairs; ++p) {
            for (size_t v = 0; v < 8; ++v) sums[p][v] = vdupq_n_s32(0);
        }
        const auto* weights = reinterpret_cast<const int8_t*>(t.weights);
        for (size_t k = 0; k < group_size(E); k += 8, weights += 8 * kTileColumns) {
            int8x16_t x[kPairs];
            for (size_t p = 0; p < kPairs; ++p) {
                // An odd last token is its own neighbour, whose sums nobody reads.
                const size_t second = 2 * p + 1 < R ? 2 * p + 1 : 2 * p;
                x[p] = vcombine_s8(vld1_s8(t.values + 2 * p * t.stride + k), vld1_s8(t.values + second * t.stride + k));
            }
            for (size_t v = 0; v < 8; ++v) {
                const int8x16_t w = vld1q_s8(weights + 16 * v);
                for (size_t p = 0; p < kPairs; ++p) sums[p][v] = vmmlaq_s32(sums[p][v], x[p], w);
            }
        }
        for (size_t r = 0; r < R; ++r) {
            int32x4_t row[4];
            for (size_t v = 0; v < 4; ++v) {
                const int32x4_t low = sums[r / 2][2 * v], high = sums[r / 2][2 * v + 1];
                row[v] = r % 2 == 0 ? vcombine_s32(vget_low_s32(low), vget_low_s32(high))
                                    : vcombine_s32(vget_high_s32(low), vget_high_s32(high));
            }
            add_group(row, t.scales[r * t.scales_stride], t.weight_scales, t.out + r * kColumns);
        }
    }
};

constexpr GemmVariant kVariant = {"neon-i8mm", "i8mm", kColumns, panel_bytes, unpack_signed<8>, multiply<Kernel>};

}  // namespace

const GemmVariant* gemm_neon_i8mm() { return &kVariant; }

}  // namespace linocut
