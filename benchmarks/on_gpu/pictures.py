"""Sections `text`, `decode`, `picture`, `batch` and `embedded`: whole pictures, from the prompt to a PNG file's bytes.

Ours are drawn by the pipeline from a model folder. The dense arms do what it does with networks in bfloat16: the text
encoder, four Euler steps, the decoder of torch's own layers, and our PNG. "compiled" has the transformer's blocks and
the text encoder's layers under torch.compile.
"""

import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch

from linocut.models.flux2 import image_position_ids, text_position_ids
from linocut.models.text_encoder_gpu import GpuEncoder
from linocut.pipeline.components import Components
from linocut.pipeline.generate import Pipeline
from linocut.pipeline.png import encode_png
from linocut.pipeline.run import to_image
from linocut.pipeline.sampler import euler, sigmas
from on_gpu import folders
from on_gpu.bench import PROMPT, STEPS, Bench, level, line, modulations, peak, release, say, seconds, wall
from on_gpu.networks import DEVICE, compile_blocks, decoder, dense_network, dense_text_encoder, packed_text_encoder

COUNTS = (1, 2, 4)


def text(bench: Bench) -> list[dict[str, Any]]:
    """One prompt through the text encoder: packed as folders ship it, and dense."""
    found, model = [], bench.model
    ids, mask = _prompt(bench)
    arms: dict[str, Callable[[], Any]] = {
        "linocut affine4": lambda: GpuEncoder(packed_text_encoder(model.text_encoder, model.text_taps)),
        "dense bf16 eager": lambda: dense_text_encoder(model.text_encoder, model.text_taps),
        "dense bf16 compiled": lambda: _compiled_text(bench)}
    for name, make in arms.items():
        with torch.no_grad(), peak() as most:
            encoder = make()
            start = time.perf_counter()
            features = encoder(ids, mask)
            float(features.float().sum())
            first = time.perf_counter() - start
            for _ in range(0 if bench.toy else 2):
                encoder(ids, mask)
            took = seconds(lambda encoder=encoder: encoder(ids, mask), bench.rounds)
        found.append({"what": name, "seconds": took, "first_call_seconds": first, **most,
                      "graph": getattr(encoder, "graph_note", "none") or "yes"})
        say(line(found[-1]))
        del encoder
        release()
    return found


