// Attention in float32 for any CPU.
#define LINOCUT_ATTENTION attention_baseline
#define LINOCUT_NAME "baseline"
#define LINOCUT_NEEDS ""
#include "attention_impl.h"
