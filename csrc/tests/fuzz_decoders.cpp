// Random bytes through every decoder and the scalar product, in heap blocks of exactly the right size. Built with
// -fsanitize=address,undefined by tests/kernels/test_sanitizers.py: one byte too far, or one undefined shift, ends it.
#include <cstdio>
#include <random>
#include <vector>

#include "../cpu_features.h"

using namespace linocut;

int main() {
    std::mt19937 random(7);
    std::uniform_int_distribution<int> byte(0, 255), half(0, 65535);
    std::size_t decoded = 0;
    for (Encoding encoding : {Encoding::binary, Encoding::ternary, Encoding::affine4}) {
        for (std::size_t n = kGroup; n <= 2 * kBlock + kGroup; n += kGroup) {
            for (std::size_t rows : {1, 3}) {
                std::vector<std::uint8_t> codes(rows * row_bytes(encoding, n)), zeros(rows * zero_bytes(encoding, n));
                std::vector<std::uint16_t> scales(rows * groups(encoding, n));
                for (auto& each : codes) each = std::uint8_t(byte(random));
                for (auto& each : zeros) each = std::uint8_t(byte(random));
                for (auto& each : scales) each = std::uint16_t(half(random));  // NaN, infinite and negative ones too
                const Packed weight{encoding, rows, n, codes.data(), scales.data(), zeros.empty() ? nullptr : zeros.data()};
                for (const auto& each : variants()) {
                    if (!each.why_not.empty()) continue;
                    std::vector<float> out(rows * n);
                    std::vector<std::uint16_t> out16(rows * n);
                    each.decoders.f32(weight, out.data());
                    each.decoders.bf16(weight, out16.data());
                    decoded += out.size() + out16.size();
                }
                const std::vector<float> x(2 * n, 1.0f);
                std::vector<float> y(2 * rows);
                linear_generic(weight, x.data(), 2, y.data());
            }
        }
    }
    std::printf("decoded %zu weights cleanly\n", decoded);
    return 0;
}
