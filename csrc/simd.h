// One register of floats and the few operations on it that plain C++ has no word for, per instruction set. Included by
// files that are compiled once per set, so all of it is in an anonymous namespace: an inline function compiled for
// AVX-512 must not become the copy that the linker keeps. +, -, * and comparisons are the compiler's own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace linocut {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t VecInt __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t VecBits __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t VecHalf __attribute__((vector_size(2 * kLanes)));
typedef std::int8_t VecByte __attribute__((vector_size(kLanes)));

template <class V>
inline V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V>
inline void store(void* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

inline Vec splat(float value) { return value - Vec{}; }
inline VecBits bits(Vec v) { return (VecBits)v; }

// a * b + c, rounded once where the CPU can.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// b if either is a NaN.
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

// To the nearest integer, ties to even. Values beyond an int32 give any number.
inline VecInt to_int(Vec v) {
#if defined(__AVX512F__)
    return (VecInt)_mm512_maskz_cvtps_epi32(0xffff, (__m512)v);  // without a mask gcc 12 warns of its own header
#elif defined(__AVX2__)
    return (VecInt)_mm256_cvtps_epi32((__m256)v);
#elif defined(__SSE2__)
    return (VecInt)_mm_cvtps_epi32((__m128)v);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (VecInt)vcvtnq_s32_f32((float32x4_t)v);
#else
    VecInt result;
    for (int i = 0; i < kLanes; ++i) result[i] = std::int32_t(__builtin_rintf(v[i]));
    return result;
#endif
}

inline Vec to_float(VecInt v) { return __builtin_convertvector(v, Vec); }

template <class V>
inline auto sum(V v) {
    auto total = v[0];
    for (int i = 1; i < kLanes; ++i) total += v[i];
    return total;
}

template <class V>
inline auto largest(V v) {
    auto found = v[0];
    for (int i = 1; i < kLanes; ++i) found = v[i] > found ? v[i] : found;
    return found;
}

// 2^x to 2e-7 relative for x in [-126, 127], and 2^-126 below.
inline Vec exp2(Vec x) {
    x = max(splat(-126.0f), x);  // in this order a NaN stays one
    const VecInt whole = to_int(x);
    const Vec f = x - to_float(whole);  // in [-0.5, 0.5]
    // The polynomial of least relative error, but exact at 0.
    Vec p = splat(0.0013276472f);
    p = fma(p, f, splat(0.0096755415f));
    p = fma(p, f, splat(0.0555071327f));
    p = fma(p, f, splat(0.2402211972f));
    p = fma(p, f, splat(0.6931469671f));
    p = fma(p, f, splat(1.0f));
    return p * (Vec)((whole + 127) << 23);
}

inline Vec load_bf16(const std::uint16_t* from) {
    return (Vec)(__builtin_convertvector(load<VecHalf>(from), VecBits) << 16);
}

// Rounded to nearest, ties to even. A NaN with all its low bits set would overflow; processors make none such.
inline VecHalf to_bf16(Vec v) {
    const VecBits b = bits(v);
    return __builtin_convertvector((b + 0x7fffu + ((b >> 16) & 1u)) >> 16, VecHalf);
}

}  // namespace
}  // namespace linocut
