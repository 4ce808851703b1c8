// What this CPU can do, asked once at run time, and which decoders follow from it.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "packed.h"

namespace linocut {

// Instruction sets that matter to kernels here, with whether CPU and operating system support them.
std::vector<std::pair<std::string, bool>> cpu_features();

struct Variant {
    std::string name;
    std::string why_not;  // empty: can run here
    Decoders decoders;
};

// The compiled variants, best first. The last one always can.
const std::vector<Variant>& variants();

// The variant called `name`, or the best one that can run if `name` is empty. Throws std::invalid_argument.
const Variant& variant(const std::string& name);

}  // namespace linocut
