"""What people say around the things of a scene: the phrases that captions are put together from, with their weights.

{x} stands for the scene, {0}, {1} and {2} for its groups, {is}, {it} and the like for words that agree
with one of them in number. Nothing here changes the picture but RELATION_WORDS, PLACED, SIZE_WORDS, SPOT_WORDS,
STYLE_FRAMES and the numbers.
"""

from __future__ import annotations

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
EXACT = ("exactly", "just", "only")
TWO, SIX = ("a pair of", "a couple of"), ("half a dozen",)
UNCOUNTED = ("the", "this", "some kind of")  # what can stand before "bread"
ONE = ("one", "a single", *UNCOUNTED)
# Words in the singular and the plural: of the group that comes next, if one does at once, else of the first group.
WITH_NEXT = {"is": ("is", "are"), "this": ("this is", "these are"), "friend": ("friend", "friends")}
WITH_FIRST = {"it": ("it", "them"), "its": ("its", "their"), "itself": ("itself", "themselves"),
              "meets": ("meets", "meet")}
COLLECTIONS = ("a group of", "a set of", "a collection of", "a total of")
COLOUR_AFTER = ("{n} in {c}", "{n} that {is} {c}", "{n} which {is} {c}", "{n} colored {c}", "{n} painted {c}",
                "{n} of {c} color")
# The colour {c} of what is asked for alone, said after it. {do} is one of COMMANDS, which "and make it" needs.
COLOUR_WISHES = ("{0}, but make {it} {c}", "{0} but {c}", "{0}, but {c}", "{0}, make {it} {c}",
                 "{do} {0} and make {it} {c}", "{0}, but in {c}", "{0}, and I want {it} {c}", "{0}, only {c}",
                 "{0}, painted {c}", "{0}, all {c}",
                 "{0}, but I want {it} in {c}", "{0}, please make {it} {c}", "{0}, in {c}")
COLOUR_BEFORE = ("{c} colored {n}", "{c}-colored {n}", "{c} coloured {n}")
SIZE_WORDS = {"big": ("big", "large", "huge", "giant", "enormous", "very big"),
              "small": ("small", "tiny", "little", "mini", "very small")}

# Adjectives without a look of their own here.
FILLERS = (
    "lovely", "nice", "beautiful", "pretty", "cute", "adorable", "sweet", "funny", "friendly", "happy", "cheerful",
    "great", "awesome", "amazing", "wonderful", "perfect", "fantastic", "gorgeous", "fancy", "cool", "simple", "plain",
    "ordinary", "typical", "classic", "modern", "new", "brand new", "old", "vintage", "favorite", "famous", "shiny",
    "bright", "colorful", "clean", "fresh", "delicious", "tasty", "juicy", "soft", "fluffy", "cozy", "lonely", "sleepy",
    "lazy", "brave", "proud", "smart", "clever", "silly", "crazy", "mysterious", "magical", "magic", "elegant",
    "stylish", "charming", "realistic", "detailed", "real", "good", "well-made", "expensive", "cheap", "young",
    "wild", "strange", "sleeping", "smiling", "dancing", "hungry", "tired", "little old", "singing",
)
VERBS = ("sitting", "standing", "lying", "resting", "waiting", "placed", "shown", "seen", "located", "floating",
         "sleeping", "dancing", "playing", "swimming", "hiding", "smiling", "hanging", "jumping", "flying", "working")
PLACE_VERBS = ("placed", "shown", "seen", "located")  # those of VERBS that need a place after them

JOINS = {
    "{0} and {1}": 60, "{0} with {1}": 8, "{0}, {1}": 7, "{0} & {1}": 3, "{0} together with {1}": 4,
    "{0} as well as {1}": 3, "{0} plus {1}": 3, "{0} along with {1}": 3, "{0} and also {1}": 2, "both {0} and {1}": 2,
    "{0}, and {1}": 2, "{0} and {1} together": 2, "{0} + {1}": 1, "{0} {1}": 1, "{0} accompanied by {1}": 1,
    "{0} playing with {1}": 1, "{0} dancing with {1}": 1, "{0} looking at {1}": 1, "{0} and {its} {friend}, {1}": 1,
    "{0} {meets} {1}": 1, "{0} talking to {1}": 1,
}
JOINS_3 = {"{0}, {1} and {2}": 40, "{0}, {1}, and {2}": 25, "{0}, {1}, {2}": 12, "{0} and {1} and {2}": 8,
           "{0} with {1} and {2}": 8, "{0}, {1} plus {2}": 4, "{0} and {1} with {2}": 3}
