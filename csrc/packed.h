// The packed layout, version 1, as C++ sees it; docs/format.md is the normative text and formats/packed.py its other
// implementation (a test compares the numbers of the two). Raw pointers only: nothing here knows of Python or torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace linocut {

constexpr std::size_t kGroup = 128;        // weights that share a scale
constexpr std::size_t kAffineGroup = 64;   // the same for affine4
constexpr std::size_t kBlock = 640;        // ternary weights of a full block
constexpr std::size_t kBlockBytes = 128;   // its bytes, which is also the length of one of its five planes
constexpr std::size_t kTrits = 5;          // ternary weights in a byte

static_assert(kBlock == kBlockBytes * kTrits, "a full ternary block has five planes of one byte column each");
static_assert(kBlockBytes == kGroup, "a plane of a full block is exactly one group: the decoder relies on it");
static_assert(243 <= 256, "five trits fit a byte");

enum class Encoding { binary, ternary, affine4, int8 };

constexpr std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

constexpr std::size_t group_size(Encoding e) { return e == Encoding::affine4 ? kAffineGroup : kGroup; }
constexpr std::size_t groups(Encoding e, std::size_t n) { return n / group_size(e); }
constexpr std::size_t zero_bytes(Encoding e, std::size_t n) {
    return e == Encoding::affine4 ? ceil_div(groups(e, n), 2) : 0;
}
constexpr std::size_t row_bytes(Encoding e, std::size_t n) {
    return e == Encoding::binary    ? n / 8
           : e == Encoding::affine4 ? n / 2
           : e == Encoding::int8    ? n
                                    : n / kBlock * kBlockBytes + ceil_div(n % kBlock, kTrits);
}

static_assert(row_bytes(Encoding::ternary, 3072) == 615, "format.md");
static_assert(row_bytes(Encoding::ternary, 9216) == 1844, "format.md");
static_assert(row_bytes(Encoding::ternary, 12288) == 2458, "format.md");

// One packed weight, or some rows of one: W[rows, n]. All rows are contiguous and `codes` need no alignment; nothing
// outside rows * row_bytes, rows * groups and rows * zero_bytes is ever read. n is a multiple of the group size.
struct Packed {
    Encoding encoding;
    std::size_t rows, n;
    const std::uint8_t* codes;
    const std::uint16_t* scales;  // FP16 bits
    const std::uint8_t* zeros;    // affine4 only, else null
};

// Writes W[rows, n]. Total for any bytes: each value of codes, scales and zeros decodes to something.
using DecodeF32 = void (*)(const Packed&, float* out);
using DecodeBF16 = void (*)(const Packed&, std::uint16_t* out);

struct Decoders {
    DecodeF32 f32;
    DecodeBF16 bf16;
};

// One table per instruction set; all are compiled from decode_impl.h and give the same bits.
const Decoders* decoders_baseline();
#if defined(LINOCUT_X86)
const Decoders* decoders_avx2();
const Decoders* decoders_avx512();
#endif

// y[rows, m] = W[rows, n] @ x[m, n]^T with float64 sums, one weight after the other: the oracle.
void linear_generic(const Packed& w, const float* x, std::size_t m, float* y);

}  // namespace linocut
