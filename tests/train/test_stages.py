"""The whole chain at toy size: every stage, what it leaves, and that what ships computes what was trained."""

import copy
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_recipe import ROOT, write_recipe, write_sprites

from linocut.cli import main
from linocut.errors import UsageError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.folder import ModelFolder
from linocut.kernels.dispatch import use_kernel
from linocut.models.linear import FakeQuantEmbedding, FakeQuantLinear
from linocut.models.text_encoder import PromptTokenizer
from linocut.pipeline.generate import Pipeline
from linocut.pipeline.schedule import Schedule
from linocut.train.autoencoder import load_vae, vae_of
from linocut.train.corpus import Scenes, endless, make_scenes
from linocut.train.dataset import Captions, LatentBank, make_tokenizer, psnr, scene_images
from linocut.train.export import FOLDERS, quantized
from linocut.train.monitor import read_lines
from linocut.train.naming import names_of
from linocut.train.optimize import Average
from linocut.train.painter import Painter
from linocut.train.recipe import Recipe
from linocut.train.render import SceneRenderer
from linocut.train.sheet import split_grid
from linocut.train.snapshot import Snapshot
from linocut.train.stages import run_stage
from linocut.train.teacher import Fresh
from linocut.train.weights import load_weights

CPU = torch.device("cpu")


class Trained:
    """Where things lie after all stages have run."""

    def __init__(self, root: Path) -> None:
        self.recipe_file, self.sprites, self.run = write_recipe(root), write_sprites(root / "sprites"), root / "run"
        self.recipe = Recipe.from_file(self.recipe_file)

    def arguments(self, *stages: str) -> list[str]:
        chosen = [word for stage in stages for word in ("--stage", stage)]
        return ["train", str(self.recipe_file), "--out", str(self.run), "--sprites", str(self.sprites), *chosen,
                "--device", "cpu"]

    def command(self, *stages: str) -> None:
        with pytest.raises(SystemExit) as ended:
            main(self.arguments(*stages))
        assert ended.value.code == 0

    def student(self, encoding: str) -> Painter:
        """The trained student with its dense tensors rounded to float16, as the export stores them."""
        painter = quantized(self.recipe, encoding).eval().requires_grad_(False)
        load_weights(painter, self.run / encoding)
        for module in painter.modules():
            if not isinstance(module, FakeQuantLinear | FakeQuantEmbedding):
                for parameter in module.parameters(recurse=False):
                    parameter.copy_(parameter.half().float())
        return painter


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = Trained(tmp_path_factory.mktemp("train"))
    found.command()
    torch.set_num_threads(before)
    return found


def test_every_stage_leaves_its_result(trained):
    left = {path.relative_to(trained.run).as_posix() for path in trained.run.rglob("*") if path.is_file()}
    assert {"vae/report.txt", "vae/held_out.png", "tokenizer/tokenizer.json",
            "teacher.png", "ternary.png", "binary.png",
            "model/model_index.json", "model/scheduler/scheduler_config.json", "model/tokenizer/tokenizer.json",
            *(f"{stage}/model.safetensors" for stage in ("vae", "teacher", "ternary", "binary")),
            *(f"model/{part}/config.json" for part in ("vae", "text_encoder", *FOLDERS.values()))} <= left
    assert not [name for name in left if name.endswith((".partial", ".journal", ".pt", ".pkl"))]


@torch.no_grad()
def test_teacher_has_learned(trained):
    """Its flow-matching loss on fixed noise is below that of its starting point, which predicts zero."""
    recipe, run = trained.recipe, trained.run
    bank = LatentBank.build(recipe, make_tokenizer(recipe, run / "tokenizer"), load_vae(recipe, run, CPU),
                            SceneRenderer(trained.sprites, recipe.data.size), 0, CPU)
    torch.manual_seed(0)
    latents, _, ids, mask = bank.sample(32)
    noise, sigma = torch.randn_like(latents), torch.rand(32)
    noisy = latents + sigma[:, None, None] * (noise - latents)

    def loss(painter: Painter) -> float:
        return float((painter.velocity(noisy, painter.read(ids, mask), sigma) - (noise - latents)).square().mean())

    assert loss(Painter.load(recipe, run / "teacher", CPU)) < 0.97 * loss(Painter(recipe).eval())


