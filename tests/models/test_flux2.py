"""The transformer against diffusers' own, on random weights, and the properties that training and running need."""

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import (
    Flux2PosEmbed,
    Flux2SingleTransformerBlock,
    Flux2TransformerBlock,
)

from linocut.errors import Cancelled, FormatError, UsageError
from linocut.models.flux2 import (
    DoubleBlock,
    Flux2Config,
    Flux2Transformer,
    SingleBlock,
    image_position_ids,
    rope_tables,
    text_position_ids,
)

TINY = {"patch_size": 1, "in_channels": 16, "out_channels": None, "num_layers": 2, "num_single_layers": 3,
        "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 48,
        "timestep_guidance_channels": 32, "mlp_ratio": 3.0, "axes_dims_rope": [8, 8, 8, 8], "rope_theta": 2000,
        "eps": 1e-6, "guidance_embeds": False}


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights that keep activations near one, so that an error anywhere shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 1 + 0.2 * noise


def pair(config: dict) -> tuple[Flux2Transformer2DModel, Flux2Transformer]:
    theirs = Flux2Transformer2DModel(**config).eval()
    randomize(theirs)
    ours = Flux2Transformer(Flux2Config.from_dict(config)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def inputs(config: dict, batch: int, text: int, height: int, width: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(batch, height * width, config["in_channels"], generator=generator),
            torch.randn(batch, text, config["joint_attention_dim"], generator=generator) * 3,
            torch.linspace(0.9, 0.1, batch), image_position_ids(height, width), text_position_ids(text))


def reference(model: Flux2Transformer2DModel, latents: torch.Tensor, text: torch.Tensor, sigma: torch.Tensor,
              image_ids: torch.Tensor, text_ids: torch.Tensor) -> torch.Tensor:
    return model(hidden_states=latents, encoder_hidden_states=text, timestep=sigma, img_ids=image_ids[None],
                 txt_ids=text_ids[None], guidance=None, return_dict=False)[0]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found - wanted).abs().max() / wanted.abs().max()).detach())


@pytest.mark.parametrize(("batch", "text", "height", "width"), [(2, 7, 3, 4), (1, 1, 1, 1), (3, 12, 8, 2)])
@torch.no_grad()
def test_parity_with_diffusers(batch: int, text: int, height: int, width: int) -> None:
    theirs, ours = pair(TINY)
    arguments = inputs(TINY, batch, text, height, width)
    assert relative(ours(*arguments), reference(theirs, *arguments)) < 3e-6


@torch.no_grad()
def test_parity_in_float64_is_exact_to_rounding() -> None:
    theirs, ours = pair(TINY)
    latents, text, sigma, image_ids, text_ids = inputs(TINY, 2, 7, 3, 4)
    ours, theirs = ours.double(), theirs.double()
    # Ours normalizes q and k in float32 by design, so float64 agrees to float32 rounding and no further.
    found = ours(latents.double(), text.double(), sigma, image_ids, text_ids)
    wanted = reference(theirs, latents.double(), text.double(), sigma.double(), image_ids, text_ids)
    assert found.dtype == torch.float64
    assert relative(found, wanted) < 1e-6


@torch.no_grad()
def test_parity_with_other_shapes() -> None:
    config = {**TINY, "out_channels": 8, "mlp_ratio": 2.0, "axes_dims_rope": [4, 12, 12, 4], "rope_theta": 100,
              "num_layers": 1, "num_single_layers": 1}
    theirs, ours = pair(config)
    arguments = inputs(config, 2, 5, 4, 4)
    assert relative(ours(*arguments), reference(theirs, *arguments)) < 3e-6


@torch.no_grad()
def test_reference_tokens_use_their_own_time_id() -> None:
    theirs, ours = pair(TINY)
    latents, text, sigma, image_ids, text_ids = inputs(TINY, 1, 6, 4, 4)
    ids = torch.cat([image_ids[:12], image_position_ids(2, 2, time=10)])
    found = ours(latents, text, sigma, ids, text_ids)
    assert relative(found, reference(theirs, latents, text, sigma, ids, text_ids)) < 3e-6
    assert relative(found, ours(latents, text, sigma, image_ids, text_ids)) > 1e-3


def test_klein_shapes_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Flux2Transformer(Flux2Config())
    state = model.state_dict()
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(state) == 169
    assert sum(tensor.numel() for tensor in state.values()) == 3_875_544_576
    assert len(linears) == 109
    assert all(linear.bias is None for linear in linears)


def test_config_round_trip_and_refusals() -> None:
    config = Flux2Config.from_dict(TINY)
    assert Flux2Config.from_dict(config.to_dict()) == config
    assert Flux2Config.from_dict({**TINY, "enable_time_sign_embed": False, "_class_name": "x"}) == config
    for change in ({"guidance_embeds": True}, {"patch_size": 2}, {"axes_dims_rope": [8, 8, 8]}, {"num_layers": -1},
                   {"num_attention_heads": "2"}, {"axes_dims_rope": 32}):
        with pytest.raises(FormatError):
            Flux2Config.from_dict({**TINY, **change})
    with pytest.raises(FormatError, match="joint_attention_dim"):
        Flux2Config.from_dict({key: value for key, value in TINY.items() if key != "joint_attention_dim"})


