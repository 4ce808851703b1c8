"""Sheets to look at: rendered scenes with their captions, and the held-out prompts as teacher and students draw them.

Stage `scenes` shows what a recipe trains on. Stage `sheet` shows what came of it: for every held-out prompt the
teacher's picture (from the run folder) beside those that the exported models draw through the pipeline users run.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from linocut.errors import FormatError, ModelNotFoundError, UsageError
from linocut.formats.folder import ModelFolder
from linocut.formats.writer import atomic_write_bytes
from linocut.train.export import FOLDERS

if TYPE_CHECKING:
    from linocut.train.recipe import Recipe

WIDTH = 1600  # pixels of a sheet
MAX_BYTES = 4_000_000  # larger sheets are stored with fewer colours
MARGIN, GAP, BORDER = 16, 22, 3
GRID_COLUMNS, GRID_BORDER = 8, 2  # of the grids that the training stages leave in the run folder
INK, FAINT, PAPER = (20, 20, 24), (120, 120, 128), (255, 255, 255)
SCENE_SEED = -900  # scenes that no stage trains on


@dataclass(frozen=True)
class Entry:
    """Pictures side by side with one caption below, and a fainter note after it."""

    pictures: tuple[Image.Image, ...]
    caption: str
    note: str = ""


def compose(entries: Sequence[Entry], headings: Sequence[str], columns: int, width: int = WIDTH) -> Image.Image:
    """A sheet `width` pixels wide with `columns` entries a row. `headings` name the pictures of each entry."""
    if not entries:
        raise UsageError("nothing to show: the recipe has no held-out prompts (key held_out)")
    across = len(entries[0].pictures)
    room = (width - 2 * MARGIN - (columns - 1) * GAP) // columns
    side = (room - (across - 1) * BORDER) // across
    body, small = ImageFont.load_default(15), ImageFont.load_default(12)
    texts = [_wrap(entry.caption, body, room) for entry in entries]
    rows = [range(start, min(start + columns, len(entries))) for start in range(0, len(entries), columns)]
    heights = [side + 38 + 19 * max(len(texts[i]) for i in row) for row in rows]
    top = MARGIN + (22 if headings else 0)
    sheet = Image.new("RGB", (width, top + sum(heights) + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            left = MARGIN + column * (room + GAP)
            for k, picture in enumerate(entries[index].pictures):
                x = left + k * (side + BORDER)
                sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (x, top))
                if headings and row is rows[0]:
                    pen.text((x + side // 2, MARGIN), headings[k], FAINT, body, anchor="ma")
            y = top + side + 6
            for line in texts[index]:
                pen.text((left, y), line, INK, body)
                y += 19
            pen.text((left, y), entries[index].note, FAINT, small)
        top += height
    return sheet


def sheet_png(sheet: Image.Image, limit: int = MAX_BYTES) -> bytes:
    """A sheet as PNG; if it would pass `limit` bytes, with a palette of 256 colours and fewer until it fits."""
    data = _png(sheet)
    for colours in (256, 128, 64, 32):
        if len(data) <= limit:
            break
        data = _png(sheet.quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG))
    return data


def write_sheet(sheet: Image.Image, path: Path, limit: int = MAX_BYTES) -> None:
    """Write a sheet as PNG of at most about `limit` bytes, and say so."""
    data = sheet_png(sheet, limit)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, data)
    print(f"  wrote {path} ({sheet.width} x {sheet.height}, {len(data) / 1e6:.2f} MB)", flush=True)


def scene_sheet(recipe: Recipe, sprites: Path, path: Path, count: int = 28, columns: int = 7) -> None:
    """Render `count` scenes of the recipe, tasks in turn, each with one of its captions, and write them to `path`."""
    from linocut.train.captions import sample_captions
    from linocut.train.layout import place
    from linocut.train.render import SceneRenderer
    from linocut.train.scenes import TASKS, sample_scene

    rng = random.Random(f"{recipe.data.seed}/{SCENE_SEED}")
    scenes = [sample_scene(rng, tuple(TASKS)[i % len(TASKS)]) for i in range(count)]
    used = {group.thing for scene in scenes for group in scene.groups}
    renderer = SceneRenderer(sprites, recipe.data.size, things=used)
    images = renderer.draw(renderer.table([place(scene, rng) for scene in scenes]), renderer.looks(scenes))
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    write_sheet(compose([Entry((Image.fromarray(picture),), sample_captions(scene, rng, 1, recipe.held_out)[0],
                               scene.task.replace("_", " "))
                         for scene, picture in zip(scenes, pixels, strict=True)], (), columns), path)


def held_out_sheet(recipe: Recipe, run: Path, path: Path, models: tuple[str, str] | None = None,
                   device: str | None = None, columns: int = 3) -> None:
    """Draw every held-out prompt i with seed i and write teacher, ternary and binary side by side to `path`.

    `models` are the ternary and the binary model to draw with; without it those of `run/model`. The teacher draws as it
    was exported (`run/teacher-model`), else its pictures in the steps of the grid are read from `run/teacher.png`.
    What is not there is left out and said. Raises ModelNotFoundError if no student is.
    """
    prompts = recipe.held_out
    rows: dict[str, list[Image.Image]] = {}
    if (run / "teacher-model" / "model_index.json").is_file():
        print(f"  drawing {len(prompts)} prompts with the teacher", flush=True)
        rows["teacher"] = _draw(ModelFolder(run / "teacher-model", "teacher"), prompts, device)
    elif (run / "teacher.png").is_file():
        rows["teacher"] = split_grid(run / "teacher.png", len(prompts), recipe.data.size)
    for encoding, folder in _students(run, models).items():
        print(f"  drawing {len(prompts)} prompts with {folder.name} ({encoding})", flush=True)
        rows[encoding] = _draw(folder, prompts, device)
    missing = [name for name in ("teacher", *FOLDERS) if name not in rows]
    if missing:
        print(f"  not in {run}, hence not in the sheet: {', '.join(missing)}", flush=True)
    entries = [Entry(tuple(pictures[i] for pictures in rows.values()), prompt, f"seed {i}")
               for i, prompt in enumerate(prompts)]
    write_sheet(compose(entries, tuple(rows), columns), path)


def split_grid(path: Path, count: int, size: int) -> list[Image.Image]:
    """The pictures of a grid that a training stage left: `size` pixels a side with a white border, eight a row."""
    grid, pitch = Image.open(path), size + 2 * GRID_BORDER
    expected = (min(count, GRID_COLUMNS) * pitch, -(-count // GRID_COLUMNS) * pitch)
    if grid.size != expected:
        raise FormatError("grid of held-out pictures has another size than the recipe says", path=path,
                          expected=expected, found=grid.size, advice="run the stage again with this recipe")
    corners = [(i % GRID_COLUMNS * pitch + GRID_BORDER, i // GRID_COLUMNS * pitch + GRID_BORDER) for i in range(count)]
    return [grid.crop((x, y, x + size, y + size)) for x, y in corners]


def _students(run: Path, models: tuple[str, str] | None) -> dict[str, ModelFolder]:
    if models is not None:
        return {encoding: ModelFolder.open(name) for encoding, name in zip(FOLDERS, models, strict=True)}
    root = run / "model"
    found = {encoding: ModelFolder(root, encoding, folder) for encoding, folder in FOLDERS.items()
             if (root / "model_index.json").is_file() and (root / folder).is_dir()}
    if not found:
        raise ModelNotFoundError(f"{root}: no exported model; run the stage export first, or say which models to draw "
                                 "with (--models embedded embedded-binary)")
    return found


def _draw(folder: ModelFolder, prompts: Sequence[str], device: str | None) -> list[Image.Image]:
    from linocut.pipeline.generate import Pipeline

    pipe = Pipeline(folder, device=device or "cpu", keep_loaded=True)
    return [pipe(prompt, seed=i).images[0] for i, prompt in enumerate(prompts)]


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> list[str]:
    """Break a caption into lines of at most `room` pixels; a longer word has a line of its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _png(image: Image.Image) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
