"""Triton's kernels on the GPU of this machine, or else in Triton's interpreter, which computes them with numpy."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
