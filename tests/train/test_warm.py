"""Teachers and students that begin with the weights of a packed model."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_recipe import write_recipe, write_sprites

from linocut.errors import FormatError, UsageError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.packed import dequantize
from linocut.models.convert import quantize_
from linocut.train import distill
from linocut.train.dataset import make_tokenizer
from linocut.train.export import FOLDERS, export
from linocut.train.monitor import coded_layers, codes_of
from linocut.train.painter import Painter
from linocut.train.recipe import Recipe
from linocut.train.stages import run_stage
from linocut.train.tokenizer import save_tokenizer, train_tokenizer
from linocut.train.warm import start_from, start_student
from linocut.train.weights import load_transformer, read_weights


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, Recipe]:
    """The tiny recipe's model folder with a ternary student, untrained: what matters is that values are known."""
    root = tmp_path_factory.mktemp("warm")
    recipe = Recipe.from_file(write_recipe(root))
    write_sprites(root / "sprites")
    for stage in ("vae", "teacher"):
        run_stage(stage, recipe, root / "run", root / "sprites", "cpu")
    torch.manual_seed(1)
    Painter(recipe).save(root / "run" / "ternary")
    export(recipe, root / "run", root / "model")
    return root, recipe


def test_weights_are_those_of_the_packed_model(published):
    root, recipe = published
    torch.manual_seed(2)
    painter = Painter(recipe)
    start_from(painter, make_tokenizer(recipe, root / "run" / "tokenizer"), root / "model")
    with Checkpoint.open(root / "model" / "transformer") as checkpoint:
        name = next(name for name, entry in checkpoint.packed.items() if entry.encoding == "ternary")
        assert torch.equal(painter.transformer.get_submodule(name).weight,
                           torch.from_numpy(dequantize(checkpoint.packed_tensor(name))))
        assert torch.equal(painter.transformer.x_embedder.weight.half(),
                           torch.from_numpy(checkpoint.array("x_embedder.weight")))
    with Checkpoint.open(root / "model" / "text_encoder") as checkpoint:
        assert torch.equal(painter.text_encoder.embed_tokens.weight,
                           torch.from_numpy(dequantize(checkpoint.packed_tensor("embed_tokens"))))


def test_tokens_keep_their_embedding_in_another_vocabulary(published, tmp_path):
    root, recipe = published
    save_tokenizer(train_tokenizer(["zebra zebra zebra a photo of a fox"] * 9, 300), tmp_path)
    tokenizer, old = make_tokenizer(recipe, tmp_path), make_tokenizer(recipe, root / "run" / "tokenizer")
    painter = Painter(recipe)
    fresh = painter.text_encoder.embed_tokens.weight.detach().clone()
    start_from(painter, tokenizer, root / "model")
    with Checkpoint.open(root / "model" / "text_encoder") as checkpoint:
        rows = torch.from_numpy(dequantize(checkpoint.packed_tensor("embed_tokens")))
    ids, before = tokenizer.tokenizer.get_vocab(), old.tokenizer.get_vocab()
    new = set(ids) - set(before)
    assert new
    assert ids["<|im_start|>"] != before["<|im_start|>"]
    found = painter.text_encoder.embed_tokens.weight
    for token, index in ids.items():
        assert torch.equal(found[index], fresh[index] if token in new else rows[before[token]])


