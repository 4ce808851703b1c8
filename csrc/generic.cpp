// The scalar product that every faster kernel is compared with: independent of any BLAS, sums in float64.
#include <vector>

#include "packed.h"

namespace linocut {

void linear_generic(const Packed& w, const float* x, std::size_t m, float* y) {
    const auto decode = decoders_baseline()->f32;
    std::vector<float> row(w.n);
    Packed one = w;
    one.rows = 1;
    for (std::size_t o = 0; o < w.rows; ++o) {
        decode(one, row.data());
        one.codes += row_bytes(w.encoding, w.n);
        one.scales += groups(w.encoding, w.n);
        if (one.zeros != nullptr) one.zeros += zero_bytes(w.encoding, w.n);
        for (std::size_t i = 0; i < m; ++i) {
            double sum = 0;
            for (std::size_t k = 0; k < w.n; ++k) sum += double(row[k]) * double(x[i * w.n + k]);
            y[o * m + i] = float(sum);
        }
    }
}

}  // namespace linocut
