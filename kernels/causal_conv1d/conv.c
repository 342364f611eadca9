/* Causal convolution of few taps without gradients, in float32 on a CPU; called by cpu.py, which holds the contract. */
#include "convolve.h"

void causal_conv1d_forward(const Conv *p) { convolve_all(p); }

int causal_conv1d_max_taps(void) { return MAX_TAPS; }
