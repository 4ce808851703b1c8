"""Attention and the row operations in C++ against torch, in every variant that this CPU can run."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linocut.errors import KernelError
from linocut.kernels import fused, fusible, native
from linocut.kernels.cpu import Activations, quantize
from linocut.kernels.dispatch import use_kernel
from linocut.kernels.fused import Heads, Norm
from linocut.models import flux2, text_encoder

if native.why_no_module() is not None:
    pytest.skip(f"{native.why_no_module()}", allow_module_level=True)

ATTENTION = [name for name, _, reason in native.module().attention_variants() if not reason]
ROWS = [name for name, reason in native.module().variants() if not reason]

# Of the result, relative to its norm. bfloat16: q, k, v and the weights are rounded once each, 2^-9 at most and half of
# that on average. float32: order of sums and a polynomial good to 2e-7.
TOLERANCE = {True: 5e-3, False: 3e-6}
# heads, kv heads, width, tokens, keys, causal: around a panel of 32 keys and a tile of 256 keys or 64 queries
SHAPES = [(2, 2, 128, 1, 1, False), (3, 3, 64, 33, 33, False), (2, 2, 128, 300, 300, False),
          (4, 2, 128, 70, 41, True), (4, 1, 64, 65, 65, True), (2, 2, 32, 257, 257, True), (2, 2, 96, 20, 3, False),
          (6, 2, 128, 520, 300, True)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def projections(heads: int, kv_heads: int, width: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of q, k, v with scores of some spread, so that the softmax is neither flat nor a choice of one key."""
    return (2 * random(tokens, heads * width, seed=1), random(tokens, kv_heads * width, seed=2),
            random(tokens, kv_heads * width, seed=3))


