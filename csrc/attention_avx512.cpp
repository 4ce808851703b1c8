// Attention in float32 for CPUs with AVX-512.
#define LINOCUT_ATTENTION attention_avx512
#define LINOCUT_NAME "avx512"
#define LINOCUT_NEEDS "avx512f avx512bw avx512dq avx512vl avx2 fma"
#include "attention_impl.h"