NEXT_TO = {"{0} next to {1}": 30, "{0} beside {1}": 20, "{0} by {1}": 6, "{0} near {1}": 8, "{0} close to {1}": 4,
           "{0} and {1} side by side": 10, "{0} and {1} next to each other": 6, "next to {1} {is} {0}": 3,
           "{0} right next to {1}": 4, "{0} alongside {1}": 3, "{1} with {0} next to {it}": 4,
           "{0} {is} next to {1}": 4}
BETWEEN = {"{0} between {1} and {2}": 50, "{0} in between {1} and {2}": 12, "{1} and {2} with {0} between them": 14,
           "between {1} and {2} {is} {0}": 8, "{0} {is} between {1} and {2}": 10, "{0} surrounded by {1} and {2}": 4}
# Of "{0} <words> {1}".
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of", "on the left side of", "at the left of",
                "on the left hand side of"),
    "right of": ("right of", "to the right of", "on the right of", "on the right side of", "at the right of",
                 "on the right hand side of"),
    "above": ("above", "over", "higher than", "right above", "high above"),
    "below": ("below", "under", "beneath", "underneath", "lower than", "right below"),
    "on": ("on", "on", "on top of", "on top of", "standing on", "sitting on", "standing on top of",
           "sitting on top of"),
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above",
            "on": "below"}
# Where group 0 and group 1 are if group 0 stands so to group 1.
PLACED = {
    "left of": (("on the left", "on the right"), ("on the left side", "on the right side"), ("left", "right")),
    "right of": (("on the right", "on the left"), ("on the right side", "on the left side"), ("right", "left")),
    "above": (("at the top", "at the bottom"), ("above", "below")),
    "below": (("at the bottom", "at the top"), ("below", "above")),
    "on": (("on top", "at the bottom"), ("on top", "below")),
}
RELATED = {  # {r} relation words, {o} those of the opposite, {p} and {q} the places of group 0 and group 1
    "{0} {r} {1}": 44, "{1} {o} {0}": 16, "{0} {is} {r} {1}": 8, "{0} {p} and {1} {q}": 6, "{p} {0}, {q} {1}": 3,
    "{0} {p}, {1} {q}": 3, "{r} {1} {is} {0}": 5, "{r} {1} there {is} {0}": 3, "{1} with {0} {r} {it}": 5,
    "{0} positioned {r} {1}": 2, "{0} located {r} {1}": 2, "{0} placed {r} {1}": 2, "{1} and {0} {r} {it}": 2,
}
SPOT_WORDS = {
    "top left": ("in the top left corner", "in the upper left corner", "at the top left", "top left"),
    "top": ("at the top", "in the upper part", "near the top", "at the top of the picture"),
    "top right": ("in the top right corner", "in the upper right corner", "at the top right", "top right"),
    "left": ("on the left", "on the left side", "at the left edge", "on the left of the picture"),
    "center": ("in the center", "in the middle", "in the middle of the picture", "centered", "in the centre"),
    "right": ("on the right", "on the right side", "at the right edge", "on the right of the picture"),
    "bottom left": ("in the bottom left corner", "in the lower left corner", "at the bottom left", "bottom left"),
    "bottom": ("at the bottom", "in the lower part", "near the bottom", "at the bottom of the picture"),
    "bottom right": ("in the bottom right corner", "in the lower right corner", "at the bottom right", "bottom right"),
}
WALL_PHRASES = ("on a {c} background", "with a {c} background", "in front of a {c} wall", "against a {c} background",
                "on {c} background", "{c} background", "against a {c} wall", "before a {c} backdrop",
                "and a {c} background", "and the background is {c}")
