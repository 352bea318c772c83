"""Figures of images made elsewhere, and reference statistics of a data set, written once for later evaluations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffdistill.config import Config
from diffdistill.data.contract import Source
from diffdistill.data.unlabelled import open_unlabelled
from diffdistill.evaluation import measuring, reference, results, tables
from diffdistill.evaluation.measuring import Network
from diffdistill.evaluation.reference import Reference
from diffdistill.evaluation.stream import Partial
from diffdistill.judges.inception import load_network
from diffdistill.training import mesh as meshes
from diffdistill.training.interrupt import Interrupt


def evaluate(
    images: str,
    against: str,
    config: Config,
    inception_weights: str,
    out: str,
    interrupt: Interrupt,
    say: Callable[[str], Any] = print,
) -> None:
    """Measures images made elsewhere and appends the figures to <out>/results.jsonl; nothing is measured twice.

    Args:
      images: folder, zip, tar, .npz or .npy of images (see data.unlabelled).
      against: reference statistics (.npz with mu and sigma), or images in any of those forms.
      config: its evaluation settings say which protocol, and how many features are kept.
      inception_weights: path of the network; empty: the environment variable or the cache.
      out: folder for results and for what a killed evaluation had; empty: runs/images.
      interrupt: looked at after every chunk.

    Raises:
      EvaluationInterrupted: a signal arrived; the same command continues.
      DataError, WeightsError, StatisticsError: what is needed is not there, or not of this protocol.
    """
    evaluation, folder = config.evaluation, Path(out or "runs/images")
    network = load_network(evaluation, inception_weights)
    source = open_unlabelled(images)
    compared = _reference(network, against, config, folder, interrupt)
    protocol = f"{network.text()}, reference {compared.digest()}"

    def record(metric: str, **more: Any) -> results.Record:
        return results.record(
            stage=source.name,
            num_steps=0,
            sampler="",
            w=None,
            metric=metric,
            num_samples=len(source),
            seed=0,
            params_hash=source.fingerprint()[:12],
            protocol=protocol,
            network_evaluations=0,
            hardware=meshes.describe(meshes.make_mesh()),
            dataset=source.name,
            method="images",
            **more,
        )

    path = folder / "results.jsonl"
    measured = results.read(path)
    done = {results.key(entry): entry for entry in measured}
    names = measuring.metrics_against(compared, len(source))
    blank = {name: record(name, value=0.0, wall_time=0.0) for name in names}
    wanted = [name for name in names if results.key(blank[name]) not in done]
    say(f"evaluation of {source.name}, {len(source)} images: {network.text()}, against {compared.text()}")
    shown = [done[results.key(blank[name])] for name in names if name not in wanted]
    if wanted:
        partial = Partial(folder / "partial", f"{source.fingerprint()} {protocol} {evaluation.reservoir}")
        statistics, pace = network.statistics_of(
            source, np.arange(len(source)), evaluation.reservoir, partial, interrupt
        )
        if not meshes.is_main():
            return
        values, spreads = measuring.figures(statistics, compared, wanted)
        facts = {**network.facts(), **compared.facts()}
        shown += [
            record(
                name,
                value=values[name],
                wall_time=0.0,
                **facts,
                **({"spread": spreads[name]} if name in spreads else {}),
            )
            for name in wanted
        ]
        results.append(path, shown[-len(wanted) :])
        partial.remove()
        if pace is not None:
            say(pace.text())
    for entry in sorted(shown, key=lambda entry: names.index(entry["metric"])):
        spread = f" +- {tables.three_digits(entry['spread'])}" if "spread" in entry else ""
        say(f"  {tables.title(entry['metric'])}: {tables.three_digits(entry['value'])}{spread}")
    say(f"Results: {path}")


def write_statistics(
    source: Source,
    config: Config,
    inception_weights: str,
    out: str,
    interrupt: Interrupt,
    say: Callable[[str], Any] = print,
) -> None:
    """Writes the reference statistics of a source to the .npz file `out`.

    Raises:
      EvaluationInterrupted: a signal arrived; the same command continues.
      WeightsError, DataError: the network or an image cannot be read.
    """
    network = load_network(config.evaluation, inception_weights)
    path = Path(out)
    found = network.reference_of(
        source, config.evaluation.reference_images, config.evaluation.reservoir, path.parent / ".statistics", interrupt
    )
    if meshes.is_main():
        reference.write(path, found)
    say(f"{path}: {found.text()}. Use it with --config.evaluation.reference={path} or --reference={path}")


def _reference(network: Network, path: str, config: Config, folder: Path, interrupt: Interrupt) -> Reference:
    if reference.is_statistics(path):
        return network.read_reference(path, config.evaluation.reference_protocol)
    evaluation = config.evaluation
    source = open_unlabelled(path)
    return network.reference_of(source, evaluation.reference_images, evaluation.reservoir, folder / "cache", interrupt)
