// Attention for CPUs whose AMX multiplies bfloat16.
#define LINOCUT_ATTENTION attention_amx
#define LINOCUT_NAME "amx"
#define LINOCUT_NEEDS "avx512f avx512bw avx512dq avx512vl avx2 fma avx512bf16 amxbf16"
#define LINOCUT_BF16
#define LINOCUT_TILES
#include "attention_impl.h"
