"""A run may come from anyone, or be damaged: whatever its files hold, one message says which and what to do."""

import json
import os
import shutil

import numpy as np
import pytest

from configs import digits
from diffdistill import chain, config, report, targets, workdir
from diffdistill.chain import DataFacts
from diffdistill.evaluate import samples_path
from diffdistill.evaluation import image_statistics
from diffdistill.evaluation.partial import Partial
from diffdistill.evaluation.report import write_report
from diffdistill.evaluation.results import ResultsError
from diffdistill.training import checksums
from diffdistill.training.errors import CheckpointError
from diffdistill.training.json_files import parse_object, read_json
from diffdistill.training.metrics import MetricWriter
from diffdistill.workdir import WorkdirError

SMOKE = config.resolve(digits.get_config("smoke"))
FACTS = DataFacts((8, 8, 1), 10)
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    workdir.create(folder, SMOKE, FACTS, "f" * 64)
    return (folder / "config.json").read_text()


@pytest.fixture
def run(tmp_path, record):
    (tmp_path / "config.json").write_text(record)
    return workdir.read(tmp_path)


@pytest.mark.parametrize(
    "text", [DEEP, '{"a":' * 500 + "1" + "}" * 500, "[]", "5", "null", '[["a", 1]]', "{", b"\xff{}"]
)
def test_json_that_is_no_plain_object_is_one_error(tmp_path, text):
    file = tmp_path / "file.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    for read in (lambda: read_json(file), lambda: parse_object(text)):
        with pytest.raises(ValueError, match=r".+"):
            read()


def test_json_of_a_device_is_not_read(tmp_path):
    os.symlink("/dev/zero", tmp_path / "file.json")
    with pytest.raises(ValueError, match="it is no file"):
        read_json(tmp_path / "file.json")


def changed(record, *path_and_value):
    *groups, name, value = path_and_value
    whole = json.loads(record)
    place = whole
    for group in groups:
        place = place[group]
    place[name] = value
    return json.dumps(whole)


@pytest.mark.parametrize(
    "path_and_value",
    [
        ("config", []),
        ("config", "model", [1]),
        ("config", "name", "/tmp/elsewhere"),
        ("config", "process", "num_train_steps", 10**12),
        ("data", []),
        ("data", "image_shape", ["a", "b", "c"]),
        ("data", "image_shape", [8, 8]),
        ("data", "image_shape", [8, 8, 10**30]),
        ("data", "image_shape", 8),
        ("data", "num_classes", "x"),
        ("data", "num_classes", 10**12),
        ("data", "class_names", [[], {}]),
        ("data", "latents", 5),
        ("starts", 5),
        ("starts", [5]),
        ("starts", [{"versions": 5}]),
        ("starts", [{"command_line": [5]}]),
        ("imported", []),
    ],
)
def test_a_foreign_record_is_refused_or_is_that_of_another_run(tmp_path, record, path_and_value):
    (tmp_path / "config.json").write_text(changed(record, *path_and_value))
    with pytest.raises(WorkdirError, match=r"config\.json (cannot be read|was not written by this version)"):
        workdir.read(tmp_path)
    if "name" in path_and_value:
        return  # training begins anew under its own
    (tmp_path / "teacher" / "3").mkdir(parents=True)
    with pytest.raises(WorkdirError, match=r"config\.json cannot be read|holds a run of another config"):
        workdir.create(tmp_path, SMOKE, FACTS, "f" * 64)


