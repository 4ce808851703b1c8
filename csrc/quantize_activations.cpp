// Activations of a whole matrix: rows spread over threads, each quantized by the best instruction set that is here.
#include <algorithm>

#include "cpu_features.h"
#include "gemm.h"
#include "pool.h"

namespace linocut {

void quantize_activations(const Rows& x, const Activations& out, std::size_t first, std::size_t threads) {
    const auto quantize_rows = variant("").quantize_rows;
    // A row of klein takes some 2 us: a few of them are worth waking a thread.
    const std::size_t step = std::max<std::size_t>(1, (1 << 15) / std::max<std::size_t>(1, x.columns));
    const std::size_t parts = ceil_div(out.m, step);
    const auto part = [&](std::size_t i, std::size_t) {
        quantize_rows(x, out, first, i * step, std::min(out.m, (i + 1) * step));
    };
    parallel(threads, parts, part);
}

}  // namespace linocut
