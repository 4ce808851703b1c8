#include "cpu_features.h"

#include <stdexcept>

#if defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace linocut {

std::vector<std::pair<std::string, bool>> cpu_features() {
#if defined(LINOCUT_X86)
    __builtin_cpu_init();
    // __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
    return {
        {"sse4.2", __builtin_cpu_supports("sse4.2") != 0},
        {"avx", __builtin_cpu_supports("avx") != 0},
        {"avx2", __builtin_cpu_supports("avx2") != 0},
        {"fma", __builtin_cpu_supports("fma") != 0},
        {"avx512f", __builtin_cpu_supports("avx512f") != 0},
        {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
        {"avx512dq", __builtin_cpu_supports("avx512dq") != 0},
        {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
        {"avx512vbmi", __builtin_cpu_supports("avx512vbmi") != 0},
        {"avx512vnni", __builtin_cpu_supports("avx512vnni") != 0},
        {"avx512bf16", __builtin_cpu_supports("avx512bf16") != 0},
    };
#elif defined(__linux__) && defined(__aarch64__)
    const unsigned long caps = getauxval(AT_HWCAP);
    return {{"asimd", (caps & HWCAP_ASIMD) != 0}, {"asimddp", (caps & HWCAP_ASIMDDP) != 0}};
#else
    return {};
#endif
}

namespace {

// The first feature of `needed` that this CPU lacks, as a reason; empty if it has them all.
[[maybe_unused]] std::string lacking(const std::vector<std::string>& needed) {
    const auto features = cpu_features();
    for (const auto& name : needed) {
        bool found = false;
        for (const auto& feature : features) found = found || (feature.first == name && feature.second);
        if (!found) return "this CPU lacks " + name;
    }
    return "";
}

std::vector<Variant> probe() {
    std::vector<Variant> all;
#if defined(LINOCUT_X86)
    all.push_back({"avx512", lacking({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"}), decoders_avx512()});
    all.push_back({"avx2", lacking({"avx2", "fma"}), decoders_avx2()});
#endif
    all.push_back({"baseline", "", decoders_baseline()});
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
