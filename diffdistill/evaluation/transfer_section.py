"""The part of the report on style transfers: a picture and a table for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffdistill.evaluation import page, tables

EXPLANATION = (
    "Images of one class are encoded to noise without guidance and decoded as another class with guidance weight w. "
    "Distilled encoders and decoders are compared with the same number of steps of DDIM by the models they were "
    "distilled from. Correlations compare each image with what became of it: what a change of class should leave alone."
)
_FIGURES = {"noise_rmse": "RMSE of the noise to DDIM's in {} steps", "reconstruction_rmse": "Reconstruction RMSE"}


def sections(folder: Path, transfers: Sequence[Mapping[str, Any]]) -> list[str]:
    """One section for each record of transfer_files.evaluate, whose pictures lie in `folder`."""
    return [
        page.section("transfers" if not number else "", *_section(folder, each))
        for number, each in enumerate(transfers)
    ]


def _section(folder: Path, record: Mapping[str, Any]) -> tuple[str, ...]:
    entries = record["entries"]
    steps = sorted({entry["steps"] for entry in entries})
    names = list(dict.fromkeys(entry["pair"] for entry in entries))
    picture = folder / f"{record['transfer'].replace(' to ', '_to_')}.png"
    try:
        shown = page.figure(picture.read_bytes(), f"transfer {record['transfer']}", caption=_caption(record))
    except OSError:
        shown = page.missing(f"{picture} is missing")
    by_place = {(entry["pair"], entry["steps"]): entry for entry in entries}

    def lines(title: str, remark: str, value: Any) -> list[str]:
        found = [[name, *(value(by_place[name, number]) for number in steps)] for name in names]
        return [page.group(title, remark, len(steps) + 1), *map(page.row, found)]

    rows: list[str] = []
    for key, title in _FIGURES.items():
        rows += lines(
            title.format(record["full_steps"]), "lower is better", lambda e, key=key: tables.three_digits(e[key])
        )
    for index, first in enumerate(entries[0]["by_w"]):
        for key in first:
            if key == "class_accuracy":
                text = lambda e, key=key, index=index: f"{100 * e['by_w'][index][key]:.1f} %"  # noqa: E731
            else:
                text = lambda e, key=key, index=index: f"{e['by_w'][index][key]:.2f}"  # noqa: E731
            if key != "w":
                title = "Class accuracy" if key == "class_accuracy" else f"Correlation of {key}"
                rows += lines(f"{title}, w = {first['w']:g}", "higher is better", text)
    table = page.table(["steps of encoder and of decoder", *map(str, steps)], rows)
    return f"Style transfer {record['transfer']}", page.paragraph(EXPLANATION), page.figures([shown], "grids"), table


def _caption(record: Mapping[str, Any]) -> str:
    steps = record["pictured_steps"]
    return f"{record['num_images']} images; {steps} + {steps} steps in the picture"
