"""linocut's folders in diffusers' own pipeline, against linocut's pipeline: the same latents, files and errors.

Tolerances. With LINOCUT_KERNEL=reference both multiply the same decoded float32 weights by the same float32 values, and
differ by the order of sums in attention and norms alone: 1e-4 of the largest latent after all steps is some hundred
times what one rounding gives and a hundredth of one grey level. With int8 kernels a value that lies on the edge of two
int8 steps may fall to either side, so pictures are compared by their mean there.
"""

import copy
import importlib
import json
import runpy
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel, PipelineQuantizationConfig
from PIL import Image
from tiny_dense import TINY
from transformers import AutoTokenizer, Qwen3ForCausalLM, Qwen3Model

from linocut import Pipeline
from linocut.cli import cli
from linocut.errors import FormatError, LinocutError, PolicyError, UsageError
from linocut.formats.checkpoint import Checkpoint, write_checkpoint
from linocut.formats.folder import ModelFolder
from linocut.formats.timestep_table import WEIGHTS_FILE
from linocut.integrations.convert import convert
from linocut.integrations.diffusers import LinocutConfig, pipeline_arguments
from linocut.integrations.huggingface import UnsupportedLibraryError, required
from linocut.models.linear import PackedEmbedding, PackedLinear
from linocut.pipeline.schedule import make_timestep_table
from linocut.quantize.policy import Policy, Rule
from linocut.quantize.rounding import quantize_tensor
from linocut.quantize.stream import quantize_folder

