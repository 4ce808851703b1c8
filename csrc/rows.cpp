// The row kernels spread over threads.
#include "rows.h"

#include <algorithm>

#include "pool.h"

namespace linocut {
namespace {

constexpr std::size_t kFloats = 1 << 15;  // of a task: some 20 us, worth waking a thread

// f(begin, end) over `rows` of `columns`.
template <class F>
void over_rows(std::size_t rows, std::size_t columns, std::size_t threads, F&& f) {
    const std::size_t step = std::max<std::size_t>(1, kFloats / std::max<std::size_t>(1, columns));
    parallel(threads, ceil_div(rows, step), [&](std::size_t i, std::size_t) {
        f(i * step, std::min(rows, (i + 1) * step));
    });
}

}  // namespace

void add_rows(const RowKernels& kernels, const Residual& r, std::size_t threads) {
    over_rows(r.x.rows, r.x.columns, threads, [&](std::size_t begin, std::size_t end) { kernels.add(r, begin, end); });
}

void normalize_rows(const RowKernels& kernels, const Residual& r, const Norm& norm, const Normalized& out,
                    std::size_t threads) {
    over_rows(r.x.rows, r.x.columns, threads,
              [&](std::size_t begin, std::size_t end) { kernels.normalize(r, norm, out, begin, end); });
}

void swiglu_rows(const RowKernels& kernels, const Rows& gate, const Rows& value, const Activations& out,
                 std::size_t first, std::size_t threads) {
    over_rows(gate.rows, gate.columns, threads,
              [&](std::size_t begin, std::size_t end) { kernels.swiglu(gate, value, out, first, begin, end); });
}

void arrange_heads(const RowKernels& kernels, const Projected& q, const Projected& k, const Projected& v,
                   const Rotation& rotation, std::size_t first, const Heads& out, std::size_t threads) {
    // Tasks start at panels, so that no two threads write to one cache line of k or v.
    const std::size_t tokens = q.rows.rows, heads = out.heads + 2 * out.kv_heads, skew = first % kPanel;
    const std::size_t panels = ceil_div(skew + tokens, kPanel);
    parallel(threads, panels * heads, [&](std::size_t i, std::size_t) {
        const std::size_t panel = i / heads * kPanel, head = i % heads;
        const std::size_t begin = panel > skew ? panel - skew : 0, end = std::min(tokens, panel + kPanel - skew);
        const bool is_q = head < out.heads, is_k = !is_q && head < out.heads + out.kv_heads;
        const std::size_t number = is_q ? head : is_k ? head - out.heads : head - out.heads - out.kv_heads;
        kernels.arrange(is_q ? q : is_k ? k : v, is_q ? Operand::q : is_k ? Operand::k : Operand::v, number, rotation,
                        first, out, begin, end);
    });
}

}  // namespace linocut
