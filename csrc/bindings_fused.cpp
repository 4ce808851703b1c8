// Bindings of attention and of the row operations between products.
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "attention.h"
#include "bindings.h"
#include "cpu_features.h"
#include "rows.h"

namespace linocut {
namespace {

// Rows of floats of either type: float32, or int16 for the bits of bfloat16. Contiguous within a row.
using AnyRows = nb::ndarray<nb::ndim<2>, nb::device::cpu>;
using AnyHeads = nb::ndarray<nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = Matrix<const float>;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

template <class Array>
Float type_of(const Array& array, const char* name) {
    if (array.dtype() == nb::dtype<float>()) return Float::f32;
    if (array.dtype() == nb::dtype<std::int16_t>()) return Float::bf16;
    refuse(std::string(name) + " must be float32, or int16 that holds the bits of bfloat16");
}

Rows any_rows(const AnyRows& array, const char* name) {
    const std::size_t rows = array.shape(0), columns = array.shape(1);
    if (columns > 1 && array.stride(1) != 1) refuse(std::string(name) + " must be contiguous within a row");
    if (rows > 1 && array.stride(0) < std::int64_t(columns)) {
        refuse(std::string(name) + " must have rows that do not overlap");
    }
    return {type_of(array, name), rows, columns, rows > 1 ? std::size_t(array.stride(0)) : columns, array.data()};
}

Rows any_rows(const AnyRows& array, const char* name, std::size_t rows, std::size_t columns) {
    expect(array, name, rows, columns);
    return any_rows(array, name);
}

Rows float_rows(const AnyRows& array, const char* name) {
    const Rows rows = any_rows(array, name);
    if (rows.type != Float::f32) refuse(std::string(name) + " must be float32");
    return rows;
}

const float* vector_of(const std::optional<Vector>& array, const char* name, std::size_t length) {
    if (!array) return nullptr;
    if (array->shape(0) != length) {
        refuse(std::string(name) + " must have " + std::to_string(length) + " elements, found " +
               std::to_string(array->shape(0)));
    }
    return array->data();
}

void expect_groups(std::size_t columns) {
    if (columns == 0 || columns % kGroup != 0) {
        refuse("rows are worked on in groups of 128, found " + std::to_string(columns) + " columns");
    }
}

Heads heads_of(const AnyHeads& q, const AnyHeads& k, const AnyHeads& v, std::size_t tokens) {
    const Heads heads{type_of(q, "q"), q.shape(0), k.shape(0),  q.shape(2), tokens,
                      q.shape(1),      q.data(),   k.data(),    v.data()};
    if (type_of(k, "k") != heads.type || type_of(v, "v") != heads.type) refuse("q, k and v must have one dtype");
    if (heads.width == 0 || heads.width > kMaxHeadWidth || heads.width % kPanel != 0) {
        refuse("a head must have 32, 64, 96 or 128 channels, found " + std::to_string(heads.width));
    }
    if (tokens == 0 || heads.padded != padded_tokens(tokens)) {
        refuse(std::to_string(tokens) + " tokens fill " + std::to_string(padded_tokens(tokens)) + " places, found " +
               std::to_string(heads.padded));
    }
    if (heads.kv_heads == 0 || heads.heads % heads.kv_heads != 0) {
        refuse("heads of q must be a multiple of those of k, found " + std::to_string(heads.heads) + " and " +
               std::to_string(heads.kv_heads));
    }
    for (const AnyHeads* each : {&k, &v}) {
        if (each->shape(0) != heads.kv_heads || each->shape(1) != heads.padded || each->shape(2) != heads.width) {
            refuse("k and v must have the same heads, places and channels");
        }
    }
    return heads;
}

Residual residual_of(const AnyRows& x, const std::optional<AnyRows>& y, const std::optional<Vector>& gate) {
    Residual residual{float_rows(x, "x"), {}, nullptr};
    expect_groups(residual.x.columns);
    if (y) residual.y = any_rows(*y, "y", residual.x.rows, residual.x.columns);
    residual.gate = vector_of(gate, "gate", residual.x.columns);
    return residual;
}

void add(const AnyRows& x, const AnyRows& y, const std::optional<Vector>& gate, std::size_t threads,
         const std::string& name) {
    const Residual residual = residual_of(x, y, gate);
    const RowKernels& kernels = *variant(name).rows;
    nb::gil_scoped_release released;
    add_rows(kernels, residual, threads);
}

// What a norm takes, as Python gives it.
Norm norm_of(bool centered, float eps, const Vector& factor, const std::optional<Vector>& shift, std::size_t columns) {
    return {centered, eps, vector_of(factor, "factor", columns), vector_of(shift, "shift", columns)};
}

void normalize(const AnyRows& x, const std::optional<AnyRows>& y, const std::optional<Vector>& gate, bool centered,
               float eps, const Vector& factor, const std::optional<Vector>& shift, const AnyRows& out,
               std::size_t threads, const std::string& name) {
    const Residual residual = residual_of(x, y, gate);
    const Norm norm = norm_of(centered, eps, factor, shift, residual.x.columns);
    const Rows floats = float_rows(out, "out");
    expect(out, "out", residual.x.rows, residual.x.columns);
    const RowKernels& kernels = *variant(name).rows;
    nb::gil_scoped_release released;
    normalize_rows(kernels, residual, norm, {{}, floats}, threads);
}

void normalize_quantize(const AnyRows& x, const std::optional<AnyRows>& y, const std::optional<Vector>& gate,
                        bool centered, float eps, const Vector& factor, const std::optional<Vector>& shift,
                        const Matrix<std::int8_t>& values, const Matrix<float>& scales,
                        const Matrix<std::int32_t>& sums, std::size_t threads, const std::string& name) {
    const Residual residual = residual_of(x, y, gate);
    const Norm norm = norm_of(centered, eps, factor, shift, residual.x.columns);
    const Activations out = activations_of(values, scales, sums, residual.x.columns);
    if (out.m != residual.x.rows) refuse("x and the activations must have the same number of rows");
    const RowKernels& kernels = *variant(name).rows;
    nb::gil_scoped_release released;
    normalize_rows(kernels, residual, norm, {out, {}}, threads);
}

// Columns [first, first + count) of activations of n must exist, in whole groups.
void expect_columns(std::size_t first, std::size_t count, std::size_t n) {
    expect_groups(count);
    if (first % kGroup != 0 || first > n || count > n - first) {
        refuse("columns " + std::to_string(first) + " to " + std::to_string(first + count) +
               " must be whole groups of 128 within " + std::to_string(n));
    }
}

void swiglu(const AnyRows& gate, const AnyRows& value, const Matrix<std::int8_t>& values, const Matrix<float>& scales,
            const Matrix<std::int32_t>& sums, std::size_t n, std::size_t first, std::size_t threads,
            const std::string& name) {
    const Activations out = activations_of(values, scales, sums, n);
    const Rows left = any_rows(gate, "gate", out.m, gate.shape(1));
    const Rows right = any_rows(value, "value", out.m, left.columns);
    expect_columns(first, left.columns, n);
    const RowKernels& kernels = *variant(name).rows;
    nb::gil_scoped_release released;
    swiglu_rows(kernels, left, right, out, first, threads);
}

void arrange(const AnyRows& q, const AnyRows& k, const AnyRows& v, const std::optional<Vector>& q_weight,
             const std::optional<Vector>& k_weight, float eps, const std::optional<Floats>& cos,
             const std::optional<Floats>& sin, bool adjacent, std::size_t first, const AnyHeads& q_out,
             const AnyHeads& k_out, const AnyHeads& v_out, std::size_t tokens, std::size_t threads,
             const std::string& name) {
    const Heads out = heads_of(q_out, k_out, v_out, tokens);
    const std::size_t rows = q.shape(0);
    const std::size_t wide = out.heads * out.width, narrow = out.kv_heads * out.width;
    const Projected from_q{any_rows(q, "q", rows, wide), vector_of(q_weight, "q_weight", out.width), eps};
    const Projected from_k{any_rows(k, "k", rows, narrow), vector_of(k_weight, "k_weight", out.width), eps};
    const Projected from_v{any_rows(v, "v", rows, narrow), nullptr, eps};
    if (first > tokens || rows > tokens - first) {
        refuse("tokens " + std::to_string(first) + " to " + std::to_string(first + rows) + " are beyond the " +
               std::to_string(tokens) + " there are");
    }
    if (cos.has_value() != sin.has_value()) refuse("a rotation takes cos and sin");
    Rotation rotation{adjacent ? Pairing::adjacent : Pairing::halves, nullptr, nullptr};
    if (cos) {
        expect(*cos, "cos", tokens, out.width / 2);
        expect(*sin, "sin", tokens, out.width / 2);
        rotation.cos = cos->data(), rotation.sin = sin->data();
    }
    const RowKernels& kernels = *variant(name).rows;
    nb::gil_scoped_release released;
    arrange_heads(kernels, from_q, from_k, from_v, rotation, first, out, threads);
}

const AttentionVariant& variant_for(const std::string& name, const Heads& heads) {
    const AttentionVariant& chosen = attention_variant(name);
    if (chosen.type != heads.type) refuse(std::string("the attention variant ") + chosen.name + " takes another dtype");
    return chosen;
}

void attend_rows(const AnyHeads& q, const AnyHeads& k, const AnyHeads& v, std::size_t tokens, std::size_t keys,
                 bool causal, const AnyRows& out, std::size_t threads, const std::string& name) {
    const Heads heads = heads_of(q, k, v, tokens);
    const AttentionVariant& chosen = variant_for(name, heads);
    expect(out, "out", tokens, heads.heads * heads.width);
    const Rows rows = float_rows(out, "out");
    if (keys == 0) refuse("queries need at least one key");
    nb::gil_scoped_release released;
    attend(chosen, heads, {keys, causal}, rows, threads);
}

void attend_quantize(const AnyHeads& q, const AnyHeads& k, const AnyHeads& v, std::size_t tokens, std::size_t keys,
                     bool causal, const Matrix<std::int8_t>& values, const Matrix<float>& scales,
                     const Matrix<std::int32_t>& sums, std::size_t n, std::size_t threads, const std::string& name) {
    const Heads heads = heads_of(q, k, v, tokens);
    const AttentionVariant& chosen = variant_for(name, heads);
    const Activations out = activations_of(values, scales, sums, n);
    if (heads.width != kGroup) refuse("a head is quantized as one group of 128, found " + std::to_string(heads.width));
    if (out.m != tokens) refuse("tokens and rows of the activations must be the same number");
    expect_columns(0, heads.heads * heads.width, n);
    if (keys == 0) refuse("queries need at least one key");
    nb::gil_scoped_release released;
    attend(chosen, heads, {keys, causal}, out, threads);
}

std::vector<std::tuple<std::string, std::string, std::string>> reasons() {
    std::vector<std::tuple<std::string, std::string, std::string>> all;
    for (const auto& each : attention_variants()) {
        all.emplace_back(each.variant->name, each.variant->needs, each.why_not);
    }
    return all;
}

std::string dtype_of(const std::string& name) {
    return attention_variant(name).type == Float::bf16 ? "bfloat16" : "float32";
}

}  // namespace

void bind_fused(nb::module_& m) {
    // A silent copy would take the output elsewhere.
    const auto exact = [](const char* name) { return nb::arg(name).noconvert(); };
    const auto maybe = [](const char* name) { return nb::arg(name).noconvert().none(); };
    const auto best = nb::arg("variant") = "";
    m.attr("PANEL") = kPanel;
    m.def("attention_variants", &reasons,
          "[(variant of attention, instruction sets it needs, '' or why it cannot run here)], best first.");
    m.def("attention_dtype", &dtype_of, nb::arg("variant") = "", "What a variant takes: bfloat16 or float32.");
    m.def("add_rows", &add, exact("x"), exact("y"), maybe("gate"), nb::arg("threads"), best, "x += gate * y.");
    m.def("normalize", &normalize, exact("x"), maybe("y"), maybe("gate"), nb::arg("centered"), nb::arg("eps"),
          exact("factor"), maybe("shift"), exact("out"), nb::arg("threads"), best,
          "x += gate * y, then the norm of x into float32 rows.");
    m.def("normalize_quantize", &normalize_quantize, exact("x"), maybe("y"), maybe("gate"), nb::arg("centered"),
          nb::arg("eps"), exact("factor"), maybe("shift"), exact("values"), exact("scales"), exact("sums"),
          nb::arg("threads"), best, "x += gate * y, then the norm of x into activations.");
    m.def("swiglu", &swiglu, exact("gate"), exact("value"), exact("values"), exact("scales"), exact("sums"),
          nb::arg("n"), nb::arg("first"), nb::arg("threads"), best,
          "silu(gate) * value into columns [first, first + columns) of activations [m, n].");
    m.def("arrange_heads", &arrange, exact("q"), exact("k"), exact("v"), maybe("q_weight"), maybe("k_weight"),
          nb::arg("eps"), maybe("cos"), maybe("sin"), nb::arg("adjacent"), nb::arg("first"), exact("q_out"),
          exact("k_out"), exact("v_out"), nb::arg("tokens"), nb::arg("threads"), best,
          "Norm, rotate and lay out rows of q, k, v as tokens first.. of attention's operands.");
    m.def("attend", &attend_rows, exact("q"), exact("k"), exact("v"), nb::arg("tokens"), nb::arg("keys"),
          nb::arg("causal"), exact("out"), nb::arg("threads"), best,
          "Attention into float32 rows [tokens, heads * width].");
    m.def("attend_quantize", &attend_quantize, exact("q"), exact("k"), exact("v"), nb::arg("tokens"), nb::arg("keys"),
          nb::arg("causal"), exact("values"), exact("scales"), exact("sums"), nb::arg("n"), nb::arg("threads"), best,
          "Attention into the first columns of activations [tokens, n].");
}

}  // namespace linocut
