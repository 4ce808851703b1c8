// The row kernels for any CPU.
#define LINOCUT_ROWS row_kernels_baseline
#include "rows_impl.h"
