// The row kernels for CPUs with AVX-512 (F, BW, DQ, VL).
#define LINOCUT_ROWS row_kernels_avx512
#include "rows_impl.h"
