"""The pipeline end to end on a tiny random model: same pixels every time, one picture at a time, stoppable."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import TEXT_LENGTH, TRANSFORMER, write_tiny_model

import linocut
from linocut.errors import Cancelled, FormatError, ModelNotFoundError, UsageError
from linocut.kernels import fused, native
from linocut.kernels.dispatch import use_kernel
from linocut.models.flux2_cpu import FusedTransformer
from linocut.pipeline.generate import Pipeline
from linocut.pipeline.request import size_note
from linocut.pipeline.run import Progress

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Pipeline:
    torch.set_num_threads(1)
    return linocut.Pipeline.from_pretrained(tiny_model)


def pixels(result) -> list[np.ndarray]:
    return [np.asarray(image) for image in result.images]


def test_a_prompt_becomes_a_picture(pipe: Pipeline) -> None:
    result = pipe(PROMPT, seed=7, width=96, height=64)
    assert result.images[0].size == (96, 64)
    assert result.images[0].mode == "RGB"
    assert np.asarray(result.images[0]).std() > 5
    assert result.seeds == [7]
    recipe = result.recipe
    assert (recipe.prompt, recipe.width, recipe.height, recipe.steps, recipe.dtype) == (PROMPT, 96, 64, 2, "float32")
    assert recipe.model == "tiny"
    assert recipe.model_hash == pipe.folder.hash()
    assert set(recipe.versions) == {"linocut", "torch", "python"}


def test_seed_i_does_not_depend_on_company(pipe: Pipeline) -> None:
    together = pipe([PROMPT, "two blue cups"], seed=7, num_images=2)
    assert together.seeds == [7, 8, 7, 8]
    alone = pixels(pipe("two blue cups", seed=8))[0]
    assert (pixels(together)[3] == alone).all()
    assert not (pixels(together)[1] == alone).all()


def test_dropping_components_changes_nothing(pipe: Pipeline, tiny_model: Path) -> None:
    dropping = Pipeline.from_pretrained(tiny_model, keep_loaded=False)
    assert pipe.components.keep
    assert (pixels(dropping(PROMPT, seed=3))[0] == pixels(pipe(PROMPT, seed=3))[0]).all()
    assert dropping.components._kept == {}


def test_threads_do_not_change_pixels(pipe: Pipeline) -> None:
    before = torch.get_num_threads()
    try:
        pictures = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            pictures.append(pixels(pipe(PROMPT, seed=3, width=128, height=128))[0])
    finally:
        torch.set_num_threads(before)
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] == pictures[2]).all()


@pytest.mark.parametrize("kernel", ["int8", "native", "generic"])
def test_no_python_code_runs_where_an_interrupt_would_be_lost(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch,
                                                              kernel: str) -> None:
    taken = []
    monkeypatch.setattr(torch.Tensor, "__dlpack__", lambda *_, **__: taken.append(1))
    with use_kernel(kernel):
        assert pipe(PROMPT, seed=3).recipe.kernel.startswith(kernel)
    assert not taken
    with pytest.raises(TypeError, match="incompatible"):  # what the bindings do with a tensor itself
        native.module().add_rows(torch.zeros(1, 128), torch.zeros(1, 128), None, 1)
    assert taken


def test_the_recipe_says_what_ran(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.why_no_module() is not None:
        pytest.skip(f"{native.why_no_module()}")
    steps = []
    whole = FusedTransformer.__call__
    monkeypatch.setattr(FusedTransformer, "__call__", lambda *given, **named: steps.append(1) or whole(*given, **named))
    assert pipe(PROMPT, seed=3).recipe.kernel == f"int8 fused {fused.attention_variant()}"
    assert len(steps) == 2
    with use_kernel("native"):
        assert pipe(PROMPT, seed=3).recipe.kernel == "native"
    assert len(steps) == 2


def test_a_fresh_generator_equals_its_seed(pipe: Pipeline) -> None:
    by_seed = pipe(PROMPT, seed=11)
    by_generator = pipe(PROMPT, generator=torch.Generator().manual_seed(11), num_images=2)
    assert (pixels(by_generator)[0] == pixels(by_seed)[0]).all()
    assert by_generator.seeds == [11, None]  # the second picture's noise comes from a state that no seed gives


def test_random_seeds_are_told_and_differ(pipe: Pipeline) -> None:
    first, second = pipe(PROMPT, num_inference_steps=1).seeds + pipe(PROMPT, num_inference_steps=1).seeds
    assert isinstance(first, int)
    assert first != second


def test_noise_is_the_one_every_backend_draws(pipe: Pipeline) -> None:
    """With a sampler that takes no step away from it, the noise itself comes out."""
    seen = {}
    pipe(PROMPT, seed=5, num_inference_steps=1,
         callback_on_step_end=lambda p, i, sigma, state: seen.update(x0=state["x0"], latents=state["latents"]))
    noise = torch.randn((1, TRANSFORMER.in_channels, 4, 4), generator=torch.Generator().manual_seed(5))
    assert seen["x0"].shape == noise.shape
    assert torch.allclose(seen["x0"], seen["latents"], atol=1e-5)  # one step ends at the prediction itself
    assert not torch.allclose(seen["x0"], noise)


def test_step_callbacks_see_previews_lazily(pipe: Pipeline) -> None:
    seen = []

    def on_step(inner: Pipeline, i: int, sigma: float, state) -> None:
        assert inner is pipe
        assert state._made == {}
        assert state["preview"].size == (8, 8)
        assert set(state) == {"latents", "x0", "preview"}
        seen.append((i, sigma))

    pipe(PROMPT, num_inference_steps=3, callback_on_step_end=on_step)
    assert [i for i, _ in seen] == [0, 1, 2]
    assert seen[0][1] == 1.0
    assert seen[0][1] > seen[1][1] > seen[2][1] > 0


def test_progress_rises_through_all_phases(pipe: Pipeline) -> None:
    seen: list[Progress] = []
    pipe([PROMPT, "two blue cups"], on_progress=seen.append)
    assert [p.phase for p in seen if p.done == p.total] == ["encode", "denoise", "decode"] * 2
    blocks = [p.done for p in seen if p.phase == "denoise" and p.picture == 0]
    assert blocks == list(range(1, 2 * 3 + 1))
    assert {p.pictures for p in seen} == {2}


@pytest.mark.parametrize("keep", [True, False])
def test_cancelling_stops_within_a_block(tiny_model: Path, keep: bool) -> None:
    pipe = Pipeline.from_pretrained(tiny_model, keep_loaded=keep)
    stop, seen = threading.Event(), []

    def on_progress(progress: Progress) -> None:
        seen.append(progress)
        if progress.phase == "denoise" and progress.done == 2:
            stop.set()

    with pytest.raises(Cancelled):
        pipe(PROMPT, cancel=stop, on_progress=on_progress)
    assert (seen[-1].phase, seen[-1].done) == ("denoise", 2)
    stop.clear()
    assert len(pipe(PROMPT, cancel=stop).images) == 1  # the pipeline is fit for use afterwards


@pytest.mark.parametrize("phase", ["encode", "denoise", "decode"])
def test_a_function_can_cancel_in_any_phase(pipe: Pipeline, phase: str) -> None:
    at: list[str] = []
    with pytest.raises(Cancelled):
        pipe(PROMPT, cancel=lambda: phase in at, on_progress=lambda progress: at.append(progress.phase))


def test_timings_tell_seconds_and_memory(pipe: Pipeline) -> None:
    timings = pipe(PROMPT).timings
    assert list(timings) == ["encode", "denoise", "decode"]
    for phase in timings.values():
        assert 0 <= phase["load_seconds"] <= phase["seconds"]
        assert phase["peak_rss"] > 50e6
    assert len(timings["denoise"]["steps"]) == 2


def test_a_long_prompt_is_cut_with_a_warning_that_quotes_the_loss(pipe: Pipeline) -> None:
    long = "a red apple " * 10 + "and the very end"
    with pytest.warns(UserWarning, match=r"and this model reads 40; cut off: .*and the very end"):
        result = pipe(long, num_inference_steps=1)
    assert len(result.warnings) == 1
    assert pipe(PROMPT, num_inference_steps=1).warnings == []


def test_what_is_quoted_and_what_is_kept_make_the_prompt(pipe: Pipeline) -> None:
    with pipe.components.use("tokenizer") as tokenizer:
        pass
    words = [f"w{i}" for i in range(30)]
    with pytest.warns(UserWarning, match="cut off") as noted:
        pipe(" ".join(words), num_inference_steps=1)
    note = str(noted[0].message)
    lost = note.partition("cut off: ")[2].strip("'").split()
    assert lost == words[-len(lost):] or lost[1:] == words[-len(lost) + 1:]
    ids, _ = tokenizer.encode([" ".join(words)])
    assert tokenizer.tokenizer.decode(ids[0].tolist()).split()[-1].startswith("w")
    assert ids.shape == (1, TEXT_LENGTH)


def test_bfloat16_is_close_to_float32(pipe: Pipeline, tiny_model: Path) -> None:
    half = Pipeline.from_pretrained(tiny_model, dtype="bfloat16")
    difference = np.abs(pixels(half(PROMPT, seed=3))[0].astype(int) - pixels(pipe(PROMPT, seed=3))[0].astype(int))
    assert 0 < difference.mean() < 8


def test_guidance_only_where_it_acts(pipe: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="distilled"):
        pipe(PROMPT, guidance_scale=4.0)
    base = Pipeline.from_pretrained(write_tiny_model(tmp_path / "base", distilled=False))
    plain = base(PROMPT, seed=3, guidance_scale=1.0)
    assert (pixels(plain)[0] == pixels(pipe(PROMPT, seed=3))[0]).all()
    guided = base(PROMPT, seed=3)
    assert guided.recipe.guidance == 4.0
    assert not (pixels(guided)[0] == pixels(plain)[0]).all()
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    index["linocut"]["default_guidance"] = 1.75
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    own = Pipeline.from_pretrained(tmp_path / "base")(PROMPT, seed=3)
    assert own.recipe.guidance == 1.75
    assert (pixels(own)[0] == pixels(base(PROMPT, seed=3, guidance_scale=1.75))[0]).all()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"width": 100}, "multiple of 32.*96 or 128"), ({"height": -64}, "positive"), ({"width": 0}, "positive"),
    ({"width": 7}, "use 32"), ({"width": 64.0}, "whole number"), ({"width": 10**6}, "would need"),
    ({"num_inference_steps": 0}, "steps"), ({"num_inference_steps": True}, "steps"), ({"num_images": 0}, "images"),
    ({"seed": -1}, "seed"), ({"seed": 2**63}, "seed"), ({"seed": [1, "x"]}, "seed"), ({"seed": []}, "seeds is empty"),
    ({"guidance_scale": float("nan")}, "guidance"), ({"prompt": "  "}, "empty"), ({"prompt": []}, "no prompt"),
    ({"prompt": [PROMPT, 3]}, "must be text"), ({"prompt": "\udcff"}, "UTF-8"),
])
def test_what_cannot_be_drawn_is_refused_at_once(pipe: Pipeline, arguments: dict, message: str) -> None:
    arguments = {"prompt": PROMPT, **arguments}
    with pytest.raises(UsageError, match=message):
        pipe.draw(**arguments)  # no iteration: the request is checked when it is made


def test_opening_refuses_what_is_no_model(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        Pipeline.from_pretrained(tmp_path / "nothing")
    with pytest.raises(UsageError, match="dtype"):
        Pipeline.from_pretrained(tiny_model, dtype="int8")
    with pytest.raises(UsageError, match="threads"):
        Pipeline.from_pretrained(tiny_model, threads=0)


def test_networks_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    root = write_tiny_model(tmp_path / "odd")
    config = root / "vae" / "config.json"
    config.write_text(config.read_text().replace('"latent_channels": 4', '"latent_channels": 8'))
    with pytest.raises(FormatError, match="in_channels of the transformer"):
        Pipeline.from_pretrained(root)


@pytest.mark.parametrize(("learned", "size", "told"), [
    ([], (512, 32), False), ([[256, 256]], (256, 256), False), ([[256, 256]], (288, 224), False),
    ([[256, 256]], (320, 192), True), ([[256, 256]], (512, 512), True), ([[256, 256], [320, 192]], (320, 192), False),
    ([[256, 256], [320, 192]], (192, 320), True)])
def test_a_size_that_was_not_learned_is_told(learned: list[list[int]], size: tuple[int, int], told: bool) -> None:
    note = size_note({"trained_sizes": learned}, *size)
    assert (note is not None) == told
    if note is not None:
        assert "has learned pictures of 256x256" in note
        assert f"at {size[0]}x{size[1]} things" in note


def test_the_embedded_models_say_what_they_have_learned() -> None:
    pipe = linocut.Pipeline.from_pretrained("embedded")
    for size, told in (((256, 256), False), ((320, 192), False), ((192, 320), False), ((512, 256), True)):
        (picture,) = pipe.draw(PROMPT, width=size[0], height=size[1], num_inference_steps=1, seed=0)
        assert any("has learned" in warning for warning in picture.warnings) == told
