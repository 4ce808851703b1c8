"""The colours and backgrounds of the embedded world: their names, what people call them, and what they look like.

RGB is sRGB in 0..1 throughout. A colour is a ramp over an object's own brightness; a background is a stack of colours
from the top of the picture to its bottom, perhaps with stars.
"""

from __future__ import annotations

from dataclasses import dataclass

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Colour:
    """`ramp` is (shadow, middle, light); `words` what people say, the plain name first."""

    words: tuple[str, ...]
    ramp: tuple[RGB, RGB, RGB]


@dataclass(frozen=True)
class Background:
    """`stops` are (height from 0 = top to 1 = bottom, RGB), interpolated; two equal heights make an edge.

    `phrases` put it at the end of a caption; `ground` says that things throw a shadow. Where there is a `horizon`,
    things stand (or swim) below that height.
    """

    stops: tuple[tuple[float, RGB], ...]
    phrases: tuple[str, ...] = ()
    stars: bool = False
    ground: bool = True
    horizon: float | None = None


_COLOURS = {
    "red": Colour(("red", "crimson", "scarlet", "bright red"),
                  ((0.42, 0.02, 0.05), (0.88, 0.11, 0.14), (1.0, 0.55, 0.52))),
    "orange": Colour(("orange", "bright orange"), ((0.60, 0.22, 0.0), (0.98, 0.52, 0.06), (1.0, 0.78, 0.45))),
    "yellow": Colour(("yellow", "golden", "bright yellow"), ((0.68, 0.48, 0.0), (0.99, 0.83, 0.10), (1.0, 0.96, 0.60))),
    "green": Colour(("green", "emerald green", "grass green"),
                    ((0.02, 0.28, 0.08), (0.13, 0.66, 0.24), (0.60, 0.92, 0.60))),
    "blue": Colour(("blue", "royal blue", "bright blue"), ((0.03, 0.10, 0.42), (0.12, 0.37, 0.90), (0.58, 0.78, 1.0))),
    "purple": Colour(("purple", "violet"), ((0.22, 0.04, 0.38), (0.53, 0.20, 0.76), (0.82, 0.63, 0.98))),
    "pink": Colour(("pink", "rose pink"), ((0.70, 0.18, 0.42), (0.98, 0.47, 0.70), (1.0, 0.82, 0.90))),
    "brown": Colour(("brown", "chocolate brown"), ((0.18, 0.08, 0.03), (0.46, 0.26, 0.13), (0.76, 0.58, 0.42))),
    "black": Colour(("black", "pitch black"), ((0.01, 0.01, 0.02), (0.11, 0.11, 0.12), (0.42, 0.42, 0.45))),
    "white": Colour(("white", "snow white"), ((0.58, 0.59, 0.66), (0.92, 0.92, 0.95), (1.0, 1.0, 1.0))),
    "gray": Colour(("gray", "grey", "silver"), ((0.22, 0.23, 0.25), (0.52, 0.53, 0.56), (0.84, 0.85, 0.88))),
}
COLOURS = tuple(_COLOURS)


def colour(index: int) -> Colour:
    """The colour that COLOURS[index] names."""
    return _COLOURS[COLOURS[index]]


def _plain(rgb: RGB) -> tuple[tuple[float, RGB], ...]:
    """One colour, lighter above than below, as lit from the top."""
    above, below = (tuple(min(1.0, part * factor) for part in rgb) for factor in (1.03, 0.94))
    return (0.0, above), (1.0, below)  # type: ignore[return-value]


def _horizon(at: float, sky: tuple[RGB, RGB], ground: tuple[RGB, RGB]) -> tuple[tuple[float, RGB], ...]:
    """Sky above, ground below, each shaded from its first to its second colour."""
    return (0.0, sky[0]), (at, sky[1]), (at, ground[0]), (1.0, ground[1])