@pytest.mark.parametrize("text", [DEEP, "[]", "5", "\xff"])
def test_training_does_not_begin_over_what_is_no_record(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    (tmp_path / "teacher" / "3").mkdir(parents=True)
    with pytest.raises(WorkdirError, match=r"config\.json cannot be read"):
        workdir.create(tmp_path, SMOKE, FACTS, "f" * 64)


@pytest.mark.parametrize(
    "name",
    [
        "params/../../../../../../../dev/zero",
        "/dev/zero",
        "params/a\0b",
        "params//a",
        "params/.",
        "params",
        "params/zero",
    ],
)
def test_checksums_are_of_files_of_the_checkpoint_alone(tmp_path, name):
    (tmp_path / "params").mkdir()
    os.symlink("/dev/zero", tmp_path / "params" / "zero")
    (tmp_path / checksums.FILE).write_text(json.dumps({"blake2b": {name: "00"}}))
    with pytest.raises(checksums.Damaged, match=r"no file"):
        checksums.check(tmp_path, ["params"])
    assert not checksums.are_right(tmp_path)


@pytest.mark.parametrize("text", [DEEP, "[]", '{"blake2b": 5}', '{"blake2b": [["params", 1]]}', "{}", "\xff"])
def test_damaged_checksums_are_said(tmp_path, text):
    (tmp_path / checksums.FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(checksums.Damaged, match=r"checksums\.json cannot be read"):
        checksums.check(tmp_path, ["params"])
    assert not checksums.are_right(tmp_path)


def test_lines_of_metrics_that_are_none_are_left_out(run):
    good = {"stage": "teacher", "step": 2, "loss": 0.5, "loss_by_log_snr": [0.5, None]}
    bad = [{**good, **change} for change in ({"stage": [1]}, {"step": "x"}, {"loss": 10**400}, {"loss_by_log_snr": 5})]
    lines = [DEEP, "5", "[1]", "{}", *map(json.dumps, bad), json.dumps(good)]
    (run.path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xff\n")
    assert list(report._losses(run)) == [good]
    MetricWriter(run.path, "teacher", 4, tensorboard=False).close()
    assert DEEP not in (run.path / "metrics.jsonl").read_text()


def test_a_stage_of_the_metrics_names_no_file_elsewhere(tmp_path):
    losses = [{"stage": "x/../../../escaped", "step": step, "loss": 1.0} for step in (1, 2)]
    write_report(tmp_path / "a" / "b" / "report.html", title="t", losses=losses)
    assert [path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*escaped*")] == [
        "a/b/plots",
        "a/b/plots/dark",
    ]


@pytest.mark.parametrize("text", [DEEP, "[]", '{"loss": ["x"]}', '{"loss": {}}', "{}"])
def test_a_damaged_path_is_measured_again(tmp_path, text):
    (tmp_path / "path.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"path\.json .*Delete it"):
        targets._read(tmp_path / "path.json", 3)


def test_grids_of_no_weight_are_left_out(run):
    for name in ("wabc", "wnan", "w1.2.3", "w", "w2"):
        (run.path / "grids" / name).mkdir(parents=True)
        (run.path / "grids" / name / "teacher_sampled_0004.png").write_bytes(b"x")
    os.symlink("/dev/zero", run.path / "grids" / "w2" / "teacher_sampled_0008.png")
    assert [(grid["w"], grid["num_steps"]) for grid in report._grids(run)] == [(2.0, 4)]


def samples(file, images, labels, **more):
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, images=images, labels=labels, **more)


def test_damaged_samples_are_named(run):
    weights = sorted(run.config.evaluation.guidance)
    file = samples_path(run, "teacher", chain.full_steps(run.config), weights[len(weights) // 2])
    samples(file, np.zeros((20, 8, 8, 1), np.uint8), np.arange(20) % 10)
    assert report.save_overview(run, None) == run.path / "overview.png"
    whole = file.read_bytes()
    for make in (
        lambda: file.write_bytes(b"PK\3\4junk"),
        lambda: file.write_bytes(whole[:100] + b"\xff" + whole[101:]),
        lambda: samples(file, np.zeros((20, 9, 9, 1), np.uint8), np.arange(20)),
        lambda: samples(file, np.zeros((20, 8, 8, 1)), np.arange(20)),
        lambda: samples(file, np.zeros((20, 8, 8, 1), np.uint8), np.arange(3)),
        lambda: samples(file, np.zeros((20, 8, 8, 1), np.uint8), np.arange(20), bomb=np.zeros(10**8, np.uint8)),
    ):
        make()
        with pytest.raises(ResultsError, match=r"teacher_sampled_0004\.npz cannot be read .*Delete it"):
            report.save_overview(run, None)


def test_damaged_transfers_are_named(tmp_path):
    settings = digits.get_config("full-smoke")
    settings.evaluation.transfers = ("3 to 8",)
    run = workdir.Workdir(tmp_path, config.resolve(settings), FACTS)
    file = tmp_path / "evaluation" / "transfer" / "3_to_8.json"
    file.parent.mkdir(parents=True)
    for text in (DEEP, "5", "{}", '{"transfer": "9 to 8"}', '{"transfer": "3 to 8", "entries": []}'):
        file.write_text(text)
        with pytest.raises(ResultsError, match=r"3_to_8\.json cannot be read .*Delete it"):
            list(report._transfers(run))


def test_a_damaged_partial_evaluation_is_named(tmp_path):
    like = image_statistics.empty(20, 4)
    partial = Partial(tmp_path, "x")
    partial.save(5, 1.5, like)
    assert partial.load(like)[:2] == (5, 1.5)
    (partial.path / "not a number").mkdir()
    (partial.path / "not a number" / "complete").touch()
    assert partial.load(like)[0] == 5
    share = partial.path / "5" / "process_0000.npz"
    arrays = image_statistics.to_arrays(like)
    whole = share.read_bytes()
    for make in (
        lambda: share.write_bytes(b"PK\3\4"),
        lambda: share.write_bytes(whole[:1000]),
        lambda: np.savez(share, **{**arrays, "pool_total": np.zeros(3)}),
        lambda: np.savez(share, **{**arrays, "pool_count": np.array("x")}),
        lambda: np.savez(share, **{**arrays, "features_numbers": np.arange(3)}),
        lambda: np.savez_compressed(share, **{**arrays, "bomb": np.zeros(10**8, np.uint8)}),
        share.unlink,
    ):
        make()
        with pytest.raises(ResultsError, match=r"process_0000\.npz.*cannot be read .*Delete"):
            partial.load(like)
    for text in ("{", "[]", "{}", '{"processes": 0, "seconds": 1}', '{"processes": "x", "seconds": 1}', DEEP):
        (partial.path / "5" / "complete").write_text(text)
        with pytest.raises(ResultsError, match=r"complete.*cannot be read .*Delete"):
            partial.load(like)
    shutil.rmtree(partial.path)
