"""Slant and thickness of drawn lines."""

import numpy as np
import pytest

from diffdistill.evaluation import strokes


def line(lean: float, width: int) -> np.ndarray:
    """A straight stroke that goes `lean` pixels right for each pixel down, (20, 20, 1)."""
    y, x = np.mgrid[:20, :20]
    return (255 * (np.abs(x - 10 - lean * (y - 9.5)) < width)).astype(np.uint8)[..., None]


@pytest.mark.parametrize("lean", [-0.4, 0.0, 0.4])
def test_slant_is_that_of_the_line(lean):
    assert strokes.slant(line(lean, 2)[None])[0] == pytest.approx(lean, abs=0.05)


def test_thickness_grows_with_the_stroke_and_is_a_mean():
    thin, thick = strokes.thickness(np.stack([line(0, 1), line(0, 3)]))
    assert thick > 2 * thin
    assert strokes.thickness(np.full((1, 4, 4, 1), 255, np.uint8))[0] == 1.0


def test_an_empty_image_has_no_slant():
    assert strokes.slant(np.zeros((1, 8, 8, 1), np.uint8))[0] == 0.0


def test_correlation_is_pearsons_and_of_a_constant_zero():
    random = np.random.default_rng(0)
    a = random.normal(size=50)
    b = a + random.normal(size=50)
    assert strokes.correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert strokes.correlation(a, np.ones(50)) == 0.0
