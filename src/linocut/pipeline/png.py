"""PNG files that carry the recipe of their picture, written all or nothing.

Two text chunks are written before the pixels: iTXt `linocut`, a JSON object from which `linocut generate --from-image`
draws the same pixels again, and `parameters`, the line of Automatic1111's web UI that galleries know how to read.
The recipe names the model but never a folder of this machine. Reading treats the file as untrusted.
"""

import contextlib
import errno
import io
import json
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from linocut.errors import FormatError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

RECIPE_VERSION = 1
RECIPE_KEY = "linocut"
PARAMETERS_KEY = "parameters"
SAMPLER = "euler, empirical mu"
LARGEST_SEED = 2**63 - 1
MOST_TOKENS = 2**24


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the pixels of one picture, and what it was drawn with.

    `seed` is None when the noise came from a generator whose state no seed gives. `tile` is the height in pixels of
    the strips that the decoder worked in, or None for one piece. `schedule_tokens` are the image tokens of the size
    whose noise levels were used, or None if these were the picture's own.
    """

    model: str
    model_hash: str
    prompt: str
    seed: int | None
    width: int
    height: int
    steps: int
    guidance: float = 1.0
    sampler: str = SAMPLER
    dtype: str = "float32"
    kernel: str = ""
    device: str = "cpu"
    tile: int | None = None
    schedule_tokens: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"version": RECIPE_VERSION, **asdict(self)}, ensure_ascii=False)

    def parameters(self) -> str:
        """Return the line that Automatic1111's web UI writes: the prompt, then comma-separated settings."""
        settings = {"Steps": self.steps, "Sampler": "Euler", "CFG scale": f"{self.guidance:g}", "Seed": self.seed,
                    "Size": f"{self.width}x{self.height}", "Model hash": self.model_hash, "Model": self.model,
                    "Version": f"linocut {self.versions.get('linocut', '')}".strip()}
        line = ", ".join(f"{key}: {value}" for key, value in settings.items() if value is not None)
        return f"{self.prompt}\n{line}".replace("\0", "")

    @classmethod
    def from_json(cls, text: str, path: object = None) -> "Recipe":
        """Parse and check a recipe from a file. Raises FormatError: the text may come from anybody."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"the recipe is not JSON ({error})", path=path) from None
        if not isinstance(fields, dict):
            raise FormatError("the recipe is malformed", path=path, expected="a JSON object",
                              found=type(fields).__name__)
        version = fields.pop("version", None)
        if version != RECIPE_VERSION:
            raise FormatError("unknown version of recipe", path=path, expected=RECIPE_VERSION, found=version,
                              advice="a newer linocut may read it")
        known = {name: value for name, value in fields.items() if name in cls.__dataclass_fields__}
        for name, kinds in _KINDS.items():
            value = known.get(name, _ABSENT)
            if value is _ABSENT and name in _REQUIRED:
                raise FormatError(f"the recipe lacks {name!r}", path=path)
            if value is not _ABSENT and (not isinstance(value, kinds) or isinstance(value, bool)):
                expected = " or ".join(kind.__name__ for kind in kinds)
                raise FormatError(f"{name!r} in the recipe is malformed", path=path, expected=expected,
                                  found=type(value).__name__)
        if known["seed"] is not None and not 0 <= known["seed"] <= LARGEST_SEED:
            raise FormatError("'seed' in the recipe is out of range", path=path, expected=f"0..{LARGEST_SEED}",
                              found=known["seed"])
        if known.get("schedule_tokens") is not None and not 1 <= known["schedule_tokens"] <= MOST_TOKENS:
            raise FormatError("'schedule_tokens' in the recipe is out of range", path=path,
                              expected=f"1..{MOST_TOKENS}", found=known["schedule_tokens"])
        return cls(**known)


_ABSENT = object()
_KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,), "model_hash": (str,), "prompt": (str,), "seed": (int, type(None)), "width": (int,),
    "height": (int,), "steps": (int,), "guidance": (int, float), "sampler": (str,), "dtype": (str,), "kernel": (str,),
    "device": (str,), "tile": (int, type(None)), "schedule_tokens": (int, type(None)), "versions": (dict,),
}
_REQUIRED = {"model", "model_hash", "prompt", "seed", "width", "height", "steps"}


def read_recipe(path: str | os.PathLike[str] | BinaryIO) -> Recipe:
    """Return the recipe inside a PNG, given as a path or as an open file.

    Raises:
        UsageError: there is no such file, or it is no PNG, or it carries no recipe.
        FormatError: it carries a recipe that is broken.
    """
    from PIL import Image, PngImagePlugin, UnidentifiedImageError

    try:
        with Image.open(path, formats=["PNG"]) as image:
            assert isinstance(image, PngImagePlugin.PngImageFile)
            text = image.info.get(RECIPE_KEY)
            if text is None:  # some optimizers move text behind the pixels, where only decoding finds it
                text = image.text.get(RECIPE_KEY)
    except UnidentifiedImageError:
        raise UsageError(f"{path} is not a PNG; give a picture that linocut wrote") from None
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} cannot be read as a PNG ({error})") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error})") from None
    if not isinstance(text, str):
        raise UsageError(f"{path} carries no linocut recipe; only pictures that linocut wrote, and that no program "
                         "has stripped since, can be drawn again")
    return Recipe.from_json(text, path)


def encode_png(image: "Image", recipe: Recipe | None) -> bytes:
    """Return the bytes of a PNG that carries `recipe`. The same pixels and recipe give the same bytes."""
    from PIL import PngImagePlugin  # registers PNG; without it, saving would load every plugin that Pillow has

    texts = PngImagePlugin.PngInfo()
    if recipe is not None:
        texts.add_itxt(RECIPE_KEY, recipe.to_json())
        texts.add_text(PARAMETERS_KEY, recipe.parameters())
    buffer = io.BytesIO()
    ours = image.mode == "RGB"
    (image.crop((0, 0, 1, 1)) if ours else image).save(buffer, "PNG", pnginfo=texts)
    if not ours:
        return buffer.getvalue()
    import numpy as np

    from linocut.pipeline.png_pixels import with_pixels
    return with_pixels(buffer.getvalue(), np.asarray(image))


def check_output(path: Path, force: bool = False) -> None:
    """Raise UsageError if a picture could not be written to `path`; called before any time is spent on drawing."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give a file name, such as {path / '{seed}.png'}")
    if _is_device(path):
        return
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write {path}: no permission to write into {path.parent}")
    if not force and os.path.lexists(path):
        raise UsageError(f"{path} exists; give another name with -o, or --force to replace it")


