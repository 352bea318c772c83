"""Images: where they come from (`open_source`) and how they reach a training step (`Batches`). Knows no model."""

from diffdistill.data.contract import DataError, Example, Source, array_source
from diffdistill.data.pipeline import Batch, Batches, gather, in_memory
from diffdistill.data.sources import open_source

__all__ = [
    "Batch",
    "Batches",
    "DataError",
    "Example",
    "Source",
    "array_source",
    "gather",
    "in_memory",
    "open_source",
]
