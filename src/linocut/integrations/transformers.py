"""linocut's text encoders in transformers: importing this module registers them.

    import linocut.integrations.transformers
    encoder = transformers.Qwen3ForCausalLM.from_pretrained("klein-ternary/text_encoder")

The network is transformers' own Qwen3 with linocut's four-bit layers in it. What a linocut folder cut off (layers after
the last one that is used, the final norm, the language head) is not made up: the layers are left out, the norm lets
everything pass, so that the last hidden state is that of the last layer as FLUX.2 wants it, and the logits are empty.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from linocut.errors import UsageError
from linocut.integrations.huggingface import (
    METHOD,
    ConfigBase,
    PackedFiles,
    check_complete,
    required,
    save_as_linocut,
)
from linocut.models.convert import quantize_

__all__ = ["LinocutConfig", "LinocutTextQuantizer"]

_VERSIONS = ">=5,<6"
HfQuantizer, QuantizationConfigMixin, register_quantizer, register_config, QUANTIZERS, CONFIGS = (
    *required("transformers", "transformers.quantizers", "HfQuantizer", versions=_VERSIONS),
    *required("transformers", "transformers.utils.quantization_config", "QuantizationConfigMixin", versions=_VERSIONS),
    *required("transformers", "transformers.quantizers.auto", "register_quantizer", "register_quantization_config",
              "AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING", versions=_VERSIONS))
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")


class LinocutConfig(ConfigBase, QuantizationConfigMixin):  # type: ignore[misc, valid-type]
    __doc__ = ConfigBase.__doc__

    __eq__ = ConfigBase.__eq__
    __hash__ = None
    __repr__ = ConfigBase.__repr__


class NoHead(nn.Module):
    """Stands for a language head: a text encoder makes features, and its logits are empty."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_empty((*x.shape[:-1], 0))


class LinocutTextQuantizer(HfQuantizer):  # type: ignore[misc, valid-type]
    """Puts packed layers into transformers' Qwen3, from a linocut folder or from dense weights."""

    requires_calibration = False

    def __init__(self, quantization_config: LinocutConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._files: PackedFiles | None = None  # while weights are loaded
        self.metadata: dict[str, str] = {}  # of the files, beside what linocut writes itself

    def update_attn_implementation(self, config: Any) -> Any:
        """Have float32 where neither the caller nor config.json names a dtype, as diffusers does beside this network.

        transformers would take that of the first tensor in the file, and this is the only hook before it looks there.
        """
        if self.pre_quantized and config.dtype is None:
            config.dtype = torch.float32
        return config

    def _process_model_before_weight_loading(self, model: nn.Module, dtype: torch.dtype | None = None,
                                             checkpoint_files: list[str] | None = None, **_: Any) -> None:
        encoder = _encoder(model)
        if not self.pre_quantized:
            return
        if not checkpoint_files:
            raise UsageError("a packed text encoder is loaded from its folder, not from a state dict")
        self._files = files = PackedFiles(checkpoint_files)
        names = {files.renamed(name) for name in files.names}
        layers = 1 + max((int(found[1]) for found in map(_LAYER.match, names) if found), default=-1)
        del encoder.layers[layers:]
        if "norm.weight" not in names:
            encoder.norm = nn.Identity()
        files.place_layers(encoder, dtype or torch.float32)
        check_complete(encoder, names, files.place)
        _drop_head(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        encoder = _encoder(model)
        if self._files is not None:
            self._files.fill(encoder)
            self.metadata, self._files = self._files.metadata, None  # a mapped file could not be copied with the model
        else:
            dtype = next(parameter.dtype for parameter in encoder.parameters())
            quantize_(encoder, self.quantization_config.policy)
            encoder.to(dtype=dtype)  # embeddings give rows of the dtype that they are cast to
            _drop_head(model)
        model.save_pretrained = MethodType(_save, model)  # type: ignore[assignment]
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _encoder(model: nn.Module) -> Any:
    """The stack of layers inside a model of transformers. Raises UsageError if it is none of Qwen3's."""
    encoder = getattr(model, "model", model)
    if type(encoder).__name__ != "Qwen3Model":
        raise UsageError(f"linocut's text encoders are Qwen3 models (found {type(model).__name__}); use "
                         "Qwen3ForCausalLM or Qwen3Model")
    return encoder


def _drop_head(model: Any) -> None:
    """Do without a language head, which would be tied to an embedding that is packed now."""
    if hasattr(model, "lm_head"):
        model.lm_head = NoHead()
        model.all_tied_weights_keys, model._tied_weights_keys = {}, {}


def _save(model: Any, save_directory: str | Path, is_main_process: bool = True, variant: str | None = None,
          max_shard_size: int | str | None = None, push_to_hub: bool = False, **kwargs: Any) -> None:
    """Save the text encoder in linocut's format, one file whatever `max_shard_size`; see `save_as_linocut`."""
    if not is_main_process:
        return
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    save_as_linocut(_encoder(model), save_directory, "model.safetensors", model.config.to_json_string,
                    model.hf_quantizer.metadata, {**kwargs, "variant": variant, "push_to_hub": push_to_hub})


if METHOD not in CONFIGS:
    register_config(METHOD)(LinocutConfig)
if METHOD not in QUANTIZERS:
    register_quantizer(METHOD)(LinocutTextQuantizer)
