// Runs AVX-VNNI code on an x86 CPU that has AVX2 but not that: its one instruction here, VEX-encoded vpdpbusd between
// registers, is carried out by a handler of the illegal-instruction signal. All else runs as it is.
#pragma once

namespace linocut {

// Installs the handler, after comparing its arithmetic with the EVEX-encoded instruction where the CPU has that. Ends
// the program where emulation is not possible (not Linux on x86-64, or no AVX2).
void emulate_avxvnni();

}  // namespace linocut
