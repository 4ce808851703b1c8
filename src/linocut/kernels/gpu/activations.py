"""Activations on a GPU in the forms that products read, one set of rows each. No Triton: shapes and memory only.

| kind    | values        | scales                                                                    |
|---------|---------------|---------------------------------------------------------------------------|
| int8    | int8          | max / 127 per token and 128 values, as on the CPU (docs/kernels.md)        |
| rows    | int8          | max / 127 per token: products need no scale of the activations in between |
| fp8     | float8_e4m3fn | max / 448 per token and 128 values                                        |
| float   | bfloat16, ... | none                                                                      |

Scales of groups are stored group by group, [G, M], so that the tokens of a tile lie side by side.
Shape letters: M tokens, N features, G = N / 128 groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from linocut.errors import KernelError
from linocut.formats.packed import GROUP_SIZE

KINDS = ("int8", "rows", "fp8", "float")


def layout(kind: str, m: int, n: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what M tokens of N features, a multiple of 128, lie in: values, then scales where there are
    any. `dtype` is that of floats."""
    if n <= 0 or n % GROUP_SIZE:
        raise KernelError(f"activations are quantized in groups (expected N a multiple of 128, found {n})")
    if kind not in KINDS:
        raise KernelError(f"there is no kind of activations called {kind!r} (known: {', '.join(KINDS)})")
    stored = {"int8": torch.int8, "rows": torch.int8, "fp8": torch.float8_e4m3fn, "float": dtype}[kind]
    shape = {"int8": (n // GROUP_SIZE, m), "rows": (m,), "fp8": (n // GROUP_SIZE, m), "float": None}[kind]
    return [((m, n), stored), *([] if shape is None else [(shape, torch.float32)])]


@dataclass(frozen=True)
class Activations:
    """x[M, N] in one of the kinds above; filled by `kernels.gpu.rows`."""

    kind: str
    values: Tensor
    """[M, N], contiguous."""
    scales: Tensor | None
    """float32: [G, M] for int8 and fp8, whose rows may lie apart; [M] for rows."""

    @classmethod
    def empty(cls, kind: str, m: int, n: int, device: torch.device | str,
              dtype: torch.dtype = torch.bfloat16) -> "Activations":
        """Memory for M tokens of N features, a multiple of 128; `dtype` is that of floats."""
        values, *scales = (torch.empty(shape, dtype=stored, device=device)
                           for shape, stored in layout(kind, m, n, dtype))
        return cls(kind, values, scales[0] if scales else None)

    @property
    def m(self) -> int:
        """Number of tokens."""
        return self.values.shape[0]

    @property
    def n(self) -> int:
        """Number of features."""
        return self.values.shape[1]

    def rows(self, start: int, stop: int) -> "Activations":
        """Tokens start..stop as views; no copy."""
        scales = None if self.scales is None else self.scales[..., start:stop]
        return Activations(self.kind, self.values[start:stop], scales)

    @property
    def scale_stride(self) -> int:
        """Scales between one group's and the next group's."""
        return 0 if self.scales is None else self.scales.stride(0)

    def dequantize(self) -> Tensor:
        """float32 [M, N]: what the products see."""
        values = self.values.float()
        if self.scales is None:
            return values
        if self.kind == "rows":
            return values * self.scales[:, None]
        return (values.reshape(self.m, -1, GROUP_SIZE) * self.scales.t()[:, :, None]).flatten(1)