def decode(bench: Bench) -> list[dict[str, Any]]:
    """Latents to pixels at the larger size, and pixels to the bytes of a PNG file."""
    side, found = bench.sides[-1], []
    latents = torch.randn(1, 4 * bench.vae.latent_channels, side // 16, side // 16, device=DEVICE)
    for name, of_torch in (("linocut", False), ("torch's layers", True)):
        with torch.no_grad(), peak() as most:
            vae = decoder(bench.vae, of_torch)
            pixels = vae.develop(latents, None, lambda *_: None)
            took = seconds(lambda vae=vae: vae.develop(latents, None, lambda *_: None), bench.rounds)
        found.append({"what": f"decoder of {name}", "side": side, "seconds": took, **most})
        say(line(found[-1]))
        del vae
    image = to_image(pixels[0] / 2 + 0.5)
    found.append({"what": "PNG", "side": side, "seconds": wall(lambda: encode_png(image, None), bench.rounds),
                  "bytes": len(encode_png(image, None))})
    say(line(found[-1]))
    return found


def picture(bench: Bench) -> list[dict[str, Any]]:
    """Whole pictures at the larger size, warm: the third and later ones of a process."""
    return _pictures(bench, bench.sides[-1], (1,), bench.encodings, ("exact", "fast"), ("eager", "compiled"))


def batch(bench: Bench) -> list[dict[str, Any]]:
    """Several pictures of one call at the smaller size: seconds of each. Ours run one after another."""
    return _pictures(bench, bench.sides[0], COUNTS[: 2 if bench.toy else None], bench.encodings[:1],
                     ("exact", "fast"), ("compiled",))


def _pictures(bench: Bench, side: int, counts: tuple[int, ...], encodings: list[str], levels: tuple[str, ...],
              dense: tuple[str, ...]) -> list[dict[str, Any]]:
    found = []

    def add(what: str, count: int, draw: Callable[[int], list[bytes]], **facts: Any) -> None:
        with peak() as most:
            for _ in range(1 if bench.toy else 3):  # compiles, records, replays
                draw(count)
            took = wall(lambda: draw(count), 1 if bench.toy else 5) / count
        found.append({"what": what, "side": side, "pictures": count, "seconds": took, **most, **facts})
        say(line({key: value for key, value in found[-1].items() if key != "phases"}))

    for encoding in encodings:
        for accuracy in levels[: 1 if bench.toy else None]:
            bench.tune(encoding, accuracy)
            with level(accuracy), _rehearsed(bench):
                pipe = Pipeline.from_pretrained(folders.folder(bench, encoding), device=DEVICE, prompt_cache=False)
                for count in counts:
                    add(f"linocut {encoding} {accuracy}", count, lambda n, p=pipe: _ours(p, n, side))
                    found[-1]["phases"] = pipe.timings
                pipe.close()
                del pipe
            release()
    for how in dense:
        arm = Dense(bench, compiled=how == "compiled")
        for count in counts:
            add(f"dense bf16 {how}", count, lambda n, arm=arm: arm.draw(n, side))
        del arm
        release()
    return found


def _ours(pipe: Pipeline, count: int, side: int) -> list[bytes]:
    result = pipe(PROMPT, width=side, height=side, num_inference_steps=STEPS, seed=0, num_images=count)
    return [encode_png(image, recipe) for image, recipe in zip(result.images, result.recipes, strict=True)]


class Dense:
    """The networks of a picture in bfloat16, with random weights, all of them on the device."""

    def __init__(self, bench: Bench, compiled: bool) -> None:
        self.bench = bench
        self.text: Any = _compiled_text(bench) if compiled else \
            dense_text_encoder(bench.model.text_encoder, bench.model.text_taps)
        self.network: Any = dense_network(bench.config)
        self.vae = decoder(bench.vae, of_torch=True)
        if compiled:
            compile_blocks(self.network.transformer_blocks, self.network.single_transformer_blocks)
        self.mods = [modulations(bench.config.width, i).to(torch.bfloat16) for i in range(STEPS)]

    @torch.no_grad()
    def draw(self, count: int, side: int) -> list[bytes]:
        """`count` pictures of one prompt, all of them at once."""
        grid = side // 16
        features = self.text(*_prompt(self.bench)).expand(count, -1, -1)
        image_ids, text_ids = image_position_ids(grid, grid).to(DEVICE), text_position_ids(self.bench.text).to(DEVICE)
        noise = torch.randn(count, self.bench.config.in_channels, grid, grid,
                            generator=torch.Generator().manual_seed(0)).to(DEVICE)
        steps = iter(self.mods)

        def velocity(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return self.network(x.to(torch.bfloat16), features, next(steps), image_ids, text_ids)

        latents = euler(velocity, noise.flatten(2).transpose(1, 2), sigmas(grid * grid, STEPS))
        pixels = self.vae.develop(latents.transpose(1, 2).unflatten(2, (grid, grid)), None, lambda *_: None)
        return [encode_png(to_image(each / 2 + 0.5), None) for each in pixels]


def _prompt(bench: Bench) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of a short prompt, padded as all are."""
    ids = torch.arange(1, bench.text + 1)[None] % 200
    mask = torch.zeros_like(ids)
    mask[:, : max(1, min(32, bench.text - 2))] = 1
    return ids.to(DEVICE), mask.to(DEVICE)


def _compiled_text(bench: Bench) -> Any:
    encoder = dense_text_encoder(bench.model.text_encoder, bench.model.text_taps)
    compile_blocks(encoder.layers)
    return encoder


@contextmanager
def _rehearsed(bench: Bench) -> Any:
    """In a rehearsal on a CPU, what would run on a GPU runs in the interpreter."""
    if not (bench.toy and DEVICE == "cpu"):
        yield
        return
    own = Components._on_tensor_cores
    Components._on_tensor_cores = True  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Components._on_tensor_cores = own  # type: ignore[method-assign]


def embedded(bench: Bench) -> dict[str, Any]:
    """The embedded models: seconds of a picture, and how far it is from the CPU's of the same seed (PSNR, dB)."""
    if bench.toy:
        return {"skipped": "the interpreter would take minutes"}
    import numpy as np

    found: dict[str, Any] = {}
    for model in ("embedded", "embedded-binary"):
        wanted = None
        for where, accuracy in (("cpu", "exact"), (DEVICE, "exact"), (DEVICE, "rows"), (DEVICE, "fast")):
            with level(accuracy):
                pipe = Pipeline.from_pretrained(model, device=where, prompt_cache=False)
                times = []
                for _ in range(1 if where == "cpu" else 4):
                    start = time.perf_counter()
                    images = pipe("two red apples and a blue cup", seed=7).images
                    times.append(time.perf_counter() - start)
                pixels = np.asarray(images[0]).astype(float)
                name = f"{model} {where}{'' if where == 'cpu' else ' ' + accuracy}"
                found[name] = {"first_seconds": times[0], "seconds": min(times), "kernel": pipe.kernel(320)}
            if wanted is None:
                wanted = pixels
            else:
                found[name]["psnr_to_cpu"] = 10 * math.log10(255**2 / max(float(((pixels - wanted) ** 2).mean()), 1e-3))
                bench.ok &= found[name]["psnr_to_cpu"] > 30
            say(f"{name}: {line(found[name])}")
    return found