STYLE_FRAMES = {
    "black and white": ("a black and white photo of {x}", "{x} in black and white", "{x}, black and white",
                        "a grayscale picture of {x}", "a monochrome image of {x}", "{x}, grayscale",
                        "black and white picture of {x}", "{x}, monochrome"),
    "pixel art": ("pixel art of {x}", "{x}, pixel art", "{x} in pixel art style", "a pixel art picture of {x}",
                  "a pixelated image of {x}", "{x} as pixel art", "8-bit pixel art of {x}", "{x}, pixel art style"),
}

_MEDIUM = ("a photo of", "a picture of", "an image of", "a drawing of", "an illustration of", "a 3d render of",
           "a painting of", "a photograph of", "a rendering of", "a scene with", "an emoji of", "a cute picture of",
           "a nice picture of", "a sketch of", "an icon of", "a cartoon of", "a close-up of", "a high quality photo of",
           "a professional photo of", "a detailed illustration of", "a beautiful image of", "a 3d model of",
           "a postcard with", "a poster of", "a sticker of", "a view of", "a portrait of", "a snapshot of")
_BARE = ("photo of", "picture of", "image of", "drawing of", "illustration of", "render of", "emoji of", "icon of",
         "clip art of", "3d render of", "photo with", "picture with", "scene with", "cartoon of")
_ASK = ("draw", "show me", "please draw", "draw me", "paint", "make", "create", "generate", "give me", "i want",
        "please make", "please show me", "i need", "i'd like", "i would like", "i'd like to see", "i would like to see",
        "imagine", "let me see", "could i have", "please paint", "sketch", "render", "design", "picture", "visualize",
        "just draw", "now draw", "hello, draw", "hi, please draw", "let's see", "try to draw")
COMMANDS = ("draw", "please draw", "draw me", "paint", "create", "sketch", "design")
_QUESTIONS = ("can you draw", "could you draw", "can you show me", "could you paint", "would you draw",
              "can you make", "could you please draw", "can i see", "may i see", "can i have", "will you paint")
_STATEMENTS = ("{this}", "here {is}", "look, it's", "behold", "imagine", "we see", "you can see", "it shows",
               "the picture shows", "the image contains", "a world with", "in this picture we see")
FRAMES: tuple[tuple[float, tuple[str, ...]], ...] = (
    (0.40, ("{x}",)),
    (0.24, tuple(f"{words} {{x}}" for words in _MEDIUM)),
    (0.06, tuple(f"{words} {{x}}" for words in _BARE)),
    (0.13, tuple(f"{words} {{x}}" for words in _ASK)),
    (0.04, tuple(f"{words} {{x}}?" for words in _QUESTIONS)),
    (0.06, tuple(f"{ask} {medium} {{x}}" for ask in _ASK[:20] for medium in _MEDIUM[:8])),
    (0.03, tuple(f"{ask} {medium} {{x}}?" for ask in _QUESTIONS for medium in _MEDIUM[:5])),
    (0.04, tuple(f"{words} {{x}}" for words in _STATEMENTS)),
)
# In the order in which they follow each other. Of a row there is one at most, for two would contradict or repeat.
ENDINGS: tuple[tuple[str, ...], ...] = (
    (", for my kids", " for a birthday card", " for my daughter", " for my son"),
    (", nothing else",),
    (", digital art", ", 3d render", ", emoji style", ", clip art", ", cartoon style", ", realistic",
     ", professional photo", ", vector art"),
    (", high quality", ", highly detailed", ", detailed", ", 4k", ", simple", ", masterpiece", ", best quality",
     ", minimalistic"),
    (", studio lighting", ", soft light", ", sharp focus", ", smooth", ", glossy"),
    (", cute", ", beautiful"),
    (", please", " please", ", thanks", ", thank you", ", if you can"),
    ("!", "..."),
)
POLITE = ENDINGS[-2]
NAMED = ("named", "called")
BY = ("by", "in the style of")
LONE_STATEMENTS = ("{0} all alone", "{0} by {itself}", "{0} on {its} own", "{0}, nothing else")
EVERY_STATEMENT = ("{0} in a row", "{0} together", "{0}, that is all")
