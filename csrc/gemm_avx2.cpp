// The packed product for CPUs with AVX2, whose only product of bytes sums two of them into 16 bits.
#include "gemm_ymm_impl.h"

namespace linocut {
namespace {

struct Dot {
    // Products that a 16-bit lane holds: two a step, of activations up to 127 and weights up to 2, or 30 for affine4.
    template <Encoding E>
    static constexpr size_t kSteps = E == Encoding::affine4 ? 4 : 32;
    static constexpr size_t kRows = 4;  // times two registers of sums, two of weights, four of products

    static void add(__m256i& sum, __m256i weights, __m256i values) {
        const __m256i products = _mm256_maddubs_epi16(weights, values);
        __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(products));
    }
    static __m256i widen(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
};
static_assert(Dot::kSteps<Encoding::ternary> * 2 * 127 * 2 <= 32767, "16-bit sums are exact");
static_assert(Dot::kSteps<Encoding::affine4> * 2 * 127 * 30 <= 32767, "16-bit sums are exact");

constexpr GemmVariant kVariant = {"avx2", "avx2 fma", kColumns, panel_bytes, unpack_unsigned, multiply<Ymm<Dot>>};

}  // namespace

const GemmVariant* gemm_avx2() { return &kVariant; }

}  // namespace linocut
