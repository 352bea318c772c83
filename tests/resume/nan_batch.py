"""main.py, but the images of one batch are NaN: NAN_BATCH=its number, counted from the start of the process."""

import itertools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from diffdistill import cli
from diffdistill.data.pipeline import Batch, Batches

NUMBERS = itertools.count()
honest = Batches.__call__


def broken(self: Batches, number: int) -> Batch:
    """The batch that was asked for, unless its turn has come."""
    batch = honest(self, number)
    if next(NUMBERS) == int(os.environ["NAN_BATCH"]):
        batch["image"] = np.full(batch["image"].shape, np.nan, np.float32)
    return batch


Batches.__call__ = broken
cli.main()
