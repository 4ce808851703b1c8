"""Weight math on tensors: rounding to packed groups, policies that pick layers, and streaming a whole model."""
