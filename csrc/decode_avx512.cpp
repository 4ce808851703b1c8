// The decoders for CPUs with AVX-512 (F, BW, DQ, VL); compiled with its flags, called only after the probe found them.
#define LINOCUT_DECODERS decoders_avx512
#include "decode_impl.h"
