// The decoders for CPUs with AVX2; compiled with its flags, called only after the probe found them.
#define LINOCUT_DECODERS decoders_avx2
#include "decode_impl.h"
