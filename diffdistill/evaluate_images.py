"""Figures of images made elsewhere, and reference statistics of a data set, written once for later evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffdistill.config import Config
from diffdistill.data.contract import Source
from diffdistill.data.unlabelled import open_unlabelled
from diffdistill.evaluation import measuring, reference, results, tables
from diffdistill.evaluation.measuring import Network
from diffdistill.evaluation.partial import Partial
from diffdistill.evaluation.reference import Reference
from diffdistill.judges.inception import load_network
from diffdistill.training import mesh as meshes
from diffdistill.training import processes
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
    folder = Path(out or "runs/images")
    # A path that cannot be written is found before hours of work.
    processes.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    network = load_network(config.evaluation, inception_weights)
    source = open_unlabelled(images, config.data.image_size, config.data.channels)
    compared = _reference(network, against, config, folder, interrupt)
    say(f"evaluation of {source.name}, {len(source)} images: {network.text()}, against {compared.text()}")
    measuring.say_left_out(compared, len(source), say)
    path = folder / "results.jsonl"
    known = {results.key(entry): entry for entry in processes.on_main(lambda: results.read(path))}
    names = measuring.metrics_against(compared, len(source))
    capacity = config.evaluation.reservoir
    keys = {name: results.key(_record(source, network, compared, capacity, name, 0.0, 0.0)) for name in names}
    wanted = [name for name in names if keys[name] not in known]
    if wanted:
        for entry in _measure(source, network, compared, wanted, config, path, interrupt, say):
            known[results.key(entry)] = entry
    if not processes.is_main():
        return
    shown = [known[keys[name]] for name in names]
    for entry in shown:
        metric = tables.metric_of(entry["metric"])
        spread = f" +- {metric.text(entry['spread'])}" if "spread" in entry else ""
        say(f"  {metric.title}: {metric.text(entry['value'])}{spread}")
    say(" ".join([f"Results: {path}.", *tables.remarks(shown)]))


def _measure(
    source: Source,
    network: Network,
    compared: Reference,
    wanted: Sequence[str],
    config: Config,
    path: Path,
    interrupt: Interrupt,
    say: Callable[[str], Any],
) -> list[results.Record]:
    """Measures, appends to the results file and returns the records; none on all but the main process."""
    capacity = config.evaluation.reservoir
    identity = f"{source.fingerprint()} {_protocol(network, compared, capacity)}"
    partial = Partial(path.parent / ".partial", identity)
    found = network.statistics_of(source, np.arange(len(source)), capacity, partial, interrupt)
    if not processes.is_main():
        return []
    values, spreads = measuring.figures(found.statistics, compared, wanted)
    records = [
        _record(source, network, compared, capacity, name, values[name], found.seconds)
        | ({"spread": spreads[name]} if name in spreads else {})
        for name in wanted
    ]
    results.append(path, records)
    partial.remove()
    if found.pace is not None:
        say(found.pace.text())
    return records


def _protocol(network: Network, compared: Reference, capacity: int) -> str:
    return f"{network.text()}, reference {compared.digest()}, {capacity} kept"


def _record(
    source: Source,
    network: Network,
    compared: Reference,
    capacity: int,
    metric: str,
    value: float,
    seconds: float,
) -> results.Record:
    return results.record(
        stage=source.name,
        num_steps=0,
        network_evaluations=0,
        sampler="",
        w=None,
        metric=metric,
        value=value,
        num_samples=len(source),
        seed=0,
        hardware=meshes.describe(meshes.make_mesh()),
        wall_time=seconds,
        params_hash=source.fingerprint()[:12],
        protocol=_protocol(network, compared, capacity),
        dataset=source.name,
        method="images",
        **network.facts(),
        **compared.facts(),
    )


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
    evaluation, path = config.evaluation, Path(out)
    processes.on_main(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    network.write_reference(path, source, evaluation.reference_images, evaluation.reservoir, interrupt)
    found = network.read_reference(out, "")
    say(f"{path}: {found.text()}. Use it with --config.evaluation.reference={path} or --reference={path}")


def _reference(network: Network, path: str, config: Config, folder: Path, interrupt: Interrupt) -> Reference:
    evaluation = config.evaluation
    if reference.is_statistics(path):
        found = network.read_reference(path, evaluation.reference_protocol)
        return network.with_features(found, path, evaluation.reservoir, folder / "cache", interrupt)
    source = open_unlabelled(path, config.data.image_size, config.data.channels)
    return network.reference_of(source, evaluation.reference_images, evaluation.reservoir, folder / "cache", interrupt)
