"""Seconds of `linocut quantize --prompts` at FLUX.2 klein 4B's size, by method and what they go into; random weights.

    PYTHONPATH=src python benchmarks/ptq_klein.py --work DIR --method descent reconstruct -o klein.json   # 14 GB in DIR
    PYTHONPATH=src python benchmarks/ptq_klein.py --work DIR --blocks 1 2 --device cpu --toy -o toy.json  # a rehearsal

The model is made once in DIR. Rounding random weights says nothing about quality (`benchmarks/ptq.py` does, for a
trained model), but it takes as long as rounding trained ones. A method that is not done after `--limit` seconds is
stopped; what it had done until then is told, and what the rest would take at that pace.
"""

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from linocut.models.configs import Flux2Config, Qwen3Config
from linocut.models.synthetic import KNOWN, SyntheticModel, write_synthetic
from linocut.quantize.stream import quantize_folder
from linocut.train.loop import chosen_device
from linocut.train.prompts import sample_prompts
from linocut.train.ptq.ladder import CalibrationSettings, method_named
from linocut.train.ptq.solver import BlockSolver

WRITING = {"text_encoder": "writing the text encoder", "transformer": "writing"}
TOY = SyntheticModel(
    Flux2Config(num_attention_heads=1, joint_attention_dim=384),
    Qwen3Config(hidden_size=128, intermediate_size=256, num_hidden_layers=3), text_taps=(1, 2, 3), text_length=64,
    default_size=(64, 64))
PARTS = (("transformer",), ("text_encoder", "vae", "tokenizer"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"), default=(5, 20))
    parser.add_argument("--method", nargs="+", default=["descent", "reconstruct"])
    parser.add_argument("--encoding", default="ternary")
    parser.add_argument("--calibrate", type=int, default=64)
    parser.add_argument("--limit", type=float, default=600.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="next to no size")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    begun, source = time.monotonic(), given.work / "-".join(["klein", *map(str, given.blocks)])
    model = TOY if given.toy else KNOWN["klein-4b"]
    model = replace(model, transformer=replace(model.transformer, num_layers=given.blocks[0],
                                               num_single_layers=given.blocks[1]))
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(make, [source] * 2, [model] * 2, PARTS))
    print(f"made {source} in {time.monotonic() - begun:.0f} s", flush=True)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if given.device.startswith("cuda") else "cpu",
        "torch": torch.__version__, "blocks": given.blocks, "encoding": given.encoding, "prompts": given.calibrate}
    for method in given.method:
        results[method] = timed(given, source, method)
        given.output.write_text(json.dumps(results, indent=1) + "\n")
        print(method, results[method], flush=True)


def make(source: Path, model: SyntheticModel, parts: tuple[str, ...]) -> None:
    write_synthetic(source, model, "bf16", parts)


def timed(given: argparse.Namespace, source: Path, method: str) -> dict[str, Any]:
    """One run in a process of its own: seconds from its start at which things began, and in all."""
    target, log = given.work / f"{given.encoding}-{method}", given.work / f"{given.encoding}-{method}.jsonl"
    log.unlink(missing_ok=True)
    begun = time.time()
    child = multiprocessing.get_context("spawn").Process(
        target=quantize, args=(source, target, given.encoding, method, given.calibrate, given.device, log))
    child.start()
    child.join(given.limit)
    stopped = child.is_alive()
    child.kill()
    child.join()
    found: dict[str, Any] = {"seconds": round(time.time() - begun, 1), "done": not stopped and not child.exitcode}
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    found["began"] = {line["what"]: round(line["time"] - begun, 1) for line in reversed(lines)}
    blocks = [line for line in lines if "transformer_blocks." in line["what"]]
    if stopped and len(blocks) > 1:
        pace = (blocks[-1]["done"] - blocks[0]["done"]) / (blocks[-1]["time"] - blocks[0]["time"])
        found["expected_seconds"] = round(blocks[0]["time"] - begun + blocks[0]["all"] / pace, 1)
    return found


def quantize(source: Path, target: Path, encoding: str, method: str, count: int, device: str, log: Path) -> None:
    """Quantize and write down when what is worked at changes."""
    last = ""

    def note(done: int, total: int, what: str) -> None:
        nonlocal last
        what = WRITING.get(what.partition(".")[0], what.partition(",")[0])
        if what != last:
            last = what
            with log.open("a") as lines:
                lines.write(json.dumps({"time": time.time(), "what": what, "done": done, "all": total}) + "\n")

    prompts = tuple(each["prompt"] for each in sample_prompts("dev", count))
    solver = BlockSolver(method_named(method), CalibrationSettings(prompts), chosen_device(device))
    quantize_folder(source, target, encoding, force=True, on_progress=note, solver=solver)


if __name__ == "__main__":
    main()
