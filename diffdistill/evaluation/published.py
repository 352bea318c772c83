"""Figures that papers print (published.csv), and the measurements of ours that belong beside them.

A row of published.csv says what a paper measured: data set, method, steps, guidance weight, sampler. Records of our
results say the same of themselves, so that no measurement has to be filed by hand.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources

import numpy as np

from diffdistill.evaluation.results import Record
from diffdistill.weights import fetch

PUBLISHED, QUOTED, RECALLED, UNKNOWN = "published", "quoted_by_later_papers", "recalled_unconfirmed", "unknown"
# How the methods of the table are told from a record; methods that this library does not have match nothing.
_METHODS: dict[str, Callable[[Record], bool]] = {
    "teacher": lambda record: record.get("method") == "teacher",
    "ddim": lambda record: record.get("method") == "teacher" and record.get("sampler") == "ddim",
    "progressive": lambda record: record.get("method") == "progressive" and not record.get("guidance_range"),
    "guided_distilled": lambda record: record.get("method") in ("progressive", "stochastic") and _width(record) > 0,
    "single_w": lambda record: record.get("method") in ("progressive", "stochastic") and _width(record) == 0,
    "disback": lambda record: record.get("method") == "disback",
    "diff_instruct": lambda record: record.get("method") == "diff_instruct",
}
_SAMPLERS = {"deterministic": ("ddim",), "ancestral": ("ancestral", "respaced")}
# Details that repeat the columns beside them.
_REPEATED = re.compile(r"ddim \d+x2|")
_ARCHITECTURES = {"vp": "ddpmpp", "ve": "ncsnpp", "adm": "adm"}


class TableError(ValueError):
    """A table that is not there; the message names those that are."""


@dataclass(frozen=True)
class Row:
    """One published figure; fields that a paper does not state are empty.

    Attributes:
      value: as printed ("3.0", "diverges"); empty where it is not known.
      status: PUBLISHED; QUOTED: printed by later papers; RECALLED: not checked against the paper; UNKNOWN.
    """

    paper: str
    table: str
    dataset: str
    conditional: str
    method: str
    detail: str
    steps_or_nfe: str
    w: str
    sampler: str
    metric: str
    value: str
    status: str

    @property
    def setting(self) -> tuple[str, ...]:
        """Everything but metric, value and status: what the metrics of one line of a table share."""
        return (
            self.dataset,
            self.conditional,
            self.method,
            self.detail,
            self.steps_or_nfe,
            self.w,
            self.sampler,
        )

    @property
    def steps(self) -> int | None:
        """Sampling steps, or network evaluations in the tables of EDM."""
        return int(self.steps_or_nfe) if self.steps_or_nfe else None


@dataclass(frozen=True)
class Measured:
    """What was measured here for a published row: the mean over seeds.

    Attributes:
      value: their mean.
      seeds: how many seeds it is of.
      record: the newest record of them, for samples, protocol, hardware and date.
    """

    value: float
    seeds: int
    record: Record


# Beginnings of details of EDM's rows about networks of others, and what those put out. The original sampler of ADM,
# with its learned variance, is not among ours.
_PRETRAINED = {"vp ": "vp", "ve ": "ve", "ddim ": "iddpm", "pretrained ADM": "iddpm"}


def tables() -> dict[str, int]:
    """Names of all tables, such as "progressive/2", and how many published figures each has."""
    counts: dict[str, int] = {}
    for row in _rows():
        name = f"{row.paper}/{row.table}"
        counts[name] = counts.get(name, 0) + 1
    return counts


def table(name: str) -> tuple[Row, ...]:
    """The rows of one table, in the order of the paper. Raises TableError for a table that is not there."""
    if name not in tables():
        raise TableError(f"there is no table {name!r}; known are {', '.join(tables())}. Give one with --table=NAME")
    return tuple(row for row in _rows() if f"{row.paper}/{row.table}" == name)


@functools.cache
def _rows() -> tuple[Row, ...]:
    text = resources.files("diffdistill.evaluation").joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(Row(**entry) for entry in csv.DictReader(text.splitlines()))


def measured(row: Row, records: Iterable[Record]) -> Measured | None:
    """What belongs beside a published row; None: not measured.

    Where a row states no steps, the most steps that were measured count. Of several measurements that of the published
    network counts before others, then protocol tf, then the most samples, then the newest.
    """
    fitting = [record for record in records if _fits(row, record)]
    if row.steps is None and fitting:
        most = max(record["num_steps"] for record in fitting)
        fitting = [record for record in fitting if record["num_steps"] == most]
    if not fitting:
        return None
    newest = max(fitting, key=_worth)
    same = ("params_hash", "protocol", "num_samples", "num_steps", "sampler")
    seeds = {r["seed"]: r["value"] for r in fitting if all(r.get(name) == newest.get(name) for name in same)}
    return Measured(float(np.mean(list(seeds.values()))), len(seeds), newest)


def _worth(record: Record) -> tuple[bool, bool, int, str]:
    is_tf = str(record.get("protocol", "")).startswith("inception tf")
    return fetch.is_inception(record.get("weights_sha256")), is_tf, record["num_samples"], record["date"]


def _fits(row: Row, record: Record) -> bool:
    if record.get("metric") != row.metric or record.get("dataset") != row.dataset:
        return False
    if row.conditional and record.get("conditional") != (row.conditional == "yes"):
        return False
    if row.method not in _METHODS or not _METHODS[row.method](record):
        return False
    if row.sampler and not _is_sampler(row, record):
        return False
    if (record.get("w") or 0.0) != float(row.w or 0.0):
        return False
    steps = record.get("network_evaluations" if row.paper == "edm" else "num_steps")
    return row.steps in (None, steps) and _has_detail(row.detail, record)


def _is_sampler(row: Row, record: Record) -> bool:
    """Whether a record's sampler is that of the row: by name, or as a choice of solver of the ablation sampler."""
    if record.get("sampler") == "ablation":
        return row.paper == "edm" and f"solver {row.sampler}," in str(record.get("protocol", ""))
    return record.get("sampler") in _SAMPLERS.get(row.sampler, (row.sampler,))


def _has_detail(detail: str, record: Record) -> bool:
    """Whether a record is of the output, weight, configuration, ... that a row names."""
    if _REPEATED.fullmatch(detail):
        return True
    parts = str(record.get("config", "")).split("-")
    kinds: Mapping[str, Callable[[str], bool]] = {
        "output": lambda value: record.get("prediction") == value,
        "weight": lambda value: record.get("weight") == value,
        "config": lambda value: value in parts,
        "arch": lambda value: _ARCHITECTURES[value] in parts,
        "gamma": lambda value: _gamma(record) == float(value),
    }
    for start, network in _PRETRAINED.items():
        if detail.startswith(start):
            return record.get("prediction") == network and not detail.endswith("original sampler")
    if detail == "P2":
        return _gamma(record) > 0.0
    pairs = [pair.partition("=") for pair in detail.split(";")]
    return all(kind in kinds and kinds[kind](value) for kind, _, value in pairs)


def _gamma(record: Record) -> float:
    """That of the weight of Choi et al. 2022, whose baseline is the plain error of the noise; below 0: of another."""
    if record.get("weight") == "snr":
        return 0.0
    return float((record.get("weight_settings") or {}).get("gamma", -1.0))


def _width(record: Record) -> float:
    """Of the range of guidance weights that a w-conditioned model was distilled for; below 0: of no such model."""
    low, high = record.get("guidance_range") or (0.0, -1.0)
    return high - low
