// The quantizer of activations for the instruction set that every CPU of this architecture has.
#define LINOCUT_QUANTIZE_ROWS quantize_rows_baseline
#include "quantize_rows_impl.h"
