"""Section `cold`: fresh processes, from the shell's point of view, to a PNG file on disk."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from linocut.kernels.gpu import accuracy
from on_gpu import folders
from on_gpu.bench import PROMPT, STEPS, Bench, line, release, say
from on_gpu.networks import DEVICE

AGAIN = 3
CACHES = {"LINOCUT_CACHE": "linocut", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor",
          "CUDA_CACHE_PATH": "cuda"}
# Where the command line lacks a package that it needs: the same by the Python API.
_API = """
import json, sys
from linocut.pipeline.generate import Pipeline
from linocut.pipeline.png import write_png
folder, out, side, steps, device, prompt, *limit = sys.argv[1:]
result = Pipeline.from_pretrained(folder, device=device, prompt_cache=False, max_memory=limit[0] if limit else None)(
    prompt, width=int(side), height=int(side), num_inference_steps=int(steps), seed=0)
write_png(result.images[0], out, result.recipe)
print(json.dumps({"timings": result.timings}))
"""


def cold(bench: Bench) -> list[dict[str, Any]]:
    """A picture at the larger size in a process of its own: with empty caches, then again with what it left there.

    Model files come from the system's cache, if it has room for them: they were written just before.
    """
    found = []
    way = "linocut generate" if _cli_works() else "Python API: the command line cannot be imported"
    for encoding in bench.encodings[: 1 if bench.toy else None]:
        place = folders.folder(bench, encoding)
        release()
        with tempfile.TemporaryDirectory(prefix="linocut-cold-") as made:
            caches = {name: str(Path(made) / folder) for name, folder in CACHES.items()}
            runs = []
            for number in range(1 + (1 if bench.toy else AGAIN)):
                runs.append(process(bench, place, Path(made) / f"{number}.png", caches))
                say(f"{encoding}, caches {'there' if number else 'empty'}: {line(runs[-1])}")
            files = [file for file in Path(made).rglob("*") if file.is_file() and file.suffix != ".png"]
            size = sum(file.stat().st_size for file in files)
        again = {key: statistics.median(run[key] for run in runs[1:]) for key in runs[0]}
        found.append({"what": f"linocut {encoding} {accuracy.DEFAULT}", "way": way, "first": runs[0], "again": again,
                      "runs": runs, "cache_bytes": size})
        say(f"{encoding}: first {runs[0]['seconds']:.2f} s, again {again['seconds']:.2f} s")
    return found


@lru_cache(maxsize=1)
def _cli_works() -> bool:
    return subprocess.run([sys.executable, "-m", "linocut", "generate", "--help"], capture_output=True,
                          check=False).returncode == 0


def process(bench: Bench, place: Path, picture: Path, caches: dict[str, str],
            limit: int | None = None) -> dict[str, float]:
    """Seconds of one process by what they went into, and bytes of GPU memory; `limit` is its --max-memory."""
    side = bench.sides[-1]
    if _cli_works():
        command = ["-m", "linocut", "generate", PROMPT, "--model", str(place), "--size", f"{side}x{side}", "--steps",
                   str(STEPS), "--seed", "0", "--device", DEVICE, "--no-prompt-cache", "--json", "-o", str(picture)]
        command += ["--max-memory", str(limit)] if limit else []
    else:
        command = ["-c", _API, str(place), str(picture), str(side), str(STEPS), DEVICE, PROMPT]
        command += [str(limit)] if limit else []
    asked = ("LINOCUT_GPU_ACCURACY", "LINOCUT_GPU_TUNE", "LINOCUT_KERNEL")
    environment = {name: value for name, value in os.environ.items() if name not in asked} | caches
    with tempfile.TemporaryFile() as said, _Watch() as watch:
        start = time.monotonic()
        child = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=said, env=environment)
        printed, _ = child.communicate(timeout=300)
        end = time.monotonic()
        if child.returncode or not picture.exists():
            said.seek(0)
            raise RuntimeError(f"the process ended with {child.returncode}: {said.read().decode()[-1500:]}")
    text = printed.decode()
    timings = json.loads(text[text.index("{"):])["timings"]
    encode, denoise, decode = (timings[name] for name in ("encode", "denoise", "decode"))
    loads = [phase["load_seconds"] for phase in (encode, denoise, decode)]
    steps = denoise["steps"]
    return {"seconds": end - start, "import_and_open": encode["spans"][0][0] - start, "load": sum(loads),
            "text": encode["seconds"] - loads[0], "first_step": steps[0], "other_steps": sum(steps[1:]),
            "rest_of_denoising": denoise["seconds"] - loads[1] - sum(steps), "decode": decode["seconds"] - loads[2],
            "png_and_exit": end - decode["spans"][-1][1],
            "peak_rss": max(phase["peak_rss"] for phase in timings.values()),
            "peak_gpu_torch": max(phase.get("peak_gpu", 0) for phase in timings.values()),
            "peak_gpu_process": watch.most}


class _Watch:
    """The most memory that others take on the GPU meanwhile: the process and its context."""

    def __init__(self) -> None:
        self.most = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "_Watch":
        if DEVICE == "cuda":
            self._before = torch.cuda.mem_get_info()[0]
            self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            self.most = max(self.most, self._before - torch.cuda.mem_get_info()[0])

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
