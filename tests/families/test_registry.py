"""The registry, and what README says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from triton_diffusion.families.base import ModelFamily
from triton_diffusion.families.registry import FAMILIES, families_table
from triton_diffusion.request import TASKS

README = Path(__file__).parents[2] / "README.md"


def test_readme_has_the_table_of_the_registry() -> None:
    """To renew it: python -c "from triton_diffusion.families.registry import *; print(families_table())"."""
    assert families_table() in README.read_text()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_says_what_it_does(family: ModelFamily) -> None:
    assert family.tasks
    assert set(family.tasks) <= set(TASKS)
    assert family.makes_videos == any("video" in task for task in family.tasks)


def test_names_and_pipelines_belong_to_one_family_each() -> None:
    names = [family.name for family in FAMILIES]
    pipelines = [name for family in FAMILIES for name in family.pipeline_classes]
    assert names == sorted(set(names))
    assert len(pipelines) == len(set(pipelines))
