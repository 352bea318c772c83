"""The ancestral sampler's variance fraction, tuned for each number of steps (Salimans & Ho 2022, table 1).

Between the small variance (fraction 0) and the large one (1) the logarithm of the variance is interpolated; which is
best depends on the model and on the number of steps, so it is tried.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffdistill import evaluate
from diffdistill.config import ConfigError
from diffdistill.data.contract import Source
from diffdistill.evaluation import results, tables
from diffdistill.evaluation.files import write_atomically
from diffdistill.training import processes
from diffdistill.training.interrupt import Interrupt
from diffdistill.workdir import Workdir

TRIED = "evaluation/variance_fraction.jsonl"
TABLE = "evaluation/variance_fraction.csv"
FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def search(
    folder: Workdir,
    source: Source | None,
    fractions: Sequence[float],
    interrupt: Interrupt,
    *,
    inception_weights: str = "",
    say: Callable[[str], Any] = print,
) -> Path:
    """Measures the teacher's ancestral samples with each fraction, at config.evaluation.num_steps and guidance.

    Every try is a line of TRIED, as in evaluation/results.jsonl; what was tried before is not tried again. The best
    fractions are said, and the table of all written to TABLE.

    Args:
      fractions: 0 to 1 each.
      folder, source, interrupt, inception_weights: as those of `evaluate.evaluate`.

    Raises:
      ConfigError: a fraction outside 0..1, or a run that is not to be measured.
    """
    if not fractions or not all(0.0 <= fraction <= 1.0 for fraction in fractions):
        raise ConfigError(f"--fractions are {', '.join(map(str, fractions))}; give numbers from 0 to 1.")
    if not folder.config.evaluation.num_samples:
        raise ConfigError("config.evaluation.num_samples is 0, so that nothing can be compared; set it to 2 or more.")
    for fraction in fractions:
        config = folder.config
        tried = dataclasses.replace(
            config,
            sampling=dataclasses.replace(config.sampling, variance_fraction=fraction),
            evaluation=dataclasses.replace(config.evaluation, samplers=("ancestral",), stages=("teacher",)),
        )
        evaluate.evaluate(
            dataclasses.replace(folder, config=tried),
            source,
            interrupt,
            inception_weights=inception_weights,
            into=TRIED,
            say=say,
        )
    path = folder.path / TABLE
    if processes.is_main():
        metric = "fid" if folder.config.evaluation.features == "inception" else "frechet_to_data"
        values = _values(results.read(folder.path / TRIED), metric)
        write_atomically(path, lambda file: file.write(_csv(values, metric).encode()))
        say(_text(values, metric) + f"\n{path}")
    return path


Values = dict[tuple[float, int], dict[float, float]]


def _values(records: Sequence[results.Record], metric: str) -> Values:
    """{(w, steps): {fraction: mean over the seeds}}; of repeated measurements the last counts."""
    seeds: dict[tuple[float, int], dict[float, dict[int, float]]] = {}
    tries = [entry for entry in records if entry["metric"] == metric and entry["sampler"] == "ancestral"]
    for entry in tries:
        # Tries of other parameters, or with other numbers of samples, cannot be compared with the newest.
        if all(entry[name] == tries[-1][name] for name in ("params_hash", "num_samples")):
            fraction = entry["sampler_settings"]["variance_fraction"]
            place = seeds.setdefault((entry["w"], entry["num_steps"]), {}).setdefault(fraction, {})
            place[entry["seed"]] = entry["value"]
    return {
        place: {fraction: sum(found.values()) / len(found) for fraction, found in sorted(by_fraction.items())}
        for place, by_fraction in sorted(seeds.items())
    }


def _csv(values: Values, metric: str) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["w", "num_steps", "variance_fraction", metric])
    for (w, steps), found in values.items():
        writer.writerows([w, steps, fraction, value] for fraction, value in found.items())
    return text.getvalue()


def _text(values: Values, metric: str) -> str:
    fractions = sorted({fraction for found in values.values() for fraction in found})
    lines = [f"{tables.metric_of(metric).title} of ancestral samples by variance fraction; * is the best"]
    lines.append(f"{'w':>6}{'steps':>8}" + "".join(f"{fraction:>10g}" for fraction in fractions))
    for (w, steps), found in values.items():
        best = min(found, key=lambda fraction: found[fraction])
        cells = [
            f"{tables.three_digits(found[each])}{'*' if each == best else ' '}" if each in found else "- "
            for each in fractions
        ]
        lines.append(f"{w:>6g}{steps:>8}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)
