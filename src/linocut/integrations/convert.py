"""Convert a model from any form that is recognized to another, tensor by tensor, and prove that nothing was lost.

As in `quantize.stream`, all work happens in a hidden folder beside the destination, which gets its name when
everything in it is on disk and was read back: every weight of every written file, opened as a foreign file would be,
is compared with the source, codes and scales bit for bit. An interrupted run goes on with the tensors that are
missing.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from linocut.errors import FormatError, UsageError
from linocut.formats.checkpoint import atomic_write_bytes
from linocut.formats.packed import PackedTensor
from linocut.formats.weight import Block, Output, Weight, Weights, row_blocks
from linocut.formats.writer import TensorWriter
from linocut.integrations.recognize import Component, Model, open_component, open_model
from linocut.integrations.targets import Job, Layout, Options, layout_for
from linocut.quantize.rounding import quantize_tensor
from linocut.quantize.workplace import carry, check_apart, check_destination, check_disk, publish, workplace

__all__ = ["Report", "convert"]

T = TypeVar("T")
R = TypeVar("R")
OnProgress = Callable[[int, int, str], None]
_AHEAD = 4  # row blocks in hand beside the one that is written


@dataclass
class Report:
    """What a conversion did. `verified` counts the weights that were read back and found equal, `losses` says what the
    form cannot hold or had to be rounded, `notes` what changed its form but not its values."""

    source: Path
    destination: Path
    source_form: str
    form: str
    packed: int = 0
    dense: int = 0
    verified: int = 0
    resumed: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    losses: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"source": str(self.source), "destination": str(self.destination), "source_form": self.source_form,
                "form": self.form, "packed_weights": self.packed, "dense_tensors": self.dense,
                "verified": self.verified, "resumed": self.resumed, "bytes": self.nbytes,
                "seconds": round(self.seconds, 3), "losses": self.losses, "notes": self.notes}


def convert(src: str | Path, dst: str | Path, to: str, *, lossy: bool = False, force: bool = False,
            options: Options | None = None, threads: int | None = None,
            on_progress: OnProgress | None = None) -> Report:
    """Convert the model `src` (path, embedded name or hub id) to the form `to` in the folder `dst`.

    A source that carries checksums is checked first. Without `lossy`, what the form cannot hold exactly is refused.
    on_progress(weights done, weights in all, name) counts every weight twice, for writing and for reading back. Raises
    UsageError, FormatError, ModelNotFoundError.
    """
    start = time.monotonic()
    dst = Path(dst).expanduser().absolute()
    check_destination(dst, force)
    model = open_model(src)
    tolerant: Model | None = None
    report = Report(model.path, dst, model.transformer.form, to)
    try:
        check_apart(model.path, dst)
        rounded: dict[str, str] = {}
        if lossy:
            tolerant = open_model(src, exact=False)
        for name, component in model.components.items():
            loose = tolerant.components[name] if tolerant is not None else None
            component.weights = _prepared(component, loose, to, rounded)
        layout = layout_for(model, to, options or Options())
        if layout.losses and not lossy:
            raise UsageError(f"{to} cannot hold this model as it is: {'; '.join(layout.losses)}; pass --lossy to "
                             "accept that")
        for component in model.components.values():
            component.verify()
        with workplace(dst, _identity(model, to, layout)) as work:
            check_disk(work, sum(job.nbytes for job in layout.jobs), list(layout.carried.values()))
            _run(work, layout, threads or torch.get_num_threads(), report, on_progress)
            report.nbytes = sum((work / job.file).stat().st_size for job in layout.jobs)
            publish(work, dst, force)
        report.losses = layout.losses + [f"{name}: {what}" for name, what in sorted(rounded.items())]
        report.notes = layout.notes
    finally:
        model.close()
        if tolerant is not None:
            tolerant.close()
    report.seconds = time.monotonic() - start
    return report


def _prepared(component: Component, loose: Component | None, to: str, rounded: dict[str, str]) -> Weights:
    """A component's weights as they are to be converted: where loss is allowed, rounded if they have to be."""
    found: Weights = {}
    for name, weight in component.weights.items():
        if weight.requantize and to in ("linocut", "gguf", "mlx"):
            if loose is None:
                raise UsageError(f"{component.files[0]}: {name} has four-bit weights of a kind that linocut does not "
                                 "have (no whole zero points); pass --lossy to round them again")
            found[name.removesuffix(".weight")] = _requantized(name, weight, rounded)
        else:
            found[name] = weight if loose is None else _tolerant(name, weight, loose.weights[name], rounded)
    return found


def _requantized(name: str, weight: Weight, rounded: dict[str, str]) -> Weight:
    rounded[name] = "four-bit weights rounded again"

    def rows(first: int, last: int) -> Block:
        block = weight.rows(first, last)
        assert isinstance(block, np.ndarray)
        return quantize_tensor(torch.from_numpy(block), weight.requantize, name=name)

    return Weight(weight.requantize, weight.shape, rows, weight.release)


def _tolerant(name: str, weight: Weight, loose: Weight, rounded: dict[str, str]) -> Weight:
    if not weight.packed:
        return weight

    def rows(first: int, last: int) -> Block:
        try:
            return weight.rows(first, last)
        except FormatError:
            block = loose.rows(first, last)  # raises again if it was no matter of rounding
            rounded[name] = "scales rounded to float16"
            return block

    return Weight(weight.kind, weight.shape, rows, weight.release)


