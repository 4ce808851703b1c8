#include "cpu_features.h"

#include <algorithm>
#include <stdexcept>

#if defined(LINOCUT_X86)
#include <cpuid.h>
#if defined(LINOCUT_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__APPLE__) && defined(__aarch64__)
#include <sys/sysctl.h>
#endif

namespace linocut {

void quantize_rows_baseline(const Rows&, const Activations&, std::size_t, std::size_t, std::size_t);
#if defined(LINOCUT_X86)
void quantize_rows_avx2(const Rows&, const Activations&, std::size_t, std::size_t, std::size_t);
void quantize_rows_avx512(const Rows&, const Activations&, std::size_t, std::size_t, std::size_t);

namespace {

// CPUID leaf 7.1, EAX bit 4; older compilers do not know the name. Its registers are AVX's, which the caller asks for.
bool has_avxvnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}

#if defined(LINOCUT_AMX)
// CPUID leaf 7.0, EDX: bit 24 is tiles, `product` what they multiply. Linux lets a process use tiles once it has asked: XTILEDATA is 18,
// ARCH_REQ_XCOMP_PERM 0x1023. It grants that to all threads of the process, and refuses where it does not save tiles.
bool has_amx(int product) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 24 & d >> product & 1) == 1 &&
           syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
#endif

}  // namespace
#endif

std::vector<std::pair<std::string, bool>> cpu_features() {
#if defined(LINOCUT_X86)
    __builtin_cpu_init();
    // __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
    return {
        {"sse4.2", __builtin_cpu_supports("sse4.2") != 0},
        {"avx", __builtin_cpu_supports("avx") != 0},
        {"avx2", __builtin_cpu_supports("avx2") != 0},
        {"fma", __builtin_cpu_supports("fma") != 0},
        {"avxvnni", has_avxvnni()},
        {"avx512f", __builtin_cpu_supports("avx512f") != 0},
        {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
        {"avx512dq", __builtin_cpu_supports("avx512dq") != 0},
        {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
        {"avx512vbmi", __builtin_cpu_supports("avx512vbmi") != 0},
        {"avx512vnni", __builtin_cpu_supports("avx512vnni") != 0},
        {"avx512bf16", __builtin_cpu_supports("avx512bf16") != 0},
#if defined(LINOCUT_AMX)
        {"amxbf16", has_amx(22)},
        {"amxint8", has_amx(25)},
#endif
    };
#elif defined(__linux__) && defined(__aarch64__)
    const unsigned long caps = getauxval(AT_HWCAP);
    return {{"asimd", (caps & HWCAP_ASIMD) != 0}, {"asimddp", (caps & HWCAP_ASIMDDP) != 0},
            {"i8mm", (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0}};
#elif defined(__APPLE__) && defined(__aarch64__)
    const auto has = [](const char* name) {
        int value = 0;
        std::size_t size = sizeof value;
        return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
    };
    return {{"asimd", true},
            {"asimddp", has("hw.optional.arm.FEAT_DotProd")},
            {"i8mm", has("hw.optional.arm.FEAT_I8MM")}};
#else
    return {};
#endif
}

std::string lacking(const std::string& needed) {
    static const auto features = cpu_features();
    for (std::size_t start = 0; start < needed.size();) {
        const std::size_t stop = std::min(needed.find(' ', start), needed.size());
        const std::string name = needed.substr(start, stop - start);
        bool found = false;
        for (const auto& feature : features) found = found || (feature.first == name && feature.second);
        if (!found) return (name.compare(0, 3, "amx") == 0 ? "this CPU or its system lacks " : "this CPU lacks ") + name;
        start = stop + 1;
    }
    return "";
}

namespace {

std::vector<Variant> probe() {
    std::vector<Variant> all;
#if defined(LINOCUT_X86)
    all.push_back({"avx512", lacking("avx512f avx512bw avx512dq avx512vl avx2 fma"), decoders_avx512(),
                   quantize_rows_avx512, row_kernels_avx512()});
    all.push_back({"avx2", lacking("avx2 fma"), decoders_avx2(), quantize_rows_avx2, row_kernels_avx2()});
#endif
    all.push_back({"baseline", "", decoders_baseline(), quantize_rows_baseline, row_kernels_baseline()});
    return all;
}

}  // namespace

const std::vector<Variant>& variants() {
    static const std::vector<Variant> all = probe();
    return all;
}

const Variant& variant(const std::string& name) {
    for (const auto& each : variants()) {
        if (name.empty() ? each.why_not.empty() : each.name == name) {
            if (each.why_not.empty()) return each;
            throw std::invalid_argument("decoder variant " + name + " cannot run: " + each.why_not);
        }
    }
    throw std::invalid_argument("there is no decoder variant called " + name);
}

}  // namespace linocut
