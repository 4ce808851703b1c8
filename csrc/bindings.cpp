// The module, and the bindings of decoders and oracle; bindings_*.cpp hold the others (see bindings.h).
#include "bindings.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "cpu_features.h"

namespace linocut {

Encoding encoding_of(const std::string& name) {
    if (name == "binary") return Encoding::binary;
    if (name == "ternary") return Encoding::ternary;
    if (name == "affine4") return Encoding::affine4;
    if (name == "int8") return Encoding::int8;
    throw std::invalid_argument("encoding must be binary, ternary, affine4 or int8, not " + name);
}

Packed packed_of(const Codes& codes, const Halves& scales, const std::optional<Codes>& zeros, const std::string& name,
                 std::size_t n) {
    const Encoding encoding = encoding_of(name);
    const std::size_t rows = codes.shape(0);
    if (n == 0 || n % group_size(encoding) != 0) {
        throw std::invalid_argument("in-features must be a positive multiple of " +
                                    std::to_string(group_size(encoding)) + ", found " + std::to_string(n));
    }
    expect(codes, "codes", rows, row_bytes(encoding, n));
    expect(scales, "scales", rows, groups(encoding, n));
    if ((encoding == Encoding::affine4) != zeros.has_value()) {
        throw std::invalid_argument("zeros belong to affine4 weights, and to no other");
    }
    if (zeros) expect(*zeros, "zeros", rows, zero_bytes(encoding, n));
    return {encoding, rows, n, codes.data(), reinterpret_cast<const std::uint16_t*>(scales.data()),
            zeros ? zeros->data() : nullptr};
}

namespace {

constexpr int kInterface = 4;  // kernels/native.py refuses a module with another number

void decode_f32(const Codes& codes, const Halves& scales, const std::optional<Codes>& zeros,
                const std::string& encoding, std::size_t n, const Matrix<float>& out, const std::string& name) {
    const Packed weight = packed_of(codes, scales, zeros, encoding, n);
    expect(out, "out", weight.rows, n);
    const auto decode = variant(name).decoders->f32;
    float* target = out.data();
    nb::gil_scoped_release released;
    decode(weight, target);
}

void decode_bf16(const Codes& codes, const Halves& scales, const std::optional<Codes>& zeros,
                 const std::string& encoding, std::size_t n, const Matrix<std::int16_t>& out,
                 const std::string& name) {
    const Packed weight = packed_of(codes, scales, zeros, encoding, n);
    expect(out, "out", weight.rows, n);
    const auto decode = variant(name).decoders->bf16;
    auto* target = reinterpret_cast<std::uint16_t*>(out.data());
    nb::gil_scoped_release released;
    decode(weight, target);
}

void linear(const Matrix<const float>& x, const Codes& codes, const Halves& scales, const std::optional<Codes>& zeros,
            const std::string& encoding, const Matrix<float>& y) {
    const std::size_t m = x.shape(0);
    const Packed weight = packed_of(codes, scales, zeros, encoding, x.shape(1));
    expect(y, "y", weight.rows, m);
    const float* input = x.data();
    float* target = y.data();
    nb::gil_scoped_release released;
    linear_generic(weight, input, m, target);
}

std::string build_info() {
    std::string info;
#if defined(__clang__)
    info = "clang " __clang_version__;
#elif defined(__GNUC__)
    info = "gcc " __VERSION__;
#else
    info = "unknown compiler";
#endif
#if defined(Py_LIMITED_API)
    info += ", stable ABI";
#endif
    return info;
}

std::vector<std::pair<std::string, std::string>> variant_reasons() {
    std::vector<std::pair<std::string, std::string>> all;
    for (const auto& each : variants()) all.emplace_back(each.name, each.why_not);
    return all;
}

}  // namespace
}  // namespace linocut

NB_MODULE(_native, m) {
    using namespace linocut;
    m.doc() = "linocut's C++ kernels; use them through linocut.kernels.";
    m.attr("INTERFACE") = kInterface;
    m.def("build_info", &build_info, "Compiler and ABI of this build.");
    m.def("cpu_features", &cpu_features, "[(instruction set, supported here)].");
    m.def("variants", &variant_reasons, "[(decoder variant, '' or why it cannot run here)], best first.");
    m.def("row_bytes", [](const std::string& e, std::size_t n) { return row_bytes(encoding_of(e), n); },
          nb::arg("encoding"), nb::arg("n"), "Bytes of the codes of one row.");
    // noconvert: a silent copy would take the output elsewhere.
    m.def("decode", &decode_f32, nb::arg("codes").noconvert(), nb::arg("scales").noconvert(),
          nb::arg("zeros").noconvert().none(), nb::arg("encoding"), nb::arg("n"), nb::arg("out").noconvert(),
          nb::arg("variant") = "", "Write float32 W[rows, n] into out.");
    m.def("decode", &decode_bf16, nb::arg("codes").noconvert(), nb::arg("scales").noconvert(),
          nb::arg("zeros").noconvert().none(), nb::arg("encoding"), nb::arg("n"), nb::arg("out").noconvert(),
          nb::arg("variant") = "", "Write bfloat16 W[rows, n], as int16 bits, into out.");
    m.def("linear", &linear, nb::arg("x").noconvert(), nb::arg("codes").noconvert(), nb::arg("scales").noconvert(),
          nb::arg("zeros").noconvert().none(), nb::arg("encoding"), nb::arg("y").noconvert(),
          "Write y[rows, m] = W @ x[m, n]^T, float64 sums, into y.");
    bind_gemm(m);
    bind_fused(m);
}
