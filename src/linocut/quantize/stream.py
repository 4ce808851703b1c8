"""Quantize a model folder tensor by tensor, in little memory, so that it can be stopped and taken up again.

All work happens in a hidden folder beside the destination (`.NAME.partial`), which is renamed when everything in it is
on disk: the destination never holds half a model. The hidden folder knows which files (size and time of change) and
which options it was begun with; the next run with the same ones goes on with the tensors that are missing, any other
run starts over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from linocut.errors import FormatError, UsageError
from linocut.formats.checkpoint import Checkpoint, CheckpointWriter, atomic_write_bytes, write_checkpoint
from linocut.formats.header import FORMAT_VERSION
from linocut.formats.names import is_timestep
from linocut.formats.packed import GROUP_SIZE, PackedTensor, layout, packed_nbytes
from linocut.formats.timestep_table import CONFIG_KEY, TABLE_FILE, TABLE_VERSION, WEIGHTS_FILE
from linocut.quantize.policy import DENSE, Policy
from linocut.quantize.rounding import quantize_tensor, squared_error
from linocut.quantize.source import Reader, Source, open_source, text_encoder_names
from linocut.quantize.workplace import carry, check_apart, check_destination, check_disk, publish, workplace

__all__ = ["Report", "Solved", "Solver", "TensorReport", "quantization_config", "quantize_folder"]

OnProgress = Callable[[int, int, str], None]
MakeTable = Callable[[Mapping[str, Any], Mapping[str, Any], Checkpoint], Mapping[str, np.ndarray]]
"""From a transformer's config, the model's settings and the layers that see the noise level to a table's tensors."""
TEXT_ENCODER_CHOICES = ("affine4", "keep")
TIMESTEP_WEIGHTS = "timestep_weights"  # the name of their file's job
SCRATCH = "solving"  # what a solver keeps in the hidden folder while it works

_ROW_BLOCK = 1 << 21  # weights that one thread rounds at a time
_RELEASE_EVERY = 1 << 25  # weights after which the source's pages may leave memory
_CPU = torch.device("cpu")
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class TensorReport:
    """What became of one weight. error and energy are |w - q|^2 and |w|^2; a dense tensor has no error.

    `output_error` is the relative squared error of the layer's outputs, where a solver has measured it.
    """

    component: str
    name: str
    encoding: str
    shape: tuple[int, ...]
    nbytes: int
    source_nbytes: int
    reason: str
    error: float = 0.0
    energy: float = 0.0
    output_error: float | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8.0 * self.nbytes / max(1, self.weights)

    @property
    def relative_error(self) -> float:
        """|w - q|^2 / |w|^2."""
        return self.error / self.energy if self.energy else 0.0


