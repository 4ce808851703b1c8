// The packed product in plain C++: the oracle of the fast variants, which give the same bits, and the way for CPUs that
// none of them knows. A panel holds its rows one after the other as signed bytes, then their scales as floats.
#include <cmath>

#include "gemm.h"
#include "unpack_impl.h"

namespace linocut {
namespace {

constexpr size_t kColumns = 16;

size_t panel_bytes(Encoding e, size_t n) { return kColumns * (n + groups(e, n) * sizeof(float)); }

void unpack(const Packed& w, size_t first, size_t count, void* panel) {
    auto* values = static_cast<uint8_t*>(panel);
    auto* scales = reinterpret_cast<float*>(values + kColumns * w.n);
    const size_t per_row = groups(w.encoding, w.n);
    for (size_t c = 0; c < count; ++c) {
        for (size_t start = 0; start < w.n; start += kBlock) {
            uint8_t block[kBlockRoom];
            const size_t got = unpack_block(w, first + c, start, 0, block);
            std::memcpy(values + c * w.n + start, block, got);
        }
        const uint16_t* halves = w.scales + (first + c) * per_row;
        for (size_t g = 0; g < per_row; ++g) scales[c * per_row + g] = float_of_half(halves[g]);
    }
}

void multiply(const Activations& x, size_t begin, size_t end, Encoding encoding, const void* panel, size_t first,
              size_t count, const Rows& y) {
    const size_t size = group_size(encoding), per_row = groups(encoding, x.n);
    const auto* values = static_cast<const signed char*>(panel);
    const auto* scales = reinterpret_cast<const float*>(values + kColumns * x.n);
    for (size_t t = begin; t < end; ++t) {
        const std::int8_t* row = x.values + t * x.stride;
        const float* steps = x.scales + t * (x.n / kGroup);
        for (size_t c = 0; c < count; ++c) {
            const signed char* weights = values + c * x.n;
            float sum = 0;
            for (size_t g = 0; g < per_row; ++g) {
                std::int32_t dot = 0;
                for (size_t k = g * size; k < (g + 1) * size; ++k) dot += std::int32_t(row[k]) * weights[k];
                sum = std::fma(float(dot), scales[c * per_row + g] * steps[g * size / kGroup], sum);
            }
            if (y.type == Float::f32) store(static_cast<float*>(y.data) + t * y.stride + first + c, sum);
            else store(static_cast<uint16_t*>(y.data) + t * y.stride + first + c, sum);
        }
    }
}

constexpr GemmVariant kVariant = {"generic", "", kColumns, panel_bytes, unpack, multiply};

}  // namespace

const GemmVariant* gemm_generic() { return &kVariant; }

}  // namespace linocut