def expected(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int, keys: int, causal: bool) -> Tensor:
    """torch's attention in float64 on rows."""
    tokens = q.shape[0]
    q, k, v = (x.double().unflatten(1, (count, -1)).transpose(0, 1)
               for x, count in ((q, heads), (k, kv_heads), (v, kv_heads)))
    k, v = (x.repeat_interleave(heads // kv_heads, dim=0) for x in (k, v))
    allowed = torch.ones(tokens, tokens, dtype=torch.bool)
    allowed = (allowed.tril() if causal else allowed) & (torch.arange(tokens) < keys)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(0, 1).flatten(1)


def attend(rows: tuple[Tensor, Tensor, Tensor], heads: int, kv_heads: int, width: int, keys: int,
           causal: bool) -> Tensor:
    tokens = rows[0].shape[0]
    places = Heads.zeros(heads, kv_heads, width, tokens)
    fused.arrange(rows, places)
    out = torch.full((tokens, heads * width), math.nan)
    fused.attend(places, out, keys, causal)
    return out


@pytest.fixture(params=ATTENTION)
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LINOCUT_ATTENTION", request.param)
    return request.param


def takes_bfloat16(name: str) -> bool:
    return native.module().attention_dtype(name) == "bfloat16"


# --------------------------------------------------------------------------------------------------- attention

@pytest.mark.parametrize(("heads", "kv_heads", "width", "tokens", "keys", "causal"), SHAPES)
def test_attention_equals_torch(attention, heads, kv_heads, width, tokens, keys, causal):
    rows = projections(heads, kv_heads, width, tokens)
    found = attend(rows, heads, kv_heads, width, keys, causal)
    wanted = expected(*rows, heads, kv_heads, keys, causal)
    assert relative(found, wanted) < TOLERANCE[takes_bfloat16(attention)]


def test_attention_takes_extreme_scores(attention):
    q, k, v = projections(2, 2, 64, 80)
    k[7] *= 1000  # one key outshines all others or is outshone by them, by far more than an exponential can hold
    found = attend((q, k, v), 2, 2, 64, 80, False)
    assert relative(found, expected(q, k, v, 2, 2, 80, False)) < TOLERANCE[takes_bfloat16(attention)]


def test_keys_out_of_sight_change_no_bit(attention):
    rows = projections(2, 1, 128, 90)
    seen = attend(rows, 2, 1, 128, 50, False)
    causal = attend(rows, 2, 1, 128, 90, True)
    for x in rows[1:]:
        x[50:] = 1e4
    assert torch.equal(attend(rows, 2, 1, 128, 50, False), seen)
    assert torch.equal(attend(rows, 2, 1, 128, 90, True)[:50], causal[:50])


def test_attention_does_not_depend_on_threads(attention, monkeypatch):
    rows = projections(3, 3, 128, 330)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setenv("LINOCUT_THREADS", str(threads))
        results.append(attend(rows, 3, 3, 128, 330, False))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("width", [64, 128])
def test_quantized_attention_is_the_quantized_result(attention, width):
    rows = projections(2, 2, width, 100)
    wanted = quantize(attend(rows, 2, 2, width, 100, False))
    heads, out = Heads.zeros(2, 2, width, 100), Activations.empty(100, 512)
    for tensor in (out.values, out.scales, out.sums):
        tensor.fill_(77)
    fused.arrange(rows, heads)
    fused.attend(heads, out)
    n = 2 * width
    assert torch.equal(out.values[:, :n], wanted.values[:, :n])
    assert torch.equal(out.scales[:, : n // 128], wanted.scales)
    assert torch.equal(out.sums[:, : n // 64], wanted.sums)
    assert (out.values[:, n:] == 77).all()  # the MLP's columns
    assert (out.scales[:, n // 128 :] == 77).all()


def test_a_broken_value_shows(attention):
    q, k, v = projections(1, 1, 64, 40)
    k[3, 5] = math.nan
    assert attend((q, k, v), 1, 1, 64, 40, False).isnan().all()


# ------------------------------------------------------------------------------------------------ arrangement

def logical(heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [heads, tokens, width] in float32 out of the layout that attention.h describes."""
    count, padded, width = heads.k.shape
    pair = 4 // heads.k.element_size()
    k = heads.k.reshape(count, padded // 32, width // pair, 32, pair).permute(0, 1, 3, 2, 4).reshape(heads.k.shape)
    v = heads.v.reshape(count, width // 32, padded // pair, 32, pair).permute(0, 2, 4, 1, 3).reshape(heads.v.shape)
    scale = math.sqrt(width) / math.log2(math.e)
    return heads.q[:, : heads.tokens].float() * scale, k[:, : heads.tokens].float(), v[:, : heads.tokens].float()


@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize("rows", ROWS)
def test_arrangement_equals_torch(rows, adjacent, attention):
    heads, kv_heads, width, tokens, eps = 4, 2, 64, 45, 1e-6
    q, k, v = projections(heads, kv_heads, width, tokens)
    weights = (1 + 0.2 * random(width, seed=4), 1 + 0.2 * random(width, seed=5))
    angles = 3 * random(tokens, width // 2, seed=6)
    cos, sin = angles.cos(), angles.sin()
    out = Heads.zeros(heads, kv_heads, width, tokens)
    bits = [x.view(torch.int16) if x.dtype == torch.bfloat16 else x for x in (out.q, out.k, out.v)]
    native.module().arrange_heads(q, k, v, *weights, eps, cos, sin, adjacent, 0, *bits, tokens, 2, rows)

    wanted = []
    for x, weight, count in ((q, weights[0], heads), (k, weights[1], kv_heads)):
        x = F.rms_norm(x.unflatten(1, (count, width)), (width,), weight, eps)
        if adjacent:
            x = flux2.rotate(x[None], (cos[:, None], sin[:, None]))[0].transpose(0, 1)
        else:
            x = text_encoder.rotate(x.transpose(0, 1), cos.repeat(1, 2), sin.repeat(1, 2))
        wanted.append(x)
    wanted.append(v.unflatten(1, (kv_heads, width)).transpose(0, 1))
    for found, each in zip(logical(out), wanted, strict=True):
        assert relative(found, each) < (3e-3 if takes_bfloat16(attention) else 1e-6)  # one rounding


def test_text_and_image_may_be_arranged_apart(attention):
    rows, wide = projections(2, 2, 128, 77), torch.zeros(77, 3 * 256, dtype=torch.bfloat16)
    for x, out in zip(rows, wide.chunk(3, dim=1), strict=True):
        out.copy_(x)  # columns of one matrix, as a fused projection leaves them
    whole, parts = Heads.zeros(2, 2, 128, 77), Heads.zeros(2, 2, 128, 77)
    fused.arrange(wide.chunk(3, dim=1), whole)
    for start, stop in ((0, 41), (41, 77)):  # meets within a pair of keys and within a panel
        fused.arrange(wide[start:stop].chunk(3, dim=1), parts, first=start)
    for name in ("q", "k", "v"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))


# --------------------------------------------------------------------------------------------------- row kernels

@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centered", [True, False])
def test_norm_with_residual_equals_torch(rows, dtype, centered):
    x, y = 3 * random(37, 384) + 1, random(37, 512, seed=1).to(dtype)[:, 128:]  # y lies in a wider matrix
    gate, factor, shift = random(384, seed=2), random(384, seed=3), random(384, seed=4)
    total = x + gate * y.float()
    if centered:
        wanted = F.layer_norm(total, (384,), eps=1e-5) * factor + shift
    else:
        wanted = F.rms_norm(total, (384,), factor, 1e-5)
    out, given = torch.empty(37, 384), y.view(torch.int16) if dtype == torch.bfloat16 else y
    native.module().normalize(x, given, gate, centered, 1e-5, factor, shift if centered else None, out, 2, rows)
    assert relative(x, total) < 1e-7
    assert relative(out, wanted) < 1e-6

    act, again = Activations.empty(37, 384), total.clone()
    native.module().normalize_quantize(x, None, None, centered, 1e-5, factor, shift if centered else None, act.values,
                                       act.scales, act.sums, 2, rows)
    plain = quantize(out)
    assert torch.equal(act.values[:, :384], plain.values[:, :384])
    assert torch.equal(act.scales, plain.scales)
    assert torch.equal(act.sums, plain.sums)
    assert relative(x, again) < 1e-7  # nothing is added twice


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("gated", [True, False])
def test_residual_equals_torch(rows, gated):
    x, y, gate = random(9, 256), random(9, 256, seed=1).bfloat16(), random(256, seed=2)
    wanted = x + y.float() * (gate if gated else 1)
    native.module().add_rows(x, y.view(torch.int16), gate if gated else None, 2, rows)
    assert relative(x, wanted) < 1e-7


@pytest.mark.parametrize("rows", ROWS)
def test_swiglu_fills_its_columns_only(rows):
    both = 4 * random(19, 512)
    both[0, :4] = torch.tensor([1e4, -1e4, 88.0, -88.0])
    both[1] = -1e5 - torch.arange(512)  # far beyond what an exponential can hold
    out = Activations.empty(19, 768)
    for tensor in (out.values, out.scales, out.sums):
        tensor.fill_(77)
    given = both.bfloat16()
    gate, value = given.view(torch.int16).chunk(2, dim=1)
    native.module().swiglu(gate, value, out.values, out.scales, out.sums, out.n, 128, 2, rows)
    wanted = flux2.swiglu(given.float())
    found = out.dequantize()[:, 128:384]
    steps = out.scales[:, 1:3].repeat_interleave(128, dim=1)
    # Half a step, what the exponential is wrong by, and where it stops short of infinity.
    assert ((found - wanted).abs() <= steps * 0.5 + wanted.abs() * 1e-6 + 1e-25).all()
    assert (out.values[:, :128] == 77).all()
    assert (out.values[:, 384:768] == 77).all()
    assert (out.scales[:, [0, 3, 4, 5]] == 77).all()
    assert (out.sums[:, [0, 1, *range(6, 12)]] == 77).all()


def test_a_broken_row_shows_and_stays_alone():
    x = random(3, 256)
    x[1, 200] = math.nan
    out = Activations.empty(3, 256)
    fused.normalize(x, Norm(True, 1e-6, torch.ones(256)), out)
    assert out.scales[1].isnan().all()
    assert not out.scales[[0, 2]].isnan().any()
    fused.swiglu(x[:, :128], x[:, 128:], Activations.empty(3, 128))  # does not raise either


# ----------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("call", [
    lambda: fused.add(random(2, 128), random(2, 256)),
    lambda: fused.add(random(2, 100), random(2, 100)),
    lambda: fused.add(random(2, 128).double(), random(2, 128)),
    lambda: fused.add(random(2, 128), random(2, 128), random(64)),
    lambda: fused.normalize(random(2, 128), Norm(True, 1e-6, torch.ones(64)), torch.empty(2, 128)),
    lambda: fused.normalize(random(2, 128), Norm(True, 1e-6, torch.ones(128)), Activations.empty(3, 128)),
    lambda: fused.normalize(random(2, 128), Norm(True, 1e-6, torch.ones(128)), torch.empty(2, 256)),
    lambda: fused.swiglu(random(2, 128), random(2, 128), Activations.empty(2, 256), 64),
    lambda: fused.swiglu(random(2, 128), random(2, 128), Activations.empty(2, 256), 256),
    lambda: fused.swiglu(random(2, 128), random(2, 256), Activations.empty(2, 256)),
    lambda: fused.swiglu(random(2, 128).t().contiguous().t(), random(2, 128), Activations.empty(2, 128)),
    lambda: fused.arrange([random(4, 64)] * 3, Heads.zeros(1, 1, 64, 4), first=1),
    lambda: fused.arrange([random(4, 128)] * 3, Heads.zeros(2, 1, 64, 4)),
    lambda: fused.arrange([random(4, 64)] * 3, Heads.zeros(1, 1, 64, 4), rope=(random(4, 64), random(4, 64))),
    lambda: fused.arrange([random(4, 64)] * 3, Heads.zeros(1, 1, 64, 4), norms=(random(32), random(64))),
    lambda: fused.attend(Heads.zeros(3, 2, 64, 4), torch.empty(4, 192)),
    lambda: fused.attend(Heads.zeros(1, 1, 64, 4), torch.empty(4, 128)),
    lambda: fused.attend(Heads.zeros(1, 1, 64, 4), torch.empty(4, 64), keys=0),
    lambda: fused.attend(Heads.zeros(2, 2, 128, 4), Activations.empty(4, 128)),
    lambda: fused.attend(Heads.zeros(1, 1, 48, 4), torch.empty(4, 48)),
])
def test_what_does_not_fit_is_refused(call):
    with pytest.raises((ValueError, TypeError)):
        call()


def test_unknown_attention_is_refused_with_the_known_ones(monkeypatch):
    monkeypatch.setenv("LINOCUT_ATTENTION", "magic")
    with pytest.raises(KernelError, match="baseline"):
        fused.attention_variant()


def test_reasons_against_the_fused_blocks(monkeypatch):
    assert fused.why_not(128, None, "cpu") is None
    assert "48" in fused.why_not(48, None, "cpu")
    assert "cuda" in fused.why_not(128, None, "cuda")
    assert "to_q" in fused.why_not(128, "to_q", "cpu")
    with use_kernel("native"):
        assert "native" in fused.why_not(128, None, "cpu")
        assert fusible.why_not(128, None) is None  # knows the environment only
    monkeypatch.setenv("LINOCUT_KERNEL", "reference")
    assert "reference" in fused.why_not(128, None, "cpu")
    assert "reference" in fusible.why_not(128, None)
