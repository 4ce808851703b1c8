// What the checks of kernels_test.cpp share: random numbers, memory that ends at a page nobody may touch, and a report.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../packed.h"

namespace linocut {

// Numbers that are the same on every machine for a seed (xorshift64*).
class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
    std::uint32_t bits() {
        state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
        return std::uint32_t(state_ * 0x2545f4914f6cdd1du >> 32);
    }
    std::size_t below(std::size_t limit) { return bits() % limit; }
    std::size_t between(std::size_t least, std::size_t most) { return least + below(most - least + 1); }
    float uniform() { return float(bits() >> 8) * 0x1p-23f - 1.0f; }  // [-1, 1)
private:
    std::uint64_t state_;
};

// `count` values whose end is the end of a page, or up to kAlign - 1 bytes before it; reading or writing on ends the
// program, and so does going back to before the page in which they start.
template <class T, std::size_t kAlign = alignof(T)>
class Guarded {
public:
    explicit Guarded(std::size_t count) : count_(count) {
        const std::size_t page = std::size_t(sysconf(_SC_PAGESIZE)), bytes = count * sizeof(T);
        const std::size_t room = ceil_div(bytes, page) * page;
        size_ = room + 2 * page;
        void* const mapped = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) std::perror("mmap"), std::abort();
        base_ = static_cast<std::uint8_t*>(mapped);
        if (mprotect(base_, page, PROT_NONE) != 0 || mprotect(base_ + page + room, page, PROT_NONE) != 0) {
            std::perror("mprotect"), std::abort();
        }
        data_ = reinterpret_cast<T*>(base_ + page + (room - bytes) / kAlign * kAlign);
    }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;
    ~Guarded() { munmap(base_, size_); }
    T* data() { return data_; }
    std::size_t size() const { return count_; }
    T& operator[](std::size_t i) { return data_[i]; }
    T* begin() { return data_; }
    T* end() { return data_ + count_; }
    void fill_bytes(int byte) { std::memset(static_cast<void*>(data_), byte, count_ * sizeof(T)); }
    template <class F>
    void fill(F&& f) { for (T& each : *this) each = T(f()); }

private:
    std::size_t count_, size_;
    std::uint8_t* base_;
    T* data_;
};

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::fputs("FAILED: ", stderr);
    std::vfprintf(stderr, format, arguments);
    std::fputs("\n", stderr);
    va_end(arguments);
    std::exit(1);
}

inline bool same_bits(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0 || (a != a && b != b); }

// An independent FP16 to float, by arithmetic.
inline float value_of_half(std::uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float magnitude = exponent == 31  ? (fraction ? __builtin_nanf("") : __builtin_inff())
                            : exponent == 0 ? __builtin_ldexpf(float(fraction), -24)
                                            : __builtin_ldexpf(float(1024 + fraction), exponent - 25);
    return half & 0x8000 ? -magnitude : magnitude;
}

inline float float_of_bfloat(std::uint16_t bits) {
    const std::uint32_t wide = std::uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// To nearest, ties to even; every NaN becomes one and the same.
inline std::uint16_t bfloat_of_float(float value) {
    if (value != value) return 0x7fc0;
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const std::uint32_t low = bits & 0xffff, high = bits >> 16;
    return std::uint16_t(high + (low > 0x8000 || (low == 0x8000 && (high & 1))));
}

// How to run one of the checks.
struct Plan {
    std::uint64_t seed = 1;
    std::size_t random_cases = 0;  // on top of the fixed ones
    bool emulate_avxvnni = false;
    bool fork = true;  // emulators and the thread sanitizer do not follow threads into a child process
};

// The line for one variant, in words that tests/kernels/test_native_program.py reads.
inline void report(const char* kind, const std::string& name, const std::string& why_not, std::size_t cases) {
    if (cases != 0) std::printf("%s %s: %zu cases agree\n", kind, name.c_str(), cases);
    else std::printf("%s %s: not run, %s\n", kind, name.c_str(), why_not.c_str());
}

// Each prints a line per variant, and ends the program at the first difference.
void check_decoders(const Plan&);
void check_quantizers(const Plan&);
void check_products(const Plan&);
void check_rows(const Plan&);
void check_attention(const Plan&);
void check_pool(const Plan&);

}  // namespace linocut
