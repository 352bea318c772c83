"""Distillation of diffusion models into few-step samplers, in JAX."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffdistill.generator import Generator


def load(path: str | os.PathLike[str], stage: str = "") -> Generator:
    """A trained model, ready to sample: ``diffdistill.load("runs/digits").sample(10, w=1.0).images``.

    See :func:`diffdistill.sample.load`, which is imported at the first call: importing the package alone is cheap.
    """
    from diffdistill import sample

    return sample.load(path, stage)