@pytest.mark.parametrize("encoding", FOLDERS)
@torch.no_grad()
def test_what_ships_computes_what_was_trained(trained, encoding):
    folder = ModelFolder(trained.run / "model", encoding, FOLDERS[encoding])
    pipe, student = Pipeline(folder, keep_loaded=True), trained.student(encoding)
    with pipe.components.use("tokenizer") as tokenizer:
        ids, mask = tokenizer.encode(["three red apples", ""])
    latents = torch.randn(2, 4, trained.recipe.transformer.in_channels, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.9, 0.3])
    schedule = Schedule(torch.tensor([0.9, 0.3, 0.0]), tokens=4)
    text = student.read(ids, mask)
    with use_kernel("native"), pipe.components.use("text_encoder") as encoder:  # float activations, as in training
        torch.testing.assert_close(encoder(ids, mask), text, rtol=1e-4, atol=1e-4)
    with use_kernel("native"), pipe.components.use("transformer") as transformer:
        packed = torch.cat([
            transformer(latents[i : i + 1], text[i : i + 1], modulations, student.image_ids, student.text_ids)
            for i, modulations in enumerate(pipe.components.modulations(schedule))])
    torch.testing.assert_close(packed, student.velocity(latents, text, sigma), rtol=1e-4, atol=1e-4)
    with folder.checkpoint("transformer") as checkpoint:
        assert {entry.encoding for entry in checkpoint.packed.values()} == {encoding, "affine4", "int8"}
        checkpoint.verify()


@torch.no_grad()
def test_the_teacher_as_a_model_computes_what_was_trained(trained):
    trained.command("teacher-model")
    pipe, teacher = Pipeline(ModelFolder.open(trained.run / "teacher-model"), keep_loaded=True), Painter.load(
        trained.recipe, trained.run / "teacher", CPU)
    for parameter in teacher.parameters():
        parameter.copy_(parameter.half().float())
    with pipe.components.use("tokenizer") as tokenizer:
        ids, mask = tokenizer.encode(["three red apples"])
    latents = torch.randn(1, 4, trained.recipe.transformer.in_channels, generator=torch.Generator().manual_seed(0))
    text, modulations = teacher.read(ids, mask), pipe.components.modulations(Schedule(torch.tensor([0.9, 0.0]), 4))[0]
    with pipe.components.use("text_encoder") as encoder, pipe.components.use("transformer") as transformer:
        torch.testing.assert_close(encoder(ids, mask), text, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(transformer(latents, text, modulations, teacher.image_ids, teacher.text_ids),
                                   teacher.velocity(latents, text, torch.tensor([0.9])), rtol=1e-4, atol=1e-4)
    assert pipe("three red apples", seed=0).images[0].size == (trained.recipe.data.size, trained.recipe.data.size)


@pytest.mark.parametrize("encoding", FOLDERS)
def test_the_pipeline_draws_what_training_drew(trained, encoding):
    """Same noise for the same seed, same steps, same decoder: the pictures differ by rounding to float16 alone."""
    pipe = Pipeline(ModelFolder(trained.run / "model", encoding, FOLDERS[encoding]))
    drawn = split_grid(trained.run / f"{encoding}.png", 2, trained.recipe.data.size)
    for seed, (prompt, picture) in enumerate(zip(trained.recipe.held_out, drawn, strict=True)):
        shipped = np.asarray(pipe(prompt, seed=seed).images[0]).astype(int)
        assert np.abs(shipped - np.asarray(picture).astype(int)).mean() < 1.0


def test_pictures_to_look_at(trained):
    trained.command("scenes", "sheet")
    assert Image.open(trained.run / "scenes.png").width == 1600
    assert Image.open(trained.run / "sheet.png").width == 1600
    assert (trained.run / "sheet.png").stat().st_size < 1_500_000


@pytest.mark.filterwarnings("ignore:the prompt takes")
def test_sheet_with_other_models(trained, tiny_model, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", str(trained.recipe_file), "--out", str(tmp_path), "--stage", "sheet", "--device", "cpu",
              "--models", str(tiny_model), str(tiny_model)])
    assert ended.value.code == 0
    assert "hence not in the sheet: teacher" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").is_file()


