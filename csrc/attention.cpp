// Attention spread over threads by (head, block of queries), and the choice between its variants.
#include "attention.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cpu_features.h"
#include "pool.h"

namespace linocut {
namespace {

std::vector<AttentionChoice> probe() {
    std::vector<const AttentionVariant*> compiled;
#if defined(LINOCUT_AMX)
    compiled.push_back(attention_amx());
#endif
#if defined(LINOCUT_X86)
    compiled.insert(compiled.end(), {attention_avx512bf16(), attention_avx512(), attention_avx2()});
#endif
    compiled.push_back(attention_baseline());
    std::vector<AttentionChoice> all;
    for (const auto* each : compiled) all.push_back({each, lacking(each->needs)});
    return all;
}

// What comes out of a task: rows [first, first + count) of columns [head * width, + width).
void write(const float* tile, std::size_t head, std::size_t width, std::size_t first, std::size_t count,
           const Rows& out) {
    float* to = static_cast<float*>(out.data) + first * out.stride + head * width;
    for (std::size_t i = 0; i < count; ++i, to += out.stride, tile += kMaxHeadWidth) {
        std::memcpy(to, tile, width * sizeof(float));
    }
}

void write(const float* tile, std::size_t head, std::size_t width, std::size_t first, std::size_t count,
           const Activations& out) {
    const Rows rows{Float::f32, count, width, kMaxHeadWidth, const_cast<float*>(tile)};
    const Activations part{count, out.n, out.stride, out.values + first * out.stride,
                           out.scales + first * (out.n / kGroup), out.sums + first * (out.n / 64)};
    variant("").quantize_rows(rows, part, head * width, 0, count);
}

template <class Out>
void attend_into(const AttentionVariant& variant, const Heads& heads, Mask mask, const Out& out, std::size_t threads) {
    const std::size_t step = variant.queries_per_task, blocks = ceil_div(heads.tokens, step);
    const std::size_t tile_bytes = step * kMaxHeadWidth * sizeof(float);
    const auto task = [&](std::size_t i, std::size_t) {
        const std::size_t head = i / blocks, first = i % blocks * step;
        const std::size_t count = std::min(step, heads.tokens - first);
        float* const tile = static_cast<float*>(scratch(tile_bytes + variant.scratch_bytes));
        variant.run(heads, head, first, count, mask, tile + step * kMaxHeadWidth, tile);
        write(tile, head, heads.width, first, count, out);
    };
    parallel(threads, heads.heads * blocks, task);
}

}  // namespace

const std::vector<AttentionChoice>& attention_variants() {
    static const std::vector<AttentionChoice> all = probe();
    return all;
}

const AttentionVariant& attention_variant(const std::string& name) {
    std::string known;
    for (const auto& each : attention_variants()) {
        if (name.empty() ? each.why_not.empty() : name == each.variant->name) {
            if (each.why_not.empty()) return *each.variant;
            throw std::invalid_argument("the attention variant " + name + " cannot run: " + each.why_not);
        }
        known += (known.empty() ? "" : ", ") + std::string(each.variant->name);
    }
    throw std::invalid_argument("there is no attention variant called " + name + " (known: " + known + ")");
}

void attend(const AttentionVariant& variant, const Heads& heads, Mask mask, const Rows& out, std::size_t threads) {
    attend_into(variant, heads, mask, out, threads);
}

void attend(const AttentionVariant& variant, const Heads& heads, Mask mask, const Activations& out,
            std::size_t threads) {
    attend_into(variant, heads, mask, out, threads);
}

}  // namespace linocut
