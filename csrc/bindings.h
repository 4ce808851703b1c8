// What the bindings share. They are the only files that know Python: each function checks every shape before a pointer
// is taken, then releases the GIL. FP16 and BF16 arrays come in as int16: their bits, which need no half-precision type
// on either side.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "activations.h"
#include "packed.h"

namespace nb = nanobind;

namespace linocut {

template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Codes = Matrix<const std::uint8_t>;
using Halves = Matrix<const std::int16_t>;

// Throws std::invalid_argument, which Python sees as ValueError, unless `array` has this shape.
template <class M>
void expect(const M& array, const char* name, std::size_t rows, std::size_t columns) {
    if (array.shape(0) == rows && array.shape(1) == columns) return;
    throw std::invalid_argument(std::string(name) + " must have shape [" + std::to_string(rows) + ", " +
                                std::to_string(columns) + "], found [" + std::to_string(array.shape(0)) + ", " +
                                std::to_string(array.shape(1)) + "]");
}

Encoding encoding_of(const std::string& name);

// The checked view of a packed weight [rows of codes, n].
Packed packed_of(const Codes& codes, const Halves& scales, const std::optional<Codes>& zeros, const std::string& name,
                 std::size_t n);

// The checked view of activations [m, n]: values int8 [m, activation_stride(n)], scales [m, n / 128], sums [m, n / 64].
Activations activations_of(const Matrix<std::int8_t>& values, const Matrix<float>& scales,
                           const Matrix<std::int32_t>& sums, std::size_t n);

void bind_gemm(nb::module_& m);
void bind_fused(nb::module_& m);

}  // namespace linocut
