"""Import of published models, by the name of whose format they are in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffdistill.weights import WeightsError, edm, guided_diffusion, progressive
from diffdistill.weights.imported import ImportedModel

SOURCES: dict[str, Callable[..., ImportedModel]] = {
    "edm": edm.read,
    "guided-diffusion": guided_diffusion.read,
    "progressive": progressive.read,
}


def import_weights(source: str, path: str | Path, **options: str | int) -> ImportedModel:
    """A published model as one of ours; nothing that its file says is executed.

    Args:
      source: edm (pickles of NVlabs/edm), guided-diffusion (state dicts of openai/guided-diffusion) or progressive
        (msgpack of google-research/diffusion_distillation).
      path: the file.
      options: what its format leaves open, for other files than the published ones: image_size (guided-diffusion,
        progressive) and prediction (progressive).

    Raises:
      WeightsError: an unknown source, no such file, damaged, naming code, or a network that cannot be built here.
    """
    if source not in SOURCES:
        raise WeightsError(f"source {source!r} is not known; choose one of {', '.join(SOURCES)}.")
    return SOURCES[source](Path(path), **options)
