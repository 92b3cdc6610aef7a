"""The demo checkpoint's little world: scenes of coloured shapes, their captions, and their pictures.

A `Scene` is what a caption says. What a caption leaves open is drawn in one fixed way (a white background, a medium
size, the first object on the left), so that a short prompt has one answer and the model need not guess.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

PICTURE_SIZE = 128
OBJECT_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "orange": (255, 140, 0),
    "yellow": (255, 225, 30),
    "green": (30, 160, 60),
    "blue": (30, 80, 225),
    "purple": (140, 40, 170),
}
BACKGROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "gray": (150, 150, 150),
    "black": (0, 0, 0),
    "pink": (255, 195, 210),
}
SHAPES = ("circle", "square", "triangle", "star", "heart")
SIZES = ("large", "small")
RELATIONS = ("above", "below", "left of", "right of")

_RADIUS_PX = {"large": 23.0, None: 18.0, "small": 13.0}
_OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
_SUPERSAMPLING = 3
_HELD_OUT_ONE_IN = 12

_SIZE_WORDS = {"large": ("large", "large", "big", "huge"), "small": ("small", "small", "little", "tiny")}
_RELATION_WORDS = {
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
}
_BACKGROUND_PHRASES = (
    "{objects} on a {colour} background",
    "{objects} on a {colour} background",
    "{objects} on a {colour} background",
    "{objects} on {colour}",
    "{objects}, {colour} background",
    "{objects} in front of a {colour} background",
    "on a {colour} background, {objects}",
)
_OPENINGS = ("", "", "", "", "", "", "a picture of ", "an image of ", "a drawing of ")


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One shape of a scene."""

    shape: str
    """One of SHAPES."""
    colour: str
    """A key of OBJECT_COLOURS."""
    size: str | None = None
    """One of SIZES; None: the caption does not say, and it is drawn in between."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a caption says about a picture."""

    first: SceneObject
    """The only object, or the one that stands in `relation` to the second."""
    second: SceneObject | None = None
    """None: one object, drawn in the middle."""
    relation: str | None = None
    """One of RELATIONS: where the first is, seen from the second; None: the caption says only "and"."""
    background: str | None = None
    """A key of BACKGROUND_COLOURS; None: the caption does not say, and it is drawn white."""

    @property
    def objects(self) -> tuple[SceneObject, ...]:
        """The objects, first to second."""
        return (self.first,) if self.second is None else (self.first, self.second)


def random_scene(rng: random.Random) -> Scene:
    """Draw a scene: two objects three times in four, mostly with everything said."""
    background = None if rng.random() < 0.15 else rng.choice(list(BACKGROUND_COLOURS))
    sizes_are_said = rng.random() < 0.7
    first = _random_object(rng, sizes_are_said)
    if rng.random() < 0.25:
        return Scene(first=first, background=background)
    second = _random_object(rng, sizes_are_said)
    relation = None if rng.random() < 0.08 else rng.choice(RELATIONS)
    return Scene(first=first, second=second, relation=relation, background=background)


def _random_object(rng: random.Random, size_is_said: bool) -> SceneObject:
    return SceneObject(
        shape=rng.choice(SHAPES),
        colour=rng.choice(list(OBJECT_COLOURS)),
        size=rng.choice(SIZES) if size_is_said else None,
    )


def is_held_out(scene: Scene) -> bool:
    """Whether training must never see this scene, in whichever words: decided by a hash of what it looks like.

    "A above B" and "B below A" are one scene.
    """
    first, second, relation = scene.first, scene.second, scene.relation
    if second is not None and relation in ("below", "right of"):
        first, second, relation = second, first, _OPPOSITE[relation]
    described = repr((first, second, relation or "left of", scene.background or "white"))
    return hashlib.sha256(described.encode()).digest()[0] % _HELD_OUT_ONE_IN == 0


def random_scenes(count: int, seed: int, *, held_out: bool) -> list[Scene]:
    """Draw `count` scenes, all of them held out from training or none."""
    rng = random.Random(f"scenes {seed} {held_out}")
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng)
        if is_held_out(scene) == held_out:
            scenes.append(scene)
    return scenes


def caption(scene: Scene, rng: random.Random) -> str:
    """Say a scene in words, in one of several phrasings."""
    words = _object_words(scene.first, rng)
    if scene.second is not None:
        relation = "and" if scene.relation is None else rng.choice(_RELATION_WORDS[scene.relation])
        words = f"{words} {relation} {_object_words(scene.second, rng)}"
    if scene.background is not None:
        words = rng.choice(_BACKGROUND_PHRASES).format(objects=words, colour=scene.background)
    if not words.startswith("on "):
        words = rng.choice(_OPENINGS) + words
    return f"{words.capitalize()}." if rng.random() < 0.15 else words


def _object_words(thing: SceneObject, rng: random.Random) -> str:
    words = [thing.colour, thing.shape]
    if thing.size is not None:
        words.insert(0, rng.choice(_SIZE_WORDS[thing.size]))
    article = rng.choice(("an" if words[0][0] in "aeiou" else "a",) * 6 + ("the", "one", ""))
    return " ".join([article, *words]).strip()


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene as an RGB picture, each object a little off its place; the colours are exact."""
    scale = _SUPERSAMPLING
    background = BACKGROUND_COLOURS[scene.background or "white"]
    picture = Image.new("RGB", (PICTURE_SIZE * scale, PICTURE_SIZE * scale), background)
    canvas = ImageDraw.Draw(picture)
    for thing, (x, y) in zip(scene.objects, _centres(scene), strict=True):
        radius = _RADIUS_PX[thing.size] + rng.uniform(-1.0, 1.0)
        x, y = x + rng.uniform(-4, 4), y + rng.uniform(-4, 4)
        outline = [((x + radius * u) * scale, (y + radius * v) * scale) for u, v in _OUTLINES[thing.shape]]
        canvas.polygon(outline, fill=OBJECT_COLOURS[thing.colour])
    return picture.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX)


def _centres(scene: Scene) -> list[tuple[float, float]]:
    """Where the objects stand, in pixels; two large ones just fit."""
    middle, near, far = PICTURE_SIZE / 2, 32.0, PICTURE_SIZE - 32.0
    if scene.second is None:
        return [(middle, middle)]
    relation = scene.relation or "left of"
    start, end = (near, far) if relation in ("above", "left of") else (far, near)
    if relation in ("above", "below"):
        return [(middle, start), (middle, end)]
    return [(start, middle), (end, middle)]


def _make_outlines() -> dict[str, list[tuple[float, float]]]:
    """The shapes' corners around (0, 0), y downwards, of about the same extent."""
    turn = 2 * math.pi
    circle = [(math.cos(turn * i / 72), math.sin(turn * i / 72)) for i in range(72)]
    square = [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
    triangle = [(0.0, -1.0), (1.05, 0.9), (-1.05, 0.9)]
    star = []
    for i in range(10):
        radius = 1.12 if i % 2 == 0 else 0.46
        star.append((radius * math.sin(turn * i / 10), 0.06 - radius * math.cos(turn * i / 10)))
    heart = []
    for i in range(72):
        t = turn * i / 72
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        heart.append((math.sin(t) ** 3 * 1.02, -(y + 2.5) / 15.0))
    return {"circle": circle, "square": square, "triangle": triangle, "star": star, "heart": heart}


_OUTLINES = _make_outlines()
