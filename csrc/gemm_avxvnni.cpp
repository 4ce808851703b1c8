// The packed product for CPUs with AVX-VNNI (the VEX-encoded vpdpbusd of CPUs without AVX-512).
#include "gemm_ymm_impl.h"

namespace linocut {
namespace {

struct Dot {
    template <Encoding E>
    static constexpr size_t kSteps = group_size(E) / 4;
    static constexpr size_t kRows = 6;  // times two registers of sums, two of weights, one of activations

    static void add(__m256i& sum, __m256i weights, __m256i values) {
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(values));
    }
    static __m256i widen(__m256i sum) { return sum; }
};

constexpr GemmVariant kVariant = {"avxvnni", "avxvnni avx2 fma", kColumns, panel_bytes, unpack_unsigned,
                                  multiply<Ymm<Dot>>};

}  // namespace

const GemmVariant* gemm_avxvnni() { return &kVariant; }

}  // namespace linocut
