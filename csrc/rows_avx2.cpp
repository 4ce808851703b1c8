// The row kernels for CPUs with AVX2 and FMA.
#define LINOCUT_ROWS row_kernels_avx2
#include "rows_impl.h"
