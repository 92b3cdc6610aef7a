"""The judge of the demo checkpoint's pictures, tried on pictures whose content is known."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from demo_checkpoint import scenes  # noqa: E402
from demo_checkpoint.judge import judge, look_at  # noqa: E402
from demo_checkpoint.scenes import Scene, SceneObject  # noqa: E402

_OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


def _drawn(scene: Scene, seed: int = 0) -> Image.Image:
    return scenes.draw(scene, random.Random(seed))


def _other(value: str, choices: list[str], rng: random.Random) -> str:
    return rng.choice([choice for choice in choices if choice != value])


def _two_objects() -> Scene:
    return Scene(
        first=SceneObject(shape="circle", colour="red", size="large"),
        second=SceneObject(shape="star", colour="blue", size="small"),
        relation="above",
        background="gray",
    )


def test_accepts_every_correctly_drawn_picture() -> None:
    rng = random.Random(1)
    drawn = scenes.random_scenes(200, 1, held_out=False)
    wrong = [scene for scene in drawn if not judge(scenes.draw(scene, rng), scene).right]
    assert wrong == []


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("size", scenes.SIZES)
def test_names_what_it_sees(shape: str, size: str) -> None:
    scene = Scene(first=SceneObject(shape=shape, colour="green", size=size), background="pink")
    seen = look_at(_drawn(scene))
    assert seen.background == "pink"
    assert [(thing.shape, thing.colour) for thing in seen.objects] == [(shape, "green")]


@pytest.mark.parametrize("changed", ["shape", "colour", "size", "background", "relation"])
def test_rejects_a_picture_with_one_property_changed(changed: str) -> None:
    rng = random.Random(f"changed {changed}")
    drawn = [
        scene
        for scene in scenes.random_scenes(100, 2, held_out=False)
        if scene.background is not None
        and scene.relation is not None
        and scene.first.size is not None
        # Exchanging two equal things changes nothing.
        and (changed != "relation" or scene.first != scene.second)
    ]
    for scene in drawn:
        verdict = judge(scenes.draw(_with_change(scene, changed, rng), rng), scene)
        assert not verdict.right, scene
        if changed != "relation":
            assert not getattr(verdict, changed), scene


def _with_change(scene: Scene, changed: str, rng: random.Random) -> Scene:
    """Return the scene with one property of its first object, its background or its relation made wrong."""
    first, background, relation = scene.first, scene.background, scene.relation
    if changed == "shape":
        first = replace(first, shape=_other(first.shape, list(scenes.SHAPES), rng))
    elif changed == "colour":
        first = replace(first, colour=_other(first.colour, list(scenes.OBJECT_COLOURS), rng))
    elif changed == "size":
        first = replace(first, size=_other(str(first.size), list(scenes.SIZES), rng))
    elif changed == "background":
        background = _other(str(background), list(scenes.BACKGROUND_COLOURS), rng)
    else:
        relation = _OPPOSITE[str(relation)]
    return replace(scene, first=first, background=background, relation=relation)


def test_rejects_a_missing_and_a_third_object() -> None:
    scene = _two_objects()
    alone = replace(scene, second=None, relation=None)
    assert not judge(_drawn(alone), scene).number
    assert not judge(_drawn(scene), alone).number
    crowded = np.array(_drawn(scene))
    crowded[2:14, 2:14] = scenes.OBJECT_COLOURS["green"]
    assert not judge(Image.fromarray(crowded), scene).number


def test_rejects_objects_side_by_side_that_should_stand_above_each_other() -> None:
    scene = _two_objects()
    verdict = judge(_drawn(replace(scene, relation="left of")), scene)
    assert not verdict.position


def test_rejects_noise_an_empty_picture_and_washed_out_colours() -> None:
    scene = _two_objects()
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert not judge(Image.fromarray(noise), scene).right
    assert not judge(Image.new("RGB", (128, 128), (150, 150, 150)), scene).right
    pale = Image.blend(_drawn(scene), Image.new("RGB", (128, 128), (150, 150, 150)), 0.6)
    assert not judge(pale, scene).right


def test_rejects_a_blob_that_is_no_shape() -> None:
    scene = Scene(first=SceneObject(shape="circle", colour="red"))
    picture = np.full((128, 128, 3), 255, dtype=np.uint8)
    picture[40:90, 40:60] = picture[70:90, 40:90] = scenes.OBJECT_COLOURS["red"]
    verdict = judge(Image.fromarray(picture), scene)
    assert verdict.number
    assert verdict.colour
    assert not verdict.shape


def test_accepts_any_size_place_and_order_that_the_prompt_leaves_open() -> None:
    drawn = _two_objects()
    first, second = (replace(thing, size=None) for thing in drawn.objects)
    for asked in (Scene(first=first, second=second), Scene(first=second, second=first)):
        assert judge(_drawn(drawn), asked).right


def test_accepts_slightly_blurred_and_noisy_pictures() -> None:
    rng = np.random.default_rng(0)
    drawn = scenes.random_scenes(60, 3, held_out=False)
    right = 0
    for i, scene in enumerate(drawn):
        small = _drawn(scene, i).resize((96, 96)).resize((128, 128))
        noisy = np.clip(np.asarray(small) + rng.normal(0, 6, (128, 128, 3)), 0, 255).astype(np.uint8)
        right += judge(Image.fromarray(noisy), scene).right
    assert right >= 57


def test_held_out_scenes_do_not_depend_on_how_they_are_said() -> None:
    for scene in scenes.random_scenes(200, 4, held_out=True):
        if scene.second is None or scene.relation is None:
            continue
        mirrored = replace(scene, first=scene.second, second=scene.first, relation=_OPPOSITE[scene.relation])
        assert scenes.is_held_out(mirrored)