_SKY: tuple[RGB, RGB] = ((0.42, 0.70, 0.96), (0.78, 0.90, 0.99))
_WALLS = {
    "white": (0.98, 0.98, 0.98), "gray": (0.62, 0.63, 0.65), "pink": (0.98, 0.76, 0.84), "blue": (0.58, 0.76, 0.97),
    "green": (0.62, 0.87, 0.64), "yellow": (0.98, 0.90, 0.56), "purple": (0.78, 0.67, 0.94),
    "orange": (0.99, 0.74, 0.48), "red": (0.93, 0.42, 0.40), "brown": (0.66, 0.50, 0.38), "black": (0.12, 0.12, 0.14),
}
_PLACES = {
    "grass": Background(_horizon(0.58, _SKY, ((0.52, 0.80, 0.36), (0.34, 0.64, 0.26))),
                        ("on the grass", "on grass", "in a meadow", "on a green meadow", "on a lawn", "in a field",
                         "in the garden", "in a park"), horizon=0.58),
    "sky": Background(((0.0, (0.36, 0.66, 0.96)), (1.0, (0.80, 0.91, 1.0))),
                      ("in the sky", "in the blue sky", "high up in the sky", "in front of a blue sky"), ground=False),
    "sea": Background(_horizon(0.45, _SKY, ((0.16, 0.52, 0.80), (0.06, 0.34, 0.64))),
                      ("in the sea", "in the ocean", "on the water", "on the sea", "at sea"), ground=False,
                      horizon=0.45),
    "beach": Background((*_horizon(0.38, _SKY, ((0.22, 0.60, 0.82), (0.34, 0.74, 0.86)))[:3],
                         (0.54, (0.40, 0.76, 0.86)), (0.54, (0.96, 0.88, 0.68)), (1.0, (0.90, 0.78, 0.55))),
                        ("on the beach", "at the beach", "on a sandy beach", "on the sand", "by the sea"),
                        horizon=0.54),
    "snow": Background(_horizon(0.55, ((0.62, 0.76, 0.90), (0.84, 0.90, 0.96)),
                                ((0.97, 0.98, 1.0), (0.86, 0.91, 0.97))),
                       ("in the snow", "on the snow", "in a snowy landscape", "in winter"), horizon=0.55),
    "desert": Background(_horizon(0.56, ((0.50, 0.74, 0.94), (0.98, 0.90, 0.72)),
                                  ((0.93, 0.72, 0.42), (0.80, 0.54, 0.28))),
                         ("in the desert", "in a hot desert", "on desert sand"), horizon=0.56),
    "sunset": Background(((0.0, (0.44, 0.30, 0.56)), (0.45, (0.95, 0.50, 0.42)), (0.62, (1.0, 0.78, 0.42)),
                          (0.62, (0.40, 0.24, 0.36)), (1.0, (0.24, 0.15, 0.26))),
                         ("at sunset", "at dusk", "in the evening", "in front of a sunset"), horizon=0.62),
    "night": Background(_horizon(0.66, ((0.05, 0.07, 0.20), (0.13, 0.19, 0.40)),
                                 ((0.10, 0.20, 0.22), (0.06, 0.12, 0.15))),
                        ("at night", "in the dark", "under the stars", "under a starry sky", "in the moonlight"),
                        stars=True, horizon=0.66),
    "space": Background(((0.0, (0.03, 0.02, 0.07)), (0.5, (0.12, 0.06, 0.20)), (1.0, (0.04, 0.03, 0.10))),
                        ("in space", "in outer space", "among the stars", "in the universe"), stars=True, ground=False),
    "table": Background(_horizon(0.60, ((0.95, 0.92, 0.86), (0.90, 0.86, 0.79)),
                                 ((0.68, 0.46, 0.28), (0.55, 0.35, 0.20))),
                        ("on a table", "on the table", "on a wooden table", "on a desk", "on a wooden board"),
                        horizon=0.6),
    "floor": Background(_horizon(0.66, ((0.72, 0.80, 0.84), (0.66, 0.75, 0.80)),
                                 ((0.80, 0.76, 0.72), (0.66, 0.61, 0.57))),
                        ("in a room", "indoors", "on the floor", "at home", "in the house"), horizon=0.66),
}
# Without a wish the background is a quiet tone: a light one, or a darker one where light things need it.
_LIGHT = ((0.94, 0.94, 0.95), (0.96, 0.94, 0.90), (0.90, 0.94, 0.97), (0.91, 0.96, 0.92), (0.95, 0.92, 0.97))
_MIDDLE = ((0.62, 0.72, 0.80), (0.78, 0.70, 0.60), (0.60, 0.71, 0.63), (0.70, 0.66, 0.78))
LIGHT = tuple(f"light {number}" for number in range(len(_LIGHT)))
MIDDLE = tuple(f"middle {number}" for number in range(len(_MIDDLE)))
WALLS, PLACES = tuple(_WALLS), tuple(_PLACES)
BACKGROUNDS: dict[str, Background] = (
    {name: Background(_plain(rgb)) for name, rgb in _WALLS.items()} | _PLACES
    | {name: Background(_plain(rgb)) for name, rgb in zip(LIGHT + MIDDLE, _LIGHT + _MIDDLE, strict=True)})


def background_rgb(background: Background, height: float) -> RGB:
    """The background's colour at a height, 0 = top to 1 = bottom."""
    before, after = background.stops[0], background.stops[-1]
    for stop in background.stops:
        if stop[0] <= height:
            before = stop
    for stop in reversed(background.stops):
        if stop[0] > height:
            after = stop
    share = 0.0 if after[0] == before[0] else (height - before[0]) / (after[0] - before[0])
    red, green, blue = (a + share * (b - a) for a, b in zip(before[1], after[1], strict=True))
    return red, green, blue


def distance(a: RGB, b: RGB) -> float:
    """How different two colours look, 0..1: a weighted Euclidean distance (green counts most, blue in hue alone)."""
    red, green, blue = (x - y for x, y in zip(a, b, strict=True))
    return ((2 * red * red + 4 * green * green + 3 * blue * blue) / 9) ** 0.5
