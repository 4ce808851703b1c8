"""Judging models: GenEval's six tasks, paired comparisons of two models, and the detectors that look at pictures.

`eval` may import `train`, whose world (scenes, prompts) is its ground truth; only the command line imports `eval`.
"""
