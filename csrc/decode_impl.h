// The decoders, written as plain loops that compilers turn into vector code, and compiled once per instruction set
// (decode_*.cpp define LINOCUT_DECODERS and include this file).
//
// Why it is fast: codes are planar. Byte j of a full ternary block holds the weights j, 128+j, ... 512+j, so digit i of
// 128 consecutive bytes is 128 consecutive weights, all of one group: a multiply, a compare, one scale, straight stores.
#include "scalar_impl.h"

namespace linocut {
namespace {

// out[j] = values[j] * scale for values of -1, 0 and +1.
inline void expand(const signed char* values, size_t count, float scale, float* out) {
    for (size_t j = 0; j < count; ++j) out[j] = float(values[j]) * scale;
}

// The same with one rounding for all: rounding is symmetric, so a value only picks the sign or the zero.
inline void expand(const signed char* values, size_t count, float scale, uint16_t* out) {
    uint16_t pattern;
    store(&pattern, scale);
    for (size_t j = 0; j < count; ++j) {
        const uint16_t value = uint16_t(short(values[j]));
        const uint16_t keep = uint16_t(-(value & 1));
        out[j] = uint16_t((pattern & keep) ^ (value & 0x8000u));
    }
}

template <class Out>
void ternary_row(const uint8_t* codes, const uint16_t* scales, size_t n, Out* out) {
    const size_t full = n / kBlock;
    for (size_t block = 0; block < full; ++block, codes += kBlockBytes) {
        for (size_t plane = 0; plane < kTrits; ++plane, out += kBlockBytes) {
            const float scale = float_of_half(*scales++);
            // A local copy of the plane's digits: the first loop stays in eight-bit lanes, the second one widens.
            signed char digits[kBlockBytes];
            const uint8_t power = kPower[plane];
            for (size_t j = 0; j < kBlockBytes; ++j) digits[j] = static_cast<signed char>(digit(codes[j], power) - 1);
            expand(digits, kBlockBytes, scale, out);
        }
    }
    const size_t rest = n % kBlock;
    if (rest == 0) return;
    const size_t stride = ceil_div(rest, kTrits);
    signed char digits[kBlock + kTrits];  // the last plane may run up to four weights past the row's end
    for (size_t plane = 0; plane < kTrits; ++plane) {
        for (size_t j = 0; j < stride; ++j) {
            digits[plane * stride + j] = static_cast<signed char>(digit(codes[j], kPower[plane]) - 1);
        }
    }
    for (size_t group = 0; group < rest / kGroup; ++group) {
        expand(digits + group * kGroup, kGroup, float_of_half(scales[group]), out + group * kGroup);
    }
}

// Eight weights of one byte as eight bytes of -1 or +1, in memory order.
inline void binary_byte(uint8_t byte, signed char* values) {
    constexpr uint64_t kOnes = 0x0101010101010101u;
    const uint64_t bits = spread_bits(byte);
    const uint64_t signs = bits + (kOnes - bits) * 0xffu;  // 1 or 255, that is -1; no carries
    std::memcpy(values, &signs, sizeof signs);
}

template <class Out>
void binary_row(const uint8_t* codes, const uint16_t* scales, size_t n, Out* out) {
    for (size_t group = 0; group < n / kGroup; ++group, codes += kGroup / 8, out += kGroup) {
        signed char values[kGroup];
        for (size_t i = 0; i < kGroup / 8; ++i) binary_byte(codes[i], values + 8 * i);
        expand(values, kGroup, float_of_half(scales[group]), out);
    }
}

template <class Out>
void affine4_row(const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, size_t n, Out* out) {
    for (size_t group = 0; group < n / kAffineGroup; ++group, codes += kAffineGroup / 2, out += kAffineGroup) {
        const float scale = float_of_half(scales[group]);
        const int zero = zeros[group / 2] >> (group % 2 * 4) & 15;
        signed char values[kAffineGroup];
        for (size_t i = 0; i < kAffineGroup / 2; ++i) {
            values[2 * i] = static_cast<signed char>((codes[i] & 15) - zero);
            values[2 * i + 1] = static_cast<signed char>((codes[i] >> 4) - zero);
        }
        for (size_t i = 0; i < kAffineGroup; ++i) store(out + i, float(values[i]) * scale);
    }
}

template <class Out>
void int8_row(const uint8_t* codes, const uint16_t* scales, size_t n, Out* out) {
    for (size_t group = 0; group < n / kGroup; ++group, codes += kGroup, out += kGroup) {
        const float scale = float_of_half(scales[group]);
        for (size_t i = 0; i < kGroup; ++i) store(out + i, float(static_cast<signed char>(codes[i])) * scale);
    }
}

template <class Out>
void decode(const Packed& w, Out* out) {
    const size_t bytes = row_bytes(w.encoding, w.n);
    const size_t per_row = groups(w.encoding, w.n);
    const size_t zeros = zero_bytes(w.encoding, w.n);
    for (size_t row = 0; row < w.rows; ++row, out += w.n) {
        const uint8_t* codes = w.codes + row * bytes;
        const uint16_t* scales = w.scales + row * per_row;
        switch (w.encoding) {
            case Encoding::binary: binary_row(codes, scales, w.n, out); break;
            case Encoding::ternary: ternary_row(codes, scales, w.n, out); break;
            case Encoding::affine4: affine4_row(codes, scales, w.zeros + row * zeros, w.n, out); break;
            case Encoding::int8: int8_row(codes, scales, w.n, out); break;
        }
    }
}

constexpr Decoders kDecoders = {decode<float>, decode<uint16_t>};

}  // namespace

const Decoders* LINOCUT_DECODERS() { return &kDecoders; }

}  // namespace linocut