def write_png(image: "Image", path: str | os.PathLike[str], recipe: Recipe | None = None,
              force: bool = False) -> None:
    """Write a picture with its recipe: whole or not at all, and over an existing file only with `force`.

    Raises UsageError with the reason (exists, no permission, disk full, ...); nothing is left behind then.
    """
    target = Path(path)
    check_output(target, force)
    data = encode_png(image, recipe)
    try:
        if _is_device(target):
            with open(target, "wb") as device:
                device.write(data)
        else:
            _write_whole(Path(os.path.realpath(target)), data, force)
    except FileExistsError:
        raise UsageError(f"{path} exists; give another name with -o, or --force to replace it") from None
    except OSError as error:
        reason = {errno.EFBIG: "the file would pass the size limit of this process"}.get(error.errno or 0)
        raise UsageError(f"cannot write {path}: {reason or error.strerror or error}") from None


def _is_device(path: Path) -> bool:
    """Whether `path` is a device or a pipe (/dev/stdout): written in place, since replacing it would remove it."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _write_whole(target: Path, data: bytes, force: bool) -> None:
    # The temporary file lies in the same folder, so that giving it its name cannot cross file systems. Its own name is
    # short, whatever the target's, and random: in a container every run may have the process number of the last one.
    partial = target.with_name(f".linocut-{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:
            _write_durably(file, data)
        if force:
            os.replace(partial, target)
        else:
            _rename_without_replacing(partial, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


def _write_durably(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())  # some file systems report a full disk only now


def _rename_without_replacing(partial: Path, target: Path) -> None:
    try:
        os.link(partial, target)  # unlike a rename, this fails if another program has made the file meanwhile
    except FileExistsError:
        raise
    except OSError:  # no hard links here (FAT, some network shares)
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "exists", str(target)) from None
        os.replace(partial, target)


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain JSON-ready values."""
    return json.loads(recipe.to_json())