@pytest.mark.parametrize(("arguments", "message"), [
    (["none.toml", "--out", "run"], "none.toml: not a readable recipe"),
    (["recipe.toml"], "Missing option '--out'"),
    (["recipe.toml", "--out", "recipe.toml"], "--out names a folder"),
    (["recipe.toml", "--out", "run", "--stage", "paint"], "'paint' is not one of"),
    (["recipe.toml", "--out", "run", "--stage", "teacher"], "run it first (--stage vae)"),
    (["recipe.toml", "--out", "run", "--stage", "vae", "--sprites", "none"], "no sprite for person"),
    (["recipe.toml", "--out", "run", "--models", "a", "b"], "--models is for stage sheet"),
    (["recipe.toml", "--out", "run", "--stage", "sheet", "--models", "embedde", "b"], "no model 'embedde'"),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["train", *arguments, "--device", "cpu"])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("stage", ["teacher", "ternary"])
def test_a_stage_that_was_cut_goes_on_from_its_saved_state(trained, tmp_path, monkeypatch, capsys, stage):
    """Killed at step 12 after a save at step 10, it makes the steps that are left and no more."""
    for done in ("vae", "tokenizer", "teacher"):
        if done != stage:
            shutil.copytree(trained.run / done, tmp_path / done)
    settings = replace(getattr(trained.recipe, stage), steps=20, save_every=5, log_every=1)
    recipe = replace(trained.recipe, **{stage: settings})
    update, calls = Average.update, []

    def cut(average: Average) -> None:
        calls.append(average)
        if len(calls) == 12:
            raise KeyboardInterrupt
        update(average)

    monkeypatch.setattr(Average, "update", cut)
    with pytest.raises(KeyboardInterrupt):
        run_stage(stage, recipe, tmp_path, trained.sprites, "cpu")
    assert not (tmp_path / stage / "model.safetensors").exists()
    with pytest.raises(UsageError, match=r"no result of stage teacher|no student to export"):
        run_stage("binary" if stage == "teacher" else "export", recipe, tmp_path, trained.sprites, "cpu")
    capsys.readouterr()
    run_stage(stage, recipe, tmp_path, trained.sprites, "cpu")
    said = capsys.readouterr().out
    # Steps are counted from 0 and saved after they are made: of 12 that began, number 10 (the 11th) was the last saved.
    assert len(calls) == 12 + 20 - 11
    assert " 11/20 " in said
    assert " 10/20 " not in said
    assert [path.name for path in (tmp_path / stage).iterdir()] == ["model.safetensors"]
    if stage == "ternary":
        assert [line["step"] for line in read_lines(tmp_path / "ternary.jsonl")] == list(range(20))


def test_a_stage_cut_after_its_time_writes_what_it_had(trained, tmp_path, monkeypatch):
    for done in ("vae", "tokenizer", "teacher"):
        shutil.copytree(trained.run / done, tmp_path / done)
    recipe = replace(trained.recipe, binary=replace(trained.recipe.binary, steps=20, save_every=5))
    monkeypatch.setattr(Snapshot, "drop", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_stage("binary", recipe, tmp_path, trained.sprites, "cpu")
    monkeypatch.undo()
    (saved,) = (tmp_path / "binary" / "state").glob("step.*/rank.0.safetensors")
    with Checkpoint.open(saved) as state:
        averages = {name: state.array(name).copy() for name in state.names if name.startswith("average.")}
    run_stage("binary", recipe, tmp_path, trained.sprites, "cpu", until=0.0)
    painter = trained.student("binary")
    load_weights(painter, tmp_path / "binary")
    for index, parameter in enumerate(painter.transformer.parameters()):
        assert np.array_equal(parameter.numpy(), averages[f"average.{index}"])


def test_two_processes_train_together(trained, tmp_path):
    """Two processes on the CPU leave a teacher of the same structure, once."""
    for done in ("vae", "tokenizer"):
        shutil.copytree(trained.run / done, tmp_path / done)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
                           "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    arguments = trained.arguments("teacher")
    arguments[arguments.index(str(trained.run))] = str(tmp_path)
    processes = [subprocess.Popen([sys.executable, "-m", "linocut", *arguments], text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, env=shared | {"RANK": rank, "LOCAL_RANK": rank})
                 for rank in "01"]
    try:
        said = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert "teacher on 2 x cpu" in said[0]
    assert "teacher on" not in said[1]
    with Checkpoint.open(tmp_path / "teacher") as two, Checkpoint.open(trained.run / "teacher") as one:
        assert {name: two.info(name).shape for name in two.names} == {name: one.info(name).shape for name in one.names}
        assert any(not np.array_equal(two.array(name), one.array(name)) for name in two.names)
    assert (tmp_path / "teacher.png").is_file()


def make_bank(trained: Trained) -> tuple[PromptTokenizer, SceneRenderer, LatentBank]:
    recipe, run = trained.recipe, trained.run
    tokenizer, renderer = make_tokenizer(recipe, run / "tokenizer"), SceneRenderer(trained.sprites, recipe.data.size)
    return tokenizer, renderer, LatentBank.build(recipe, tokenizer, load_vae(recipe, run, CPU), renderer, 0, CPU)


def latents_of(trained: Trained, renderer: SceneRenderer, made: Scenes) -> torch.Tensor:
    """Latents [M, I, 4C] of pictures of scenes, all at once."""
    images = renderer.draw(renderer.table(made.placements), renderer.looks(made.scenes))
    return load_vae(trained.recipe, trained.run, CPU).latents_from_image(images).flatten(2).transpose(1, 2)


@torch.no_grad()
def test_captions_belong_to_their_pictures(trained):
    """The bank draws scenes sorted by size; each latent still lies beside its own captions."""
    recipe, (tokenizer, renderer, bank) = trained.recipe, make_bank(trained)
    made = make_scenes(recipe, 0, recipe.data.scenes)
    wanted = latents_of(trained, renderer, made)
    assert torch.equal(bank.names, names_of(renderer, renderer.table(made.placements), 16))
    error = (bank.latents.float() - wanted).square().mean((1, 2))
    assert float(error.max()) < 0.01 * float(wanted.square().mean())
    assert torch.equal(bank.captions.ids[::2].long(), tokenizer.encode([texts[0] for texts in made.captions])[0])


@torch.no_grad()
def test_an_autoencoder_goes_on_from_a_models_and_stays_near_its_latents(trained, tmp_path):
    """From the weights of the start, also with other groups of channels; what `stay` weighs holds the latents."""
    renderer, start = SceneRenderer(trained.sprites, trained.recipe.data.size), trained.run / "model"
    pictures, before = scene_images(trained.recipe, renderer, -7, 8), vae_of(start)
    moved = {}
    for name, changes in {"at once": {"steps": 0}, "free": {}, "held": {"stay": 30.0}}.items():
        settings = replace(trained.recipe.vae, **{"start": str(start), "steps": 12, "lr": 3e-3} | changes)
        with torch.enable_grad():
            run_stage("vae", replace(trained.recipe, vae=settings), tmp_path / name, trained.sprites, "cpu")
        latents = before.normalize(load_vae(trained.recipe, tmp_path / name, CPU).encode(pictures)[0])
        moved[name] = float((latents - before.latents_from_image(pictures)).square().mean())
    assert moved["at once"] < 1e-4
    assert moved["at once"] < moved["held"] < 0.5 * moved["free"]
    with pytest.raises(UsageError, match=r"set vae\.start"):
        replace(settings, start="")


@torch.no_grad()
def test_a_decoder_alone_learns_to_draw_from_latents_that_are_known(trained, tmp_path):
    """With other groups of channels, whose first pictures are worse; encoder and statistics stay what they were."""
    other = replace(trained.recipe.autoencoder, norm_num_groups=4)
    renderer, start = SceneRenderer(trained.sprites, trained.recipe.data.size), trained.run / "model"
    pictures, before, fidelity = scene_images(trained.recipe, renderer, -7, 8), vae_of(start), {}
    for steps in (0, 30):
        settings = replace(trained.recipe.vae, start=str(start), steps=steps, lr=2e-3, decoder=True, noise=0.1)
        recipe, run = replace(trained.recipe, vae=settings, autoencoder=other), tmp_path / str(steps)
        with torch.enable_grad():
            run_stage("vae", recipe, run, trained.sprites, "cpu")
        vae = load_vae(recipe, run, CPU)
        fidelity[steps] = psnr(vae.image_from_latents(before.latents_from_image(pictures)), pictures)
        for name, tensor in before.state_dict().items():
            if name.startswith(("encoder", "quant_conv", "bn")):
                torch.testing.assert_close(vae.state_dict()[name], tensor)
    assert fidelity[30] > fidelity[0] + 1
    with pytest.raises(UsageError, match=r"set vae\.start"):
        replace(settings, start="")


@torch.no_grad()
def test_new_scenes_take_the_place_of_the_oldest(trained):
    """Whole: latents, names and every wording of a row are those of the new scene; the other rows stay."""
    recipe, (tokenizer, renderer, bank) = trained.recipe, make_bank(trained)
    before, scenes = copy.deepcopy((bank.latents, bank.names, bank.captions)), recipe.data.scenes
    fresh = Fresh(replace(recipe, teacher=replace(recipe.teacher, fresh=scenes // 4)), tokenizer, [bank], 0, 8)
    assert fresh.every == 4
    for step in range(8, 11):
        fresh.renew(step)
    (expected,) = islice(endless(recipe, 0, scenes, start=2), 1)
    direct = [text for group in expected.captions for text in group]
    wanted = Captions.build(tokenizer, direct, CPU)
    assert torch.equal(bank.captions.ids, wanted.ids)
    assert torch.equal(bank.captions.lengths, wanted.lengths)
    assert not torch.equal(bank.captions.ids, before[2].ids)
    torch.testing.assert_close(bank.latents.float(), latents_of(trained, renderer, expected), rtol=0.05, atol=0.05)
    bank.oldest, kept = scenes - 2, bank.latents.clone()
    bank.renew(make_scenes(recipe, 77, 5), tokenizer)  # around the end
    changed = (bank.latents != kept).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == [0, 1, 2, scenes - 2, scenes - 1]
    assert bank.oldest == 3


def test_a_teacher_learns_from_new_scenes_as_it_goes(trained, tmp_path, monkeypatch):
    renewed, renew = [], LatentBank.renew

    def counted(bank: LatentBank, part: Scenes, *rest: object) -> None:
        renewed.append(len(part.scenes))
        renew(bank, part, *rest)

    monkeypatch.setattr(LatentBank, "renew", counted)
    for done in ("vae", "tokenizer"):
        shutil.copytree(trained.run / done, tmp_path / done)
    settings = replace(trained.recipe.teacher, fresh=trained.recipe.data.scenes // 2, steps=4)
    run_stage("teacher", replace(trained.recipe, teacher=settings), tmp_path, trained.sprites, "cpu")
    assert (tmp_path / "teacher" / "model.safetensors").is_file()
    assert renewed == [trained.recipe.data.scenes] * 2  # at steps 0 and 2 of 4
    with pytest.raises(UsageError, match="number of scenes per step"):
        replace(settings, fresh=-1)
