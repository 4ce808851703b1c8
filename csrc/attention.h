// softmax(q k^T) v for many heads, without ever writing the scores of more than a few queries ("flash"): a block of
// queries meets the keys a tile after the other, with a running maximum and sum.
//
// Tiles of keys are always the same and come in the same order, so a result does not depend on the number of threads.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "activations.h"

namespace linocut {

constexpr std::size_t kPanel = 32;          // keys, or channels of v, that stand side by side
constexpr std::size_t kMaxHeadWidth = 128;  // channels of a head: 32, 64, 96 or 128

// Queries, keys and values as the kernel reads them; `padded` is `tokens` rounded up to a whole panel. A unit is one
// float32 or a pair of bfloat16, that is four bytes. q must be scaled by log2(e) / sqrt(width): exponentials are of
// base 2. Heads of q share those of k and v in equal groups (heads / kv_heads each).
struct Heads {
    Float type;
    std::size_t heads, kv_heads, width, tokens, padded;
    void* q;  // [heads, padded, width]
    void* k;  // [kv_heads, padded / 32, units of width, 32 keys]: a unit pairs neighbouring channels of one key
    void* v;  // [kv_heads, width / 32, units of padded, 32 channels]: a unit pairs neighbouring keys of one channel
};

constexpr std::size_t padded_tokens(std::size_t tokens) { return (tokens + kPanel - 1) / kPanel * kPanel; }

// Which keys a query may see: those below `keys`, and if `causal` none after its own place.
struct Mask {
    std::size_t keys;
    bool causal;
};

// One task: the queries [first, first + count) of one head, count <= queries_per_task, into rows of 128 floats.
struct AttentionVariant {
    const char* name;
    const char* needs;  // instruction sets
    Float type;
    std::size_t queries_per_task;
    std::size_t scratch_bytes;
    // out[i * kMaxHeadWidth + channel] for query first + i. scratch is 64-byte aligned.
    void (*run)(const Heads&, std::size_t head, std::size_t first, std::size_t count, Mask, void* scratch, float* out);
};

const AttentionVariant* attention_baseline();
#if defined(LINOCUT_X86)
const AttentionVariant* attention_avx2();
const AttentionVariant* attention_avx512();
const AttentionVariant* attention_avx512bf16();
const AttentionVariant* attention_amx();
#endif

struct AttentionChoice {
    const AttentionVariant* variant;
    std::string why_not;  // empty: can run here
};

// All compiled variants, best first. The last one always can.
const std::vector<AttentionChoice>& attention_variants();
// The variant called `name`, or the best one that can run if `name` is empty. Throws std::invalid_argument.
const AttentionVariant& attention_variant(const std::string& name);

// All heads side by side, [tokens, heads * width]: into float32 rows, or quantized into the first columns of `out`, for
// which a head must be as wide as a group (128). heads.type must be the variant's.
void attend(const AttentionVariant&, const Heads&, Mask, const Rows& out, std::size_t threads);
void attend(const AttentionVariant&, const Heads&, Mask, const Activations& out, std::size_t threads);

}  // namespace linocut
