// Every kernel that was compiled and can run here against scalar oracles, on shapes that are awkward or random, in
// memory that ends at forbidden pages; without Python, so that it also runs under sanitizers and emulators.
//
//   kernels_test [--random CASES] include <cstdio>
#include <cstdlib>
#include <string>

#include "../attention.h"
#include "../cpu_features.h"
#include "../gemm.h"
#include "../peak.h"
#include "check.h"
#include "emulate_avxvnni.h"

using namespace linocut;

int main(int count, char** words) {
    Plan plan;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        const bool more = i + 1 < count;
        if (word == "--emulate-avxvnni") plan.emulate_avxvnni = true;
        else if (word == "--no-fork") plan.fork = false;
        else if (word == "--random" && more) plan.random_cases = std::strtoull(words[++i], nullptr, 10);
        else if (word == "--seed" && more) plan.seed = std::strtoull(words[++i], nullptr, 10);
        else return std::fprintf(stderr, "%s: unknown option %s\n", words[0], words[i]), 2;
    }
    if (plan.emulate_avxvnni) emulate_avxvnni();
    std::printf("chosen: decoder %s, attention %s, product %s\n", variant("").name.c_str(), attention_variant("").name,
                gemm_variant("").name);
    check_decoders(plan);
    check_quantizers(plan);
    check_products(plan);
    check_rows(plan);
    check_attention(plan);
    check_pool(plan);
    for (const auto& each : gemm_variants()) {
        if (!each.why_not.empty() || plan.emulate_avxvnni) continue;
        const bool positive = int8_peak(each.variant->name, 2, 0.001) > 0;
        if (positive != (each.variant != gemm_generic())) fail("the peak of %s", each.variant->name);
    }
    std::puts("all kernels agree with their oracles");
    return 0;
}
