// Rows of floats to activations; quantize_*.cpp define LINOCUT_QUANTIZE_ROWS and include this file.
#include "quantize_impl.h"

namespace linocut {

void LINOCUT_QUANTIZE_ROWS(const Rows& x, const Activations& out, std::size_t first, std::size_t begin,
                           std::size_t end) {
    for (size_t row = begin; row < end; ++row) {
        if (x.type == Float::f32) {
            quantize_row(static_cast<const float*>(x.data) + row * x.stride, x.columns, out, row, first);
        } else {
            quantize_row(static_cast<const uint16_t*>(x.data) + row * x.stride, x.columns, out, row, first);
        }
    }
}

}  // namespace linocut
