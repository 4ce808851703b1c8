"""PrismML's published folders, built at small size to their description: names of files, keys and dtypes."""

import json
import shutil

import numpy as np
import pytest
import torch
from packed_samples import assert_same

from linocut.errors import FormatError, UsageError
from linocut.formats.checkpoint import Checkpoint, write_checkpoint
from linocut.formats.gemlite import gemlite_output
from linocut.formats.mlx import mlx_output
from linocut.formats.packed import PackedTensor, dequantize
from linocut.formats.weight import to_bfloat16, weights_of
from linocut.integrations.convert import convert
from linocut.integrations.publish import prepare
from linocut.integrations.recognize import open_model

WEIGHTS = "diffusion_pytorch_model.safetensors"


def bfloat_scales(root):
    """The transformer's weights with scales that bfloat16 holds, as trained ones released in it have."""
    found = {}
    with Checkpoint.open(root / "transformer") as file:
        for name, weight in weights_of(file).items():
            block = weight.rows(0, weight.shape[0])
            if isinstance(block, PackedTensor):
                bits = block.scales.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
                block = PackedTensor(block.encoding, block.shape, block.codes.copy(),
                                     bits.view(np.float32).astype(np.float16))
                found[name] = (weight, block)
            else:
                found[name] = (weight, block.copy())
    return found


def frame(source, target, *folders):
    for name in ("model_index.json", "scheduler", "tokenizer", "vae"):
        path = source / name
        shutil.copytree(path, target / name) if path.is_dir() else shutil.copy(path, target / name)
    for folder in folders:
        (target / folder).mkdir()
        part = "text_encoder" if folder.startswith("text") else "transformer"
        shutil.copy(source / part / "config.json", target / folder / "config.json")


def check(source, target, weights):
    """The transformer that comes back has the published codes and scales."""
    report = convert(source, target, "linocut", lossy=True)
    with Checkpoint.open(target / "transformer") as file:
        for name, (_, block) in weights.items():
            if isinstance(block, PackedTensor):
                assert_same(file.packed_tensor(name), block)
    return report


def hqq_dict(values):
    """HQQ's dictionary for a matrix, rounded to nearest with a real zero point."""
    groups = values.reshape(-1, 64)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    scale = np.maximum(high - low, 1e-6) / 15
    zero = -low / scale
    codes = np.clip(np.rint(groups / scale + zero), 0, 15).astype(np.uint8)
    half = len(codes) // 2
    return {"W_q": torch.from_numpy(codes[:half] << 4 | codes[half:]), "scale": torch.from_numpy(scale).half(),
            "zero": torch.from_numpy(zero).half(), "shape": list(values.shape), "nbits": 4, "group_size": 64, "axis": 1,
            "packing": "4bit_u8"}


def test_mlx_release(packed_model, tmp_path):
    weights = bfloat_scales(packed_model)
    target = tmp_path / "bonsai"
    target.mkdir()
    frame(packed_model, target, "transformer-packed-mflux")
    tensors = {}
    for name, (weight, block) in weights.items():
        if not isinstance(block, PackedTensor):
            tensors[name] = (block, weight.kind)
            continue
        for (part, dtype, _), array in zip(mlx_output(name, weight).parts, mlx_output(name, weight).encode(block),
                                           strict=True):
            tensors[part] = (array, "U32") if dtype == "U32" else (to_bfloat16(array.astype(np.float32)), "BF16")
    write_checkpoint(target / "transformer-packed-mflux" / WEIGHTS, tensors)
    bits = 1 if packed_model.name == "binary" else 2
    (target / "transformer-packed-mflux" / "quantization_config.json").write_text(
        json.dumps({"bits": bits, "group_size": 128, "skip_patterns": ["norm_out"]}))
    model = open_model(target)
    assert model.transformer.form == "mlx"
    assert model.transformer.encodings == {packed_model.name}
    model.close()
    assert check(target, tmp_path / "x", weights).losses == []


def test_gemlite_release(packed_model, tmp_path):
    weights = bfloat_scales(packed_model)
    bits = 1 if packed_model.name == "binary" else 2
    target = tmp_path / "bonsai"
    target.mkdir()
    frame(packed_model, target, f"transformer-gemlite-int{bits}", "text_encoder-hqq-4bit")
    for name in ("model_index.json", "scheduler", "tokenizer"):  # not part of this release
        path = target / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    state = {}
    for name, (weight, block) in weights.items():
        if not isinstance(block, PackedTensor):
            state[name] = torch.from_numpy(block).view(torch.bfloat16)
            continue
        output = gemlite_output(name, weight)
        for (part, _, _), array in zip(output.parts, output.encode(block), strict=True):
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            state[part] = tensor.float() if tensor.is_floating_point() else tensor
    place = target / f"transformer-gemlite-int{bits}"
    torch.save(state, place / "state_dict.pt")
    (place / "quantization_config.json").write_text(json.dumps({"format": f"gemlite-int{bits}-g128", "bits": bits}))
    with Checkpoint.open(packed_model / "text_encoder") as file:
        modules = {}
        for name, weight in weights_of(file).items():
            block = weight.rows(0, weight.shape[0])
            if isinstance(block, PackedTensor):
                values = dequantize(block)
                modules[f"model.{name}"] = {"weight": torch.from_numpy(values).half()} if "embed" in name \
                    else hqq_dict(values)
            else:
                tensor = torch.from_numpy(np.asarray(block).copy())
                tensor = tensor.view(torch.bfloat16) if weight.kind == "BF16" else tensor
                modules[f"model.{name.removesuffix('.weight')}"] = {"weight": tensor.half()}
    torch.save(modules, target / "text_encoder-hqq-4bit" / "qmodel.pt")
    shutil.copytree(packed_model / "tokenizer", target / "text_encoder-hqq-4bit" / "tokenizer")
    with pytest.raises(UsageError, match="no whole zero points"):
        convert(target, tmp_path / "x", "linocut")
    with pytest.raises(UsageError, match=r"qmodel.pt, transformer-gemlite-int./state_dict.pt\); convert it"):
        prepare(target, "me/model")  # a push never takes pickles
    report = check(target, tmp_path / "x", weights)
    assert report.source_form == "gemlite"
    assert all(loss.endswith("four-bit weights rounded again") for loss in report.losses)
    assert (tmp_path / "x" / "tokenizer" / "tokenizer.json").is_file()


class Evil:
    def __reduce__(self):
        return (print, ("this must never be printed",))


@pytest.mark.parametrize("name", ["state_dict.pt", "qmodel.pt"])
def test_a_pickle_that_runs_code_is_refused(packed_model, tmp_path, capsys, name):
    torch.save({"a": Evil()}, tmp_path / name)
    with pytest.raises(FormatError, match="would run code"):
        open_model(tmp_path)
    assert "never" not in capsys.readouterr().out


def test_other_pickles_are_not_opened(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(UsageError, match="could run code"):
        open_model(tmp_path / "model.pt")
