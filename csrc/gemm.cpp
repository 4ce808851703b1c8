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

// How many of all panels a task holds, at most `most`: the slowest thread shall do least, then panels be together most.
std::size_t panels_of_a_task(std::size_t panels, std::size_t most, std::size_t threads) {
    std::size_t best = 1, least = ceil_div(panels, threads);
    for (std::size_t count = 2; count <= std::min(most, ceil_div(panels, 4 * threads)); ++count) {
        const std::size_t slowest = ceil_div(ceil_div(panels, count), threads) * count;
        if (slowest * 20 <= least * 21) best = count, least = std::min(least, slowest);
    }
    return best;
}

std::vector<GemmChoice> probe() {
    const GemmVariant* const built[] = {
#if defined(LINOCUT_X86)
#if defined(LINOCUT_AMX)
        gemm_amx(),
#endif
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
    if (w.encoding == Encoding::int8) throw std::invalid_argument("int8 weights have no packed product; decode them");
    if (x.m == 0 || w.rows == 0) return;
    constexpr std::size_t kVisit = 64;  // tokens that meet one panel of several after the other
    const std::size_t panels = ceil_div(w.rows, variant.columns);
    const std::size_t bytes = ceil_div(variant.panel_bytes(w.encoding, w.n), 64) * 64;
    const std::size_t several = panels_of_a_task(panels, variant.held / bytes, threads);
    const std::size_t step = several > 1 ? x.m : token_step(x, panels, threads);
    const std::size_t visit = several > 1 ? kVisit : step;
    const std::size_t tasks = ceil_div(panels, several), cuts = ceil_div(x.m, step);
    const auto task = [&](std::size_t i, std::size_t) {
        const std::size_t first = i % tasks * several, last = std::min(panels, first + several);
        const std::size_t begin = i / tasks * step, end = std::min(x.m, begin + step);
        auto* const memory = static_cast<std::uint8_t*>(scratch(several * bytes));
        const auto panel = [&](std::size_t p) { return memory + (p - first) * bytes; };
        const auto row = [&](std::size_t p) { return p * variant.columns; };
        const auto rows = [&](std::size_t p) { return std::min(variant.columns, w.rows - row(p)); };
        for (std::size_t p = first; p < last; ++p) variant.unpack(w, row(p), rows(p), panel(p));
        for (std::size_t t = begin; t < end; t += visit) {
            for (std::size_t p = first; p < last; ++p) {
                variant.multiply(x, t, std::min(end, t + visit), w.encoding, panel(p), row(p), rows(p), y);
            }
        }
    };
    parallel(threads, tasks * cuts, task);
}

}  // namespace linocut
