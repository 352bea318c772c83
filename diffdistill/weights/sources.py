"""Import of published models, by the name of whose format they are in."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import jax

from diffdistill.data import unpickling
from diffdistill.weights import WeightsError, edm, guided_diffusion, progressive, torch_file
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
        progressive) and prediction (progressive, guided-diffusion).

    Raises:
      WeightsError: an unknown source or an option that it does not have, no such file, damaged, naming code, or a
        network that cannot be built here.
    """
    if source not in SOURCES:
        raise WeightsError(f"source {source!r} is not known; choose one of {', '.join(SOURCES)}.")
    if "://" in str(path):
        raise WeightsError(f"{path} is an address; download the file first and give its path.")
    surplus = sorted(set(options) - set(inspect.signature(SOURCES[source]).parameters))
    if surplus:
        raise WeightsError(f"files of {source} say their {' and '.join(surplus)} themselves; leave that away.")
    path = Path(path)
    try:
        return SOURCES[source](path, **options)
    except WeightsError as error:
        looks = _looks_like(path)
        if looks and looks != source:
            raise WeightsError(f"{error} By its first bytes it is one for --source={looks}.") from error
        raise
    except MemoryError as error:
        raise WeightsError(
            f"{path} asks for more memory than there is: it is damaged, or too large for this machine."
        ) from error
    except jax.errors.JaxRuntimeError:  # of the device, not of the file
        raise
    except Exception as error:  # names and shapes that belong to no network raise nearly anything
        raise WeightsError(f"{path} is not a network of {source} ({unpickling.about(error)}).") from error


def _looks_like(path: Path) -> str:
    """The source whose files begin so; empty where none does, or there is no file."""
    if not path.is_file():
        return ""
    if torch_file.is_torch(path):
        return "guided-diffusion"
    with open(path, "rb") as file:
        start = file.read(1)
    if start == b"\x80":
        return "edm"
    # A map of up to 15 entries, or of up to 65,535.
    return "progressive" if start and (0x81 <= start[0] <= 0x8F or start == b"\xde") else ""
