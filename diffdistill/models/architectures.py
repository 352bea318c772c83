"""The networks by name, from the fields of a config."""

from __future__ import annotations

from typing import Any

from diffdistill.models.denoiser import Network
from diffdistill.models.edm_adm import EdmADM
from diffdistill.models.song_unet import SongUNet
from diffdistill.models.unet import UNet

ARCHITECTURES = ("unet", "ddpmpp", "ncsnpp", "edm_adm")
# What a field holds where the architecture has no such choice, or where it keeps its own.
_UNSET: dict[str, Any] = {
    "augmentation_features": 0,
    "noise_features": 0,
    "noise_frequencies": (),
    "encoder": "",
    "decoder": "",
}
_TAKES = {
    "unet": (),
    "ddpmpp": ("augmentation_features", "noise_features", "encoder", "decoder"),
    "ncsnpp": ("augmentation_features", "noise_features", "noise_frequencies", "encoder", "decoder"),
    "edm_adm": ("augmentation_features", "noise_features"),
}


def check(architecture: str, settings: dict[str, Any]) -> None:
    """Refuses settings that the architecture does not take: ValueError that names the first and lists what it takes."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r} is not known; choose one of {', '.join(ARCHITECTURES)}.")
    takes = _TAKES[architecture]
    for name, unset in _UNSET.items():
        if name not in takes and settings.get(name, unset) != unset:
            raise ValueError(
                f"{name}={settings[name]!r} is no setting of architecture {architecture!r}, which takes "
                f"{', '.join(takes) or 'none of the kind'}; leave it at {unset!r}."
            )


def build(architecture: str, *, num_heads: int, head_dim: int, **settings: Any) -> Network:
    """A network called unet, ddpmpp, ncsnpp or edm_adm.

    Args:
      num_heads, head_dim: of attention; num_heads counts where head_dim is 0.
      settings: fields of the network; those in which architectures differ may be left out, or empty for its own:
        augmentation_features, noise_features, noise_frequencies, encoder, decoder.

    Raises:
      ValueError: an unknown name, or a setting that the architecture does not take.
    """
    check(architecture, settings)
    chosen = {name: value for name, value in settings.items() if name not in _UNSET or value != _UNSET[name]}
    chosen |= {"num_heads": None, "head_dim": head_dim} if head_dim else {"num_heads": num_heads, "head_dim": None}
    if architecture == "unet":
        return UNet(**chosen)
    if architecture == "edm_adm":
        return EdmADM(**chosen)
    if architecture == "ncsnpp":
        own = {"noise_features": 2 * chosen["channels"], "encoder": "residual"}
        chosen = own | chosen | {"noise_embedding": "fourier", "resample_filter": (1, 3, 3, 1)}
    return SongUNet(**chosen)
