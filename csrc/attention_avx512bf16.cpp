// Attention for CPUs with AVX-512 and its bfloat16 products.
#define LINOCUT_ATTENTION attention_avx512bf16
#define LINOCUT_NAME "avx512bf16"
#define LINOCUT_NEEDS "avx512f avx512bw avx512dq avx512vl avx2 fma avx512bf16"
#define LINOCUT_BF16
#include "attention_impl.h"
