// What the tiles of gemm_tile_impl.h in NEON registers share: weights and activations are signed bytes, and a row of a
// tile's integer sums is four registers.
#pragma once

#include <arm_neon.h>

#include "gemm_tile_impl.h"

namespace linocut {
namespace {

// Adds the sums of one token and one group to the token's 16 floats.
inline void add_group(const int32x4_t (&sums)[4], float step, const float* weight_scales, float* out) {
    for (size_t v = 0; v < 4; ++v) {
        const float32x4_t scales = vmulq_n_f32(vld1q_f32(weight_scales + 4 * v), step);
        vst1q_f32(out + 4 * v, vfmaq_f32(vld1q_f32(out + 4 * v), vcvtq_f32_s32(sums[v]), scales));
    }
}

template <size_t kUnit>
void unpack_signed(const Packed& w, size_t first, size_t count, void* panel) {
    unpack_panel<kUnit>(w, first, count, 0, order_bytes<kUnit>, panel);
}

}  // namespace
}  // namespace linocut