# --- writing and reading back ----------------------------------------------------------------------------------------

def _run(work: Path, layout: Layout, workers: int, report: Report, on_progress: OnProgress | None) -> None:
    total, done = 2 * sum(weight.count for job in layout.jobs for weight in job.renamed.values()), 0

    def advance(weight: Weight, what: str) -> None:
        nonlocal done
        done += weight.count
        if on_progress is not None:
            on_progress(done, total, what)

    with ThreadPoolExecutor(workers, thread_name_prefix="linocut-convert") as pool:
        for job in layout.jobs:
            target = work / job.file
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():  # finished by an earlier run
                report.resumed += len(job.renamed)
                for name, weight in job.renamed.items():
                    advance(weight, name)
            else:
                with job.writer(target) as writer:
                    for name, weight in job.renamed.items():
                        if all(writer.done(part) for part, _, _ in job.outputs[name].parts):
                            report.resumed += 1
                        else:
                            _write(writer, weight, job.outputs[name], pool)
                            weight.release()
                        advance(weight, f"writing {name}")
        for place, file in layout.carried.items():
            carry(file, work / place)
        for place, text in layout.texts.items():
            (work / place).parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(work / place, text.encode())
        for job in layout.jobs:
            _verify(work, job, pool, report, advance)


def _write(writer: TensorWriter, weight: Weight, output: Output, pool: ThreadPoolExecutor) -> None:
    blocks = _in_order(pool, lambda rows: output.encode(weight.rows(*rows)), list(row_blocks(weight.shape)))
    if len(output.parts) == 1:
        writer.write_chunks(output.parts[0][0], (block[0] for block in blocks))
        return
    pieces: list[tuple[np.ndarray, ...]] = list(blocks)
    for index, (name, _, shape) in enumerate(output.parts):
        parts = [piece[index] for piece in pieces]
        # a part that does not grow with the rows is the same in every piece
        whole = parts[0] if parts[0].shape == shape else np.concatenate(parts, axis=output.axis)
        writer.write(name, whole)


def _verify(work: Path, job: Job, pool: ThreadPoolExecutor, report: Report,
            advance: Callable[[Weight, str], None]) -> None:
    """Open what was written as any reader would, and compare every weight with its source."""
    place = work / job.file
    written = open_component(place.parent if place.name in _STANDARD else place,
                             transformer=job.component == "transformer", renamed=False)
    try:
        for name, weight in job.renamed.items():
            output = job.outputs[name]
            back = written.weights.get(name) or written.weights.get(f"{name}.weight")
            if back is None:
                raise _differs(place, name, "the weight", "nothing")

            def check(rows: tuple[int, int], weight: Weight = weight, back: Weight = back, output: Output = output,
                      name: str = name) -> None:
                expected, found = weight.rows(*rows), back.rows(*rows)
                _compare(place, name, output.back(expected) if output.back else expected, found)

            for _ in _in_order(pool, check, list(row_blocks(weight.shape))):
                pass
            weight.release()
            back.release()
            report.verified += 1
            report.packed += weight.packed
            report.dense += not weight.packed
            advance(weight, f"checking {name}")
        extra = len(written.weights) - len(job.renamed)
        if extra:
            raise _differs(place, "", f"{len(job.renamed)} weights", f"{extra} more")
    finally:
        written.close()


_STANDARD = ("diffusion_pytorch_model.safetensors", "model.safetensors")


def _compare(place: Path, name: str, expected: Block, found: Block) -> None:
    if isinstance(expected, PackedTensor) != isinstance(found, PackedTensor):
        raise _differs(place, name, type(expected).__name__, type(found).__name__)
    if isinstance(expected, PackedTensor) and isinstance(found, PackedTensor):
        if (expected.encoding, expected.shape) != (found.encoding, found.shape):
            raise _differs(place, name, f"{expected.encoding} {expected.shape}", f"{found.encoding} {found.shape}")
        pairs = [(suffix, part, found.parts()[suffix]) for suffix, part in expected.parts().items()]
    else:
        pairs = [("values", np.asarray(expected), np.asarray(found))]
    for what, one, other in pairs:
        if one.dtype != other.dtype or one.size != other.size \
                or np.ascontiguousarray(one).tobytes() != np.ascontiguousarray(other).tobytes():
            raise _differs(place, name, f"the source's {what}", f"other {what}")


def _differs(place: Path, name: str, expected: str, found: str) -> FormatError:
    return FormatError("reading back gave something else than was written", path=place, tensor=name or None,
                       expected=expected, found=found, advice="the disk may be damaged; nothing was published")


def _in_order(pool: ThreadPoolExecutor, work: Callable[[T], R], items: list[T]) -> Iterator[R]:
    """`work` of each item, several at once but few ahead of the one that is asked for, so that memory stays flat."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _identity(model: Model, to: str, layout: Layout) -> str:
    """What the hidden folder was begun for: the source's files and what each weight becomes."""
    files = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in model.files()]
    facts = {"to": to, "files": files, "texts": layout.texts,
             "jobs": [[job.file, [[name, output.parts] for name, output in job.outputs.items()]]
                      for job in layout.jobs]}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
