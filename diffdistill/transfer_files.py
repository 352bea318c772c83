"""Style transfers as files: those of --mode=transfer, and those that a run shows in its report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffdistill import chain, runner, sample
from diffdistill.data.contract import Source
from diffdistill.data.pipeline import gather
from diffdistill.data.remote import is_remote
from diffdistill.data.unlabelled import open_unlabelled
from diffdistill.evaluate import params_hash
from diffdistill.evaluation import features, images
from diffdistill.evaluation.files import write_atomically
from diffdistill.evaluation.stream import EvaluationInterrupted
from diffdistill.generator import Generator, SampleError
from diffdistill.training import processes
from diffdistill.training.interrupt import Interrupt
from diffdistill.training.json_files import read_json
from diffdistill.transfer import Pair, Transfer, figures, many_step_noise, pairs, transfer
from diffdistill.workdir import Workdir, WorkdirError

FOLDER = "evaluation/transfer"
SHOWN = 12  # columns of a picture
PICTURED_STEPS = 8  # the report shows the students of this many steps, or the next fewer
NUM_IMAGES = 150  # of a class, in the report
_BLOCK = 20_000


def to_files(
    folder: Workdir,
    *,
    encoder: str,
    decoder: str,
    pictures: str,
    source_class: str,
    target_class: str,
    w: float,
    extrapolate: bool,
    num: int,
    num_steps: int | None,
    out: str,
    say: Callable[[str], Any],
) -> None:
    """Transfers images and writes transfer.png and transfer.npz; the arguments are those of the command line.

    The undistilled models from which encoder and decoder were distilled do the same in as many steps, for comparison.

    Args:
      folder: the run that the stages are of.
      encoder, decoder: stages of it, or paths of stages of other runs.
      pictures: images of `source_class`; empty: those of the data of the encoder's run.
      source_class, target_class: number or name of a class.
      w: guidance weight of the decoder.
      extrapolate: whether w may lie outside the range that the decoder was distilled for.
      num: how many images; 0: 100, or as many as there are.
      num_steps: of both; None: what each was distilled to.
      out: folder to write to; empty: <workdir>/transfer.

    Raises:
      SampleError: stages, classes or images that do not fit.
      DataError, WorkdirError: images or folders that cannot be read or written.
    """
    place = Path(out) if out else folder.path / "transfer"
    try:
        processes.on_main(lambda: place.mkdir(parents=True, exist_ok=True))
    except OSError as error:
        raise WorkdirError(f"{place} cannot be written: {error.strerror}. Choose another with --out=FOLDER.") from error
    from_run, to_run = _stage(folder, encoder), _stage(folder, decoder)
    both = pairs(from_run, to_run, num_steps, num_steps, extrapolate=extrapolate)
    source, _ = runner.open_data(from_run[0].config)
    target = source if from_run[0].path == to_run[0].path else runner.open_data(to_run[0].config)[0]
    first = _class(both[0].encoder, source_class)
    second = _class(both[0].decoder, target_class)
    given = _pictures(source, pictures, first, num or 100)
    network = _classifier(to_run[0], target)
    full = chain.full_steps(from_run[0].config)
    reference = many_step_noise(both[1], given, first, full)
    made = [transfer(pair, given, first, second, (w,)) for pair in both]
    measured = [figures(each, given, reference, second, network) for each in made]
    if not processes.is_main():
        return
    rows = _rows(given, both, made, target_class)
    images.save_png(place / "transfer.png", _picture(rows))
    kept = {f"row_{number}_{name}": row for number, (name, row) in enumerate(rows)}
    labels = np.full(len(given), second, np.int32)
    images.save_npz(place / "transfer.npz", made[0].changed[w], labels, None, **kept)
    for pair, found in zip(both, measured, strict=True):
        say(_line(pair, found, full))
    say(f"{len(given)} images: {place / 'transfer.png'}, {place / 'transfer.npz'}")


def evaluate(folder: Workdir, source: Source, interrupt: Interrupt, say: Callable[[str], Any]) -> None:
    """Makes the transfers of config.evaluation.transfers with every encoder and the decoder of as many steps.

    Writes evaluation/transfer/<first>_to_<second>.png and .json; what was made of the same parameters is left alone.
    A run whose encoders are not finished has no transfers.

    Raises:
      EvaluationInterrupted: a signal arrived.
      SampleError: a class of which the data has no image.
    """
    wanted = folder.config.evaluation.transfers
    stages = {(stage.method, stage.num_steps): stage.name for stage in runner.finished(folder)}
    steps = [number for method, number in stages if method == "encoder" and ("progressive", number) in stages]
    if not wanted or not steps:
        return
    sets = {
        number: pairs((folder, stages["encoder", number]), (folder, stages["progressive", number]), number, number)
        for number in sorted(steps, reverse=True)
    }
    network, full = _classifier(folder, source), chain.full_steps(folder.config)
    pictured = max([number for number in steps if number <= PICTURED_STEPS], default=min(steps))
    generator = sets[pictured][0].decoder
    low, high = generator.guidance_range or (0.0, 0.0)
    weights = tuple(w for w in folder.config.evaluation.guidance if low <= w <= high)
    hashes = [params_hash(each.params) for pair, _ in sets.values() for each in (pair.encoder, pair.decoder)]
    for text in wanted:
        names = _classes(text)
        key = {
            "params": hashes,
            "weights": list(weights),
            "num_images": NUM_IMAGES,
            "fingerprint": source.fingerprint(),
        }
        if processes.any_process(interrupt.requested):
            raise EvaluationInterrupted(interrupt.reason)
        if _is_made(record_path(folder, text), key):
            continue
        first, second = (_class(generator, name) for name in names)
        given = _pictures(source, "", first, NUM_IMAGES)
        reference = many_step_noise(sets[pictured][1], given, first, full)
        entries = []
        for number, both in sets.items():
            made = [transfer(pair, given, first, second, weights) for pair in both]
            found = [figures(each, given, reference, second, network) for each in made]
            entries += [{"steps": number, "pair": pair.name, **each} for pair, each in zip(both, found, strict=True)]
            if number == pictured and processes.is_main():
                picture = _picture(_rows(given, both, made, names[1]))
                images.save_png(folder.path / FOLDER / f"{'_to_'.join(names)}.png", picture)
                for pair, each in zip(both, found, strict=True):
                    say(f"{text}: {_line(pair, each, full)}")
        if processes.is_main():
            record = {
                "transfer": text,
                "num_images": len(given),
                "key": key,
                "full_steps": full,
                "pictured_steps": pictured,
                "entries": entries,
            }
            content = json.dumps(record, indent=1).encode()
            write_atomically(record_path(folder, text), lambda file, content=content: file.write(content))


def record_path(folder: Workdir, text: str) -> Path:
    """Where the figures of a transfer such as "3 to 8" lie; its picture lies beside them."""
    return folder.path / FOLDER / f"{'_to_'.join(_classes(text))}.json"


def _is_made(path: Path, key: dict[str, Any]) -> bool:
    """Whether a transfer was made by the same models of the same data; on several processes as the main one sees it."""

    def made() -> bool:
        there = path.exists() and path.with_suffix(".png").exists()
        try:
            return there and read_json(path).get("key") == key
        except ValueError:
            return False  # damaged: it is made again

    return processes.on_main(made)


def _classes(text: str) -> tuple[str, str]:
    """("3", "8") of "3 to 8"."""
    first, _, second = text.partition(" to ")
    return first, second


def _class(generator: Generator, label: str) -> int:
    number, classes = generator.class_number(label), generator.denoiser.num_classes
    if classes and number >= classes:
        raise SampleError(f"class {label} is no class of stage {generator.name}, which knows 0 to {classes - 1}.")
    return number


def _stage(folder: Workdir, name: str) -> tuple[Workdir, str]:
    """(run, stage) of a stage's name, or of the path of another run's."""
    own = {stage.name for stage in chain.plan(folder.config)}
    elsewhere = name not in own and (is_remote(name) or processes.on_main(lambda: Path(name).is_dir()))
    return sample.locate(name) if elsewhere else (folder, name)


def _pictures(source: Source, path: str, label: int, num: int) -> np.ndarray:
    """(N, H, W, C) images at a path, or of a class of the data."""
    if path:
        height, _, channels = source.image_shape
        given = open_unlabelled(path, height, channels)
        return gather(given, np.arange(min(num, len(given))))["image"]
    found: list[np.ndarray] = []
    for start in range(0, len(source), _BLOCK):  # data may be sorted by class
        data = gather(source, np.arange(start, min(start + _BLOCK, len(source))))
        found.append(data["image"][data["label"] == label])
        if sum(map(len, found)) >= num:
            break
    pictures = np.concatenate(found)[:num]
    if not len(pictures):
        raise SampleError(f"{source.name} has no image of class {label}; choose another class.")
    return pictures


def _classifier(folder: Workdir, source: Source) -> features.FeatureNetwork | None:
    """The run's feature network, where the data has classes and the run is measured by it."""
    if folder.config.evaluation.features != "domain" or source.num_classes < 2:
        return None
    data = gather(source, np.linspace(0, len(source) - 1, min(len(source), 10_000)).astype(np.int64))
    cache = folder.path / "evaluation" / "cache"
    return processes.on_main(
        lambda: features.train_or_load(data["image"], data["label"], source.num_classes, source.fingerprint(), cache)
    )