PROMPT = "two red apples and a blue cup"
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def plain_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINOCUT_KERNEL", "reference")


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Keep both libraries' notes about keys that they do not know out of the tests' output."""
    from diffusers.utils import logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def their_latents(pipe: Flux2KleinPipeline, arguments: dict, seed: int = 7) -> tuple[torch.Tensor, Image.Image]:
    kept = []

    def keep(_: object, step: int, t: object, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept.append(values["latents"].clone())
        return values

    pipe.set_progress_bar_config(disable=True)
    picture = pipe(prompt=PROMPT, generator=torch.Generator().manual_seed(seed), callback_on_step_end=keep,
                   **arguments).images[0]
    return torch.cat(kept), picture


def our_latents(model: Path | str, seed: int = 7) -> tuple[torch.Tensor, Image.Image]:
    kept = []
    pipe = Pipeline.from_pretrained(model, prompt_cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = pipe(PROMPT, seed=seed, callback_on_step_end=lambda _, i, sigma, state: kept.append(
            state["latents"].flatten(2).transpose(1, 2)))
    return torch.cat(kept), result.images[0]


def assert_same(theirs: tuple[torch.Tensor, Image.Image], ours: tuple[torch.Tensor, Image.Image]) -> None:
    assert theirs[0].shape == ours[0].shape
    assert (theirs[0] - ours[0]).abs().max() <= TOLERANCE * ours[0].abs().max()
    difference = np.abs(np.asarray(theirs[1]).astype(int) - np.asarray(ours[1]).astype(int))
    assert difference.max() <= 1
    assert np.asarray(ours[1]).std() > 5  # not a flat picture, so that the comparison means something


def packed_bytes(folder: Path) -> dict[str, bytes]:
    """Every part of every packed weight; names as linocut has them."""
    with Checkpoint.open(folder) as checkpoint:
        return {f"{module.removeprefix('model.')}.{part}": array.tobytes() for module in checkpoint.packed
                for part, array in checkpoint.packed_tensor(module).parts().items()}


def layer_bytes(network: torch.nn.Module) -> dict[str, bytes]:
    return {f"{name}.{part}": array.tobytes() for name, module in network.named_modules()
            if isinstance(module, PackedLinear | PackedEmbedding)
            for part, array in module.to_packed().parts().items()}


def file(folder: Path) -> Path:
    return folder / "diffusion_pytorch_model.safetensors"


# --- loading and drawing ---------------------------------------------------------------------------------------------

def test_the_pipeline_draws_what_linocut_draws(packed_model):
    pipe = Flux2KleinPipeline.from_pretrained(packed_model, dtype=torch.float32)
    assert isinstance(pipe.transformer, Flux2Transformer2DModel)
    assert isinstance(pipe.text_encoder, Qwen3ForCausalLM)
    assert layer_bytes(pipe.transformer) == packed_bytes(packed_model / "transformer")
    assert layer_bytes(pipe.text_encoder.model) == packed_bytes(packed_model / "text_encoder")
    assert_same(their_latents(pipe, pipeline_arguments(packed_model)), our_latents(packed_model))


def test_a_guided_model_is_guided_there_too(packed_model, tmp_path):
    model = shutil.copytree(packed_model, tmp_path / "guided")
    index = json.loads((model / "model_index.json").read_text())
    index |= {"is_distilled": False, "linocut": index["linocut"] | {"default_guidance": 2.5}}
    (model / "model_index.json").write_text(json.dumps(index))
    arguments = pipeline_arguments(model)
    assert arguments["guidance_scale"] == 2.5
    ours = our_latents(model)
    assert_same(their_latents(Flux2KleinPipeline.from_pretrained(model, dtype=torch.float32), arguments), ours)
    assert not torch.allclose(ours[0], our_latents(packed_model)[0], atol=1e-3)


def test_scales_survive_another_dtype(packed_model):
    pipe = Flux2KleinPipeline.from_pretrained(packed_model, dtype=torch.bfloat16)
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert layer_bytes(pipe.transformer) == packed_bytes(packed_model / "transformer")
    assert layer_bytes(pipe.text_encoder.model) == packed_bytes(packed_model / "text_encoder")
    latents, _ = their_latents(pipe, pipeline_arguments(packed_model))
    assert latents.dtype == torch.bfloat16
    wanted, _ = our_latents(packed_model)
    assert torch.nn.functional.cosine_similarity(latents[-1].flatten().float(), wanted[-1].flatten(), dim=0) > 0.99


def test_without_a_dtype_all_is_float32(packed_model):
    pipe = Flux2KleinPipeline.from_pretrained(packed_model)
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == pipe.vae.dtype == torch.float32
    assert_same(their_latents(pipe, pipeline_arguments(packed_model)), our_latents(packed_model))


def test_the_transformer_alone(packed_model):
    alone = Flux2Transformer2DModel.from_pretrained(packed_model / "transformer")
    assert layer_bytes(alone) == packed_bytes(packed_model / "transformer")
    assert not any(parameter.is_meta for parameter in alone.parameters())
    by_part = Flux2Transformer2DModel.from_pretrained(packed_model, subfolder="transformer")
    assert layer_bytes(by_part) == layer_bytes(alone)


def test_packed_weights_are_views_of_the_file(packed_model):
    """No copy: two networks from one file lie in the same pages, and a change in one is its own."""
    one, other = (Flux2Transformer2DModel.from_pretrained(packed_model / "transformer") for _ in range(2))
    before = packed_bytes(packed_model / "transformer")
    one.transformer_blocks[0].attn.to_q.codes.zero_()
    assert layer_bytes(other) == packed_bytes(packed_model / "transformer") == before


def test_a_copy_is_a_model_of_its_own(packed_model, tmp_path):
    model = Flux2Transformer2DModel.from_pretrained(packed_model / "transformer")
    twin = copy.deepcopy(model)
    model.transformer_blocks[0].attn.to_q.codes.zero_()
    twin.save_pretrained(tmp_path)
    assert packed_bytes(tmp_path) == packed_bytes(packed_model / "transformer")


@torch.no_grad()
def test_the_text_encoder_is_cut_as_linocut_cuts_it(packed_model):
    """Three of four layers, no final norm: linocut's own features, from both of transformers' classes."""
    folder, taps = ModelFolder.open(packed_model), TINY.text_taps
    assert folder.config("text_encoder")["num_hidden_layers"] == 4
    tokenizer = AutoTokenizer.from_pretrained(packed_model / "tokenizer")
    tokens = tokenizer(["a fox", "two green foxes and a box"], padding=True, return_tensors="pt")
    with Pipeline.from_pretrained(packed_model).components.use("text_encoder") as encoder:
        wanted = encoder(tokens["input_ids"], tokens["attention_mask"])
    for kind in (Qwen3ForCausalLM, Qwen3Model):
        theirs = kind.from_pretrained(packed_model / "text_encoder", dtype=torch.float32)
        states = theirs(**tokens, output_hidden_states=True, use_cache=False).hidden_states
        assert len(states) == 4
        found = torch.cat([states[tap] for tap in taps], dim=-1)
        assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


def test_it_can_be_compiled(packed_model):
    model = Flux2Transformer2DModel.from_pretrained(packed_model / "transformer")
    x, text = torch.randn(1, 16, 64), torch.randn(1, 8, 384)
    ids, text_ids = torch.zeros(1, 16, 4), torch.zeros(1, 8, 4)
    arguments = {"hidden_states": x, "encoder_hidden_states": text, "timestep": torch.tensor([0.5]), "img_ids": ids,
                 "txt_ids": text_ids, "return_dict": False}
    with torch.no_grad():
        wanted = model(**arguments)[0]
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(**arguments)[0]
    torch.testing.assert_close(found, wanted)


# --- a timestep table ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def with_table(dense_model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("table") / "model"
    quantize_folder(dense_model, out, "ternary", make_table=make_timestep_table)
    return out


def test_a_model_with_a_timestep_table(with_table, tmp_path):
    pipe = Flux2KleinPipeline.from_pretrained(with_table, dtype=torch.float32)
    drawn = their_latents(pipe, pipeline_arguments(with_table))
    assert_same(drawn, our_latents(with_table))
    pipe.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved" / "transformer").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors"]
    assert "timestep_table" not in ModelFolder.open(tmp_path / "saved").config("transformer")
    assert_same(drawn, our_latents(tmp_path / "saved"))


def test_files_of_a_table_that_the_config_does_not_name_are_left_alone(with_table, tmp_path):
    """Saving over such a model leaves its two other files behind."""
    shutil.copytree(with_table, tmp_path / "model")
    place = tmp_path / "model" / "transformer"
    Flux2Transformer2DModel.from_pretrained(place).save_pretrained(place)
    (place / WEIGHTS_FILE).write_bytes(b"nothing that could be opened")
    again = Flux2Transformer2DModel.from_pretrained(place)
    assert layer_bytes(again) == packed_bytes(with_table / "transformer")


def test_a_timestep_table_alone_is_refused_with_advice(with_table, tmp_path):
    shutil.copytree(with_table, tmp_path / "alone")
    (tmp_path / "alone" / "transformer" / WEIGHTS_FILE).unlink()
    our_latents(tmp_path / "alone")  # linocut draws with it
    with pytest.raises(FormatError, match=rf"timestep table alone.*get transformer/{WEIGHTS_FILE}"):
        Flux2KleinPipeline.from_pretrained(tmp_path / "alone")


# --- dense weights, quantized as they are loaded ---------------------------------------------------------------------

@pytest.mark.parametrize("encoding", ["binary", "ternary"])
def test_quantizing_while_loading(dense_model, tmp_path, encoding):
    """The codes of `linocut quantize`, from the weights as stored, whatever dtype the rest is asked for."""
    quantize_folder(dense_model, tmp_path / "ours", encoding)
    theirs = Flux2Transformer2DModel.from_pretrained(
        dense_model / "transformer", dtype=torch.float16, quantization_config=LinocutConfig(encoding=encoding))
    assert layer_bytes(theirs) == packed_bytes(tmp_path / "ours" / "transformer")
    assert theirs.proj_out.weight.dtype == torch.float16
    theirs.save_pretrained(tmp_path / "saved")
    assert packed_bytes(tmp_path / "saved") == packed_bytes(tmp_path / "ours" / "transformer")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert saved == ModelFolder.open(tmp_path / "ours").config("transformer")["quantization_config"]


def test_quantizing_a_whole_pipeline_while_loading(dense_model, tmp_path):
    pipe = Flux2KleinPipeline.from_pretrained(dense_model, dtype=torch.float32, quantization_config=(
        PipelineQuantizationConfig(quant_mapping={"transformer": LinocutConfig(encoding="ternary"),
                                                  "text_encoder": LinocutConfig(encoding="affine4")})))
    assert isinstance(pipe.text_encoder.model.embed_tokens, PackedEmbedding)
    drawn = their_latents(pipe, pipeline_arguments(dense_model))
    pipe.save_pretrained(tmp_path / "saved")
    quantize_folder(dense_model, tmp_path / "ours", "ternary")
    ours = packed_bytes(tmp_path / "ours" / "text_encoder")
    saved = packed_bytes(tmp_path / "saved" / "text_encoder")
    assert {name: saved[name] for name in ours} == ours  # `linocut quantize` leaves out the layer that nobody uses
    again = Flux2KleinPipeline.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    torch.testing.assert_close(their_latents(again, pipeline_arguments(dense_model))[0], drawn[0], rtol=0, atol=0)


def test_policies(dense_model):
    only = {"name": "mine", "rules": [{"pattern": r"transformer_blocks\.0\.attn\.to_q"}]}
    forms = [LinocutConfig(policy=Policy.from_dict(only, "binary")), LinocutConfig(encoding="binary", policy=only)]
    assert forms[0] == forms[1] == LinocutConfig.from_dict(forms[0].to_dict())
    assert forms[0] == LinocutConfig.from_dict({"quant_method": "linocut", "encoding": "binary", "policy": only})
    assert forms[0] != LinocutConfig(encoding="ternary", policy=only)
    model = Flux2Transformer2DModel.from_pretrained(dense_model / "transformer", quantization_config=forms[0])
    assert [name for name, module in model.named_modules() if isinstance(module, PackedLinear)] == [
        "transformer_blocks.0.attn.to_q"]
    with Checkpoint.open(dense_model / "transformer") as checkpoint:
        weight = torch.from_numpy(checkpoint.array("transformer_blocks.0.attn.to_q.weight")).view(torch.bfloat16)
        assert model.transformer_blocks[0].attn.to_q.to_packed().codes.tobytes() == \
            quantize_tensor(weight, "binary").codes.tobytes()
    edges = LinocutConfig(encoding="ternary", policy="flux2-embedded")
    model = Flux2Transformer2DModel.from_pretrained(dense_model / "transformer", quantization_config=edges)
    assert model.norm_out.linear.encoding == "affine4"


def test_a_packed_model_needs_no_policy(packed_model, tmp_path):
    """Which layers are packed, the file says; what else the entry of config.json says is kept as it is."""
    shutil.copytree(packed_model / "transformer", tmp_path / "transformer")
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    entry = {"quant_method": "linocut", "format_version": 1, "made_by": ["somebody"]}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    model = Flux2Transformer2DModel.from_pretrained(tmp_path / "transformer")
    assert layer_bytes(model) == packed_bytes(packed_model / "transformer")
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"] == entry


def test_configs_that_make_no_sense(dense_model):
    with pytest.raises(UsageError, match="needs an encoding"):
        LinocutConfig()
    with pytest.raises(UsageError, match="unknown policy preset 'nice'"):
        LinocutConfig(encoding="ternary", policy="nice")
    with pytest.raises(PolicyError, match="unknown encoding"):
        LinocutConfig(encoding="int3")
    with pytest.raises(FormatError, match=r"unknown format_version \(expected 1, found 2\); update linocut"):
        LinocutConfig.from_dict(LinocutConfig(encoding="binary").to_dict() | {"format_version": 2})
    with pytest.raises(PolicyError, match="matches no weight"):
        Flux2Transformer2DModel.from_pretrained(dense_model / "transformer", quantization_config=LinocutConfig(
            policy=Policy((Rule("nothing", "binary"),))))


# --- saving ----------------------------------------------------------------------------------------------------------

def test_saving_keeps_every_code_and_scale(packed_model, tmp_path):
    saved = tmp_path / "saved"
    # A text encoder's norms and an autoencoder become float32 here; the weights that were packed stay as they are.
    Flux2KleinPipeline.from_pretrained(packed_model, dtype=torch.float32).save_pretrained(saved)
    source, back = ModelFolder.open(packed_model), ModelFolder.open(saved)
    for part in ("transformer", "text_encoder"):
        assert packed_bytes(saved / part) == packed_bytes(packed_model / part)
        policies = [model.config(part)["quantization_config"]["policy"] for model in (source, back)]
        assert policies[0] == policies[1]
        with back.checkpoint(part) as checkpoint:
            assert checkpoint.native
            assert checkpoint.verify() == len(checkpoint)  # a hash of every tensor
    assert back.settings == source.settings
    again = Flux2KleinPipeline.from_pretrained(saved, dtype=torch.float32)
    assert layer_bytes(again.transformer) == packed_bytes(packed_model / "transformer")
    assert_same(their_latents(again, pipeline_arguments(saved)), our_latents(packed_model))


def test_the_command_line_draws_from_a_saved_folder(packed_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Flux2KleinPipeline.from_pretrained(packed_model, dtype=torch.float32).save_pretrained("saved")
    for model, picture in ((str(packed_model), "source.png"), ("saved", "saved.png")):
        done = CliRunner().invoke(cli, ["generate", PROMPT, "-m", model, "--seed", "3", "-o", picture])
        assert done.exit_code == 0, done.output
    assert np.array_equal(np.asarray(Image.open("source.png")), np.asarray(Image.open("saved.png")))


def test_a_transformer_in_its_own_dtype_comes_back_as_the_same_file(dense_model, tmp_path):
    quantize_folder(dense_model, tmp_path / "ours", "binary")
    Flux2Transformer2DModel.from_pretrained(tmp_path / "ours" / "transformer", dtype=torch.bfloat16).save_pretrained(
        tmp_path / "saved")
    assert file(tmp_path / "saved").read_bytes() == file(tmp_path / "ours" / "transformer").read_bytes()


def test_saving_over_the_source(packed_model, tmp_path):
    """The weights are views of the very file that is replaced."""
    shutil.copytree(packed_model / "transformer", tmp_path / "transformer")
    before = packed_bytes(tmp_path / "transformer")
    model = Flux2Transformer2DModel.from_pretrained(tmp_path / "transformer")
    model.save_pretrained(tmp_path / "transformer")
    assert packed_bytes(tmp_path / "transformer") == before


def test_saving_refuses_what_the_format_is_not(packed_model, tmp_path):
    model = Flux2Transformer2DModel.from_pretrained(packed_model / "transformer")
    for wrong in ({"safe_serialization": False}, {"variant": "fp16"}, {"push_to_hub": True}):
        with pytest.raises(UsageError):
            model.save_pretrained(tmp_path / "saved", **wrong)
    assert not (tmp_path / "saved").exists()


# --- what is not right is said ---------------------------------------------------------------------------------------

def rewrite(folder: Path, change) -> None:
    with Checkpoint.open(folder) as source:
        tensors = {name: (source.array(name).copy(), source.info(name).dtype) for name in source.names
                   if name.rpartition(".")[0] not in source.packed}
        tensors |= {module: source.packed_tensor(module) for module in source.packed}
        change(tensors)
        write_checkpoint(source.path, tensors, {"format": "pt"})


@pytest.mark.parametrize(("part", "lost"), [("transformer", "proj_out.weight"),
                                            ("text_encoder", "layers.1.input_layernorm.weight")])
def test_a_missing_tensor_is_an_error(packed_model, tmp_path, part, lost):
    shutil.copytree(packed_model, tmp_path / "model")
    rewrite(tmp_path / "model" / part, lambda tensors: tensors.pop(lost))
    with pytest.raises(FormatError, match=lost.replace(".", r"\.")):
        Flux2KleinPipeline.from_pretrained(tmp_path / "model")


def test_weights_of_another_network_are_an_error(packed_model, tmp_path):
    shutil.copytree(packed_model / "transformer", tmp_path / "transformer")
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config | {"mlp_ratio": 4.0}))
    with pytest.raises(FormatError, match="another shape than the config says"):
        Flux2Transformer2DModel.from_pretrained(tmp_path / "transformer")


def test_dense_weights_that_claim_to_be_packed_are_an_error(dense_model, tmp_path):
    shutil.copytree(dense_model / "transformer", tmp_path / "transformer")
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    claim = {"quantization_config": LinocutConfig(encoding="ternary").to_dict()}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config | claim))
    with pytest.raises(FormatError, match=r"config\.json calls these weights linocut's"):
        Flux2Transformer2DModel.from_pretrained(tmp_path / "transformer")


def test_versions_that_are_not_known_are_named(monkeypatch):
    import diffusers
    with pytest.raises(UnsupportedLibraryError, match=(
            rf"diffusers>=0\.42,<0\.44 with NOTHING in diffusers\.quantizers\.auto, found diffusers "
            rf"{diffusers.__version__}.*pip install 'diffusers>=0\.42,<0\.44'")):
        required("diffusers", "diffusers.quantizers.auto", "NOTHING", versions=">=0.42,<0.44")
    with pytest.raises(UnsupportedLibraryError, match=r"no_such_library cannot be imported.*pip install"):
        required("no_such_library", "no_such_library", "x", versions=">=1")
    assert issubclass(UnsupportedLibraryError, LinocutError)
    assert issubclass(UnsupportedLibraryError, ImportError)
    monkeypatch.delattr(diffusers.quantizers.auto, "AUTO_QUANTIZER_MAPPING")
    monkeypatch.delitem(sys.modules, "linocut.integrations.diffusers")
    with pytest.raises(ImportError, match=r"this version of diffusers is not supported.*AUTO_QUANTIZER_MAPPING"):
        importlib.import_module("linocut.integrations.diffusers")


def test_without_accelerate_that_is_said(packed_model, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "accelerate" else
                        find(name, *rest))
    with pytest.raises(UnsupportedLibraryError, match="pip install accelerate"):
        Flux2Transformer2DModel.from_pretrained(packed_model / "transformer")


# --- unpacked folders, which need no plug-in -------------------------------------------------------------------------

def test_an_unpacked_folder_draws_the_same_and_comes_back(packed_model, tmp_path):
    convert(packed_model, tmp_path / "dense", "diffusers")
    pipe = Flux2KleinPipeline.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert not any(isinstance(module, PackedLinear) for module in pipe.transformer.modules())
    assert_same(their_latents(pipe, pipeline_arguments(packed_model)), our_latents(packed_model))
    for name, dtype in (("as it is", None), ("saved by diffusers", torch.float16)):
        source = tmp_path / "dense"
        if dtype is not None:
            source = tmp_path / name
            Flux2KleinPipeline.from_pretrained(tmp_path / "dense", dtype=dtype).save_pretrained(source)
        convert(source, tmp_path / "back", "linocut", force=True)
        assert packed_bytes(tmp_path / "back" / "transformer") == packed_bytes(packed_model / "transformer"), name


def test_the_example(packed_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["draw_with_diffusers.py", PROMPT, str(packed_model)])
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "draw_with_diffusers.py"), run_name="__main__")
    assert "MB of packed weights" in capsys.readouterr().out
    assert Image.open("picture.png").size == (64, 64)


# --- the embedded models ---------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("name", ["embedded", "embedded-binary"])
def test_the_embedded_models(name, tmp_path, monkeypatch):
    convert(name, tmp_path / "packed", "linocut")
    arguments = pipeline_arguments(name)
    pipe = Flux2KleinPipeline.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    ours = our_latents(name)
    assert_same(their_latents(pipe, arguments), ours)
    convert(name, tmp_path / "dense", "diffusers")
    dense = Flux2KleinPipeline.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert_same(their_latents(dense, arguments), ours)
    convert(tmp_path / "dense", tmp_path / "back", "linocut")
    packed, back = (packed_bytes(tmp_path / folder / "transformer") for folder in ("packed", "back"))
    assert back.items() <= packed.items()
    # Weights of four and eight bits come back as their exact values, but dense.
    with Checkpoint.open(tmp_path / "packed" / "transformer") as checkpoint:
        more = {name for name, entry in checkpoint.packed.items() if entry.encoding in ("affine4", "int8")}
    assert {name.rpartition(".")[0] for name in packed.keys() - back.keys()} == more
    monkeypatch.setenv("LINOCUT_KERNEL", "auto")
    difference = np.abs(np.asarray(their_latents(pipe, arguments)[1]).astype(int) -
                        np.asarray(our_latents(name)[1]).astype(int))
    assert difference.mean() < 2
