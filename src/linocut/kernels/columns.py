"""Who computes GPTQ's inner loops quickest on a device."""

from __future__ import annotations

import torch

from linocut.kernels.gpu.runtime import why_not
from linocut.quantize.columns import Columns, TorchColumns


def columns_for(device: torch.device) -> Columns:
    """Triton's where its kernels run, else torch's; both give the same bits."""
    if why_not(str(device)) is not None:
        return TorchColumns()
    from linocut.kernels.gpu.columns import TritonColumns

    return TritonColumns()
