// Bindings of the packed product and of what quantizes its activations.
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "bindings.h"
#include "gemm.h"
#include "peak.h"

namespace linocut {

Activations activations_of(const Matrix<std::int8_t>& values, const Matrix<float>& scales,
                           const Matrix<std::int32_t>& sums, std::size_t n) {
    const std::size_t m = values.shape(0);
    if (n == 0 || n % kGroup != 0) {
        throw std::invalid_argument("n must be a positive multiple of 128, found " + std::to_string(n));
    }
    expect(values, "values", m, activation_stride(n));
    expect(scales, "scales", m, n / kGroup);
    expect(sums, "sums", m, n / 64);
    return {m, n, values.shape(1), values.data(), scales.data(), sums.data()};
}

namespace {

// Rows of floats (float32, or int16 for the bits of bfloat16), contiguous within a row.
template <class T>
using Strided = nb::ndarray<T, nb::ndim<2>, nb::device::cpu>;

template <class T>
Rows rows_of(const Strided<T>& array, const char* name, std::size_t m, std::size_t columns) {
    expect(array, name, m, columns);
    if (array.size() != 0 && columns > 1 && array.stride(1) != 1) {
        throw std::invalid_argument(std::string(name) + " must be contiguous within a row");
    }
    if (m > 1 && array.stride(0) < std::int64_t(columns)) {
        throw std::invalid_argument(std::string(name) + " must have rows that do not overlap");
    }
    const auto type = sizeof(T) == 4 ? Float::f32 : Float::bf16;
    const std::size_t stride = m > 1 ? std::size_t(array.stride(0)) : columns;
    return {type, m, columns, stride, const_cast<std::remove_const_t<T>*>(array.data())};
}

template <class T>
void quantize(const Strided<const T>& x, const Matrix<std::int8_t>& values, const Matrix<float>& scales,
              const Matrix<std::int32_t>& sums, std::size_t n, std::size_t first, std::size_t threads) {
    const Activations out = activations_of(values, scales, sums, n);
    const Rows rows = rows_of(x, "x", out.m, x.shape(1));
    if (rows.columns % kGroup != 0 || first % kGroup != 0 || first > n || rows.columns > n - first) {
        throw std::invalid_argument("x must fill whole groups of 128 within the activations, found columns " +
                                    std::to_string(first) + " to " + std::to_string(first + rows.columns) + " of " +
                                    std::to_string(n));
    }
    nb::gil_scoped_release released;
    quantize_activations(rows, out, first, threads);
}

template <class T>
void product(const Matrix<std::int8_t>& values, const Matrix<float>& activation_scales,
             const Matrix<std::int32_t>& sums, const Codes& codes, const Halves& scales,
             const std::optional<Codes>& zeros, const std::string& encoding, std::size_t n, const Strided<T>& y,
             std::size_t threads, const std::string& name) {
    const Activations x = activations_of(values, activation_scales, sums, n);
    const Packed weight = packed_of(codes, scales, zeros, encoding, n);
    const Rows out = rows_of(y, "y", x.m, weight.rows);
    const GemmVariant& variant = gemm_variant(name);
    nb::gil_scoped_release released;
    gemm(variant, x, weight, out, threads);
}

std::vector<std::tuple<std::string, std::string, std::string>> reasons() {
    std::vector<std::tuple<std::string, std::string, std::string>> all;
    for (const auto& each : gemm_variants()) all.emplace_back(each.variant->name, each.variant->needs, each.why_not);
    return all;
}

template <class T>
void bind_type(nb::module_& m) {
    // noconvert: a silent copy would take the output elsewhere.
    m.def("quantize_activations", &quantize<T>, nb::arg("x").noconvert(), nb::arg("values").noconvert(),
          nb::arg("scales").noconvert(), nb::arg("sums").noconvert(), nb::arg("n"), nb::arg("first"),
          nb::arg("threads"), "Quantize x[m, columns] into columns [first, first + columns) of activations [m, n].");
    m.def("gemm", &product<T>, nb::arg("values").noconvert(), nb::arg("activation_scales").noconvert(),
          nb::arg("sums").noconvert(), nb::arg("codes").noconvert(), nb::arg("scales").noconvert(),
          nb::arg("zeros").noconvert().none(), nb::arg("encoding"), nb::arg("n"), nb::arg("y").noconvert(),
          nb::arg("threads"), nb::arg("variant") = "", "Write y[m, rows] = x @ W^T for activations x and packed W.");
}

}  // namespace

void bind_gemm(nb::module_& m) {
    m.attr("ACTIVATION_PADDING") = activation_stride(0);
    m.def("gemm_variants", &reasons,
          "[(variant of the packed product, instruction sets it needs, '' or why it cannot run here)], best first.");
    m.def("int8_peak", &int8_peak, nb::arg("variant"), nb::arg("threads"), nb::arg("seconds"),
          nb::call_guard<nb::gil_scoped_release>(),
          "Operations per second of a variant's instructions on registers alone; 0 for the generic variant.");
    bind_type<float>(m);
    bind_type<std::int16_t>(m);
}

}  // namespace linocut
