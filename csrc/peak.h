// How fast a CPU multiplies bytes at all: what `linocut bench kernels` measures the packed product against.
#pragma once

#include <cstddef>
#include <string>

namespace linocut {

// Operations per second (a product and its addition are two) of the instructions that a variant of the packed product
// sums with, on `threads` threads for about `seconds`, all operands in registers. 0 for the generic variant, which
// names no instruction. Throws std::invalid_argument if there is no such variant or this CPU cannot run it.
double int8_peak(const std::string& variant, std::size_t threads, double seconds);

}  // namespace linocut
