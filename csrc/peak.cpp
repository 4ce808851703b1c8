#include "peak.h"

#include <atomic>
#include <chrono>

#include "gemm.h"
#include "pool.h"

namespace linocut {
namespace {

// One round adds to each of the registers that follow, so that no sum waits for itself. The loops are written out in
// assembly: a compiler would see that nobody reads the sums.
struct Peak {
    const char* variant;
    void (*run)(std::size_t rounds);
    double operations;  // of one round
};

#if defined(LINOCUT_X86)

__attribute__((target("avx512f"))) void zmm_dot(std::size_t rounds) {
    __asm__ volatile(
        "1:\n"
        ".irp r, 8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
        "vpdpbusd %%zmm0, %%zmm1, %%zmm\\r\n"
        ".endr\n"
        "dec %0\n"
        "jnz 1b\n"
        : "+r"(rounds)
        :
        : "xmm0", "xmm1", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17",
          "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29",
          "xmm30", "xmm31");
}

#if defined(LINOCUT_AMX)
void tile_dot(std::size_t rounds) {
    struct alignas(64) {
        std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
        std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const config;
    __asm__ volatile(
        "ldtilecfg %1\n"
        "1:\n"
        ".irp r, 0,1,2,3,4,5\n"
        "tdpbssd %%tmm7, %%tmm6, %%tmm\\r\n"
        ".endr\n"
        "dec %0\n"
        "jnz 1b\n"
        "tilerelease\n"
        : "+r"(rounds)
        : "m"(config));
}
#endif

#define LINOCUT_YMM_CLOBBERS \
    "xmm0", "xmm1", "xmm2", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", \
    "xmm14", "xmm15"

#if defined(LINOCUT_AVXVNNI)
__attribute__((target("avx2"))) void ymm_dot(std::size_t rounds) {
    __asm__ volatile(
        "1:\n"
        ".irp r, 4,5,6,7,8,9,10,11,12,13,14,15\n"
        "%{vex%} vpdpbusd %%ymm0, %%ymm1, %%ymm\\r\n"
        ".endr\n"
        "dec %0\n"
        "jnz 1b\n"
        : "+r"(rounds)
        :
        : LINOCUT_YMM_CLOBBERS);
}
#endif

// Products of pairs, added up in 16 bits; that these must be widened now and then is not counted.
__attribute__((target("avx2"))) void ymm_pairs(std::size_t rounds) {
    __asm__ volatile(
        "1:\n"
        ".irp r, 4,5,6,7,8,9,10,11,12,13,14,15\n"
        "vpmaddubsw %%ymm0, %%ymm1, %%ymm2\n"
        "vpaddw %%ymm2, %%ymm\\r, %%ymm\\r\n"
        ".endr\n"
        "dec %0\n"
        "jnz 1b\n"
        : "+r"(rounds)
        :
        : LINOCUT_YMM_CLOBBERS);
}

constexpr Peak kPeaks[] = {
#if defined(LINOCUT_AMX)
    {"amx", tile_dot, 6 * 2.0 * 16 * 16 * 64},
#endif
    {"avx512vnni", zmm_dot, 24 * 128.0},
#if defined(LINOCUT_AVXVNNI)
    {"avxvnni", ymm_dot, 12 * 64.0},
#endif
    {"avx2", ymm_pairs, 12 * 64.0},
};

#elif defined(LINOCUT_ARM)

#define LINOCUT_NEON_LOOP(instruction)                                                                         \
    __asm__ volatile(                                                                                          \
        "1:\n"                                                                                                 \
        ".irp r, 8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"                      \
        instruction " v\\r\\().4s, v0.16b, v1.16b\n"                                                           \
        ".endr\n"                                                                                              \
        "subs %0, %0, #1\n"                                                                                    \
        "b.ne 1b\n"                                                                                            \
        : "+r"(rounds)                                                                                         \
        :                                                                                                      \
        : "cc", "v0", "v1", "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15", "v16", "v17", "v18", "v19",  \
          "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30", "v31")

__attribute__((target("arch=armv8.2-a+dotprod"))) void neon_dot(std::size_t rounds) { LINOCUT_NEON_LOOP("sdot"); }
__attribute__((target("arch=armv8.2-a+i8mm"))) void neon_matrix(std::size_t rounds) { LINOCUT_NEON_LOOP("smmla"); }

constexpr Peak kPeaks[] = {{"neon-i8mm", neon_matrix, 24 * 64.0}, {"neon-dot", neon_dot, 24 * 32.0}};

#else

constexpr Peak kPeaks[] = {{"", nullptr, 0}};

#endif

}  // namespace

double int8_peak(const std::string& variant, std::size_t threads, double seconds) {
    using Clock = std::chrono::steady_clock;
    const std::string name = gemm_variant(variant).name;  // throws if it cannot run
    for (const Peak& peak : kPeaks) {
        if (name != peak.variant) continue;
        constexpr std::size_t kRounds = 10000;  // some tens of microseconds
        const auto start = Clock::now();
        const auto end = start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
        std::atomic<std::size_t> chunks{0};
        parallel(threads, threads, [&](std::size_t, std::size_t) {
            do {
                peak.run(kRounds);
                ++chunks;
            } while (Clock::now() < end);
        });
        const double elapsed = std::chrono::duration<double>(Clock::now() - start).count();
        return double(chunks) * kRounds * peak.operations / elapsed;
    }
    return 0;
}

}  // namespace linocut
