// The quantizer of activations for CPUs with AVX-512 (F, BW, DQ, VL); compiled with its flags, called only after the
// probe found them.
#define LINOCUT_QUANTIZE_ROWS quantize_rows_avx512
#include "quantize_rows_impl.h"
