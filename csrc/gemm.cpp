// The driver of the packed product, and the choice between its variants.
#include "gemm.h"

#include <algorithm>
#include <stdexcept>

#include "cpu_features.h"
#include "pool.h"

namespace linocut {
namespace {

// Tokens per task: as many as leave their activations in the cache that the cores share, since every panel reads them
// all; fewer if there are too few panels for the threads. Not too few, for each task unpacks its panel, at the cost of
// some 5-10 tokens.
std::size_t token_step(const Activations& x, std::size_t panels, std::size_t threads) {
    constexpr std::size_t kShared = 6 << 20, kLeast = 256;
    constexpr std::size_t kMultiple = 24;  // so that tiles of 2, 3, 4, 6 and 8 tokens come out even
    const std::size_t for_cache = ceil_div(x.m * x.stride, kShared);
    const std::size_t for_threads = panels >= 4 * threads ? 1 : ceil_div(4 * threads, panels);
    const std::size_t step = ceil_div(x.m, std::max(for_cache, for_threads));
    return std::max(kLeast, ceil_div(step, kMultiple) * kMultiple);
}

std::vector<GemmChoice> probe() {
    const GemmVariant* const built[] = {
#if defined(LINOCUT_X86)
        gemm_avx512vnni(),
#if defined(LINOCUT_AVXVNNI)
        gemm_avxvnni(),
#endif
        gemm_avx2(),
#elif defined(LINOCUT_ARM)
        gemm_neon_i8mm(), gemm_neon_dot(),
#endif
        gemm_generic()};
    std::vector<GemmChoice> all;
    for (const GemmVariant* each : built) all.push_back({each, lacking(each->needs)});
    return all;
}

}  // namespace

const std::vector<GemmChoice>& gemm_variants() {
    static const std::vector<GemmChoice> all = probe();
    return all;
}

const GemmVariant& gemm_variant(const std::string& name) {
    std::string known;
    for (const auto& each : gemm_variants()) {
        if (name.empty() ? each.why_not.empty() : name == each.variant->name) {
            if (each.why_not.empty()) return *each.variant;
            throw std::invalid_argument("the product variant " + name + " cannot run: " + each.why_not);
        }
        known += (known.empty() ? "" : ", ") + std::string(each.variant->name);
    }
    throw std::invalid_argument("there is no product variant called " + name + " (known: " + known + ")");
}

void gemm(const GemmVariant& variant, const Activations& x, const Packed& w, const Rows& y, std::size_t threads) {
    if (x.m == 0 || w.rows == 0) return;
    const std::size_t panels = ceil_div(w.rows, variant.columns);
    const std::size_t step = token_step(x, panels, threads);
    const std::size_t cuts = ceil_div(x.m, step);
    const std::size_t bytes = variant.panel_bytes(w.encoding, w.n);
    const auto task = [&](std::size_t i, std::size_t) {
        const std::size_t first = i % panels * variant.columns, begin = i / panels * step;
        const std::size_t count = std::min(variant.columns, w.rows - first);
        void* const panel = scratch(bytes);
        variant.unpack(w, first, count, panel);
        variant.multiply(x, begin, std::min(x.m, begin + step), w.encoding, panel, first, count, y);
    };
    parallel(threads, panels * cuts, task);
}

}  // namespace linocut
