"""linocut's models in diffusers: importing this module registers them.

    import linocut.integrations.diffusers
    pipe = diffusers.Flux2KleinPipeline.from_pretrained("klein-ternary")

The networks are diffusers' and transformers' own, with linocut's packed layers in them, so all that these libraries do
with a pipeline (callbacks, offloading, schedulers) goes on working, and linocut's kernels compute. Dense weights are
quantized as they are loaded:

    transformer = diffusers.Flux2Transformer2DModel.from_pretrained(
        "black-forest-labs/FLUX.2-klein-4B", subfolder="transformer",
        quantization_config=LinocutConfig(encoding="ternary"))

diffusers has no public way to register a quantizer, so two entries are written into its tables.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from linocut.errors import FormatError
from linocut.formats.folder import SETTINGS_KEY, ModelFolder
from linocut.formats.header import strict_json
from linocut.formats.timestep_table import CONFIG_KEY, WEIGHTS_FILE, has_table
from linocut.integrations.huggingface import (
    METHOD,
    PackedFiles,
    check_complete,
    require_accelerate,
    required,
    save_as_linocut,
)
from linocut.integrations.transformers import LinocutConfig, LinocutTextQuantizer
from linocut.models.convert import plan_layers, replace_packed
from linocut.quantize.policy import DENSE
from linocut.quantize.rounding import quantize_tensor

__all__ = ["LinocutConfig", "LinocutQuantizer", "LinocutTextQuantizer", "pipeline_arguments"]

_VERSIONS = ">=0.42,<0.44"
DiffusersQuantizer, QUANTIZERS, CONFIGS = (
    *required("diffusers", "diffusers.quantizers.base", "DiffusersQuantizer", versions=_VERSIONS),
    *required("diffusers", "diffusers.quantizers.auto", "AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING",
              versions=_VERSIONS))
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def pipeline_arguments(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """What to call `Flux2KleinPipeline` with, so that it draws as linocut does: size, text length and layers; and
    steps and guidance, unless the model is not distilled and does not say them.

    diffusers' own defaults are those of the undistilled klein: 50 steps at guidance 4 and 1024 px.
    """
    folder = ModelFolder.open(name_or_path)
    settings = folder.settings
    width, height = settings["default_size"]
    arguments = {"width": width, "height": height, "max_sequence_length": settings["text_length"],
                 "text_encoder_out_layers": tuple(settings["text_taps"])}
    own = folder.index.get(SETTINGS_KEY, {})
    if settings["is_distilled"] or {"default_steps", "default_guidance"} <= own.keys():
        arguments |= {"num_inference_steps": settings["default_steps"],
                      "guidance_scale": 1.0 if settings["is_distilled"] else settings["default_guidance"]}
    return arguments


class LinocutQuantizer(DiffusersQuantizer):  # type: ignore[misc, valid-type]
    """Puts packed layers into diffusers' transformer, from a linocut folder or from dense weights."""

    requires_calibration = False

    def __init__(self, quantization_config: LinocutConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.files: PackedFiles | None = None  # while weights are loaded
        self.metadata: dict[str, str] = {}  # of the files, beside what linocut writes itself
        self._decisions: dict[str, tuple[str, str]] = {}
        self._has_table = False
        self._beside: list[str] = []  # tensors of the file beside a timestep table

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        require_accelerate()

    # --- before the weights --------------------------------------------------------------------------------------

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[Any]) -> list[str]:
        """Open the files as linocut does; add what lies beside a timestep table to the names that will be loaded."""
        if self.pre_quantized:
            self.files = PackedFiles(checkpoint_files)
            config = self.files.place / "config.json"
            self._has_table = config.is_file() and has_table(_json(config), config)
            if self._has_table and (self.files.place / WEIGHTS_FILE).is_file():
                self._beside = self.files.add(self.files.place / WEIGHTS_FILE)
            settings = _settings_beside(self.files.place)
            if settings is not None:
                self.quantization_config.settings = settings
        return [*loaded_keys, *self._beside]

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        if self.files is None:
            self._decisions = plan_layers(model, self.quantization_config.policy)
            return
        self.files.place_layers(model, torch.float32)
        table_alone = self._has_table and not self._beside
        check_complete(model, self.files.names, self.files.place, (
            f"this model came with a timestep table alone, which linocut draws with and diffusers cannot; get "
            f"transformer/{WEIGHTS_FILE}, too, or use linocut.Pipeline") if table_alone else "get the whole model")

    # --- the weights ---------------------------------------------------------------------------------------------

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Hand over the tensors beside a timestep table together with the first file."""
        if self.files is not None and self._beside:
            state_dict = state_dict | {name: self.files.tensor(name) for name in self._beside}
            self._beside = []
        return state_dict

    def check_if_quantized_param(self, model: nn.Module, param_value: Tensor, param_name: str,
                                 state_dict: dict[str, Tensor], **_: Any) -> bool:
        module, kind = param_name.rpartition(".")[::2]
        if self.files is not None:
            return module in self.files.packed and kind != "weight"
        return kind == "weight" and self._decisions.get(module, (DENSE,))[0] != DENSE

    def create_quantized_param(self, model: nn.Module, param_value: Tensor, param_name: str,
                               target_device: str | torch.device, state_dict: dict[str, Tensor],
                               unexpected_keys: list[str] | None = None, **_: Any) -> None:
        module, kind = param_name.rpartition(".")[::2]
        # `param_value` was cast by diffusers already; the dict has what the file has.
        if self.files is not None:
            setattr(model.get_submodule(module), kind, self.files.tensor(param_name).to(target_device))
            return
        packed = quantize_tensor(state_dict[param_name], self._decisions[module][0], name=module)
        replace_packed(model, module, packed, target_device)

    # --- afterwards ----------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
        if left:
            raise FormatError("tensor has no value after loading", tensor=left[0], advice="get the whole model")
        if self.files is not None:
            self.metadata, self.files = self.files.metadata, None  # a mapped file could not be copied with the model
        model.save_pretrained = MethodType(_save, model)  # type: ignore[assignment]
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _settings_beside(transformer: Path) -> dict[str, Any] | None:
    """How the model is used, if the folder of its transformer lies in that of a whole model."""
    index = transformer.parent / "model_index.json"
    settings = _json(index).get(SETTINGS_KEY) if index.is_file() else None
    return settings if isinstance(settings, dict) else None


def _json(path: Path) -> dict[str, Any]:
    value = strict_json(path.read_bytes(), path, "file")
    return value if isinstance(value, dict) else {}


def _save(model: Any, save_directory: str | Path, is_main_process: bool = True, save_function: Any = None,
          safe_serialization: bool = True, variant: str | None = None, max_shard_size: int | str | None = None,
          push_to_hub: bool = False, **kwargs: Any) -> None:
    """Save the transformer in linocut's format, one file whatever `max_shard_size`; see `save_as_linocut`."""
    if not is_main_process:
        return

    def config() -> dict[str, Any]:
        # All tensors are in the one file now, so there is no table any more.
        return {key: value for key, value in json.loads(model.to_json_string()).items() if key != CONFIG_KEY}

    save_as_linocut(model, save_directory, _WEIGHTS, config, model.hf_quantizer.metadata,
                    {"safe_serialization": safe_serialization, "variant": variant, "push_to_hub": push_to_hub})


if METHOD not in CONFIGS:
    CONFIGS[METHOD] = LinocutConfig
if METHOD not in QUANTIZERS:
    QUANTIZERS[METHOD] = LinocutQuantizer
