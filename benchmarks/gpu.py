"""Everything about NVIDIA GPUs in one command: parity, products, steps, pictures, cold starts; as JSON, and a verdict.

    PYTHONPATH=src python benchmarks/gpu.py -o benchmarks/results/gpu.json         # on a GPU
    PYTHONPATH=src TRITON_INTERPRET=1 python benchmarks/gpu.py --toy -o toy.json   # a rehearsal on a CPU, in minutes
    PYTHONPATH=src python benchmarks/gpu.py --table A.json B.json                  # targets, from one run or several
    PYTHONPATH=src python benchmarks/gpu.py --plot benchmarks/results/gpu.json docs/gpu.png

| section  | what it measures                                                          | seconds (estimated, H200) |
|----------|---------------------------------------------------------------------------|---------------------------|
| device   | copy bandwidth, the library's bf16 product                                |   5 |
| parity   | every kernel against the reference, whole steps, graphs                   |  80 |
| tune     | every route and tile at every shape, kept in LINOCUT_CACHE                |  70 |
| step     | the packed step: accuracies, sizes, time, memory                          |  30 |
| together | 1, 4 and 32 pictures of the embedded model's size through a step          |  40 |
| dense    | the same in dense bfloat16                                                |   5 |
| compiled | the same compiled, at 1024 px also with cuDNN's attention                 |  60 |
| text     | the text encoder: packed, dense, compiled                                 |  25 |
| decode   | the decoder: ours, and of torch's layers; a PNG file                      |  10 |
| picture  | whole pictures, warm: ours, dense, compiled                               |  75 |
| batch    | 1, 2 and 4 pictures of a call at 512 px                                   |  70 |
| cold     | processes from the shell to a PNG, with empty caches and with full ones   | 200 |
| budget   | pictures under ever smaller --max-memory: planned and found, pixels       |  90 |
| products | torch's products at the same shapes, unpacking alone                      |  15 |
| rows     | what lies between products, attention                                     |  10 |
| profile  | where the time of a step goes, by kernel                                  |  20 |
| embedded | pictures of the embedded models, and how far they are from the CPU's      |  25 |
| gemlite  | its step and products, where it is installed                              | 150 |

Sections stand alone: what needs routes measures those that are not measured yet. Two runs of under eight minutes each:
`--sections` device to batch, and cold to gemlite. The file is written after each section, so that a run that is cut
short loses nothing; a section that fails is recorded with its error and the others go on. Networks have klein 4B's
shapes and random weights; text lasts 512 tokens. Exit code 1 if parity or a section fails; targets that are missed do
not count.

It needs torch and Triton for CUDA, numpy, click, rich, tokenizers, pillow, psutil and huggingface_hub, and no C++
module. A machine without a package index gets what it lacks as wheels (`pip wheel --no-deps -w DIR NAME==VERSION`, then
`pip install --no-index --no-deps --target SITE DIR/*.whl` there and SITE in PYTHONPATH); gemlite==0.6.0.post2 is pure
Python, wants tqdm and Triton besides, and is left out where it is not installed.
"""

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from on_gpu import budget, cold, gemlite, parity, pictures, products, steps, targets
from on_gpu.bench import Bench, alive, release
from on_gpu.plot import plot

SECTIONS = {"device": products.device, "parity": parity.parity, "tune": products.tune, "step": steps.step,
            "together": steps.together, "dense": steps.dense, "compiled": steps.compiled, "text": pictures.text,
            "decode": pictures.decode, "picture": pictures.picture, "batch": pictures.batch, "cold": cold.cold,
            "budget": budget.budget, "products": products.products, "rows": products.row_kernels,
            "profile": steps.profile, "embedded": pictures.embedded, "gemlite": gemlite.gemlite}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma separated")
    parser.add_argument("--encodings", default="ternary,binary", help="comma separated, for tuning, steps and pictures")
    parser.add_argument("--tune-seconds", type=float, default=110.0, help="most that the section tune takes")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where model folders are made: 4 GB")
    parser.add_argument("--toy", action="store_true", help="next to no size, for a rehearsal on a CPU")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("JSON", "PNG"))
    parser.add_argument("--table", nargs="+", type=Path, metavar="JSON")
    parser.add_argument("--resume", action="store_true", help="keep the other sections that the output file has")
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu.json"))
    given = parser.parse_args()
    if given.plot:
        plot(*given.plot)
        return 0
    if given.table:
        results: dict[str, Any] = {}
        for path in given.table:
            results |= json.loads(path.read_text())
        print(targets.table(results))
        return 0
    unknown = [name for name in given.sections.split(",") if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown section {unknown[0]!r}; known: {', '.join(SECTIONS)}")
    bench = Bench(given.output, given.toy, given.encodings.split(","), given.tune_seconds, given.work)
    if given.resume and given.output.exists():
        bench.results = json.loads(given.output.read_text())
        bench.ok = not any(isinstance(value, dict) and "failed" in value for value in bench.results.values())
    begun, names = time.perf_counter(), given.sections.split(",")
    for number, name in enumerate(names):
        start = time.perf_counter()
        print(f"{name} ...", flush=True)
        try:
            with torch.no_grad():
                bench.results[name] = SECTIONS[name](bench)
        except Exception as error:
            traceback.print_exc()
            bench.ok = False
            bench.results[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
            bench.save()
            if not alive() and number + 1 < len(names):  # the others need a process with a GPU
                print(f"{name} broke the GPU for this process", flush=True)
                os.execv(sys.executable, [sys.executable, *sys.argv, "--resume", "--sections",
                                          ",".join(names[number + 1 :])])
        bench.results.setdefault("seconds", {})[name] = round(time.perf_counter() - start, 1)
        bench.save()
        print(f"{name}: {bench.results['seconds'][name]} s", flush=True)
        release()
    print(f"all: {time.perf_counter() - begun:.1f} s\n{targets.table(bench.results)}", flush=True)
    return 0 if bench.ok else 1


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # said before processes are started from this one
    sys.exit(main())
