// The driver of the packed product, and the choice between its variants.
#include "gemm.h"

#include <algorithm>
#include <stdexcept>

#include "cpu_features.h"
#include "pool.h"

namespace linocut {
namespace {

// Tokens per task. All of them, so that a panel is unpacked once, unless that leaves threads without work.
std::size_t token_step(std::size_t m, std::size_t panels, std::size_t threads) {
    constexpr std::size_t kLeast = 256;  // unpacking costs as much as multiplying some 5-10 tokens
    const std::size_t cuts = panels >= 4 * threads ? 1 : ceil_div(4 * threads, std::max<std::size_t>(panels, 1));
    return std::max(kLeast, ceil_div(m, cuts));
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
    const std::size_t step = token_step(x.m, panels, threads);
    const std::size_t cuts = ceil_div(x.m, step);
    const std::size_t bytes = variant.panel_bytes(w.encoding, w.n);
    const auto task = [&](std::size_t i, std::size_t) {
        const std::size_t first = i / cuts * variant.columns, begin = i % cuts * step;
        const std::size_t count = std::min(variant.columns, w.rows - first);
        void* const panel = scratch(bytes);
        variant.unpack(w, first, count, panel);
        variant.multiply(x, begin, std::min(x.m, begin + step), w.encoding, panel, first, count, y);
    };
    parallel(threads, panels * cuts, task);
}

}  // namespace linocut
