"""`linocut generate`: prompts in, PNG files out.

Everything that can be refused is refused before torch is imported; pictures are written as they get ready. Results go
to stdout (one line per picture, or one JSON document with --json), progress and warnings to stderr.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from linocut.cli import printable
from linocut.cli._fetch import bring
from linocut.errors import UsageError

if TYPE_CHECKING:
    from linocut.pipeline.memory import Plan
    from linocut.pipeline.png import Recipe
    from linocut.pipeline.request import Request
    from linocut.pipeline.run import Picture

# What a recipe decides; each of these contradicts --from-image.
DECIDED_BY_RECIPE = ("prompt", "prompt_option", "prompt_file", "width", "height", "size", "steps", "seed", "num_images",
                     "guidance", "dtype")


class Size(click.ParamType):
    """'512x768', or '512' for a square, as (width, height)."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"(-?\d{1,9})(?:[xX×*](-?\d{1,9}))?", str(value).strip())
        if found is None:
            self.fail(f"{value!r} is no size; write it like 512x768", param, ctx)
        width = int(found[1])
        return width, int(found[2]) if found[2] else width


@click.command()
@click.argument("prompt", required=False)
@click.option("-p", "--prompt", "prompt_option", metavar="TEXT", help="The prompt, if not given as an argument.")
@click.option("--prompt-file", metavar="FILE", help="One prompt per line; - reads stdin.")
@click.option("-o", "--output", metavar="FILE", help="PNG to write; {seed} and {index} are filled in. - is stdout. "
              "Default: the prompt's words and the seed.")
@click.option("--force", is_flag=True, help="Replace existing files.")
@click.option("-m", "--model", metavar="MODEL", help="embedded (default), embedded-binary, a folder, or a name "
              "on the Hugging Face hub (klein-4b, org/name).")
@click.option("-W", "--width", type=int, metavar="PX", help="Width, a multiple of 32. Default: the model's.")
@click.option("-H", "--height", type=int, metavar="PX", help="Height, a multiple of 32.")
@click.option("--size", type=Size(), help="Both at once, such as 512x768.")
@click.option("--steps", type=int, metavar="N", help="Denoising steps. Default: the model's.")
@click.option("-s", "--seed", type=int, multiple=True, metavar="N",
              help="Seed; may be repeated. Left out: a random one, which is printed.")
@click.option("-n", "--num-images", type=int, default=1, show_default=True, metavar="N",
              help="Pictures per prompt and seed: seed, seed + 1, ...")
@click.option("--guidance", type=float, metavar="G",
              help="Guidance scale; only for models that are not distilled. Default: the model's.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
              help="Number format of the computation.")
@click.option("--device", default="auto", show_default=True, metavar="NAME",
              help="What computes: cpu, cuda, mps or mlx; auto is mlx on Apple silicon if it is installed, else cpu.")
@click.option("--threads", type=click.IntRange(1, 4096), metavar="N", help="CPU threads.")
@click.option("--max-memory", metavar="SIZE", help="Most memory of the process, such as 2GB: draws in a smaller and "
              "slower way if need be, or says what would fit.")
@click.option("--no-prompt-cache", is_flag=True, help="Neither use nor keep what the text encoder makes of prompts.")
@click.option("--from-image", metavar="PNG", help="Draw the picture in this PNG again, from the recipe inside it.")
@click.option("--preview-dir", metavar="DIR", help="Also write the predicted clean picture after each step here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of lines.")
@click.pass_context
def command(ctx: click.Context, **options: Any) -> None:
    """Draw pictures from a PROMPT.

    \b
    linocut generate "two red apples and a blue cup"
    linocut generate "a fox" -n 4 -o fox-{seed}.png
    linocut generate --from-image fox-7.png -o again.png
    """
    if options["from_image"]:
        given = [name for name in DECIDED_BY_RECIPE
                 if ctx.get_parameter_source(name) not in (None, click.core.ParameterSource.DEFAULT)]
        if given:
            name = {"prompt_option": "prompt"}.get(given[0], given[0]).replace("_", "-")
            raise UsageError(f"--from-image draws exactly the picture in the file; leave out the {name}")
    Job(options).run()


