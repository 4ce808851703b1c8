// Attention in float32 for CPUs with AVX2 and FMA.
#define LINOCUT_ATTENTION attention_avx2
#define LINOCUT_NAME "avx2"
#define LINOCUT_NEEDS "avx2 fma"
#include "attention_impl.h"