@torch.no_grad()
def test_on_block_counts_and_cancels() -> None:
    _, ours = pair(TINY)
    arguments = inputs(TINY, 1, 3, 2, 2)
    calls: list[tuple[int, int]] = []
    ours(*arguments, on_block=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 5) for i in range(1, 6)]

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise Cancelled("stopped")

    ran: list[int] = []
    for index, block in enumerate(ours.single_transformer_blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    with pytest.raises(Cancelled):
        ours(*arguments, on_block=stop)
    assert ran == [0]


def test_wrong_number_of_ids_is_refused() -> None:
    _, ours = pair(TINY)
    latents, text, sigma, image_ids, text_ids = inputs(TINY, 1, 3, 2, 2)
    with pytest.raises(UsageError, match="2 ids for 3"):
        ours(latents, text, sigma, image_ids, text_ids[:2])


def test_init_weights_gives_zero_velocity_and_every_weight_learns() -> None:
    torch.manual_seed(0)
    model = Flux2Transformer(Flux2Config.from_dict(TINY))
    model.init_weights()
    arguments = inputs(TINY, 2, 5, 3, 3)
    assert model(*arguments).abs().max() == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(4):  # the zeros open one after the other: proj_out, then the gates, then what lies behind them
        optimizer.zero_grad()
        (model(*arguments) - 1).square().mean().backward()
        optimizer.step()
    # AdamW's decay alone scales by 0.9996; a weight that got a gradient moves much further.
    still = [name for name, parameter in model.named_parameters()
             if (parameter - before[name]).abs().max() < 5e-3]
    assert not still
    assert (model(*arguments) - 1).square().mean() < 0.9


def test_trains_under_autocast() -> None:
    _, ours = pair(TINY)
    arguments = inputs(TINY, 2, 7, 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(*arguments)
    found.float().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in ours.parameters())
    with torch.no_grad():
        assert relative(found.float(), ours(*arguments)) < 0.05


@torch.no_grad()
def test_half_precision_stays_near_float32() -> None:
    _, ours = pair(TINY)
    latents, text, sigma, image_ids, text_ids = inputs(TINY, 1, 7, 3, 4)
    wanted = ours(latents, text, sigma, image_ids, text_ids)
    for dtype in (torch.bfloat16, torch.float16):
        half = ours.to(dtype)(latents.to(dtype), text, sigma, image_ids, text_ids)
        assert half.dtype == dtype
        assert relative(half.float(), wanted) < 0.05


def test_graph_has_no_breaks() -> None:
    _, ours = pair({**TINY, "num_layers": 1, "num_single_layers": 1})
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    arguments = inputs(TINY, 2, 7, 3, 4)
    found, wanted = compiled(*arguments), ours(*arguments)
    assert relative(found, wanted) < 1e-5
    found.square().mean().backward()


@pytest.mark.parametrize("kind", ["double", "single"])
@torch.no_grad()
def test_one_block_at_klein_size(kind: str) -> None:
    config, generator = Flux2Config(), torch.Generator().manual_seed(2)
    width, head = config.width, config.attention_head_dim
    with torch.device("meta"):
        if kind == "double":
            ours: torch.nn.Module = DoubleBlock(config)
            theirs: torch.nn.Module = Flux2TransformerBlock(width, config.num_attention_heads, head)
        else:
            ours = SingleBlock(config)
            theirs = Flux2SingleTransformerBlock(width, config.num_attention_heads, head)
    ours.to_empty(device="cpu")
    for parameter in ours.parameters():
        bound = 3**0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 1
        parameter.uniform_(-bound, bound, generator=generator)
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)  # both share one copy of the big weights
    ids = torch.cat([text_position_ids(5), image_position_ids(2, 3)])
    rope = rope_tables(ids, config.axes_dims_rope, config.rope_theta)
    their_rope = Flux2PosEmbed(config.rope_theta, list(config.axes_dims_rope))(ids)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if kind == "double":
        image, text, mods = draw(1, 6, width), draw(1, 5, width), [draw(1, 6 * width) for _ in range(2)]
        found = ours(image, text, *(mod[:, None].chunk(6, dim=-1) for mod in mods), rope)
        wanted = theirs(image, text, *mods, their_rope)[::-1]
    else:
        x, mod = draw(1, 11, width), draw(1, 3 * width)
        found = [ours(x, mod[:, None].chunk(3, dim=-1), rope)]
        wanted = [theirs(x, None, mod, their_rope)]
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) < 1e-5
