// The decoders for the instruction set that every CPU of this architecture has.
#define LINOCUT_DECODERS decoders_baseline
#include "decode_impl.h"