class Job:
    """One invocation: checks first, then draws."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.recipe: Recipe | None = None
        self.notes: list[str] = []
        output = options["output"]
        self.to_stdout = output == "-"
        if self.to_stdout and options["as_json"]:
            raise UsageError("-o - writes the picture to stdout, where --json prints; choose one")

    def run(self) -> None:
        from linocut.formats.folder import ModelFolder
        from linocut.pipeline import budget
        from linocut.pipeline.device import choose
        from linocut.pipeline.request import make_request

        device = choose(self.options["device"], self.options["max_memory"])
        arguments = self._arguments_from_recipe() if self.options["from_image"] else self._arguments()
        if self.options["threads"]:
            os.environ["LINOCUT_THREADS"] = str(self.options["threads"])
        bring(self.model)
        folder = ModelFolder.open(self.model)
        request = make_request(arguments.pop("prompt"), folder.settings, **arguments)
        outputs = self._outputs(request)
        limit = self.options["max_memory"]
        plan = budget.fit(budget.planner_for(folder, device.name), request.width, request.height, dtype=self.dtype,
                          tile=request.tile, limit=None if limit is None else budget.parse_bytes(limit),
                          free=budget.available_on(device.name), pictures=len(request.jobs), prompts=request.prompts)
        if self.recipe is not None and folder.hash() != self.recipe.model_hash:
            self._note(f"the picture was drawn with other weights of {self.recipe.model} (hash "
                       f"{self.recipe.model_hash}, now {folder.hash()}); expect another picture")
        self._draw(folder, request, outputs, plan)

    # ---- what to draw -------------------------------------------------------------------------------------------

    def _arguments(self) -> dict[str, Any]:
        options = self.options
        self.model, self.dtype = "embedded" if options["model"] is None else options["model"], options["dtype"]
        width, height = options["width"], options["height"]
        if options["size"] is not None:
            if width is not None or height is not None:
                raise UsageError("give --size, or --width and --height, not both")
            width, height = options["size"]
        return {"prompt": self._prompts(), "width": width, "height": height, "seed": list(options["seed"]) or None,
                "num_inference_steps": options["steps"], "num_images": options["num_images"],
                "guidance_scale": options["guidance"]}

    def _prompts(self) -> list[str]:
        from linocut.pipeline.request import check_prompt

        options = self.options
        ways = [options[name] for name in ("prompt", "prompt_option", "prompt_file") if options[name] is not None]
        if not ways:
            raise UsageError('no prompt; say what to draw: linocut generate "two red apples and a blue cup"')
        if len(ways) > 1:
            raise UsageError("give one prompt: as an argument, with --prompt, or with --prompt-file")
        if options["prompt_file"] is None:
            return [check_prompt(ways[0])]
        path = options["prompt_file"]
        try:
            raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
            lines = raw.decode("utf-8-sig").splitlines()
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8 text (byte {error.start})") from None
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise UsageError(f"{'stdin' if path == '-' else path} holds no prompt; expected one per line")
        return prompts

    def _arguments_from_recipe(self) -> dict[str, Any]:
        from linocut.formats.folder import EMBEDDED
        from linocut.pipeline.memory import DTYPE_BYTES
        from linocut.pipeline.png import read_recipe

        path = self.options["from_image"]
        recipe = self.recipe = read_recipe(path)
        if recipe.seed is None:
            raise UsageError(f"{path} was drawn from a noise generator, not from a seed; it cannot be drawn again")
        if recipe.dtype not in DTYPE_BYTES:
            raise UsageError(f"{path} asks for dtype {recipe.dtype!r}, which linocut does not know")
        # A picture may come from anybody, so its recipe does not decide what is opened or downloaded here.
        if self.options["model"] is None and recipe.model not in EMBEDDED:
            raise UsageError(f"{path} was drawn with the model {recipe.model!r}; say where it is with "
                             "--model FOLDER or --model HUB-ID")
        model = self.options["model"]
        self.model, self.dtype = recipe.model if model is None else model, recipe.dtype
        return {"prompt": recipe.prompt, "width": recipe.width, "height": recipe.height, "seed": recipe.seed,
                "num_inference_steps": recipe.steps, "guidance_scale": recipe.guidance,
                "schedule_tokens": recipe.schedule_tokens, "tile": recipe.tile}

    # ---- where to --------------------------------------------------------------------------------------------------

    def _outputs(self, request: "Request") -> list[Path]:
        """Return one path per picture, all of them checked before anything is drawn."""
        from linocut.pipeline.png import check_output

        if self.to_stdout:
            if len(request.jobs) > 1:
                raise UsageError("-o - takes a single picture")
            return [Path("/dev/stdout")]
        template = self.options["output"]
        paths = []
        for job in request.jobs:
            name = template if template is not None else f"{_words(job.prompt)}-{job.seed}.png"
            paths.append(Path(name.replace("{seed}", str(job.seed)).replace("{index}", str(job.index))))
        seen: set[Path] = set()
        for path in paths:
            if path in seen:
                raise UsageError(f"several pictures would be written to {path}; put {{seed}} or {{index}} into -o")
            seen.add(path)
            check_output(path, self.options["force"])
        previews = self.options["preview_dir"]
        if previews is not None and Path(previews).exists():
            if not Path(previews).is_dir():
                raise UsageError(f"{previews} is not a folder; --preview-dir needs one")
            for index in range(len(request.jobs)):
                for step in range(request.steps):
                    check_output(self._preview_path(request, index, step), self.options["force"])
        return paths

    def _preview_path(self, request: "Request", index: int, step: int) -> Path:
        return Path(self.options["preview_dir"]) / f"{request.jobs[index].seed}-{index}-step{step + 1}.png"

    # ---- drawing ------------------------------------------------------------------------------------------------

    def _draw(self, folder: Any, request: "Request", outputs: list[Path], plan: "Plan") -> None:
        from linocut.cli._progress import Display

        with Display(len(request.jobs), request.steps, quiet=self.options["as_json"]) as display:
            display.phase("starting")
            from linocut.pipeline.generate import Pipeline

            pipe = Pipeline(folder, dtype=self.dtype, threads=self.options["threads"], device=self.options["device"],
                            prompt_cache=not self.options["no_prompt_cache"], max_memory=self.options["max_memory"])
            written = []
            # The jobs are spelled out already (random seeds included), so they are handed on as they are.
            for picture in pipe.draw_request(request, callback_on_step_end=self._preview_writer(request, display),
                                             on_progress=display.update):
                written.append(self._write(picture, outputs[picture.index], display))
            timings = pipe.timings
        if self.options["as_json"]:
            import json

            click.echo(json.dumps({"pictures": written, "timings": timings, "planned_peak": plan.peak,
                                   "warnings": self.notes}, ensure_ascii=False, indent=2))

    def _write(self, picture: "Picture", path: Path, display: Any) -> dict[str, Any]:
        from linocut.pipeline.png import encode_png, recipe_dict, write_png

        for note in picture.warnings:
            self._note(note, display)
        if self.recipe is not None:
            self._compare(self.recipe, picture.recipe, display)
        if self.to_stdout:
            sys.stdout.buffer.write(encode_png(picture.image, picture.recipe))
            sys.stdout.buffer.flush()
        else:
            write_png(picture.image, path, picture.recipe, force=self.options["force"])
        if not self.options["as_json"]:
            display.line(f"{'-' if self.to_stdout else path}  seed {picture.recipe.seed}  "
                         f"{picture.recipe.width}x{picture.recipe.height}", err=self.to_stdout)
        return {"path": str(path), "seed": picture.recipe.seed, "prompt": picture.recipe.prompt,
                "recipe": recipe_dict(picture.recipe)}

    def _compare(self, then: "Recipe", now: "Recipe", display: Any) -> None:
        """Warn if what drew the picture differs from what drew the original."""
        for what, old, new in (("kernel", then.kernel, now.kernel), ("device", then.device, now.device),
                               ("torch", then.versions.get("torch"), now.versions.get("torch")),
                               ("mlx", then.versions.get("mlx"), now.versions.get("mlx", then.versions.get("mlx")))):
            if old and old != new:
                self._note(f"the original was drawn with {what} {old}, this one with {new}; pixels may differ slightly",
                           display)

    def _preview_writer(self, request: "Request", display: Any) -> Callable[..., None] | None:
        folder = self.options["preview_dir"]
        if folder is None:
            return None
        from linocut.pipeline.png import write_png

        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make {folder}: {error.strerror or error}") from None
        count = 0

        def write(pipe: Any, step: int, sigma: float, state: Any) -> None:
            nonlocal count
            index, count = count // request.steps, count + 1
            image = state["preview"].resize((request.width, request.height))
            write_png(image, self._preview_path(request, index, step), force=self.options["force"])

        return write

    def _note(self, text: str, display: Any = None) -> None:
        text = printable(text)  # it may quote a picture from anybody
        if text in self.notes:
            return
        self.notes.append(text)
        if display is None:
            click.echo(f"warning: {text}", err=True)
        else:
            display.line(f"warning: {text}", err=True)


def _words(prompt: str) -> str:
    """Return a file name from the first words of a prompt."""
    words = re.findall(r"\w+", prompt.lower())
    return "-".join(words)[:40].strip("-") or "picture"