@dataclass
class Report:
    """The result of a run: every tensor, the seconds it took and how many tensors an earlier run had finished.

    `timestep_table` is the size in bytes of the table's file, 0 if none was made. `solving` is what a solver says.
    """

    destination: Path
    tensors: list[TensorReport]
    seconds: float
    resumed: int
    timestep_table: int = 0
    solving: dict[str, Any] = field(default_factory=dict)

    def of(self, component: str) -> list[TensorReport]:
        """The tensors of "transformer", "timestep_weights" or "text_encoder"."""
        return [tensor for tensor in self.tensors if tensor.component == component]

    def totals(self, component: str) -> dict[str, Any]:
        """Counts, bytes, bits per weight and the relative squared error over all packed weights of a component."""
        tensors = self.of(component)
        packed = [tensor for tensor in tensors if tensor.encoding != DENSE]
        weights, nbytes = sum(t.weights for t in tensors), sum(t.nbytes for t in tensors)
        energy = sum(t.energy for t in packed)
        return {
            "packed_layers": len(packed), "dense_tensors": len(tensors) - len(packed), "weights": weights,
            "packed_weights": sum(t.weights for t in packed), "tensor_bytes": nbytes,
            "source_bytes": sum(t.source_nbytes for t in tensors), "bits_per_weight": 8.0 * nbytes / max(1, weights),
            "relative_error": sum(t.error for t in packed) / energy if energy else 0.0,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        components = dict.fromkeys(tensor.component for tensor in self.tensors)
        return {
            "destination": str(self.destination), "seconds": round(self.seconds, 3), "resumed_tensors": self.resumed,
            "timestep_table_bytes": self.timestep_table, **({"solving": self.solving} if self.solving else {}),
            "totals": {component: self.totals(component) for component in components},
            "tensors": [{"component": t.component, "name": t.name, "encoding": t.encoding, "shape": list(t.shape),
                         "bytes": t.nbytes, "bits_per_weight": t.bits_per_weight, "reason": t.reason,
                         "relative_error": None if t.encoding == DENSE else t.relative_error,
                         **({} if t.output_error is None else {"output_error": t.output_error})}
                        for t in self.tensors],
        }


class Solved(Protocol):
    """What a solver made: weights by module path, others are rounded as ever."""

    summary: dict[str, Any]

    def weight(self, name: str) -> tuple[PackedTensor, TensorReport] | None:
        """The packed weight of a module and its figures, or None for one that the solver did not round."""


class Solver(Protocol):
    """Rounds a transformer's weights looking at more than each alone, such as at what goes into the layers."""

    identity: str
    """All that the result depends on, besides source and policy."""
    device: torch.device
    """Where it computes. The text encoder is rounded there, too."""

    def scratch_nbytes(self, source: Source, encodings: Mapping[str, str]) -> int:
        """Bytes that `solve` will write into its folder."""

    def solve(self, source: Source, encodings: Mapping[str, str], work: Path, on_progress: OnProgress | None) -> Solved:
        """Round the weights of `source.transformer`. `encodings` has every module of the transformer with its
        encoding or "dense". `work` is the hidden folder, where the text encoder lies packed if it is to be; what is in
        `work / SCRATCH` is the solver's own, and is there again if a run before was cut."""


@dataclass
class _Job:
    """One weight file to write: targets are {name in the file: name in the source}."""

    component: str
    file: str  # inside the output
    reader: Reader
    targets: dict[str, str]
    config: dict[str, Any]
    policy: Policy
    groups_per_scale: int = 1
    method: str = "exact"
    decisions: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.decisions:
            return
        shapes = {name: self.reader.info(source).shape for name, source in self.targets.items()}
        modules = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
        chosen = self.policy.plan(modules)
        for name in self.targets:
            module = name.removesuffix(".weight")
            self.decisions[name] = chosen[module] if module != name else (DENSE, "not a weight matrix")
            dtype = self.reader.info(self.targets[name]).dtype
            if self.decisions[name][0] != DENSE and dtype not in _FLOATS:
                raise FormatError("cannot quantize weights of this dtype", path=self.reader.path, tensor=name,
                                  expected=" ".join(_FLOATS), found=dtype, advice="start from the unquantized model")

    def without_timestep(self) -> tuple[_Job, _Job]:
        """This job for a transformer as two: all that sees more than the noise level, and the rest."""
        parts = []
        for component, file, timestep in ((self.component, self.file, False),
                                          (TIMESTEP_WEIGHTS, f"transformer/{WEIGHTS_FILE}", True)):
            targets = {name: source for name, source in self.targets.items() if is_timestep(name) == timestep}
            decisions = {name: self.decisions[name] for name in targets}
            parts.append(_Job(component, file, self.reader, targets, self.config, self.policy,
                              self.groups_per_scale, self.method, decisions))
        return parts[0], parts[1]

    @property
    def packed(self) -> dict[str, tuple[str, tuple[int, int]]]:
        result = {}
        for name, (encoding, _) in self.decisions.items():
            if encoding != DENSE:
                o, n = self.reader.info(self.targets[name]).shape
                result[name.removesuffix(".weight")] = (encoding, (o, n))
        return result

    @property
    def dense(self) -> list[tuple[str, str, tuple[int, ...]]]:
        infos = ((name, self.reader.info(source)) for name, source in self.targets.items()
                 if self.decisions[name][0] == DENSE)
        return [(name, info.dtype, info.shape) for name, info in infos]

    @property
    def nbytes(self) -> int:
        return (sum(packed_nbytes(*entry) for entry in self.packed.values())
                + sum(self.reader.info(self.targets[name]).nbytes for name, _, _ in self.dense))

    @property
    def weights(self) -> int:
        return sum(self.reader.info(source).count for source in self.targets.values())


def quantization_config(policy: Policy, groups_per_scale: int = 1) -> dict[str, Any]:
    """The entry `quantization_config` of a packed component's config.json."""
    tied = {"groups_per_scale": groups_per_scale} if groups_per_scale != 1 else {}
    return {"quant_method": "linocut", "format_version": FORMAT_VERSION, "group_size": GROUP_SIZE, **tied,
            "policy": policy.to_dict()}


def quantize_folder(src: str | Path, dst: str | Path, encoding: str, policy: Policy | None = None,
                    text_encoder: str = "affine4", force: bool = False, threads: int | None = None,
                    on_progress: OnProgress | None = None, make_table: MakeTable | None = None,
                    tie_scales: bool = False, solver: Solver | None = None, method: str = "exact") -> Report:
    """Quantize `src` (model folder, transformer folder, transformer file or hub id) into the model folder `dst`.

    encoding ("binary" or "ternary") with the FLUX.2 preset, or `policy` for any other choice or model. The text
    encoder becomes affine4, cut after the last layer in use, or is kept as it is; all else goes along by hard link
    or copy. `make_table` makes a timestep table (`formats.timestep_table`), and the layers that it stands for go into a
    file of their own. With `tie_scales` every two neighbouring binary or ternary groups share a scale; a `solver`
    rounds the transformer's weights instead, with a scale for every group. `method` is that of `quantize.rounding`:
    "tied" for latent weights of a trained student.
    on_progress(weights done, weights in all, tensor). Any exception, KeyboardInterrupt included, leaves `dst` as it was
    and the finished tensors for the next run. Raises UsageError for a quantized source, an existing `dst` without
    `force` and a full disk, PolicyError for a model that the policy does not fit.
    """
    start = time.monotonic()
    if text_encoder not in TEXT_ENCODER_CHOICES:
        raise UsageError(f"unknown text encoder choice {text_encoder!r}; choose from affine4, keep")
    if solver is not None and tie_scales:
        raise UsageError("tied scales go with plain rounding only (method exact)")
    dst = Path(dst).expanduser().absolute()
    check_destination(dst, force)
    source = open_source(src, pack_text_encoder=text_encoder == "affine4")
    threads_before = torch.get_num_threads()
    try:
        check_apart(source.path, dst)
        jobs = _jobs(source, policy or Policy.preset("flux2", encoding), make_table is not None, 1 + tie_scales,
                     method)
        with workplace(dst, _identity(source, jobs, solver)) as work:
            encodings = {name.removesuffix(".weight"): encoding for job in jobs if job.component != "text_encoder"
                         for name, (encoding, _) in job.decisions.items()}
            scratch = 0 if solver is None else solver.scratch_nbytes(source, encodings)
            check_disk(work, sum(job.nbytes for job in jobs) + scratch, list(source.carried.values()))
            solved: Solved | None = None
            fresh, workers = 0, threads or threads_before
            torch.set_num_threads(1)  # row blocks run side by side; threads inside each would only get in the way
            if solver is not None:  # it wants to know what the packed text encoder makes of prompts
                made, known = _run(work, [job for job in jobs if job.component == "text_encoder"], workers,
                                   on_progress, device=solver.device)
                fresh = len(made) - known
                torch.set_num_threads(workers)
                solved = solver.solve(source, encodings, work, on_progress)
                torch.set_num_threads(1)
            reports, resumed = _run(work, jobs, workers, on_progress, solved)
            resumed -= fresh
            table_nbytes = 0 if make_table is None else _write_table(work, jobs[1], source.settings, make_table)
            _complete(work, jobs, source, make_table is not None)
            summary = {} if solved is None else solved.summary
            del solved  # before the files that it reads
            shutil.rmtree(work / SCRATCH, ignore_errors=True)
            publish(work, dst, force)
    finally:
        torch.set_num_threads(threads_before)
        source.close()
    return Report(dst, reports, time.monotonic() - start, resumed, table_nbytes, summary)


def _jobs(source: Source, policy: Policy, table: bool, groups_per_scale: int, method: str) -> list[_Job]:
    transformer = _Job("transformer", "transformer/diffusion_pytorch_model.safetensors", source.transformer,
                       {name: name for name in source.transformer.names}, source.transformer_config, policy,
                       groups_per_scale, method)
    if table and not any(map(is_timestep, transformer.targets)):
        raise UsageError(f"{source.path}: has none of the layers that a timestep table stands for; leave out "
                         "--timestep-table")
    jobs = list(transformer.without_timestep()) if table else [transformer]
    if source.text_encoder is not None:
        names = text_encoder_names(source.text_encoder.names, source.settings["text_taps"])
        jobs.append(_Job("text_encoder", "text_encoder/model.safetensors", source.text_encoder, names,
                         source.text_encoder_config, Policy.preset("qwen3", "affine4")))
    return jobs


# ------------------------------------------------------------------------------------------------ the work itself

def _run(work: Path, jobs: list[_Job], workers: int, on_progress: OnProgress | None, solved: Solved | None = None,
         device: torch.device = _CPU) -> tuple[list[TensorReport], int]:
    total, done, resumed = sum(job.weights for job in jobs), 0, 0
    reports: list[TensorReport] = []
    pool = ThreadPoolExecutor(workers, thread_name_prefix="linocut-quantize")
    try:
        for job in jobs:
            (work / job.file).parent.mkdir(exist_ok=True)
            log = work / f"{job.component}.jsonl"
            if (work / job.file).exists():  # finished by an earlier run
                known = list(_read_log(log).values())
                reports += known
                resumed += len(known)
                done += job.weights
                continue
            with CheckpointWriter(work / job.file, job.dense, {"format": "pt"}, job.packed, resume=True) as writer:
                earlier = _read_log(log)
                for name in job.targets:
                    encoding = job.decisions[name][0]
                    stored = name if encoding == DENSE else name.removesuffix(".weight")
                    if stored in earlier and writer.done(stored):
                        report = earlier[stored]
                        resumed += 1
                    else:
                        made = None if solved is None or encoding == DENSE or job.component == "text_encoder" else (
                            _write_solved(job, name, stored, writer, solved))
                        report = made or (_write_dense(job, name, stored, writer) if encoding == DENSE else
                                          _write_packed(job, name, stored, writer, pool, device))
                        with open(log, "a", encoding="utf-8") as file:
                            file.write(json.dumps(asdict(report)) + "\n")
                    reports.append(report)
                    done += report.weights
                    if on_progress is not None:
                        on_progress(done, total, f"{job.component}.{stored}")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return sorted(reports, key=lambda r: (r.component != "transformer", r.encoding == DENSE, r.name)), resumed


def _write_packed(job: _Job, name: str, stored: str, writer: CheckpointWriter, pool: ThreadPoolExecutor,
                  device: torch.device) -> TensorReport:
    info = job.reader.info(job.targets[name])
    encoding, reason = job.decisions[name]
    rows = max(1, _ROW_BLOCK // info.shape[1])
    array = job.reader.array(job.targets[name])

    def work(first: int) -> tuple[PackedTensor, float, float]:
        block = _tensor(array[first : first + rows], info.dtype)
        packed = quantize_tensor(block.to(device), encoding, job.method, name, job.groups_per_scale)
        return packed, *squared_error(block, packed)

    blocks, error, energy, since = [], 0.0, 0.0, 0
    for packed, block_error, block_energy in pool.map(work, range(0, info.shape[0], rows)):
        blocks.append(packed)
        error, energy = error + block_error, energy + block_energy
        since += packed.shape[0] * packed.shape[1]
        if since > _RELEASE_EVERY:
            job.reader.release(job.targets[name])
            since = 0
    for suffix, _, _ in layout(encoding, (info.shape[0], info.shape[1])):
        writer.write_chunks(f"{stored}.{suffix}", (block.parts()[suffix] for block in blocks))
    job.reader.release(job.targets[name])
    return TensorReport(job.component, stored, encoding, info.shape, sum(block.nbytes for block in blocks),
                        info.nbytes, reason, error, energy)


def _write_solved(job: _Job, name: str, stored: str, writer: CheckpointWriter, solved: Solved) -> TensorReport | None:
    found = solved.weight(stored)
    if found is None:
        return None
    packed, report = found
    writer.write(stored, packed)
    info = job.reader.info(job.targets[name])
    return replace(report, source_nbytes=info.nbytes, reason=job.decisions[name][1])


def _write_dense(job: _Job, name: str, stored: str, writer: CheckpointWriter) -> TensorReport:
    info = job.reader.info(job.targets[name])
    flat = job.reader.array(job.targets[name]).reshape(-1)

    def chunks() -> Iterator[np.ndarray]:
        for first in range(0, max(1, flat.size), _ROW_BLOCK):
            chunk = flat[first : first + _ROW_BLOCK]
            if info.dtype in _FLOATS and not bool(torch.isfinite(_tensor(chunk, info.dtype)).all()):
                raise FormatError("values are not all finite", path=job.reader.path, tensor=name,
                                  expected="finite values", found="NaN or inf", advice="the source is damaged")
            yield chunk

    writer.write_chunks(stored, chunks())
    job.reader.release(job.targets[name])
    return TensorReport(job.component, stored, DENSE, info.shape, info.nbytes, info.nbytes, job.decisions[name][1])


def _tensor(array: np.ndarray, dtype: str) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor


def _read_log(path: Path) -> dict[str, TensorReport]:
    """Reports of finished tensors by name; a line that a killed run left unfinished is passed over."""
    reports = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                entry = json.loads(line)
                reports[entry["name"]] = TensorReport(**entry | {"shape": tuple(entry["shape"])})
    return reports


# ---------------------------------------------------------------------------------------------------------- the end

def _identity(source: Source, jobs: list[_Job], solver: Solver | None) -> str:
    """What the hidden folder was begun for: the source's files and every decision."""
    files = []
    for file in source.files():
        status = file.stat()
        files.append([str(file.resolve()), status.st_size, status.st_mtime_ns])
    facts = {"format": FORMAT_VERSION, "files": files, "method": jobs[0].method,
             "jobs": [[job.component, job.file, job.config, job.groups_per_scale, sorted(job.decisions.items())]
                      for job in jobs], **({} if solver is None else {"solver": solver.identity})}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _write_table(work: Path, job: _Job, settings: Mapping[str, Any], make_table: MakeTable) -> int:
    """Write the timestep table from the layers that `job` has written; returns the bytes of the file."""
    target = work / "transformer" / TABLE_FILE
    with Checkpoint.open(work / job.file) as weights:
        write_checkpoint(target, make_table(job.config, settings, weights), {"format": "pt"})
    nbytes = target.stat().st_size
    if nbytes >= job.nbytes:
        raise UsageError(f"a timestep table of this model would take {nbytes:,} bytes, and the weights that it stands "
                         f"for take {job.nbytes:,}; leave out --timestep-table")
    return nbytes


def _complete(work: Path, jobs: list[_Job], source: Source, table: bool) -> None:
    """Add everything but the weights to the finished folder."""
    for place, file in source.carried.items():
        carry(file, work / place)
    for job in jobs:
        if job.component != TIMESTEP_WEIGHTS:
            own = {CONFIG_KEY: {"format_version": TABLE_VERSION}} if table and job.component == "transformer" else {}
            _write_json(work / job.component / "config.json",
                        job.config | {"quantization_config": quantization_config(job.policy, job.groups_per_scale)}
                        | own)
    _write_json(work / "model_index.json", source.index)


def _write_json(path: Path, data: Any) -> None:
    atomic_write_bytes(path, (json.dumps(data, indent=2) + "\n").encode())
