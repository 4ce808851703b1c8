"""The models that a server was started with: what they weigh, what they need, and requests checked against them.

Requests name a model by its name here, never by a path, so that no request decides what is opened on this machine.
Needs no torch.
"""

from typing import Any

from linocut.errors import LinocutError, UsageError
from linocut.formats.folder import ModelFolder
from linocut.pipeline import budget, memory
from linocut.pipeline.request import Request, make_request
from linocut.server.settings import MOST_IMAGES, MOST_STEPS, Settings

# Prompts to begin with. Models with a small vocabulary were trained on such scenes.
SCENES = ("two red apples and a blue cup", "a green frog on a white background", "a photo of a yellow car",
          "three oranges and a purple book", "a red train left of a blue boat")
ANYTHING = ("a linocut print of a heron among reeds, two colours", "a ceramic teapot on a windowsill, morning light",
            "a red fox in fresh snow, ink wash", "a terrarium with a tiny city inside, macro photograph")


class NoSuchModel(LinocutError):
    """No model of this name was given to the server."""


class TooLarge(LinocutError):
    """The picture would need more memory than there is."""


class Catalogue:
    """Opens the models named in the settings; reads configs and headers only."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folders: dict[str, ModelFolder] = {}
        for asked in settings.models:
            folder = ModelFolder.open(asked)
            if folder.name in self.folders:
                raise UsageError(f"two models are called {folder.name!r}; rename a folder or leave one out")
            self.folders[folder.name] = folder
        self._planners = {name: budget.planner_for(folder, self._device) for name, folder in self.folders.items()}

    @property
    def _device(self) -> str:
        """The device that memory is planned for: if there are several, they are taken to be alike."""
        return self.settings.devices[0]

    @property
    def default(self) -> str:
        return next(iter(self.folders))

    def find(self, name: str | None) -> ModelFolder:
        """The model of this name, the default one for None. Raises NoSuchModel."""
        folder = self.folders.get(self.default if name is None else name)
        if folder is None:
            raise NoSuchModel(f"no model {str(name)[:80]!r} here; this server has {', '.join(self.folders)}")
        return folder

    def request(self, model: str | None, prompt: str, *, width: int | None, height: int | None, steps: int | None,
                seed: int | None, num_images: int, guidance: float | None) -> tuple[str, Request]:
        """Check a request and spell it out. Raises NoSuchModel, TooLarge, UsageError."""
        folder = self.find(model)
        most = self.settings.largest_side
        for name, side in (("width", width), ("height", height)):
            if side is not None and side > most:
                raise UsageError(f"{name} is more than this server draws (expected at most {most}, found {side})")
        for name, value, limit in (("steps", steps, MOST_STEPS), ("num_images", num_images, MOST_IMAGES)):
            if value is not None and value > limit:
                raise UsageError(f"{name} is more than this server takes (expected at most {limit}, found {value})")
        request = make_request(prompt, folder.settings, width=width, height=height, num_inference_steps=steps,
                               seed=seed, num_images=num_images, guidance_scale=guidance)
        why_not = self._plan(folder.name, request.width, request.height)[2]
        if why_not is not None:
            raise TooLarge(why_not)
        return folder.name, request

    def describe(self, width: int | None, height: int | None, loaded: set[str]) -> list[dict[str, Any]]:
        """Every model with its payload and the memory that a picture of this size would take."""
        return [self._describe(folder, width, height, folder.name in loaded) for folder in self.folders.values()]

    def _describe(self, folder: ModelFolder, width: int | None, height: int | None, loaded: bool) -> dict[str, Any]:
        settings = folder.settings
        default_width, default_height = settings["default_size"]
        plan, free, why_not = self._plan(folder.name, width or default_width, height or default_height)
        with folder.checkpoint("transformer") as checkpoint:
            encodings = [entry.encoding for entry in checkpoint.packed.values()]
        return {"name": folder.name, "encoding": max(set(encodings), key=encodings.count) if encodings else "dense",
                "default_size": settings["default_size"], "default_steps": settings["default_steps"],
                "is_distilled": settings["is_distilled"],
                "payload": {**plan.disk, "total": sum(plan.disk.values())},
                "memory": {"width": plan.width, "height": plan.height, "peak": plan.peak,
                           "phases": {phase.name: phase.peak for phase in plan.phases}, "free": free,
                           "fits": why_not is None, "why_not": why_not},
                "loaded": loaded, "examples": list(ANYTHING if folder.vocabulary() is None else SCENES)}

    def _plan(self, name: str, width: int, height: int) -> tuple[memory.Plan, int | None, str | None]:
        """How a picture would be drawn, the bytes that this may take, and why it does not fit or None."""
        on_gpu = self._device.startswith("cuda")  # elsewhere it is this machine's memory that counts
        planner, free = self._planners[name], budget.available_on(self._device) if on_gpu else budget.available_bytes()
        if free is not None and not on_gpu:
            free += memory.resident_bytes()
        try:
            return budget.fit(planner, width, height, free=free, dtype=self.settings.dtype), free, None
        except UsageError as error:
            return planner.plan(width, height, dtype=self.settings.dtype), free, str(error)
