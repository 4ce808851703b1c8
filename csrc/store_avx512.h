// Sixteen results into a row of float32 or of bfloat16, those that are wanted.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace linocut {
namespace {

// The first `count` of sixteen, or all.
inline __mmask16 wanted16(std::size_t count) { return __mmask16(count >= 16 ? 0xffff : (1u << count) - 1); }

inline void store16(float* out, __mmask16 wanted, __m512 value) { _mm512_mask_storeu_ps(out, wanted, value); }

// As scalar_impl.h rounds: to nearest even, any NaN to one.
inline void store16(std::uint16_t* out, __mmask16 wanted, __m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i high = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16(out, wanted, _mm512_cvtepi32_epi16(high));
}

}  // namespace
}  // namespace linocut
