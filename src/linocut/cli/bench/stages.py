"""`linocut bench stages`: seconds of each stage of a picture, beside torch's networks of the same shapes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from linocut.cli.generate import Size

if TYPE_CHECKING:
    from linocut.pipeline.generate import Pipeline

STAGES = ("encode", "step", "decode")
OURS = "linocut"
TORCH = {"encode": ("torch fp32", "torch bf16", "torch int8"), "step": ("torch fp32", "torch bf16", "torch int8"),
         "decode": ("torch fp32", "torch bf16")}
PROMPT = "a red apple and two blue cups on a wooden table"


@click.command()
@click.argument("model")
@click.option("--size", type=Size(), default="512x512", show_default=True, help="Picture.")
@click.option("--stage", "stages", multiple=True, type=click.Choice(STAGES), help="May be repeated; default: all.")
@click.option("--arm", "arms", multiple=True, type=click.Choice((OURS, *TORCH["step"])),
              help="May be repeated; default: all.")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Also write the results to this JSON file; rounds that are in it already are not run again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(model: str, size: tuple[int, int], stages: tuple[str, ...], arms: tuple[str, ...], rounds: int,
            threads: int | None, output: Path | None, as_json: bool) -> None:
    """Measure reading a prompt, one denoising step and decoding of MODEL, a folder or 'embedded'.

    'linocut bench synthetic' makes one of klein's shapes. torch runs the same architecture with random weights: dense
    in float32 or bfloat16, or with the Linears of all blocks as quantized.linear_dynamic (int8, onednn engine) and the
    rest in bfloat16. Our seconds are those that drawing a picture reports, without opening files.
    """
    from linocut.cli._progress import Bar
    from linocut.cli.bench import report
    from linocut.cli.bench.rounds import Rounds
    from linocut.kernels.problem import thread_count
    from linocut.pipeline.generate import Pipeline

    pipe = Pipeline.from_pretrained(model, threads=threads, device="cpu", prompt_cache=False)
    chosen = stages or STAGES
    names = [f"{stage}/{arm}" for stage in chosen for arm in (OURS, *TORCH[stage])
             if not arms or arm in arms]
    settings = {"size": list(size), "encoding": report.encoding(pipe.folder), "kernel": pipe.kernel(1024),
                "bytes": pipe.folder.checkpoint("transformer").tensor_nbytes}
    done = Rounds("stages", thread_count()[0], settings, output)
    made: dict[str, Callable[[], float]] = {}
    with Bar("measuring") as bar:
        total = sum(len(done.missing(names, number)) for number in range(rounds))
        count = 0
        for number in range(rounds):
            missing = done.missing(names, number)
            if any(name.endswith(OURS) for name in missing):
                timings = _draw(pipe, size)
                for stage in chosen:
                    done.add(f"{stage}/{OURS}", number, timings[stage])
                    count += 1
            for name in missing:
                if not name.endswith(OURS):
                    arm = made[name] if name in made else made.setdefault(name, _torch(name, pipe, size))
                    done.add(name, number, arm())
                    count += 1
                bar.update(count, total, name)
    content = done.content()
    click.echo(json.dumps(content, indent=1)) if as_json else _print(content)


def _draw(pipe: Pipeline, size: tuple[int, int]) -> dict[str, float]:
    """Seconds of each stage of drawing one picture with one step."""
    list(pipe.draw(PROMPT, width=size[0], height=size[1], num_inference_steps=1, seed=0))
    seconds = {stage: timing["seconds"] - timing["load_seconds"] for stage, timing in pipe.timings.items()}
    return {"encode": seconds["encode"], "step": pipe.timings["denoise"]["steps"][0], "decode": seconds["decode"]}


def _torch(name: str, pipe: Pipeline, size: tuple[int, int]) -> Callable[[], float]:
    """One call of torch's arm `name`, which gives its seconds. Made when it is first needed, and warmed up."""
    import torch

    from linocut.cli.bench import baselines
    from linocut.models.configs import AutoencoderConfig, Flux2Config, Qwen3Config
    from linocut.models.flux2 import image_position_ids, text_position_ids

    stage, _, precision = name.partition("/torch ")
    folder, dtype = pipe.folder, baselines.DTYPES[precision]
    vae = AutoencoderConfig.from_dict(folder.config("vae"))
    grid = (size[1] // vae.token_side, size[0] // vae.token_side)
    tokens = int(folder.settings["text_length"])
    run: Callable[[], object]
    if stage == "encode":
        encoder = baselines.text_encoder(Qwen3Config.from_dict(folder.config("text_encoder")),
                                         tuple(folder.settings["text_taps"]), precision)
        ids = torch.arange(tokens)[None] % baselines.VOCABULARY
        mask = (ids < tokens // 8).long()
        run = lambda: encoder(ids, mask)  # noqa: E731
    elif stage == "step":
        config = Flux2Config.from_dict(folder.config("transformer"))
        network = baselines.transformer(config, precision)
        image = torch.randn(1, grid[0] * grid[1], config.in_channels, dtype=dtype)
        text = torch.randn(1, tokens, config.joint_attention_dim, dtype=dtype)
        places, sigma = (image_position_ids(*grid), text_position_ids(tokens)), torch.ones(1)
        run = lambda: network(image, text, sigma, *places)  # noqa: E731
    else:
        decoder = baselines.decoder(vae, dtype)
        latents = torch.randn(1, 4 * vae.latent_channels, *grid, dtype=dtype)
        run = lambda: decoder.image_from_latents(latents)  # noqa: E731

    def timed() -> float:
        with torch.inference_mode():
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

    timed()  # memory is claimed and libraries prepare themselves: a fifth of torch's first int8 step
    return timed


def _print(content: dict[str, Any]) -> None:
    width, height = content["settings"]["size"]
    click.echo(f"{width}x{height}, {content['settings']['encoding']}, kernel {content['settings']['kernel']}, "
               f"{content['machine']['threads']} threads: seconds, median (least to most)")
    medians = {name: found["median"] for name, found in content["results"].items()}
    for name, found in content["results"].items():
        stage = name.partition("/")[0]
        ratio = found["median"] / medians.get(f"{stage}/{OURS}", found["median"])
        click.echo(f"{name:<20}{found['median']:>9.3f}  ({found['min']:.3f}-{found['max']:.3f})"
                   + ("" if name.endswith(OURS) else f"   {ratio:.2f} times ours"))