def test_new_blocks_begin_as_the_identity(published):
    root, recipe = published
    tokenizer = make_tokenizer(recipe, root / "run" / "tokenizer")
    grown = replace(recipe, transformer=replace(recipe.transformer, num_layers=2, num_single_layers=3))
    torch.manual_seed(3)
    small, large = Painter(recipe), Painter(grown)
    inputs = torch.randn(2, 4, 16), torch.randn(2, recipe.data.text_length, 384), torch.tensor([0.3, 0.9])
    for painter in (small, large):
        painter.image_ids = painter.image_ids[:4]
        start_from(painter, tokenizer, root / "model")
        for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
            torch.nn.init.normal_(painter.transformer.get_submodule(name).linear.weight, std=0.1,
                                  generator=torch.Generator().manual_seed(4))
        torch.nn.init.normal_(painter.transformer.proj_out.weight, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.allclose(small.velocity(*inputs), large.velocity(*inputs), atol=1e-5)
    assert large.transformer.single_transformer_blocks[2].attn.to_qkv_mlp_proj.weight.abs().min() > 0  # it can learn


def test_another_shape_is_refused(published):
    root, recipe = published
    other = Recipe.from_file(Path("recipes/embedded/recipe.toml"))
    with pytest.raises(FormatError, match=r"another shape than the recipe's network.*start from a model"):
        start_from(Painter(other), make_tokenizer(recipe, root / "run" / "tokenizer"), root / "model")


def test_the_teacher_begins_with_it(published, tmp_path):
    root, _ = published
    text = (root / "recipe.toml").read_text().replace("[teacher]", '[teacher]\nstart = "model"')
    warm = root / "warm.toml"
    warm.write_text(text.replace("steps = 20\n", "steps = 0\n"))
    started = Recipe.from_file(warm)
    assert Path(started.teacher.start) == root / "model"
    (tmp_path / "vae").symlink_to(root / "run" / "vae")
    run_stage("teacher", started, tmp_path, root / "sprites", "cpu")
    with Checkpoint.open(root / "model" / "transformer") as before, Checkpoint.open(tmp_path / "teacher") as after:
        assert torch.equal(torch.from_numpy(after.array("transformer.x_embedder.weight")).half(),
                           torch.from_numpy(before.array("x_embedder.weight")))


def test_a_text_encoder_that_is_kept_ships_as_it_was(published, tmp_path):
    root, _ = published
    text = (root / "recipe.toml").read_text().replace("[teacher]", '[teacher]\nstart = "model"\nkeep_text = true')
    (root / "kept.toml").write_text(text)
    kept = Recipe.from_file(root / "kept.toml")
    (tmp_path / "vae").symlink_to(root / "run" / "vae")
    for stage in ("teacher", "binary"):
        run_stage(stage, kept, tmp_path, root / "sprites", "cpu")
    export(kept, tmp_path, tmp_path / "model", {"binary": "transformer-binary"})
    for name in ("text_encoder/model.safetensors", "tokenizer/tokenizer.json"):
        assert (tmp_path / "model" / name).read_bytes() == (root / "model" / name).read_bytes()
    with Checkpoint.open(root / "model" / "transformer") as before, Checkpoint.open(tmp_path / "teacher") as after:
        assert not torch.equal(torch.from_numpy(after.array("transformer.x_embedder.weight")).half(),
                               torch.from_numpy(before.array("x_embedder.weight")))


def test_a_student_goes_on_from_another_runs(published, tmp_path, monkeypatch):
    root, recipe = published
    monkeypatch.setattr(distill, "_calibrate", lambda *_: pytest.fail("it has a beginning already"))
    latent = Painter.load(recipe, root / "run" / "teacher", torch.device("cpu"))
    with torch.no_grad():
        for value in latent.parameters():
            value += 0.5 * value.std() * torch.randn_like(value) if value.numel() > 1 else 0
    latent.save(tmp_path / "before")
    text = (root / "recipe.toml").read_text().replace("[binary]", f'[binary]\nstart = "{tmp_path / "before"}"')
    (root / "onward.toml").write_text(text.replace("[ternary]", '[ternary]\nstart = "run/ternary"'))
    onward = Recipe.from_file(root / "onward.toml")
    assert Path(onward.ternary.start) == root / "run" / "ternary"
    onward = replace(onward, binary=replace(onward.binary, steps=1, lr=0.0, calibrate=8))
    for name in ("vae", "teacher", "tokenizer"):
        (tmp_path / name).symlink_to(root / "run" / name)
    run_stage("binary", onward, tmp_path, root / "sprites", "cpu")
    found, teacher = read_weights(tmp_path / "binary"), read_weights(root / "run" / "teacher")
    name = "transformer.transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(found[name], latent.state_dict()[name])
    name = "text_encoder.layers.0.mlp.down_proj.weight"  # which is the teacher's, rounded as it ships
    assert (found[name] - teacher[name]).norm() < 0.3 * teacher[name].norm()


@pytest.mark.parametrize("encoding", ["ternary", "binary"])
def test_a_student_goes_on_from_the_codes_of_a_packed_model(published, encoding):
    root, recipe = published
    shutil.copytree(root / "run" / "ternary", root / "run" / "binary", dirs_exist_ok=True)
    export(recipe, root / "run", root / "both")
    torch.manual_seed(6)
    student = Painter(recipe).transformer
    teacher = {name: value.clone() for name, value in student.state_dict().items()}
    quantize_(student, recipe.packing(encoding), fake=True)
    start_student(student, root / "both", encoding)
    moved = kept = 0
    with Checkpoint.open(root / "both" / FOLDERS[encoding]) as checkpoint:
        for name, layer in coded_layers(student).items():
            values, scales = codes_of(layer)
            assert torch.equal(values * scales.repeat_interleave(128, 1),
                               torch.from_numpy(dequantize(checkpoint.packed_tensor(name))))
            own = teacher[f"{name}.weight"]
            moved += int((layer.weight.sign() != own.sign()).sum())
            kept += int((layer.weight.sign() == own.sign()).sum())
            if own.any():  # fresh modulations are 0
                spread = layer.weight.abs().view(len(own), -1, 128).std(-1)
                assert float((spread > 0.01 * scales).float().mean()) > 0.9  # weights keep distances of their own
        assert torch.equal(student.x_embedder.weight.half(), torch.from_numpy(checkpoint.array("x_embedder.weight")))
    assert moved > 0.2 * kept > 0  # the codes are those of another student, and not the teacher's


def test_a_packed_student_of_another_encoding_is_refused(published):
    root, recipe = published
    student = Painter(recipe).transformer
    quantize_(student, recipe.packing("binary"), fake=True)
    with pytest.raises(FormatError, match=r"another encoding than the student.*expected binary, found ternary"):
        start_student(student, root / "model", "binary")  # which has a ternary one alone


def test_a_packed_student_of_another_shape_is_refused(published):
    root, _ = published
    other = Recipe.from_file(Path("recipes/embedded/recipe.toml"))
    with pytest.raises(FormatError, match=r"another shape than the recipe's network"):
        start_student(Painter(other).transformer, root / "model", "ternary")


def test_what_a_student_cannot_go_on_from_is_refused(published, tmp_path):
    root, recipe = published
    text = (root / "recipe.toml").read_text()
    (root / "nowhere.toml").write_text(text.replace("[binary]", '[binary]\nstart = "nowhere"'))
    with pytest.raises(UsageError, match=r"binary.start is no folder: .*nowhere"):
        Recipe.from_file(root / "nowhere.toml")
    grown = replace(recipe, transformer=replace(recipe.transformer, num_layers=recipe.transformer.num_layers + 1))
    Painter(grown).save(tmp_path)
    with pytest.raises(FormatError, match=r"another network than the recipe's.*student of the same shape"):
        load_transformer(Painter(recipe).transformer, tmp_path)


def test_a_text_encoder_to_keep_must_be_named(published):
    root, _ = published
    (root / "none.toml").write_text((root / "recipe.toml").read_text().replace("[teacher]",
                                                                               "[teacher]\nkeep_text = true"))
    with pytest.raises(UsageError, match=r"keep_text needs a model folder.*set teacher.start"):
        Recipe.from_file(root / "none.toml")
