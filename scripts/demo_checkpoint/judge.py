"""Does a picture show what a scene says? Answered from the pixels alone, with numpy and no learned model.

The picture's border gives the background; what differs from it falls into connected pieces; each piece's colour is the
nearest of the palette, and its shape the template that covers the same part of its bounding box. The templates are
formulas of their own, not the outlines that the training pictures are drawn with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image

from demo_checkpoint.scenes import BACKGROUND_COLOURS, OBJECT_COLOURS, Scene, SceneObject

_BACKGROUND_TOLERANCE = 60.0
"""How far a background may be from its palette colour, in RGB distance."""
_OBJECT_TOLERANCE = 75.0
"""The same for an object's middle colour."""
_CONTRAST = 55.0
"""RGB distance from the background at which a pixel belongs to an object."""
_SMALLEST_PIECE_PX = 30
"""Pieces of fewer pixels are specks, and overlooked."""
_LARGE_FROM_PX = 18.0
"""Half the larger side of an object's bounding box: from here on it is large, below it is small."""
_TEMPLATE_SIDE = 48
_MINIMUM_OVERLAP = 0.75


@dataclass(frozen=True, kw_only=True)
class SeenObject:
    """One piece of a picture, as the judge sees it."""

    shape: str | None
    """None: like no template."""
    colour: str | None
    """None: like no palette colour."""
    half_extent_px: float
    """Half the larger side of its bounding box."""
    x: float
    """Middle of its bounding box."""
    y: float
    """Middle of its bounding box, downwards."""


@dataclass(frozen=True, kw_only=True)
class SeenScene:
    """A whole picture, as the judge sees it."""

    background: str | None
    """None: like no palette colour, or not even."""
    objects: tuple[SeenObject, ...]
    """Larger pieces first."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Which properties of a picture are as the scene says; what it leaves open is right in any case."""

    background: bool
    """The background's colour."""
    number: bool
    """How many objects there are."""
    colour: bool
    """Every object's colour; False also where the number is wrong, as in the fields below."""
    shape: bool
    """Every object's shape."""
    size: bool
    """Every object's size."""
    position: bool
    """Where the objects are."""

    @property
    def right(self) -> bool:
        """Whether everything is right."""
        return all(getattr(self, field.name) for field in fields(self))


def judge(picture: Image.Image, scene: Scene) -> Verdict:
    """Compare a picture with the scene it should show."""
    seen = look_at(picture)
    background = scene.background in (None, seen.background) and seen.background is not None
    if len(seen.objects) != len(scene.objects):
        return Verdict(background=background, number=False, colour=False, shape=False, size=False, position=False)
    pairs = list(zip(scene.objects, _in_order_of(scene, seen.objects), strict=True))
    return Verdict(
        background=background,
        number=True,
        colour=all(said.colour == thing.colour for said, thing in pairs),
        shape=all(said.shape == thing.shape for said, thing in pairs),
        size=all(_size_agrees(said, thing) for said, thing in pairs),
        position=_position_agrees(scene, seen.objects),
    )


def look_at(picture: Image.Image) -> SeenScene:
    """Find the background and the objects of a picture."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3), *pixels[:, [0, 1, -2, -1]]])
    background = np.median(border, axis=0)
    foreground = np.linalg.norm(pixels - background, axis=-1) > _CONTRAST
    pieces = [piece for piece in _connected_pieces(foreground) if len(piece) >= _SMALLEST_PIECE_PX]
    pieces.sort(key=len, reverse=True)
    return SeenScene(
        background=_nearest(background[None], BACKGROUND_COLOURS, _BACKGROUND_TOLERANCE)[0],
        objects=tuple(_describe(piece, pixels) for piece in pieces),
    )


def _connected_pieces(mask: np.ndarray) -> list[np.ndarray]:
    """Split a mask into pieces whose pixels touch by their sides; each is an array of (row, column)."""
    left = {(int(row), int(column)) for row, column in np.argwhere(mask)}
    pieces = []
    while left:
        edge = [left.pop()]
        piece = []
        while edge:
            row, column = edge.pop()
            piece.append((row, column))
            for neighbour in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if neighbour in left:
                    left.remove(neighbour)
                    edge.append(neighbour)
        pieces.append(np.array(piece))
    return pieces


def _nearest(colours: np.ndarray, palette: dict[str, tuple[int, int, int]], tolerance: float) -> list[str | None]:
    """Name each of the colours (N, 3); None where the nearest one of the palette is too far."""
    distances = np.linalg.norm(colours[:, None] - np.array(list(palette.values())), axis=-1)
    names = list(palette)
    chosen = distances.argmin(axis=1)
    return [names[i] if row[i] <= tolerance else None for i, row in zip(chosen, distances, strict=True)]


def _describe(piece: np.ndarray, pixels: np.ndarray) -> SeenObject:
    """Name a piece's colour, by the vote of its pixels, and its shape."""
    top, left = piece.min(axis=0)
    bottom, right = piece.max(axis=0) + 1
    mask = np.zeros((bottom - top, right - left), dtype=bool)
    mask[piece[:, 0] - top, piece[:, 1] - left] = True
    votes = Counter(_nearest(pixels[piece[:, 0], piece[:, 1]], OBJECT_COLOURS, _OBJECT_TOLERANCE))
    colour, count = votes.most_common(1)[0]
    return SeenObject(
        shape=_nearest_shape(mask),
        colour=colour if count > 0.6 * len(piece) else None,
        half_extent_px=max(mask.shape) / 2,
        x=(left + right) / 2,
        y=(top + bottom) / 2,
    )


