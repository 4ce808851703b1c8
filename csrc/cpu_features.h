// What this CPU can do, asked once at run time, and which builds of the row kernels follow from it.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "activations.h"
#include "packed.h"
#include "rows.h"

namespace linocut {

// Instruction sets that matter to kernels here, with whether CPU and operating system support them.
std::vector<std::pair<std::string, bool>> cpu_features();

// The first instruction set of `needed`, a list with spaces, that this CPU lacks, as a reason; empty if it has all.
std::string lacking(const std::string& needed);

// The kernels that are written as plain loops and compiled once per instruction set.
struct Variant {
    std::string name;
    std::string why_not;  // empty: can run here
    const Decoders* decoders;
    // Rows [begin, end) of x into columns [first, first + x.columns) of `out`: see quantize_activations in gemm.h.
    void (*quantize_rows)(const Rows& x, const Activations& out, std::size_t first, std::size_t begin, std::size_t end);
    const RowKernels* rows;
};

// The compiled variants, best first. The last one always can.
const std::vector<Variant>& variants();

// The variant called `name`, or the best one that can run if `name` is empty. Throws std::invalid_argument.
const Variant& variant(const std::string& name);

}  // namespace linocut
