"""Row kernels against torch, and rounding against the rule of the CPU, bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import normal, relative
from torch import Tensor

from linocut.kernels.gpu import rows
from linocut.kernels.gpu.activations import KINDS, Activations
from linocut.models import flux2

# Of the result's norm: half a step on average. The interpreter cuts bfloat16 off instead of rounding it, and forgets
# the carry where FP8 is rounded up to the next power of two.
TOLERANCE = {"int8": 0.01, "rows": 0.02, "fp8": 0.035 if torch.cuda.is_available() else 0.08, "float": 1e-2}


def int8_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """docs/kernels.md, "Activations": values [M, N] and scales [G, M]."""
    groups = x.float().unflatten(1, (-1, 128))
    largest = groups.abs().amax(2, keepdim=True)
    usable = largest >= 2.0**-120
    most = torch.full_like(largest, 127)  # torch divides a number by a tensor through the reciprocal
    values = torch.where(usable, (groups * (most / largest)).round(), 0).to(torch.int8)
    return values.flatten(1), torch.where(usable, largest / most, 0)[:, :, 0].T


@pytest.mark.parametrize("n", [128, 384, 3072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_the_cpu(device, n, dtype):
    wide = (3 * normal(9, n + 128)).to(dtype)
    wide[3, :128] = 0
    wide[4, 0:64] = 1e-38
    wide[5, 1] = 2.5e3
    x = wide[:, :n]  # its rows lie apart
    act = Activations.empty("int8", 9, n, device)
    rows.quantize(wide.to(device)[:, :n], act)
    values, scales = int8_of(x)
    assert torch.equal(act.values.cpu(), values)
    assert torch.equal(act.scales.cpu(), scales)


def test_rounding_equals_that_of_the_native_kernels(device):
    from linocut.kernels import cpu, native

    if native.why_no_module() is not None:
        pytest.skip(str(native.why_no_module()))
    x = normal(33, 768)
    act, there = cpu.quantize(x), Activations.empty("int8", 33, 768, device)
    rows.quantize(x.to(device), there)
    assert torch.equal(there.values.cpu(), act.values[:, :768])
    assert torch.equal(there.scales.cpu().T, act.scales)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_near_what_it_holds(device, kind):
    x = normal(7, 640)
    act = Activations.empty(kind, 7, 640, device)
    rows.quantize(x.to(device), act)
    assert relative(act.dequantize(), x) < TOLERANCE[kind]
    assert (act.m, act.n) == (7, 640)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("added", [True, False])
def test_norm_with_residual_equals_torch(device, kind, added):
    x, wide = 3 * normal(6, 384) + 1, normal(6, 512, seed=1)
    gate, factor, shift = (normal(384, seed=seed) for seed in (2, 3, 4))
    y = wide[:, 128:]
    total = x + gate * y if added else x
    wanted = F.layer_norm(total, (384,), eps=1e-5) * factor + shift
    there, out = x.clone().to(device), Activations.empty(kind, 6, 384, device, torch.float32)
    more = (wide.to(device)[:, 128:], gate.to(device)) if added else (None, None)
    rows.normalize(there, factor.to(device), shift.to(device), 1e-5, out, *more)
    assert relative(there, total) < 1e-6
    assert relative(out.dequantize(), wanted) < (1e-6 if kind == "float" else TOLERANCE[kind])
    if kind == "int8":  # the same bits as rounding afterwards, but where a value lies next to a half
        apart, _ = int8_of(wanted)
        assert (out.values.cpu().int() - apart.int()).abs().max() <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [0, 256])
def test_swiglu_behind_attention(device, kind, first):
    units, attended = 2 * normal(5, 2 * 640), normal(5, 384, seed=1)[:, :256]
    units[0, :3] = torch.tensor([1e4, -1e4, 88.0])
    wanted = torch.cat([attended[:, :first], flux2.swiglu(units)], 1)
    out = Activations.empty(kind, 5, first + 640, device, torch.float32)
    rows.gated(units.to(device), out, attended.to(device) if first else None)
    assert relative(out.dequantize(), wanted) < (1e-6 if kind == "float" else TOLERANCE[kind])


@pytest.mark.parametrize(("heads", "k"), [(3, 64), (2, 128), (1, 32)])
def test_norm_and_rotation_of_heads_equal_torch(device, heads, k):
    tokens, eps, first = 11, 1e-6, 4
    wide = normal(tokens, 3 * heads * k + 128)
    weights = (1 + 0.2 * normal(k, seed=4), 1 + 0.2 * normal(k, seed=5))
    angles = 3 * normal(first + tokens, k // 2, seed=6)
    there = wide.clone().to(device)
    rows.turn(there, tuple(each.to(device) for each in weights), (angles.cos().to(device), angles.sin().to(device)),
              heads, eps, first)
    for part, weight in enumerate(weights):
        column = slice(part * heads * k, (part + 1) * heads * k)
        x = F.rms_norm(wide[:, column].unflatten(1, (heads, k)), (k,), weight, eps)
        turned = angles[first:, None]
        wanted = flux2.rotate(x[None], (turned.cos(), turned.sin()))[0].flatten(1)
        assert relative(there[:, column], wanted) < 1e-6
    assert torch.equal(there[:, 2 * heads * k :].cpu(), wide[:, 2 * heads * k :])  # v and what follows


def test_a_broken_row_shows_and_stays_alone(device):
    x = normal(3, 256)
    x[1, 200] = float("nan")
    for kind in ("int8", "rows", "fp8"):
        out = Activations.empty(kind, 3, 256, device)
        rows.quantize(x.to(device), out)
        found = out.dequantize().cpu().isnan().any(1)
        assert found.tolist() == [False, True, False]