def _nearest_shape(mask: np.ndarray) -> str | None:
    """Return the shape whose template, stretched to the mask's box, overlaps it best."""
    height, width = mask.shape
    if not 0.7 < height / width < 1.4:
        return None
    rows = (np.arange(_TEMPLATE_SIDE) + 0.5) * height / _TEMPLATE_SIDE
    columns = (np.arange(_TEMPLATE_SIDE) + 0.5) * width / _TEMPLATE_SIDE
    stretched = mask[rows.astype(int)][:, columns.astype(int)]
    overlaps = {
        name: np.count_nonzero(stretched & template) / np.count_nonzero(stretched | template)
        for name, template in _TEMPLATES.items()
    }
    name = max(overlaps, key=overlaps.__getitem__)
    return name if overlaps[name] >= _MINIMUM_OVERLAP else None


def _in_order_of(scene: Scene, things: tuple[SeenObject, ...]) -> tuple[SeenObject, ...]:
    """Put two objects in the order in which the caption names them, going by where they are."""
    if scene.relation is not None:
        return tuple(sorted(things, key=lambda thing: _place_key(scene.relation, thing)))
    wanted = [(said.shape, said.colour) for said in scene.objects]
    backwards = things[::-1]
    agreement = [
        sum(want[0] == thing.shape for want, thing in zip(wanted, order, strict=True))
        + sum(want[1] == thing.colour for want, thing in zip(wanted, order, strict=True))
        + sum(_size_agrees(said, thing) for said, thing in zip(scene.objects, order, strict=True))
        for order in (things, backwards)
    ]
    return things if agreement[0] >= agreement[1] else backwards


def _place_key(relation: str | None, thing: SeenObject) -> float:
    return {"above": thing.y, "below": -thing.y, "left of": thing.x, "right of": -thing.x}[str(relation)]


def _size_agrees(said: SceneObject, thing: SeenObject) -> bool:
    return said.size is None or (said.size == "large") == (thing.half_extent_px >= _LARGE_FROM_PX)


def _position_agrees(scene: Scene, things: tuple[SeenObject, ...]) -> bool:
    """Whether two objects stand one above the other, or side by side, as said; which is which is not asked here."""
    if scene.relation is None:
        return True
    first, second = things
    across, down = abs(first.x - second.x), abs(first.y - second.y)
    return bool(down > 1.5 * across if scene.relation in ("above", "below") else across > 1.5 * down)


def _make_templates() -> dict[str, np.ndarray]:
    """Which parts of its bounding box each shape covers, from formulas; u and v go from -1 to 1, v downwards."""
    steps = (np.arange(_TEMPLATE_SIDE) + 0.5) / _TEMPLATE_SIDE * 2 - 1
    u, v = np.meshgrid(steps, steps)
    inside: dict[str, Callable[[], np.ndarray]] = {
        "circle": lambda: u**2 + v**2 <= 1,
        "square": lambda: np.ones_like(u, dtype=bool),
        "triangle": lambda: np.abs(u) <= (v + 1) / 2,
        "star": lambda: _inside_star(u, v),
        "heart": lambda: _inside_heart(u, v),
    }
    return {name: formula() for name, formula in inside.items()}


def _inside_star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A five-pointed star, a little fatter than a pentagram, folded by its symmetry onto one of its ten sides."""
    fifth = 2 * np.pi / 5
    x, y = u * np.sin(fifth), (v + 1) / 2 * (1 + np.cos(fifth / 2)) - 1
    from_tip = np.abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2)
    radius = np.hypot(x, y)
    notch = 0.42
    along, aside = radius * np.cos(from_tip), radius * np.sin(from_tip)
    notch_along, notch_aside = notch * np.cos(fifth / 2), notch * np.sin(fifth / 2)
    return aside * (1 - notch_along) <= (1 - along) * notch_aside


def _inside_heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Two half circles side by side, and below them two curves that meet in the tip."""
    crown = -0.42
    lobes = (np.abs(u) - 0.5) ** 2 / 0.25 + (v - crown) ** 2 / (1 + crown) ** 2 <= 1
    depth = np.clip((v - crown) / (1 - crown), 0, 1)
    return np.where(v < crown, lobes, np.abs(u) <= (1 - depth**1.6))


_TEMPLATES = _make_templates()
