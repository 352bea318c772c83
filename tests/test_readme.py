"""The README's Python runs as it stands."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)


def test_the_readme_has_two_examples():
    assert len(BLOCKS) == 2


def test_sampling_a_stage(smoke_run):
    names: dict = {}
    path = "runs/digits/round_04_steps_0001"
    assert path in BLOCKS[0]
    exec(BLOCKS[0].replace(path, str(smoke_run.path / "round_01_steps_0001")), names)
    assert names["samples"].images.shape == (10, 8, 8, 1)
    assert names["samples"].images.dtype == np.uint8


def test_distilling_a_teacher_of_ones_own():
    names: dict = {}
    exec(BLOCKS[1], names)
    assert jax.tree.structure(names["student"]) == jax.tree.structure(names["teacher"])
    moved = [
        np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (names["student"], names["teacher"])), strict=True)
    ]
    assert max(moved) > 0
    assert float(names["metrics"]["loss"]) == pytest.approx(0, abs=1e-3)  # an untrained teacher: zero everywhere
