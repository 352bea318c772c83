"""Published figures beside measured ones: for a terminal, as Markdown, as CSV, and as plots."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from diffdistill.evaluation import plots, published, tables
from diffdistill.evaluation.files import write_atomically
from diffdistill.evaluation.published import QUOTED, RECALLED, UNKNOWN, Measured, Row
from diffdistill.evaluation.results import Record
from diffdistill.weights import fetch

NOT_MEASURED, NOT_KNOWN, NOT_STATED = "not measured", "not known", "-"
_MARKS = {QUOTED: "*", RECALLED: "?"}
_LEGEND = {
    QUOTED: "* as quoted by later papers",
    RECALLED: "? recalled, not confirmed against the paper: no target",
    UNKNOWN: f"{NOT_KNOWN}: the paper's figure is not at hand",
}
_ORIGINS = {QUOTED: "quoted", RECALLED: "recalled"}
_EVALUATED = 50_000  # samples of every published figure
_KEYS = ("dataset", "conditional", "method", "detail", "steps_or_nfe", "w", "sampler")
_TITLES = {"conditional": "classes", "steps_or_nfe": "steps", "speedup": "Speed-up"}

Pair = tuple[Row, Measured | None]


def write(name: str, records: Sequence[Record], out: Path | None) -> str:
    """The table `name` of published.csv beside what `records` hold, as text for a terminal.

    out: folder for <name>.md, <name>.csv and plots; None writes nothing.

    Raises:
      TableError: there is no such table.
      OSError: the folder cannot be written.
    """
    pairs = [(row, published.measured(row, records)) for row in published.table(name)]
    text = terminal(name, pairs)
    if out is None:
        return f"{text}\nMarkdown, CSV and plots: --out=FOLDER"
    stem = out / name.replace("/", "_")
    files: dict[Path, bytes] = {
        stem.with_suffix(".md"): markdown(name, pairs).encode(),
        stem.with_suffix(".csv"): comma_separated(pairs).encode(),
    }
    against_steps, over_w = steps_curves(pairs), guidance_curves(pairs)
    if against_steps:
        files[Path(f"{stem}_fid_steps.png")] = plots.steps_plot(name, against_steps)
    if over_w:
        files[Path(f"{stem}_fid_is.png")] = plots.guidance_plot(name, over_w)
    for path, content in files.items():
        _write(path, content)
    return text + "\n" + "\n".join(f"Written: {path}" for path in files)


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


def terminal(name: str, pairs: Sequence[Pair]) -> str:
    """Aligned columns, then what the marks mean and where the measurements come from."""
    header, lines = _grid(pairs)
    rows = [header, *lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    text = [_heading(name, pairs)]
    for row in rows:
        text.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    text.insert(2, "  ".join("-" * width for width in widths))
    return "\n".join([*text, "", *_notes(pairs)])


def markdown(name: str, pairs: Sequence[Pair]) -> str:
    """The same as a Markdown document."""
    header, lines = _grid(pairs)
    rows = [header, ["---"] * len(header), *lines]
    table = ["| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in row) + " |" for row in rows]
    notes = [f"- {note}".replace("- *", "- \\*") for note in _notes(pairs)]
    return "\n".join([f"# {_heading(name, pairs)}", "", *table, "", *notes, ""])


def comma_separated(pairs: Sequence[Pair]) -> str:
    """One line per published figure: the columns of published.csv, then the measurement and what it depends on."""
    more = ("num_samples", "protocol", "reference", "config", "seed", "params_hash", "hardware", "date")
    fields = [*Row.__dataclass_fields__, "measured", "measured_seeds", *(f"measured_{field}" for field in more)]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(fields)
    for row, found in pairs:
        ours = ["", ""] if found is None else [repr(found.value), str(found.seeds)]
        ours += [str(found.record.get(field, "")) if found else "" for field in more]
        writer.writerow([*(getattr(row, field) for field in Row.__dataclass_fields__), *ours])
    return stream.getvalue()


def _heading(name: str, pairs: Sequence[Pair]) -> str:
    done = sum(found is not None for _, found in pairs)
    return f"{name}: {len(pairs)} published figures, {done} of them measured here"


def _grid(pairs: Sequence[Pair]) -> tuple[list[str], list[list[str]]]:
    """(header, lines): one line per setting; per metric a published and a measured column; empty columns left out."""
    metrics = list(dict.fromkeys(row.metric for row, _ in pairs))
    by_setting: dict[tuple[str, ...], dict[str, Pair]] = {}
    for row, found in pairs:
        by_setting.setdefault(row.setting, {})[row.metric] = row, found
    used = [index for index in range(len(_KEYS)) if any(setting[index] for setting in by_setting)]
    header = [_TITLES.get(_KEYS[index], _KEYS[index]) for index in used]
    for metric in metrics:
        title = _TITLES.get(metric, tables.metric_of(metric).title)
        header += [f"{title} published", "measured"]
    lines = []
    for setting, cells in by_setting.items():
        line = [setting[index] or NOT_STATED for index in used]
        for metric in metrics:
            line += _cells(*cells[metric]) if metric in cells else [NOT_STATED, NOT_STATED]
        lines.append(line)
    return header, lines


def _cells(row: Row, found: Measured | None) -> list[str]:
    theirs = NOT_KNOWN if row.status == UNKNOWN or not row.value else row.value + _MARKS.get(row.status, "")
    if found is None:
        return [theirs, NOT_MEASURED]
    ours = tables.metric_of(row.metric).text(found.value)
    return [theirs, ours + "".join(f" ({remark})" for remark in _remarks(found))]


def _remarks(found: Measured) -> list[str]:
    """What keeps a measurement from being compared with a published one."""
    remarks = [f"{found.seeds} seeds"] if found.seeds > 1 else []
    if found.record["num_samples"] != _EVALUATED:
        remarks.append(f"{found.record['num_samples']:,} samples".replace(",", " "))
    if not str(found.record.get("protocol", "")).startswith("inception tf"):
        remarks.append("other protocol")
    if not fetch.is_inception(found.record.get("weights_sha256")):
        remarks.append("other feature network: not comparable")
    return remarks


def _notes(pairs: Sequence[Pair]) -> list[str]:
    present = {row.status for row, _ in pairs}
    notes = [text for status, text in _LEGEND.items() if status in present]
    origins = {
        f"{found.record.get('config', 'a run')}: {found.record.get('protocol', 'unknown protocol')}, "
        f"{found.record.get('reference', 'unknown')} of {found.record.get('reference_count') or 'unknown'} images; "
        f"{found.record['hardware']}, {found.record['date'][:10]}": None
        for _, found in pairs
        if found is not None
    }
    return [*notes, *(f"measured: {origin}" for origin in origins)]


def steps_curves(pairs: Iterable[Pair]) -> list[plots.Curve]:
    """FID against steps, one curve per method and sampler, published and measured, one panel per guidance weight."""
    curves: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row, found in pairs:
        if row.metric != "fid" or row.steps is None:
            continue
        label, panel = ", ".join(filter(None, (row.method, row.sampler))), f"w = {row.w}" if row.w else row.dataset
        for origin, value in _values(row, found):
            curves.setdefault((label, origin, panel), []).append((row.steps, value))
    return [
        plots.Curve(label, tuple(sorted(points)), origin, panel) for (label, origin, panel), points in curves.items()
    ]


def guidance_curves(pairs: Iterable[Pair]) -> list[plots.Curve]:
    """FID against inception score over w, one curve per method and number of steps; needs both at two weights."""
    curves: dict[tuple[str, str, str], dict[float, dict[str, float]]] = {}
    for row, found in pairs:
        if not row.w or row.steps is None or row.metric not in ("fid", "is"):
            continue
        label, panel = tables.steps_text(row.steps), ", ".join(filter(None, (row.method, row.sampler)))
        for origin, value in _values(row, found):
            curves.setdefault((label, origin, panel), {}).setdefault(float(row.w), {})[row.metric] = value
    made = (plots.guidance_curve(label, origin, panel, by_w) for (label, origin, panel), by_w in curves.items())
    return [curve for curve in made if curve is not None]


def _values(row: Row, found: Measured | None) -> Iterator[tuple[str, float]]:
    """(origin, value) of the numbers that a row and its measurement hold."""
    with contextlib.suppress(ValueError):  # "diverges", or not known
        yield _ORIGINS.get(row.status, "published"), float(row.value)
    if found is not None:
        yield plots.MEASURED, found.value
