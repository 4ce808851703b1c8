"""`linocut convert`: what comes back is the same, what cannot be held is refused, nothing is half-done."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from packed_samples import assert_same
from small_model import SMALL

from linocut.cli import main
from linocut.errors import FormatError, UsageError
from linocut.formats import writer
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.gemlite import gemlite_output
from linocut.formats.gguf import GGUFFile
from linocut.formats.packed import dequantize
from linocut.formats.weight import Weight
from linocut.integrations import convert as engine
from linocut.integrations.convert import convert
from linocut.integrations.targets import Options
from linocut.models.synthetic import write_synthetic
from linocut.quantize.policy import Policy
from linocut.quantize.stream import quantize_folder


def weights_file(root: Path, component: str = "transformer") -> Path:
    (file,) = (root / component).glob("*.safetensors")
    return file


def main_code(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


FORMS = ["linocut", "diffusers", "bfl", "gguf", "mlx", "gemlite"]


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back_gives_the_same_files(packed_model, tmp_path, form):
    there = convert(packed_model, tmp_path / "there", form)
    back = convert(tmp_path / "there", tmp_path / "back", "linocut")
    assert there.verified == there.packed + there.dense > 0
    assert back.source_form == {"diffusers": "unpacked"}.get(form, form)
    assert not there.losses + back.losses
    assert weights_file(tmp_path / "back").read_bytes() == weights_file(packed_model).read_bytes()
    if form != "diffusers":  # dense there, and so it stays
        assert weights_file(tmp_path / "back", "text_encoder").read_bytes() == weights_file(
            packed_model, "text_encoder").read_bytes()
    for part in ("vae", "tokenizer", "scheduler"):
        for file in (packed_model / part).iterdir():
            assert (tmp_path / "back" / part / file.name).read_bytes() == file.read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("form", FORMS)
def test_edges_of_eight_bits_keep_their_values(dense_model, tmp_path, form):
    """int8 comes back as codes where the form has room for them, else as equal values in float32."""
    model = tmp_path / "model"
    quantize_folder(dense_model, model, "ternary", Policy.preset("flux2", "ternary").with_edges("int8"))
    edges = ("context_embedder", "proj_out")  # the third one has 64 inputs
    if form == "gemlite":  # blocks of this model have rows of a single group, which gemlite stores otherwise
        weight = Weight("int8", (128, 384), lambda first, last: None, lambda: None)
        assert gemlite_output("context_embedder", weight).parts == (("context_embedder.weight", "F32", (128, 384)),)
        return
    there = convert(model, tmp_path / "there", form)
    convert(tmp_path / "there", tmp_path / "back", "linocut")
    dense = form in ("diffusers", "bfl", "gguf")
    assert any("eight-bit weights become" in note for note in there.notes) == dense
    with Checkpoint.open(model / "transformer") as source, Checkpoint.open(tmp_path / "back/transformer") as found:
        for name in edges:
            wanted = dequantize(source.packed_tensor(name))
            assert source.packed[name].encoding == "int8"
            if dense:
                assert found.info(f"{name}.weight").dtype == "F32"
                assert np.array_equal(found.array(f"{name}.weight"), wanted)
            else:
                assert_same(found.packed_tensor(name), source.packed_tensor(name))


@pytest.mark.parametrize("form", FORMS[:-1])  # rows of this model are a single group, which gemlite stores otherwise
def test_what_comes_back_draws_the_same_picture(tmp_path, form, tiny_model):
    from linocut.kernels.dispatch import use_kernel
    from linocut.pipeline.generate import Pipeline

    def draw(root):
        # The text encoder of the diffusers form stays dense, so packed layers must not round their activations either.
        with use_kernel("reference") if form == "diffusers" else nullcontext():
            return np.asarray(Pipeline.from_pretrained(str(root))("a red apple", seed=3).images[0])

    convert(tiny_model, tmp_path / "there", form)
    convert(tmp_path / "there", tmp_path / "back", "linocut")
    difference = np.abs(draw(tmp_path / "back").astype(int) - draw(tiny_model))
    assert difference.max() <= (1 if form == "diffusers" else 0)


@pytest.mark.parametrize("packed_model", ["ternary"], indirect=True)
@pytest.mark.parametrize("ternary_type", ["TQ1_0", "TQ2_0"])
def test_ternary_types_of_two_groups(tmp_path, packed_model, ternary_type):
    """Scales of their own are refused; those that quantization tied come back, and that they are tied is not lost."""
    kind = Options(ternary=ternary_type)
    with pytest.raises(FormatError, match="--tie-scales"):
        convert(packed_model, tmp_path / "x", "gguf", options=kind)
    assert not (tmp_path / "x").exists()
    write_synthetic(tmp_path / "dense", SMALL, "bf16")
    tied = tmp_path / "tied"
    assert main_code("quantize", tmp_path / "dense", tied, "--encoding", "ternary", "--tie-scales") == 0
    convert(tied, tmp_path / "y", "gguf", options=kind)
    with GGUFFile(tmp_path / "y" / "transformer.gguf") as file:
        assert {tensor.kind.name for tensor in file.tensors.values()} == {ternary_type, "BF16"}
    convert(tmp_path / "y", tmp_path / "z", "linocut")
    for part in ("transformer", "text_encoder"):
        assert weights_file(tmp_path / "z", part).read_bytes() == weights_file(tied, part).read_bytes()
        assert (tmp_path / "z" / part / "config.json").read_bytes() == (tied / part / "config.json").read_bytes()
    convert(tied, tmp_path / "w", "linocut")
    assert (tmp_path / "w/transformer/config.json").read_bytes() == (tied / "transformer/config.json").read_bytes()


def test_loss_must_be_asked_for(packed_model, tmp_path):
    with pytest.raises(UsageError, match="--lossy"):
        convert(packed_model, tmp_path / "x", "gguf", options=Options(dense="Q8_0"))
    report = convert(packed_model, tmp_path / "x", "gguf", options=Options(dense="Q8_0"), lossy=True)
    assert report.losses == ["dense tensors are rounded from BF16 to Q8_0"]
    with GGUFFile(tmp_path / "x" / "transformer.gguf") as file:
        assert file.tensors["img_in.weight"].kind.name == "Q8_0"


def test_a_dense_model_is_not_packed_by_conversion(dense_model, tmp_path):
    with pytest.raises(UsageError, match="linocut quantize"):
        convert(dense_model, tmp_path / "x", "linocut")
    report = convert(dense_model, tmp_path / "y", "gguf")
    assert (report.source_form, report.packed) == ("dense", 0)


def test_a_single_file_is_enough(packed_model, tmp_path):
    convert(packed_model, tmp_path / "x", "gguf")
    (tmp_path / "alone").mkdir()
    file = tmp_path / "alone" / "flux-2-klein-base.gguf"
    shutil.copy(tmp_path / "x" / "transformer.gguf", file)
    convert(file, tmp_path / "y", "linocut")
    assert weights_file(tmp_path / "y").read_bytes() == weights_file(packed_model).read_bytes()
    assert json.loads((tmp_path / "y" / "model_index.json").read_text())["is_distilled"] is False
    assert json.loads((tmp_path / "y" / "transformer" / "config.json").read_text())["num_single_layers"] == 2


def test_an_interrupted_run_goes_on(packed_model, tmp_path):
    class Stop(Exception):
        pass

    def stop(done, total, name):
        if name.startswith("writing") and done > total // 4:
            raise Stop

    with pytest.raises(Stop):
        convert(packed_model, tmp_path / "x", "gguf", on_progress=stop)
    assert not (tmp_path / "x").exists()
    report = convert(packed_model, tmp_path / "x", "gguf")
    assert 0 < report.resumed < report.verified
    convert(packed_model, tmp_path / "y", "gguf")
    assert (tmp_path / "x" / "transformer.gguf").read_bytes() == (tmp_path / "y" / "transformer.gguf").read_bytes()


def test_reading_back_notices_what_the_disk_did(packed_model, tmp_path, monkeypatch):
    """A byte that changes after it was hashed and written is found, and nothing gets the final name."""
    write_at, done = writer._write_at, []

    def damaging(fd, data, offset):
        if not done and offset > 50_000 and len(data) > 1000:
            done.append(offset)
            data = memoryview(bytes(data[:20]) + bytes([data[20] ^ 1]) + bytes(data[21:]))
        write_at(fd, data, offset)

    monkeypatch.setattr(writer, "_write_at", damaging)
    with pytest.raises(FormatError, match=r"\.partial"):
        convert(packed_model, tmp_path / "x", "gguf")
    assert done
    assert not (tmp_path / "x").exists()


def test_a_damaged_source_is_refused(packed_model, tmp_path):
    for form in ("linocut", "gguf", "mlx"):
        convert(packed_model, tmp_path / form, form)
        file = max(tmp_path.glob(f"{form}/**/*"), key=lambda path: path.stat().st_size if "vae" not in str(path) else 0)
        data = bytearray(file.read_bytes())
        data[-1000] ^= 1
        file.write_bytes(data)
        with pytest.raises(FormatError, match="SHA-256"):
            convert(tmp_path / form, tmp_path / "x", "linocut")


def test_memory_stays_flat(packed_model, tmp_path, monkeypatch):
    """Rows are read in blocks, never a weight as a whole, if it is large."""
    monkeypatch.setattr("linocut.formats.weight._ROW_BLOCK", 1 << 12)
    seen = []
    in_order = engine._in_order

    def watched(pool, work, items):
        seen.append(len(items))
        return in_order(pool, work, items)

    monkeypatch.setattr(engine, "_in_order", watched)
    convert(packed_model, tmp_path / "x", "gguf")
    assert max(seen) > 20
    monkeypatch.undo()
    convert(packed_model, tmp_path / "y", "gguf")
    assert (tmp_path / "x" / "transformer.gguf").read_bytes() == (tmp_path / "y" / "transformer.gguf").read_bytes()
