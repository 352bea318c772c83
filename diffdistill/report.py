"""Collects what a run left behind (results, losses, grids, costs, facts) and writes its report."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffdistill import chain, plan, runner
from diffdistill.config import to_dict
from diffdistill.data.contract import Source
from diffdistill.data.pipeline import gather
from diffdistill.evaluate import RESULTS, samples_path
from diffdistill.evaluation import images, program, results, tables, transfer_section
from diffdistill.evaluation.arrays import read_npz
from diffdistill.evaluation.files import write_atomically
from diffdistill.evaluation.report import write_report as write_page
from diffdistill.fields import shown
from diffdistill.judges.contract import SHOWN
from diffdistill.training import processes
from diffdistill.training.checkpoints import StageCheckpoints
from diffdistill.training.json_files import parse_object, read_json
from diffdistill.transfer_files import record_path
from diffdistill.workdir import Workdir

FLOPS = "evaluation/flops.json"
_WEIGHT = re.compile(r"w(-?[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]{1,2})?)")
_GRID = re.compile(r"(?P<stage>.+)_sampled_(?P<steps>[0-9]{1,18})(?:_(?P<sampler>.+))?\.png")


def write_report(folder: Workdir, costs: Sequence[dict[str, Any]]) -> tuple[str, Path]:
    """Writes report.html and its pictures into a run's folder; returns the tables for the terminal and the page's path.

    `costs` are those of `stage_costs`. Works on an unfinished run too: what is not there yet is shown as missing.
    """
    measured = results.read(folder.path / RESULTS)
    page = write_page(
        folder.path / "report.html",
        title=f"diffdistill: {folder.config.name}",
        results=measured,
        losses=list(_losses(folder)),
        grids=list(_grids(folder)),
        facts=_facts(folder),
        costs=costs,
        transfers=list(_transfers(folder)),
    )
    return f"{tables.terminal_table(measured)}\n{tables.terminal_costs(costs)}", page


def save_overview(folder: Workdir, source: Source | None) -> Path | None:
    """Writes overview.png: a row of data, one of the teacher, one per student, each column from the same noise.

    Shows the middle guidance weight of the config, two columns per class. None where nothing was measured.
    """
    weights = sorted(folder.config.evaluation.guidance)
    if not weights or folder.facts.num_classes > 20:
        return None
    w, full = weights[len(weights) // 2], chain.full_steps(folder.config)
    samplers = (
        "ddim",
        "stochastic",
        "one_step",
        *(folder.config.evaluation.samplers or (folder.config.sampling.sampler,)),
    )
    rows: list[tuple[str, np.ndarray]] = []
    for stage in chain.plan(folder.config):
        num_steps = full if stage.name == "teacher" else stage.num_steps
        paths = [samples_path(folder, stage.name, num_steps, w, sampler) for sampler in samplers]
        path = next(filter(Path.exists, paths), None)
        if num_steps and path:
            pictures, labels = _samples(path, folder.facts.image_shape)
            name = (
                f"teacher, {num_steps} steps"
                if stage.name == "teacher"
                else f"{'stochastic ' * (stage.method == 'stochastic')}student, {tables.steps_text(num_steps)}"
            )
            rows.append((name, pictures[_first_of_each_class(labels, folder.facts.num_classes)]))
    if not rows:
        return None
    if source is not None:
        data = gather(source, range(min(len(source), 2000)))
        rows.insert(0, ("data", data["image"][_first_of_each_class(data["label"], folder.facts.num_classes)]))
    columns = min(len(tiles) for _, tiles in rows)
    tiles = np.concatenate([row[:columns] for _, row in rows])
    picture = images.grid(tiles, len(rows), columns, row_labels=[name for name, _ in rows])
    return images.save_png(folder.path / "overview.png", picture)


def _samples(path: Path, image_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) that an evaluation has kept."""
    try:
        arrays = read_npz(path, most=SHOWN * (4 * math.prod(image_shape) + 1024) + (1 << 16))
        pictures, labels = arrays["images"], arrays["labels"]
        if pictures.shape != (*labels.shape, *image_shape) or labels.ndim != 1 or pictures.dtype != np.uint8:
            raise ValueError(f"its images are {pictures.dtype} {pictures.shape}, its labels {labels.shape}")
    except (ValueError, KeyError) as error:
        raise results.ResultsError(
            f"{path} cannot be read ({error}). Delete it; --mode=evaluate makes it again."
        ) from error
    return pictures, labels


def _first_of_each_class(labels: np.ndarray, num_classes: int, count: int = 2) -> np.ndarray:
    """The places of the first `count` examples of every class, class after class; of few without classes."""
    if num_classes < 2:
        return np.arange(min(len(labels), 10 * count))
    return np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(num_classes)])


