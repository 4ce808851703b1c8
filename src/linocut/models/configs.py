"""Sizes of the three networks, read from their `config.json` and checked once.

Everything that plans, builds or runs a network takes these, so a value is either refused here, in one line that names
the key, or can be relied upon. Knows no torch: planning must not wait for it. Bounds are far above any known model;
they keep a broken or hostile file from taking all memory or time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from linocut.errors import FormatError

CELL = 2  # side of the cell of latent pixels that becomes one token of the transformer
MOST_LAYERS = 1000
WIDEST = 65_536
MOST_TOKENS = 10_000_000  # entries of a vocabulary
MOST_STAGES = 5  # a token then covers 32 pixels, and picture sides are multiples of 32


@dataclass(frozen=True)
class Flux2Config:
    """Shape of the transformer, in diffusers' words. The defaults are FLUX.2 klein 4B.

    Raises FormatError for a value of the wrong type or out of range.
    """

    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 5
    num_single_layers: int = 20
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 7680
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check = _Checks("transformer", self)
        check.integers(1, WIDEST, "in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim")
        check.integers(0, MOST_LAYERS, "num_layers", "num_single_layers")
        check.integers(2, WIDEST, "timestep_guidance_channels", even=True)
        check.numbers(0, 64, "mlp_ratio")
        check.numbers(1, 1e12, "rope_theta")
        check.numbers(0, 1, "eps")
        check.integer_lists(2, WIDEST, "axes_dims_rope", least=4, most=4, even=True)
        if self.out_channels is not None:
            check.integers(1, WIDEST, "out_channels")
        check.that("num_attention_heads", self.width <= WIDEST,
                   f"at most {WIDEST} channels in {self.attention_head_dim} per head")
        check.that("mlp_ratio", self.mlp_width >= 1, f"room for one channel at width {self.width}")
        check.that("axes_dims_rope", sum(self.axes_dims_rope) == self.attention_head_dim,
                   f"even numbers that add up to attention_head_dim = {self.attention_head_dim}")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def velocity_channels(self) -> int:
        return self.out_channels or self.in_channels

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Flux2Config:
        """Read a diffusers `config.json`. Keys that do not shape the network are ignored; absent ones are an error.

        Raises FormatError for a missing key, a value out of range, or a variant that this network is not.
        """
        for key, needed in (("patch_size", 1), ("guidance_embeds", False)):
            if config.get(key, needed) != needed:
                raise FormatError(f"unsupported FLUX.2 variant: {key}", expected=needed, found=_short(config[key]),
                                  advice="only klein-class transformers are implemented")
        optional = {"out_channels", "timestep_guidance_channels", "mlp_ratio", "axes_dims_rope", "rope_theta", "eps"}
        _demand("transformer", config, [field.name for field in fields(cls) if field.name not in optional])
        return cls(**{field.name: _tuple(config[field.name]) for field in fields(cls) if field.name in config})

    def to_dict(self) -> dict[str, Any]:
        """The diffusers `config.json` of this network."""
        return {"_class_name": "Flux2Transformer2DModel", "patch_size": 1, "guidance_embeds": False,
                **asdict(self), "axes_dims_rope": list(self.axes_dims_rope)}


@dataclass(frozen=True)
class Qwen3Config:
    """Sizes of a Qwen3 model, named as in its `config.json`. The defaults are those of Qwen3-4B.

    Raises FormatError for a value of the wrong type or out of range.
    """

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        check = _Checks("text_encoder", self)
        check.integers(1, MOST_TOKENS, "vocab_size")
        check.integers(1, WIDEST, "hidden_size", "num_attention_heads", "num_key_value_heads")
        check.integers(1, 16 * WIDEST, "intermediate_size")
        check.integers(1, MOST_LAYERS, "num_hidden_layers")
        check.integers(2, WIDEST, "head_dim", even=True)
        check.numbers(0, 1, "rms_norm_eps")
        check.numbers(1, 1e12, "rope_theta")
        check.numbers(0, 100, "initializer_range")
        check.that("num_attention_heads", self.num_attention_heads % self.num_key_value_heads == 0,
                   f"a multiple of num_key_value_heads = {self.num_key_value_heads}")
        check.that("num_attention_heads", self.num_attention_heads * self.head_dim <= 16 * WIDEST,
                   f"at most {16 * WIDEST} channels in {self.head_dim} per head")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Qwen3Config:
        """Read a Hugging Face `config.json`, of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

        Raises FormatError for what this stack does not compute: another activation, biases, sliding windows,
        stretched rotary positions; for a missing key and for a value out of range.
        """
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise _wrong("text_encoder", "rope_parameters" if config.get("rope_parameters") else "rope_scaling",
                         "an object, or null", rope)
        for key, found, expected in (
            ("model_type", config.get("model_type", "qwen3"), "qwen3"),
            ("hidden_act", config.get("hidden_act", "silu"), "silu"),
            ("attention_bias", bool(config.get("attention_bias", False)), False),
            ("use_sliding_window", bool(config.get("use_sliding_window", False)), False),
            ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
        ):
            if found != expected:
                raise FormatError(f"text_encoder config: {key} is not supported", expected=expected,
                                  found=_short(found))
        _demand("text_encoder", config, ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                         "num_attention_heads"])
        values = {field.name: config[field.name] for field in fields(cls) if config.get(field.name) is not None}
        if rope.get("rope_theta") is not None:
            values["rope_theta"] = rope["rope_theta"]
        # A file without rope_theta means transformers' default, not klein's value.
        values.setdefault("rope_theta", 10000.0)
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` of this model; transformers 4 and 5 both read it."""
        return {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu",
            "attention_bias": False, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta}, **asdict(self),
        }


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder, named as in diffusers' `config.json`. The defaults are klein's.

    Raises FormatError for a value of the wrong type or out of range.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    latent_channels: int = 32
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    batch_norm_eps: float = 1e-4
    preview: bool = False  # whether the checkpoint holds preview.weight and preview.bias (ours, not in diffusers)

    def __post_init__(self) -> None:
        check = _Checks("vae", self)
        check.integers(3, 3, "in_channels", "out_channels")  # red, green, blue
        check.integers(1, WIDEST, "latent_channels", "norm_num_groups")
        check.integers(1, MOST_LAYERS, "layers_per_block")
        check.booleans("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention", "preview")
        check.numbers(0, 1, "batch_norm_eps")
        check.integer_lists(1, WIDEST, "block_out_channels", least=1, most=MOST_STAGES)
        names = ["block_out_channels"]
        if self.decoder_block_out_channels is not None:
            stages = len(self.block_out_channels)
            check.integer_lists(1, WIDEST, "decoder_block_out_channels", least=stages, most=stages)
            names.append("decoder_block_out_channels")
        for name in names:
            check.that(name, all(width % self.norm_num_groups == 0 for width in getattr(self, name)),
                       f"multiples of norm_num_groups = {self.norm_num_groups}")

    @property
    def factor(self) -> int:
        """Picture pixels per latent pixel and side (8 for klein): every stage but one doubles."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def token_side(self) -> int:
        """Picture pixels per token of the transformer and side (16 for klein)."""
        return self.factor * CELL

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of the decoder's stages, the finest first."""
        return self.decoder_block_out_channels or self.block_out_channels

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AutoencoderConfig:
        """Read a diffusers `config.json`; absent keys and nulls mean diffusers' defaults, which are klein's.

        Raises FormatError for another activation or patch size, and for a value out of range.
        """
        for key, default, expected in (("act_fn", "silu", "silu"), ("patch_size", [CELL, CELL], [CELL, CELL])):
            found = config.get(key, default)
            found = list(found) if isinstance(found, tuple) else found
            if found != expected:
                raise FormatError(f"vae config: {key} is not supported", expected=expected, found=_short(found))
        return cls(**{field.name: _tuple(config[field.name]) for field in fields(cls)
                      if config.get(field.name) is not None})

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` of this model, as diffusers writes and reads it."""
        stages = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKLFlux2", "act_fn": "silu", "patch_size": [CELL, CELL],
            "down_block_types": ["DownEncoderBlock2D"] * stages, "up_block_types": ["UpDecoderBlock2D"] * stages,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()},
        }


# ------------------------------------------------------------------------------------------------------ checking

class _Checks:
    """Checks on the fields of one config; each raises FormatError with the key, what is expected and what is there."""

    def __init__(self, component: str, config: object) -> None:
        self.component, self.config = component, config

    def integers(self, low: int, high: int, *names: str, even: bool = False) -> None:
        for name in names:
            self.that(name, _is_integer(getattr(self.config, name), low, high, even), _range(low, high, even))

    def integer_lists(self, low: int, high: int, *names: str, least: int, most: int, even: bool = False) -> None:
        """Tuples of `least` to `most` integers."""
        count = f"{least}" if least == most else f"{least} to {most}"
        for name in names:
            value = getattr(self.config, name)
            self.that(name, isinstance(value, tuple) and least <= len(value) <= most
                      and all(_is_integer(item, low, high, even) for item in value),
                      f"a list of {count}, each {_range(low, high, even)}")

    def numbers(self, low: float, high: float, *names: str) -> None:
        for name in names:
            value = getattr(self.config, name)
            # Not a number fails every comparison; whole numbers of any length compare without overflow.
            self.that(name, isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high,
                      f"a number from {low:g} to {high:g}")

    def booleans(self, *names: str) -> None:
        for name in names:
            self.that(name, isinstance(getattr(self.config, name), bool), "true or false")

    def that(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise _wrong(self.component, name, expected, getattr(self.config, name))


def _is_integer(value: object, low: int, high: int, even: bool) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high and not (even and value % 2)


def _range(low: int, high: int, even: bool) -> str:
    return str(low) if low == high else f"an {'even ' if even else ''}integer from {low} to {high}"


def _wrong(component: str, key: str, expected: str, found: object) -> FormatError:
    return FormatError(f"{component} config: {key} does not fit", expected=expected, found=_short(found))


def _demand(component: str, config: Mapping[str, Any], names: list[str]) -> None:
    for name in names:
        if config.get(name) is None:
            raise FormatError(f"{component} config: key {name!r} is missing", expected="an integer", found="nothing")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _short(value: object) -> str:
    """A value from a file in an error message: quoted, and cut if it is long."""
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else text[:76] + " ..."