def _rows(
    given: np.ndarray, both: Sequence[Pair], made: Sequence[Transfer], target: str
) -> list[tuple[str, np.ndarray]]:
    rows = [("images", given)]
    for pair, each in zip(both, made, strict=True):
        rows.append((f"{pair.name}: back", each.back))
        rows += [(f"{pair.name}: {target}, w = {w:g}", changed) for w, changed in each.changed.items()]
    return rows


def _picture(rows: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    columns = min(SHOWN, len(rows[0][1]))
    tiles = np.concatenate([row[:columns] for _, row in rows])
    return images.grid(tiles, len(rows), columns, row_labels=[name for name, _ in rows])


def _line(pair: Pair, found: dict[str, Any], full: int) -> str:
    """One line for the terminal."""
    parts = [
        f"{pair.name}, {pair.encoder_steps} + {pair.decoder_steps} steps: noise RMSE {found['noise_rmse']:.3g} to "
        f"DDIM's in {full} steps, reconstruction RMSE {found['reconstruction_rmse']:.3g}"
    ]
    for entry in found["by_w"]:
        own = [f"class accuracy {100 * entry['class_accuracy']:.1f} %"] if "class_accuracy" in entry else []
        own += [
            f"correlation of {name} {value:.2f}" for name, value in entry.items() if name not in ("w", "class_accuracy")
        ]
        if own:
            parts.append(f"w = {entry['w']:g}: {', '.join(own)}")
    return "; ".join(parts)
