// The quantizer of activations for CPUs with AVX2; compiled with its flags, called only after the probe found them.
#define LINOCUT_QUANTIZE_ROWS quantize_rows_avx2
#include "quantize_rows_impl.h"
