"""How far each method of `linocut quantize` comes without training: one table for one dense model.

    python benchmarks/ptq.py MODEL --prompts prompts.txt --held-out held_out.txt --work DIR [--encoding ternary binary]

MODEL is a dense model folder, such as stage `teacher-model` of `linocut train` leaves. Every method quantizes it with
the same prompts; the columns are

- outputs: relative squared error of a layer's outputs against MODEL, errors of all layers before it included, mean over
  layers, on prompts that were not looked at;
- velocity: relative error of the velocity at each step of the sampler, on the teacher's own path, same prompts;
- PSNR: of pictures of the prompts in --held-out to MODEL's on the same noise, mean in dB;
- seconds of the whole command, and its peak resident memory, mapped files included.

With --judge N, N prompts of the embedded world's test split are then drawn by MODEL and by all others, `--images` times
each, in MODEL's default steps. A second table has their scores by task in percent, the mean's standard error, and what
is kept of MODEL's mean, with its 95 % interval by bootstrap over prompts.

What a method has finished in DIR is taken from there; remove DIR to measure again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from judging import Judging, judge, outcomes
from quality import interval, plain
from quantize import run

from linocut.eval.rules import GENEVAL_TASKS
from linocut.eval.statistics import compare, scores
from linocut.train.loop import chosen_device

SOURCE = "source"
METHODS = ("absmean", "exact", "folds", "gptq", "descent", "reconstruct")


def quantize(model: str, target: Path, encoding: str, method: str, prompts: Path, count: int,
             device: list[str]) -> dict[str, Any]:
    """The report of one run, with its seconds and peak bytes; from disk if it was made before."""
    known = target.with_suffix(".json")
    if known.exists():
        return json.loads(known.read_text())
    command = [sys.executable, "-m", "linocut", "quantize", model, str(target), "--encoding", encoding, "--method",
               method, "--prompts", str(prompts), "--calibrate", str(count), "--json", "--force", *device]
    report, seconds, peak = run(command)
    report |= {"seconds": seconds, "peak_bytes": peak}
    known.write_text(json.dumps(report))
    return report


def draw(model: str, prompts: list[str]) -> np.ndarray:
    from linocut.pipeline.generate import Pipeline

    pipe = Pipeline.from_pretrained(model)
    return np.stack([np.asarray(pipe(prompt, seed=seed).images[0], np.float64) for seed, prompt in enumerate(prompts)])


def psnr(pictures: np.ndarray, wanted: np.ndarray) -> float:
    error = np.square(pictures - wanted).reshape(len(wanted), -1).mean(1)
    return float(np.mean(10 * np.log10(255.0**2 / np.maximum(error, 1e-9))))


def judge_all(options: argparse.Namespace, names: list[str]) -> None:
    """Pictures of MODEL and of what was made of it, judged; a run that was cut goes on."""
    shared = ["--split", "test", "-n", str(options.judge), "--images", str(options.images), "--keep", "none",
              "--device", options.device or chosen_device(None).type]
    shared += ["--detector", options.detector] if options.detector else []
    models = {SOURCE: options.model} | {name: str(options.work / name) for name in names}
    judge([Judging(judged(options) / name, ["-m", f"{name}={model}", *shared])
           for name, model in models.items()], options.at_once)


def judged(options: argparse.Namespace) -> Path:
    """Where verdicts lie."""
    found: Path = options.work / f"judged-{options.judge}x{options.images}"
    return found


def standings(options: argparse.Namespace, names: list[str]) -> list[str]:
    """All scores in Markdown."""
    lines = [f"| model | {' | '.join(GENEVAL_TASKS)} | mean | keeps, % |", "|---|" + "---:|" * (len(GENEVAL_TASKS) + 2)]
    whole = None
    for name in (SOURCE, *names):
        right, tasks = outcomes(judged(options) / name, name, options.images)
        keeps = "" if whole is None else interval(compare(whole, right, tasks).ratio.to_dict())
        whole = right if whole is None else whole
        (score,) = scores(right.mean(1)[:, None], tasks)
        by_task = " | ".join(f"{100 * right[tasks == task].mean():.2f}" for task in range(len(GENEVAL_TASKS)))
        lines.append(f"| {name} | {by_task} | {plain(score.to_dict())} | {keeps} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="dense model folder")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, help="prompts to draw; none: no pictures are drawn")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--calibrate", type=int, default=64)
    parser.add_argument("--encoding", nargs="+", default=["ternary", "binary"], choices=["ternary", "binary"])
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--device", help="as for linocut quantize: a GPU if there is one")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--judge", type=int, metavar="N", help="prompts to judge by; none: nothing is judged")
    parser.add_argument("--images", type=int, default=4, help="pictures of each of them")
    parser.add_argument("--detector", help="as for linocut eval geneval")
    parser.add_argument("--at-once", type=int, default=1, help="models that are judged side by side")
    options = parser.parse_args()
    from linocut.train.ptq.ladder import read_prompts

    options.work.mkdir(parents=True, exist_ok=True)
    held_out = list(read_prompts(options.held_out, options.pictures)) if options.held_out else []
    wanted = draw(options.model, held_out) if held_out else None
    device = ["--device", options.device] if options.device else []
    print("| encoding | method | weights | outputs | velocity by step | mean | PSNR, dB | seconds | peak MB |")
    print("|---|---|---:|---:|---|---:|---:|---:|---:|")
    for encoding in options.encoding:
        for method in options.method:
            target = options.work / f"{encoding}-{method}"
            report = quantize(options.model, target, encoding, method, options.prompts, options.calibrate, device)
            outputs = [tensor["output_error"] for tensor in report["tensors"] if "output_error" in tensor]
            velocity = report["solving"]["velocity_error"]
            picture = "" if wanted is None else f"{psnr(draw(str(target), held_out), wanted):.2f}"
            by_step = " ".join(f"{error:.3f}" for error in velocity)
            cells = (encoding, method, f"{report['totals']['transformer']['relative_error']:.4f}",
                     f"{np.mean(outputs):.4f}", by_step, f"{np.mean(velocity):.4f}", picture,
                     f"{report['seconds']:.0f}", f"{report['peak_bytes'] / 1e6:.0f}")
            print(f"| {' | '.join(cells)} |", flush=True)
    if options.judge:
        names = [f"{encoding}-{method}" for encoding in options.encoding for method in options.method]
        judge_all(options, names)
        print("", *standings(options, names), sep="\n")


if __name__ == "__main__":
    main()