def stage_costs(folder: Workdir) -> Iterator[dict[str, Any]]:
    """Updates, FLOPs and wall time (compilation included) of every finished stage, in order."""
    flops = _flops(folder)
    for stage in runner.finished(folder):
        meta = StageCheckpoints(folder.stage(stage.name), read_only=True).meta()
        yield {
            "stage": stage.name,
            "updates": stage.num_updates,
            "flops": flops[stage.name] * stage.num_updates,
            "wall_seconds": meta.get("seconds"),
        }


def _flops(folder: Workdir) -> dict[str, float]:
    """FLOPs of an update by stage. Counting traces every program: what was counted once is kept beside the results."""
    file, stages = folder.path / FLOPS, chain.plan(folder.config)
    counted = json.dumps(
        [to_dict(folder.config), dataclasses.asdict(folder.facts), program.versions(), program.revision()],
        sort_keys=True,
    )
    key = hashlib.sha256(counted.encode()).hexdigest()

    def kept() -> dict[str, float]:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            record = read_json(file)
            if record["of"] == key and record["flops_per_update"].keys() == {stage.name for stage in stages}:
                return record["flops_per_update"]
        return {}

    if counted_before := processes.on_main(kept):
        return counted_before
    found = {stage.name: plan.flops_per_update(folder.config, stage, folder.facts) for stage in stages}
    if processes.is_main() and not program.revision().endswith("-dirty"):
        text = json.dumps({"of": key, "flops_per_update": found}, indent=1)
        write_atomically(file, lambda stream: stream.write(text.encode()))
    return found


def _losses(folder: Workdir) -> Iterator[dict[str, Any]]:
    file = folder.path / "metrics.jsonl"
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # a line that a kill cut short; the next start of the stage removes it
            entry = parse_object(line)
            if _is_of_metrics(entry):
                yield entry


def _is_of_metrics(entry: dict[str, Any]) -> bool:
    """Whether a line is one that plots and tables can be made of."""

    def is_number(value: Any) -> bool:
        return value is None or (isinstance(value, int | float) and abs(value) < 1e300)

    bins = entry.get("loss_by_log_snr") or []
    return (
        isinstance(entry.get("stage"), str)
        and isinstance(entry.get("step"), int)
        and 0 <= entry["step"] < 2**63
        and is_number(entry.get("loss"))
        and isinstance(bins, list)
        and all(map(is_number, bins))
    )


def _transfers(folder: Workdir) -> Iterator[dict[str, Any]]:
    """The records of the transfers that were made."""
    for text in folder.config.evaluation.transfers:
        path = record_path(folder, text)
        if not path.exists():
            continue
        try:
            record = read_json(path)
            if record["transfer"] != text:
                raise ValueError(f"it is of the transfer {shown(record['transfer'])}")
            transfer_section.sections(path.parent, [record])  # so that its fields are those that the report shows
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise results.ResultsError(
                f"{path} cannot be read ({error}). Delete it; --mode=evaluate makes the transfer again."
            ) from error
        yield record


def _grids(folder: Workdir) -> Iterator[dict[str, Any]]:
    """The grids that belong to the config's measurements, teacher first, then by falling number of steps."""
    order = {stage.name: index for index, stage in enumerate(chain.plan(folder.config))}
    found = []
    for path in (folder.path / "grids").glob("w*/*.png"):
        match = _GRID.fullmatch(path.name)
        weight = _WEIGHT.fullmatch(path.parent.name)
        if match and weight and match["stage"] in order and path.is_file():
            entry = {
                "path": path,
                "stage": match["stage"],
                "num_steps": int(match["steps"]),
                "w": float(weight[1]),
            }
            if match["sampler"]:
                label = tables.row_label(match["stage"], int(match["steps"]), match["sampler"])
                entry["caption"] = label
            found.append((entry["w"], order[match["stage"]], -entry["num_steps"], entry))
    yield from (entry for *_, entry in sorted(found, key=lambda item: item[:3]))


def _facts(folder: Workdir) -> dict[str, Any]:
    starts = folder.starts()
    first = starts[0] if starts else {}
    last = chain.plan(folder.config)[-1]
    height, width, channels = folder.facts.image_shape
    measured = results.read(folder.path / RESULTS)
    return {
        "images": f"{folder.config.data.source} {folder.config.data.path}".strip()
        + f", {height}x{width}x{channels}, {folder.facts.num_classes} classes",
        "parameters": f"{chain.denoiser_of(folder.config, last, folder.facts).num_parameters():,}",
        "output": folder.config.model.prediction,
        "schedule": folder.config.process.schedule,
        "seed": folder.config.seed,
        "samples per measurement": folder.config.evaluation.num_samples,
        "hardware": measured[-1]["hardware"] if measured else "unknown",
        "started": first.get("time", "unknown") + f", {len(starts) or 'unknown'} start(s)",
        "command": " ".join(first.get("command_line", [])),
        "git revision": first.get("git_revision", "unknown"),
        "versions": ", ".join(f"{name} {version}" for name, version in first.get("versions", {}).items()),
    }
