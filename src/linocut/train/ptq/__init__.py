"""Rounding a whole transformer with a look at what goes through it, block by block, without training."""
