"""Streaming quantization: same bytes from any naming, nothing half-written, resumable, honest reports."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_dense import TINY

from linocut.errors import FormatError, LinocutError, PolicyError, UsageError
from linocut.formats.checkpoint import Checkpoint, write_checkpoint
from linocut.formats.folder import ModelFolder
from linocut.formats.packed import dequantize
from linocut.models.convert import build_and_load
from linocut.models.flux2 import Flux2Config, Flux2Transformer
from linocut.quantize import stream
from linocut.quantize.policy import Policy, Rule
from linocut.quantize.rounding import quantize_tensor
from linocut.quantize.source import flux2_config
from linocut.quantize.stream import quantize_folder

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


class Stop(Exception):
    pass


def stop_after(count: int):
    calls = []

    def on_progress(done: int, total: int, name: str) -> None:
        calls.append(name)
        if len(calls) == count:
            raise Stop
    return on_progress


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("encoding", ["binary", "ternary"])
def test_a_model_folder_is_quantized_whole(dense_model, tmp_path, encoding):
    report = quantize_folder(dense_model, tmp_path / "out", encoding)
    folder = ModelFolder.open(tmp_path / "out")
    with folder.checkpoint("transformer") as packed, Checkpoint.open(dense_model / "transformer") as dense:
        assert packed.verify() == len(packed.names)
        assert len(packed.packed) == 12 * 2 + 2 * 3
        assert {entry.encoding for entry in packed.packed.values()} == {encoding}
        for name, entry in packed.packed.items():
            bits = torch.from_numpy(dense.array(f"{name}.weight")).view(torch.bfloat16)
            expected = quantize_tensor(bits, encoding)
            found = packed.packed_tensor(name)
            assert found.shape == entry.shape == tuple(bits.shape)
            assert np.array_equal(found.codes, expected.codes)
            assert np.array_equal(found.scales, expected.scales)
        for name in packed.names:
            if name.endswith(".weight"):
                assert packed.info(name).dtype == "BF16"
                assert np.array_equal(packed.array(name), dense.array(name))
        totals = report.totals("transformer")
        assert totals["tensor_bytes"] == packed.tensor_nbytes
        assert totals["packed_layers"] == 30
        model = build_and_load(Flux2Transformer, Flux2Config.from_dict(folder.config("transformer")), packed)
    assert type(model.transformer_blocks[0].ff.linear_in).__name__ == "PackedLinear"
    config = folder.config("transformer")["quantization_config"]
    assert config["quant_method"] == "linocut"
    assert Policy.from_dict(config["policy"]) == Policy.preset("flux2", encoding)
    assert folder.settings == ModelFolder.open(dense_model).settings
    assert hidden(tmp_path) == []
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in dense_model.iterdir())


@pytest.mark.parametrize("encoding", ["binary", "ternary"])
def test_scales_can_be_tied_in_pairs(dense_model, tmp_path, encoding):
    with pytest.raises(Stop):  # a run without does not go on with what one with tied scales has begun
        quantize_folder(dense_model, tmp_path / "out", encoding, on_progress=stop_after(4))
    report = quantize_folder(dense_model, tmp_path / "out", encoding, tie_scales=True)
    assert report.resumed == 0
    plain = quantize_folder(dense_model, tmp_path / "plain", encoding)
    assert (plain.totals("transformer")["relative_error"] < report.totals("transformer")["relative_error"]
            < 1.05 * plain.totals("transformer")["relative_error"])
    folder = ModelFolder.open(tmp_path / "out")
    assert folder.config("transformer")["quantization_config"]["groups_per_scale"] == 2
    assert "groups_per_scale" not in folder.config("text_encoder")["quantization_config"]
    assert "groups_per_scale" not in ModelFolder.open(tmp_path / "plain").config("transformer")["quantization_config"]
    with folder.checkpoint("transformer") as packed, Checkpoint.open(dense_model / "transformer") as dense:
        for name in packed.packed:
            found = packed.packed_tensor(name)
            bits = torch.from_numpy(dense.array(f"{name}.weight")).view(torch.bfloat16)
            assert np.array_equal(found.scales, quantize_tensor(bits, encoding, groups_per_scale=2).scales)
            even = found.scales.shape[1] // 2 * 2
            assert np.array_equal(found.scales[:, 0:even:2], found.scales[:, 1:even:2])


def test_errors_in_the_report_are_those_of_the_stored_weights(dense_model, tmp_path):
    report = quantize_folder(dense_model, tmp_path / "out", "ternary")
    tensor = next(t for t in report.tensors if t.name.endswith("to_qkv_mlp_proj"))
    with Checkpoint.open(dense_model / "transformer") as dense, Checkpoint.open(tmp_path / "out/transformer") as packed:
        w = torch.from_numpy(dense.array(f"{tensor.name}.weight")).view(torch.bfloat16).double().numpy()
        q = dequantize(packed.packed_tensor(tensor.name))
    assert tensor.relative_error == pytest.approx(((w - q) ** 2).sum() / (w**2).sum(), rel=1e-5)
    # at 128 columns 103 + 2 = 28 bytes hold 128 weights: 26 of codes and 2 of scale
    assert tensor.bits_per_weight == 8 * 28 / 128
    data = json.loads(json.dumps(report.to_dict()))
    assert data["totals"]["transformer"]["packed_layers"] == 30
    assert 0.15 < data["totals"]["transformer"]["relative_error"] < 0.22


def test_the_text_encoder_is_cut_and_packed_or_kept(dense_model, tmp_path):
    report = quantize_folder(dense_model, tmp_path / "packed", "binary")
    with Checkpoint.open(tmp_path / "packed/text_encoder") as packed:
        assert packed.verify()
        assert {entry.encoding for entry in packed.packed.values()} == {"affine4"}
        assert len(packed.packed) == 3 * 7 + 1
    assert report.totals("text_encoder")["relative_error"] < 0.02
    quantize_folder(dense_model, tmp_path / "kept", "binary", text_encoder="keep")
    kept, source = (root / "text_encoder/model.safetensors" for root in (tmp_path / "kept", dense_model))
    assert digest(kept) == digest(source)
    assert os.path.samefile(kept, source), "weights that stay as they are are linked, not copied"


def test_text_encoder_names_do_not_matter(dense_model, tmp_path):
    shutil.copytree(dense_model, tmp_path / "in")
    file = tmp_path / "in/text_encoder/model.safetensors"
    with Checkpoint.open(file) as plain:
        tensors = {f"model.{name}": (plain.array(name).copy(), "BF16") for name in plain.names}
    # what a whole Qwen3ForCausalLM also holds: later layers, the final norm, the head
    extra = {name.replace("layers.0.", "layers.3."): value for name, value in tensors.items() if "layers.0." in name}
    norm = next(value for name, value in tensors.items() if name.endswith("layers.0.input_layernorm.weight"))
    write_checkpoint(file, tensors | extra | {"model.norm.weight": norm,
                                              "lm_head.weight": tensors["model.embed_tokens.weight"]})
    quantize_folder(dense_model, tmp_path / "a", "binary")
    quantize_folder(tmp_path / "in", tmp_path / "b", "binary")
    a, b = (tmp_path / name / "text_encoder/model.safetensors" for name in "ab")
    assert digest(a) == digest(b)


def test_both_namings_and_any_thread_count_give_the_same_bytes(dense_model, original_file, tmp_path):
    quantize_folder(dense_model, tmp_path / "a", "ternary", threads=1)
    quantize_folder(original_file, tmp_path / "b", "ternary", threads=3)
    quantize_folder(dense_model / "transformer", tmp_path / "c", "ternary")
    assert digest(tmp_path / "a" / WEIGHTS) == digest(tmp_path / "b" / WEIGHTS) == digest(tmp_path / "c" / WEIGHTS)
    config = ModelFolder.open(tmp_path / "b").config("transformer")
    assert Flux2Config.from_dict(config) == TINY.transformer, "the config is read off the shapes"


def test_an_interrupted_run_leaves_nothing_and_resumes(dense_model, tmp_path):
    whole = quantize_folder(dense_model, tmp_path / "whole", "ternary")
    for stop in (7, 60):  # in the transformer, then in the text encoder
        with pytest.raises(Stop):
            quantize_folder(dense_model, tmp_path / "out", "ternary", on_progress=stop_after(stop))
        assert not (tmp_path / "out").exists()
        assert hidden(tmp_path) == [".out.partial"]
    again = quantize_folder(dense_model, tmp_path / "out", "ternary")
    assert again.resumed >= 60
    assert again.tensors == whole.tensors
    for file in (WEIGHTS, "text_encoder/model.safetensors", "transformer/config.json"):
        assert digest(tmp_path / "out" / file) == digest(tmp_path / "whole" / file)
    assert hidden(tmp_path) == []


def test_another_source_or_option_starts_over(dense_model, tmp_path):
    shutil.copytree(dense_model, tmp_path / "in")
    for change in ("encoding", "time"):
        with pytest.raises(Stop):
            quantize_folder(tmp_path / "in", tmp_path / "out", "ternary", on_progress=stop_after(9))
        if change == "time":
            os.utime(tmp_path / "in" / WEIGHTS, ns=(1, 1))
        report = quantize_folder(tmp_path / "in", tmp_path / "out", "binary" if change == "encoding" else "ternary")
        assert report.resumed == 0
        shutil.rmtree(tmp_path / "out")


def test_refusals(dense_model, tmp_path):
    out = tmp_path / "out"
    quantize_folder(dense_model, out, "ternary")
    before = digest(out / WEIGHTS)
    with pytest.raises(UsageError, match="exists already"):
        quantize_folder(dense_model, out, "binary")
    with pytest.raises(UsageError, match="already quantized"):
        quantize_folder(out, tmp_path / "twice", "binary")
    assert digest(out / WEIGHTS) == before
    quantize_folder(dense_model, out, "binary", force=True)
    assert digest(out / WEIGHTS) != before
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/diary.txt").write_text("dear diary")
    with pytest.raises(UsageError, match="only model folders"):
        quantize_folder(dense_model, tmp_path / "precious", "binary", force=True)
    with pytest.raises(UsageError, match="inside one another"):
        quantize_folder(dense_model, dense_model / "vae/x", "binary")
    with pytest.raises(UsageError, match="no such folder"):
        quantize_folder(dense_model, tmp_path / "no/where", "binary")
    with pytest.raises(LinocutError, match="nowhere"):
        quantize_folder(tmp_path / "nowhere", tmp_path / "x", "binary")
    (tmp_path / "weights.ckpt").write_bytes(b"\x80\x02}")
    with pytest.raises(UsageError, match="pickles"):
        quantize_folder(tmp_path / "weights.ckpt", tmp_path / "x", "binary")
    (tmp_path / ".mine.partial").mkdir()
    (tmp_path / ".mine.partial/notes").write_text("mine")
    with pytest.raises(UsageError, match="not made by this program"):
        quantize_folder(dense_model, tmp_path / "mine", "binary")
    assert (tmp_path / ".mine.partial/notes").exists()
    assert not (tmp_path / "x").exists()


def test_a_full_disk_is_noticed_before_the_work(dense_model, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("linocut.quantize.workplace.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UsageError, match="not enough room"):
        quantize_folder(dense_model, tmp_path / "out", "binary")
    assert not (tmp_path / "out").exists()


def test_a_second_run_on_the_same_destination_is_refused(dense_model, tmp_path):
    def nested(done: int, total: int, name: str) -> None:
        with pytest.raises(UsageError, match="another process"):
            quantize_folder(dense_model, tmp_path / "out", "binary")
        raise Stop
    with pytest.raises(Stop):
        quantize_folder(dense_model, tmp_path / "out", "binary", on_progress=nested)


def test_damaged_weights_are_refused_by_name(tmp_path):
    bad = np.zeros((128, 128), dtype=np.float32)
    for name in ("blocks.0.w", "head"):
        tensors = {"blocks.0.w.weight": bad.copy(), "head.weight": bad.copy()}
        tensors[f"{name}.weight"][3, 5] = np.nan
        write_checkpoint(tmp_path / "m.safetensors", tensors)
        with pytest.raises(FormatError, match=rf"{name}.*finite"):
            quantize_folder(tmp_path / "m.safetensors", tmp_path / "out", "binary",
                            Policy((Rule(r"blocks\..*", "binary"),)))
    write_checkpoint(tmp_path / "m.safetensors", {"blocks.0.w.weight": np.ones((128, 128), dtype=np.int8)})
    with pytest.raises(FormatError, match="dtype"):
        quantize_folder(tmp_path / "m.safetensors", tmp_path / "out", "binary",
                        Policy((Rule(r"blocks\..*", "binary"),)))


def test_any_other_model_by_a_policy(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"blocks.{i}.{name}": rng.standard_normal(shape).astype(np.float32) for i in range(2)
               for name, shape in {"qkv.weight": (384, 256), "qkv.bias": (384,), "odd.weight": (64, 100)}.items()}
    write_checkpoint(tmp_path / "dit.safetensors", tensors | {"count": np.array(3)})
    with pytest.raises(PolicyError, match="policy file"):
        quantize_folder(tmp_path / "dit.safetensors", tmp_path / "out", "ternary")
    report = quantize_folder(tmp_path / "dit.safetensors", tmp_path / "out", "ternary",
                             Policy((Rule(r"blocks\..*", "ternary"),), name="dit"))
    reasons = {t.name: (t.encoding, t.reason) for t in report.tensors}
    assert reasons["blocks.0.qkv"] == ("ternary", r"rule blocks\..*")
    assert reasons["blocks.1.odd.weight"] == ("dense", "100 inputs are no multiple of 128")
    assert reasons["blocks.0.qkv.bias"] == ("dense", "not a weight matrix")
    with Checkpoint.open(tmp_path / "out/transformer") as checkpoint:
        assert sorted(checkpoint.packed) == ["blocks.0.qkv", "blocks.1.qkv"]
        assert int(checkpoint.array("count")) == 3


def test_kleins_config_is_read_off_its_shapes():
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in Flux2Transformer(Flux2Config()).state_dict().items()}
    assert Flux2Config.from_dict(flux2_config(shapes)) == Flux2Config()
    assert flux2_config({"blocks.0.qkv.weight": (3, 3)}) == {}
    ends = {name: shape for name, shape in shapes.items() if "blocks." not in name}
    assert flux2_config(ends | {"a.attn.norm_q.weight": (128,)}) == {}  # neither an MLP nor a fused projection
    assert flux2_config(ends | {"a.attn.norm_q.weight": (), "a.ff.linear_out.weight": (3,)}) == {}


class Elsewhere:
    """A solver that rounds nothing itself and computes where tensors have no values."""

    identity, device, summary = "elsewhere", torch.device("meta"), {}

    def scratch_nbytes(self, source, encodings):
        return 0

    def solve(self, source, encodings, work, on_progress):
        return self

    def weight(self, name):
        return None


def test_the_text_encoder_is_rounded_where_a_solver_computes(dense_model, tmp_path, monkeypatch):
    seen = []

    def rounded(w, encoding, *rest):
        seen.append((encoding, w.device.type))
        return quantize_tensor(torch.zeros(w.shape), encoding, *rest)

    monkeypatch.setattr(stream, "quantize_tensor", rounded)
    quantize_folder(dense_model, tmp_path / "out", "binary", solver=Elsewhere())
    assert {where for encoding, where in seen if encoding == "affine4"} == {"meta"}
    assert {where for encoding, where in seen if encoding == "binary"} == {"cpu"}
