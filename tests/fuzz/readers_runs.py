"""Readers of what a run holds, which may be another's, and of the command line."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hostile_files import npz, npz_bombs
from reader import Reader, in_folder

from configs import digits
from diffdistill import chain, report, targets, transfer_files, workdir
from diffdistill import config as configs
from diffdistill.chain import DataFacts
from diffdistill.config import ConfigError
from diffdistill.evaluate import samples_path
from diffdistill.evaluation import image_statistics, results, tables
from diffdistill.evaluation.partial import Partial
from diffdistill.evaluation.report import write_report
from diffdistill.training import checksums
from diffdistill.training.errors import CheckpointError
from diffdistill.training.metrics import MetricWriter
from diffdistill.workdir import WorkdirError

FACTS = DataFacts((8, 8, 1), 10)
DEEP = b"[" * 100_000


@functools.cache
def config() -> configs.Config:
    settings = digits.get_config("full-smoke")
    settings.evaluation.transfers = ("3 to 8",)
    return configs.resolve(settings)


@functools.cache
def run_seed() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        workdir.create(folder, config(), FACTS, "f" * 64)
        return {"config.json": (Path(folder) / "config.json").read_bytes()}


def begin(folder: Path) -> None:
    (folder / "teacher" / "3").mkdir(parents=True)
    workdir.create(folder, config(), FACTS, "f" * 64)


def bad_runs() -> dict[str, bytes]:
    record = json.loads(run_seed()["config.json"])
    changes: dict[str, tuple[Any, ...]] = {
        "config list": ("config", []),
        "data list": ("data", []),
        "starts": ("starts", 5),
        "model": ("config", "model", [1]),
        "name": ("config", "name", "/tmp/elsewhere"),
        "steps": ("config", "process", {"schedule": "discrete_cosine", "num_train_steps": 10**12}),
        "digits": ("config", "teacher", "learning_rate", 10**400),
        "shape": ("data", "image_shape", ["a", "b", "c"]),
        "classes": ("data", "num_classes", "x"),
    }
    found = {"deep": DEEP, "list": b"[]", "number": b"5"}
    for label, (*groups, name, value) in changes.items():
        whole = copy.deepcopy(record)
        place = whole
        for group in groups:
            place = place[group]
        place[name] = value
        found[label] = json.dumps(whole).encode()
    return found


def results_seed() -> dict[str, bytes]:
    facts: dict[str, Any] = {"num_steps": 4, "network_evaluations": 4, "sampler": "ddim", "num_samples": 50, "seed": 0}
    facts |= {
        "hardware": "cpu",
        "wall_time": 1.0,
        "params_hash": "abc",
        "protocol": "inception tf",
        "dataset": "cifar10",
    }
    lines = [
        results.record(stage=stage, w=w, metric=metric, value=value, **facts)
        for stage, w, metric, value in (("teacher", 1.0, "fid", 3.5), ("round_00_steps_0004", None, "is", 9.0))
    ]
    return {"results.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode()}


def bad_results() -> dict[str, bytes]:
    line = json.loads(results_seed()["results.jsonl"].split(b"\n")[0])
    changes: list[dict[str, Any]] = [
        {"w": "x"},
        {"stage": [1]},
        {"value": "abc"},
        {"num_steps": 10**400},
        {"value": 1e300},
    ]
    found = {f"field {number}": json.dumps({**line, **each}).encode() for number, each in enumerate(changes)}
    return {"deep": DEEP + b"\n", "empty": b"{}\n"} | {label: content + b"\n" for label, content in found.items()}


def tabulate(path: Path) -> None:
    """What becomes of results: keys, tables and a page, without its plots."""
    records = results.read(path)
    results.finished(records)
    tables.terminal_table(records)
    tables.remarks(records)


def checked(folder: Path) -> None:
    checksums.are_right(folder)
    checksums.check(folder, ["params"])


@functools.cache
def checksums_seed() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "params").mkdir()
        (Path(place) / "params" / "a").write_bytes(b"abc")
        checksums.write(Path(place))
        return {"checksums.json": (Path(place) / checksums.FILE).read_bytes()}


def bad_checksums() -> dict[str, bytes]:
    names = ("params/../../../../../../../../dev/zero", "/dev/zero", "params/a\0b", "params")
    return {f"name {n}": json.dumps({"blake2b": {name: "00"}}).encode() for n, name in enumerate(names)} | {
        "deep": DEEP
    }


def metrics_of(path: Path) -> None:
    """The report of the metrics of a run, and then its training goes on."""
    folder = path.with_name("folder") / "deep" / "run"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_bytes(path.read_bytes())
    losses = list(report._losses(workdir.Workdir(folder, config(), FACTS)))
    if any(each["stage"] != "teacher" for each in losses):  # plots take their time
        write_report(folder / "report.html", title="run", losses=losses[:2])
    MetricWriter(folder, "teacher", 1, tensorboard=False).close()
    if any(path.name != "run" for path in (folder.parent).iterdir()):
        raise RuntimeError("it wrote beside the run")


METRICS = (
    b'{"stage": "teacher", "step": 1, "loss": 0.5}\n{"stage": "teacher", "step": 2, "loss_by_log_snr": [1.0, null]}\n'
)


def overview(folder: Path) -> None:
    report.save_overview(workdir.Workdir(folder, config(), FACTS), None)


def samples_name() -> str:
    weights = sorted(config().evaluation.guidance)
    run = workdir.Workdir(Path("/"), config(), FACTS)
    return str(samples_path(run, "teacher", chain.full_steps(config()), weights[len(weights) // 2]).relative_to("/"))


PARTIAL = Partial(Path("partial"), "x")


def partial_of(folder: Path) -> None:
    Partial(folder / "partial", "x").load(like())


def like() -> image_statistics.ImageStatistics:
    """Of few features: those of Inception have 70 MB."""
    from diffdistill.evaluation import moments, scores

    small = moments.empty_moments(3)
    return image_statistics.ImageStatistics(small, small, scores.empty_scores(20, 5), moments.empty_reservoir(3, 4))


TRANSFER = {
    "transfer": "3 to 8",
    "num_images": 5,
    "full_steps": 8,
    "pictured_steps": 4,
    "entries": [{"steps": 4, "pair": "distilled", "noise_rmse": 0.1, "reconstruction_rmse": 0.1, "by_w": [{"w": 1.0}]}],
}


def transfers_of(folder: Path) -> None:
    run = workdir.Workdir(folder, config(), FACTS)
    transfer_files._is_made(transfer_files.record_path(run, "3 to 8"), {})
    list(report._transfers(run))


OVERRIDES = (
    b"--config.teacher.batch_size=32",
    b"--config.model.multipliers=(1, 2, 2)",
    b"--config.data.split=train",
    b"--config.evaluation.guidance=(0.0, 1.0)",
    b"--config.teacher.learning_rate=1e-3",
    b"--config.name=x",
    b"--noconfig.data.flip",
    b"--config=configs/guided.py:cifar10-smoke",
)


def overrides(path: Path) -> None:
    """Parses a command line as main.py does, and resolves the config."""
    from absl import flags
    from ml_collections import config_flags

    from diffdistill import command_flags

    text = path.read_bytes().decode("utf-8", "surrogateescape").replace("\0", " ")
    command = ["main.py", "--config=configs/digits.py:smoke", *text.split("\n")]
    values, argv = flags.FlagValues(), sys.argv
    kinds = ("bool", "enum", "float", "integer", "list", "string")
    kept = {f"DEFINE_{kind}": getattr(flags, f"DEFINE_{kind}") for kind in kinds}
    define_file, known = config_flags.DEFINE_config_file, command_flags.FLAGS
    sys.modules.pop("config_config", None)
    try:
        sys.argv, command_flags.FLAGS = command, values
        for name, define in kept.items():
            setattr(flags, name, lambda *a, define=define, **k: define(*a, **{"flag_values": values, **k}))
        config_flags.DEFINE_config_file = lambda *a, **k: define_file(*a, **{"flag_values": values, **k})
        with contextlib.redirect_stderr(io.StringIO()):
            command_flags.parse(command)
        configs.resolve(values.config)
    except SystemExit as stop:
        if stop.code != 2:
            raise RuntimeError(f"exit code {stop.code}") from stop
        raise ConfigError("refused") from stop
    finally:
        sys.argv, command_flags.FLAGS = argv, known
        config_flags.DEFINE_config_file = define_file
        for name, define in kept.items():
            setattr(flags, name, define)


def known(owned: Path) -> dict[str, Reader]:
    """All of them by name."""
    with tempfile.TemporaryDirectory() as folder:  # what the first plot needs is fetched before anything is watched
        write_report(Path(folder) / "report.html", title="run", losses=[{"stage": "teacher", "step": 1, "loss": 1.0}])
    partial = f"partial/{PARTIAL.path.name}/5"
    share = npz(**image_statistics.to_arrays(like()))
    about = b'{"processes": 1, "seconds": 1.0}'
    sample = npz(images=np.zeros((20, 8, 8, 1), np.uint8), labels=np.arange(20) % 10)
    losses = b'{"update": [0, 1, 2], "loss": [1.0, 0.5, 0.25]}'
    return {
        "run": Reader(run_seed, in_folder("config.json", workdir.read), (WorkdirError,), bad_runs),
        "run begun": Reader(run_seed, in_folder("config.json", begin), (WorkdirError,), bad_runs),
        "results": Reader(results_seed, tabulate, (results.ResultsError,), bad_results),
        "checksums": Reader(
            checksums_seed,
            in_folder(checksums.FILE, checked, lambda: {"params/a": b"abc"}),
            (checksums.Damaged,),
            bad_checksums,
        ),
        "metrics": Reader(
            lambda: {"metrics.jsonl": METRICS},
            metrics_of,
            (),
            lambda: {
                "deep": DEEP + b"\n",
                "place": METRICS.replace(b"teacher", b"x/../../../../x"),
                "list": b"[1]\n5\n",
            },
        ),
        "path of losses": Reader(
            lambda: {"path.json": losses},
            lambda path: targets._read(path, 3),
            (CheckpointError,),
            lambda: {"deep": DEEP},
        ),
        "samples": Reader(
            lambda: {"samples.npz": sample},
            in_folder(samples_name(), overview),
            (results.ResultsError,),
            lambda: npz_bombs("images", owned),
        ),
        "partial evaluation": Reader(
            lambda: {"process_0000.npz": share},
            in_folder(f"{partial}/process_0000.npz", partial_of, lambda: {f"{partial}/complete": about}),
            (results.ResultsError,),
            lambda: npz_bombs("pool_total", owned, "<f8"),
        ),
        "facts of a partial evaluation": Reader(
            lambda: {"complete": about},
            in_folder(f"{partial}/complete", partial_of, lambda: {f"{partial}/process_0000.npz": share}),
            (results.ResultsError,),
            lambda: {"deep": DEEP, "many": about.replace(b"1,", b"1000000000,")},
        ),
        "transfer": Reader(
            lambda: {"record": json.dumps(TRANSFER).encode()},
            in_folder("evaluation/transfer/3_to_8.json", transfers_of),
            (results.ResultsError,),
            lambda: {"deep": DEEP, "elsewhere": json.dumps({**TRANSFER, "transfer": "/etc/x"}).encode()},
        ),
        "overrides": Reader(
            lambda: {str(n): text for n, text in enumerate(OVERRIDES)},
            overrides,
            (ConfigError,),
            lambda: {
                "code": f"--config.model.multipliers=__import__('os').system('touch {owned}')".encode(),
                "power": b"--config.model.multipliers=9**9**9",
                "repeated": b"--config.name='x'*10**10",
                "deep": b"--config.model.multipliers=" + b"(" * 5000,
                "large": b"--config.teacher.num_updates=" + b"9" * 5000,
                "digits": b"--config.data.latent_shift=(1" + b"0" * 399 + b",)",
                "hexadecimal": b"--config.model.multipliers=(0x" + b"f" * 5000 + b",)",
                "endless": b"--config.sampling.rho=inf",
                "steps": b"--config.process.schedule=discrete_cosine\n--config.process.num_train_steps=1000000000000",
                "blocks": b"--config.model.blocks_per_level=100000000",
                "place": b"--config.name=../../elsewhere",
            },
        ),
    }
