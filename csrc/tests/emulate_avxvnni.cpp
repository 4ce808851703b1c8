#include "emulate_avxvnni.h"

#include "check.h"

#if defined(__linux__) && defined(__x86_64__)
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>

namespace linocut {
namespace {

// sum[i] += weights[4i..] (unsigned) . values[4i..] (signed), without saturation.
void dot(std::int32_t* sum, const std::uint8_t* weights, const std::int8_t* values) {
    for (int lane = 0; lane < 8; ++lane) {
        std::uint32_t total = std::uint32_t(sum[lane]);
        for (int i = 4 * lane; i < 4 * lane + 4; ++i) total += std::uint32_t(std::int32_t(weights[i]) * values[i]);
        sum[lane] = std::int32_t(total);
    }
}

// A 256-bit register in a signal frame: its low half lies in the legacy area, its high half 576 bytes from the start.
struct Frame {
    std::uint8_t* state;
    void read(int index, void* to) const {
        std::memcpy(to, state + 160 + 16 * index, 16);
        if (has_high()) std::memcpy(static_cast<char*>(to) + 16, state + 576 + 16 * index, 16);
        else std::memset(static_cast<char*>(to) + 16, 0, 16);
    }
    void write(int index, const void* from) {
        if (!has_high()) std::memset(state + 576, 0, 256), state[512] |= 4;
        std::memcpy(state + 160 + 16 * index, from, 16);
        std::memcpy(state + 576 + 16 * index, static_cast<const char*>(from) + 16, 16);
    }
    bool has_high() const { return (state[512] & 4) != 0; }  // else all high halves are zero and were not saved
};

void handle(int, siginfo_t*, void* context) {
    auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
    auto& place = machine.gregs[REG_RIP];
    const auto* code = reinterpret_cast<const std::uint8_t*>(place);
    // VEX.256.66.0F38.W0 50 /r between registers; X is unused then.
    if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x87) != 5 || code[3] != 0x50 || code[4] < 0xc0) {
        static const char words[] = "illegal instruction, and not vpdpbusd\n";
        if (write(2, words, sizeof words - 1) < 0) _exit(4);
        _exit(4);
    }
    const int target = (~code[1] >> 7 & 1) << 3 | (code[4] >> 3 & 7);
    const int second = (~code[1] >> 5 & 1) << 3 | (code[4] & 7);
    const int first = ~code[2] >> 3 & 15;
    Frame frame{reinterpret_cast<std::uint8_t*>(machine.fpregs)};
    std::int32_t sum[8];
    std::uint8_t weights[32];
    std::int8_t values[32];
    frame.read(target, sum), frame.read(first, weights), frame.read(second, values);
    dot(sum, weights, values);
    frame.write(target, sum);
    place += 5;
}

__attribute__((target("avx512f,avx512vl,avx512vnni")))
void native_dot(std::int32_t* sum, const std::uint8_t* weights, const std::int8_t* values) {
    __m256i total = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sum));
    total = _mm256_dpbusd_epi32(total, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights)),
                                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sum), total);
}

}  // namespace

void emulate_avxvnni() {
    if (!__builtin_cpu_supports("avx2")) fail("AVX-VNNI can be emulated only on a CPU with AVX2");
    const bool native = __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    Random random(5);
    for (int round = 0; native && round < 1000; ++round) {
        std::uint8_t weights[32];
        std::int8_t values[32];
        std::int32_t expected[8], found[8];
        for (auto& each : weights) each = std::uint8_t(random.bits());
        for (auto& each : values) each = std::int8_t(random.bits());
        for (int i = 0; i < 8; ++i) expected[i] = found[i] = std::int32_t(random.bits());
        native_dot(expected, weights, values);
        dot(found, weights, values);
        if (std::memcmp(expected, found, sizeof found) != 0) fail("the emulated vpdpbusd is not the CPU's own");
    }
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO;
    if (sigaction(SIGILL, &action, nullptr) != 0) fail("no handler for illegal instructions");
    std::printf("vpdpbusd of AVX-VNNI is emulated%s\n",
                native ? ", like this CPU's EVEX form in 1000 comparisons" : "");
}

}  // namespace linocut
#else
namespace linocut {
void emulate_avxvnni() { fail("AVX-VNNI can be emulated only by Linux on x86-64"); }
}  // namespace linocut
#endif
