"""Plots of --mode=analyse: distances, weights and signal-to-noise ratios, as PNG bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffdistill.evaluation.plots import LIGHT, Theme, new_figure, png_bytes, style_axes

_COLOURS = ("#6e7781", "#1f5fd0", "#bf6a02", "#1a7f5a")
# Where the regimes of Choi et al. 2022 meet.
_BOUNDS = (1e-2, 1.0)
_NAMES = ("coarse", "content", "clean-up")


def distance_plot(snr: np.ndarray, curves: Mapping[str, np.ndarray], title: str, theme: Theme = LIGHT) -> bytes:
    """Mean and standard deviation of distances by SNR: curves of (L, N), one per kind of pair."""
    figure = new_figure(5.2, 3.6, theme)
    axes = figure.subplots()
    style_axes(axes, theme)
    for colour, (label, values) in zip(_COLOURS[1:], curves.items(), strict=False):
        mean, deviation = values.mean(axis=1), values.std(axis=1)
        axes.plot(snr, mean, color=colour, linewidth=1.6, label=label)
        axes.fill_between(snr, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
    _snr_axis(axes, theme)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(title, fontsize=9)
    axes.legend(frameon=False, fontsize=8, labelcolor=theme.text)
    return png_bytes(figure)


def weights_plot(
    schedules: Mapping[str, tuple[np.ndarray, np.ndarray]],
    snr: np.ndarray,
    on_noise: Mapping[str, np.ndarray],
    on_bound: Mapping[str, np.ndarray],
    theme: Theme = LIGHT,
) -> bytes:
    """Three panels: SNR by time of schedules (name -> (time, SNR)); two ways to state weights, by SNR."""
    figure = new_figure(11.0, 3.6, theme)
    panels = figure.subplots(1, 3)
    for axes in panels:
        style_axes(axes, theme)
    for colour, (label, (time, values)) in zip(_COLOURS, schedules.items(), strict=False):
        own = {"linestyle": "--", "linewidth": 2.2} if colour == _COLOURS[2] else {"linewidth": 1.4}
        panels[0].plot(time, values, color=colour, label=label, **own)
    panels[0].set_yscale("log")
    panels[0].set_xlabel("time", fontsize=9)
    panels[0].set_title("signal-to-noise ratio", fontsize=9, color=theme.text, loc="left")
    for axes, weights, title in (
        (panels[1], on_noise, "share of the weight on the noise error"),
        (panels[2], on_bound, "share of the weight on the variational bound"),
    ):
        for colour, (label, values) in zip(_COLOURS, weights.items(), strict=False):
            axes.plot(snr, values, color=colour, linewidth=1.6, label=label)
        axes.set_title(title, fontsize=9, color=theme.text, loc="left", pad=14)  # above the names of the regimes
        axes.set_ylim(bottom=0)
        _snr_axis(axes, theme)
    for axes in panels:
        axes.legend(frameon=False, fontsize=8, labelcolor=theme.text)
    return png_bytes(figure)


def _snr_axis(axes: Any, theme: Theme) -> None:
    """A logarithmic axis of SNR with the regimes marked and named above."""
    axes.set_xscale("log")
    axes.set_xlabel("signal-to-noise ratio", fontsize=9)
    low, high = axes.get_xlim()
    edges = [low, *_BOUNDS, high]
    for bound in _BOUNDS:
        axes.axvline(bound, color=theme.text, alpha=0.5, linewidth=0.8, linestyle=":")
    for name, start, end in zip(_NAMES, edges[:-1], edges[1:], strict=True):
        if low <= start < end <= high:
            middle = np.sqrt(start * end)
            place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom", "fontsize": 7}
            axes.text(middle, 1.0, name, color=theme.text, alpha=0.7, **place)
    axes.set_xlim(low, high)
    axes.minorticks_off()
