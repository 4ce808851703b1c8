"""Triton's kernels on the GPU of this machine, or else in Triton's interpreter, which computes them with numpy."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")

INTERPRET = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}

with pytest.MonkeyPatch.context() as patch:  # what kernels become is decided where they are defined
    for name, value in INTERPRET.items():
        patch.setenv(name, value)
    from linocut.kernels.gpu import activations, candidates, columns, decode, gemm, group_norm, routes, rows  # noqa: F401
    from linocut.models import flux2_gpu, text_encoder_gpu  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    """The interpreter is for these tests alone: to all others this machine has no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in INTERPRET.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
