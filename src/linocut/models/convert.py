"""From dense to packed layers in memory, from a checkpoint to a network, and from a network to what a file holds.

`build_and_load` makes a network whose tensors are views of the memory-mapped checkpoint: packed weights and, unless a
dtype is asked for, dense ones too are never copied, so that processes share them and opening takes no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from linocut.errors import FormatError, PolicyError
from linocut.formats.checkpoint import Checkpoint, PackedEntry
from linocut.formats.names import BFLCheckpoint, is_bfl
from linocut.formats.packed import PackedTensor
from linocut.models.linear import (
    FakeQuantEmbedding,
    FakeQuantLinear,
    PackedEmbedding,
    PackedLinear,
    StoredEmbedding,
    StoredLinear,
)
from linocut.quantize.policy import DENSE, Policy
from linocut.quantize.rounding import quantize_tensor

Model = TypeVar("Model", bound=nn.Module)
Weights = Checkpoint | BFLCheckpoint
StateValue = np.ndarray | PackedTensor | tuple[np.ndarray, str]


# ---------------------------------------------------------------------------------------- dense to packed, in memory

def quantize_(model: nn.Module, policy: Policy, fake: bool = False, eps: float = 0.0, clip: float | None = None,
              method: str = "exact") -> dict[str, tuple[str, str]]:
    """Replace the layers that `policy` picks, in place, and return its decisions {module path: (encoding, reason)}.

    fake=False packs the weights (rounded by `method`); fake=True makes trainable layers that compute with quantized
    weights and keep the latent ones (the same Parameter objects), with mixing `eps` and gradient clipping `clip`.
    Raises PolicyError if the policy does not fit the model or picks a layer with a bias.
    """
    decisions = plan_layers(model, policy)
    for name, (encoding, _) in decisions.items():
        if encoding == DENSE:
            continue
        module: Any = model.get_submodule(name)
        if not fake:
            replace_packed(model, name, quantize_tensor(module.weight, encoding, method=method, name=name),
                           module.weight.device)
        elif isinstance(module, nn.Linear):
            _replace(model, name, FakeQuantLinear.from_linear(module, encoding, eps, clip).train(module.training))
        else:
            _replace(model, name, FakeQuantEmbedding.from_embedding(module, encoding, eps).train(module.training))
    return decisions


def plan_layers(model: nn.Module, policy: Policy) -> dict[str, tuple[str, str]]:
    """What `policy` decides of the Linears and Embeddings of `model`: {module path: (encoding, reason)}.

    Raises PolicyError if the policy does not fit the model or picks a layer with a bias.
    """
    layers = {name: module for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Embedding)}
    decisions = policy.plan({name: tuple(module.weight.shape) for name, module in layers.items()})
    for name, (encoding, reason) in decisions.items():
        if encoding != DENSE and getattr(layers[name], "bias", None) is not None:
            raise PolicyError(f"{name} has a bias, which packed layers do not; make it dense ({reason})")
    return decisions


def replace_packed(model: nn.Module, name: str, packed: PackedTensor, device: torch.device | str = "cpu") -> None:
    """Put a packed layer with the weight `packed` where `model` has the Linear or Embedding `name`."""
    module = model.get_submodule(name)
    kind = PackedLinear if isinstance(module, nn.Linear) else PackedEmbedding
    _replace(model, name, kind.from_packed(packed).to(device).train(module.training))


def set_eps(model: nn.Module, eps: float) -> None:
    """Set the mixing of the latent weight in every fake-quantized layer (annealing: from about 0.5 down to 0)."""
    for module in model.modules():
        if isinstance(module, FakeQuantLinear | FakeQuantEmbedding):
            module.eps = eps


def set_rounding(model: nn.Module, method: str) -> None:
    """Set how every fake-quantized ternary Linear rounds (`quantize.rounding.FAKE_METHODS`); the other encodings have
    one rounding each."""
    for module in model.modules():
        if isinstance(module, FakeQuantLinear) and module.encoding == "ternary":
            module.method = method


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


# -------------------------------------------------------------------------------------------- checkpoint to network

def tensor_from(checkpoint: Weights, name: str) -> Tensor:
    """Tensor `name` as a view of the memory map, in its stored dtype."""
    tensor = torch.from_numpy(checkpoint.array(name))
    return tensor.view(torch.bfloat16) if checkpoint.info(name).dtype == "BF16" else tensor


def build_and_load(model_cls: Callable[..., Model], config: Any, checkpoint: Weights,
                   dtype: torch.dtype | None = None, compute_dtype: torch.dtype | None = None,
                   **arguments: Any) -> Model:
    """A network `model_cls(config, **arguments)` on the CPU, in eval mode, with the weights of `checkpoint`.

    Layers that the checkpoint holds packed become packed layers. Dense floating-point tensors are cast to `dtype`, or
    without one stay as they are stored, and their Linears compute in the dtype of the activations. Embedding rows come
    out in `compute_dtype` (if not given: `dtype`, or else float32). Raises FormatError that names the tensor if the
    checkpoint misses one, holds one that the network does not know, or one of another shape. A FLUX.2 single file with
    the original names is accepted.
    """
    compute_dtype = compute_dtype or dtype or torch.float32
    if isinstance(checkpoint, Checkpoint) and is_bfl(checkpoint.names):
        checkpoint = BFLCheckpoint(checkpoint)
    with torch.device("meta"), _NoInitialization():
        model = model_cls(config, **arguments)
    rename: Callable[[str], str | None] = getattr(model, "rename_key", lambda name: name)
    wanted = {rename(name): name for name in checkpoint.names}
    wanted.pop(None, None)
    place_packed(model, checkpoint.packed, compute_dtype, rename)
    if dtype is None:
        _place_stored(model, compute_dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = sorted(set(shapes) - set(wanted))
    if missing:
        raise FormatError(f"tensor is missing ({len(missing)} in all)", tensor=missing[0],
                          expected=list(shapes[missing[0]]), found="nothing",
                          advice="is this the checkpoint of another model, or an incomplete download?")
    state: dict[str, Tensor] = {}
    for target, name in wanted.items():
        assert target is not None
        tensor = tensor_from(checkpoint, name)
        if target in shapes and tuple(tensor.shape) != shapes[target]:
            raise FormatError("tensor has another shape than the config says", tensor=name,
                              expected=list(shapes[target]), found=list(tensor.shape))
        packed_part = target.rpartition(".")[2] in ("codes", "scales", "zeros")
        if dtype is not None and tensor.is_floating_point() and not packed_part:
            tensor = tensor.to(dtype)
        state[target] = tensor
    result = model.load_state_dict(state, strict=False, assign=True)
    if result.unexpected_keys:
        extra = sorted(result.unexpected_keys)
        raise FormatError(f"tensor is not part of this network ({len(extra)} in all)", tensor=extra[0],
                          advice="is this the checkpoint of another model?")
    left = [name for name, tensor in _tensors(model) if tensor.is_meta]
    if left:
        raise FormatError("tensor has no value after loading", tensor=left[0])
    return model.requires_grad_(False).eval()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def place_packed(model: nn.Module, packed: Mapping[str, PackedEntry], compute_dtype: torch.dtype,
                 rename: Callable[[str], str | None] = lambda name: name) -> None:
    """Put packed layers without values (on the meta device) where `packed`, a file's weights by module, has them.

    Embedding rows will come out in `compute_dtype`. `rename` gives the network's name of a tensor of the file, or None
    for one that it has no use for. Raises FormatError for a weight that fits no layer.
    """
    modules = dict(model.named_modules())
    for name, entry in packed.items():
        renamed = rename(f"{name}.codes")
        if renamed is None:
            continue
        target, shape = renamed.removesuffix(".codes"), entry.shape
        module = modules.get(target)
        if not isinstance(module, nn.Linear | nn.Embedding) or getattr(module, "bias", None) is not None:
            raise FormatError("packed weight for something that is no Linear without bias and no Embedding",
                              tensor=name, found=type(module).__name__ if module is not None else "no such layer",
                              advice="is this the checkpoint of another model?")
        if tuple(module.weight.shape) != shape:
            raise FormatError("packed weight has another shape than the config says", tensor=name,
                              expected=list(module.weight.shape), found=list(shape))
        with torch.device("meta"), _NoInitialization():
            if isinstance(module, nn.Linear):
                _replace(model, target, PackedLinear(shape[1], shape[0], entry.encoding))
            else:
                embedding = PackedEmbedding(shape[0], shape[1], entry.encoding)
                embedding.dtype = compute_dtype
                _replace(model, target, embedding)


def _place_stored(model: nn.Module, compute_dtype: torch.dtype) -> None:
    with torch.device("meta"), _NoInitialization():
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear:
                _replace(model, name, StoredLinear(module.in_features, module.out_features, module.bias is not None))
            elif type(module) is nn.Embedding:
                _replace(model, name, StoredEmbedding(module.num_embeddings, module.embedding_dim,
                                                      dtype_out=compute_dtype))


class _NoInitialization(TorchFunctionMode):
    """Skips random initialization inside the context.

    Drawing random numbers on the meta device makes torch import its compiler: two seconds, for values nobody reads.
    """

    _DRAWS = frozenset(("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_",
                        "xavier_uniform_", "xavier_normal_"))

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self._DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


# -------------------------------------------------------------------------------------------------- network to file

def packed_state(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, StateValue]:
    """What `formats.checkpoint.write_checkpoint` stores of a network: {name: array or PackedTensor}.

    Packed and fake-quantized layers come under their module path, as PackedTensor (fake ones by tied rounding, which
    is what they trained with); all else under its state-dict name, cast to `dtype` if one is given. bfloat16 becomes
    a pair (uint16 array, "BF16").
    """
    kinds = (PackedLinear, PackedEmbedding, FakeQuantLinear, FakeQuantEmbedding)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    inside = {f"{name}.{key}" for name, module in packed.items() for key in module.state_dict()}
    state: dict[str, StateValue] = {name: module.to_packed() for name, module in packed.items()}
    for name, tensor in model.state_dict().items():
        if name in inside:
            continue
        value = tensor.detach().cpu().contiguous()
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        if value.dtype == torch.bfloat16:
            state[name] = (value.view(torch.uint16).numpy(), "BF16")
        else:
            state[name] = value.numpy()
    return state
