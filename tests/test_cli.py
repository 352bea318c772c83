"""The command line: exit codes that scripts can use, and one message for every expected mistake."""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from diffdistill import command_flags

ROOT = Path(__file__).resolve().parents[1]
SMOKE = "--config=configs/digits.py:smoke"


def main(*arguments: str) -> subprocess.CompletedProcess[str]:
    """main.py in a process of its own."""
    command = [sys.executable, "main.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


DEFINITIONS = [
    (flags, f"DEFINE_{kind}", getattr(flags, f"DEFINE_{kind}"))
    for kind in ("bool", "enum", "float", "integer", "list", "string")
] + [(config_flags, "DEFINE_config_file", config_flags.DEFINE_config_file)]


@pytest.fixture
def parse(monkeypatch, capsys):
    """Parses a command line; the message and the exit code where it is refused, otherwise None."""
    monkeypatch.chdir(ROOT)

    def parsed(*arguments: str) -> tuple[str, int] | None:
        values = flags.FlagValues()
        command = ["main.py", *arguments]
        sys.modules.pop("config_config", None)  # the config file of the parse before
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command)  # where ml_collections looks for overrides
            patch.setattr(command_flags, "FLAGS", values)
            for module, name, define in DEFINITIONS:
                patch.setattr(module, name, functools.partial(define, flag_values=values))
            try:
                command_flags.parse(command)
            except SystemExit as stop:
                return capsys.readouterr().err, int(stop.code or 0)
        return None

    return parsed


def test_a_good_command_line_is_accepted(parse):
    assert parse() is None
    assert parse(SMOKE, "--mode=plan", "--config.teacher.batch_size=32", "--config.model.multipliers=(1,)") is None
    assert parse("--config=configs/guided.py:imagenet64-smoke", "--noconfig.data.flip", "--num=3") is None


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--config.teacher.learning_rat=1", "config.teacher.learning_rat is not a field. Did you mean 'learning_rate'"),
        ("--config.techer.learning_rate=1", "config.techer is not a field. Did you mean 'teacher'"),
        ("--config.seed.x=1", "config.seed.x is not a field: config.seed is a whole number."),
        ("--config.teacher.batch_size=abc", "--config.teacher.batch_size=abc: must be a whole number."),
        ("--config.teacher.batch_size=1.5", "--config.teacher.batch_size=1.5: must be a whole number."),
        ("--config.teacher.learning_rate=fast", "--config.teacher.learning_rate=fast: must be a number."),
        ("--config.data.flip=maybe", "--config.data.flip=maybe: must be True or False."),
        ("--config.teacher=5", "--config.teacher=5: must be a group of fields: num_updates"),
        ("--config.model.multipliers=(1,", "must be a list of whole numbers, such as (1, 2)."),
        (
            "--config=configs/digits.py:smok",
            "configs/digits.py has no variant 'smok'; there are edm, full, separate, single-0, single-1, single-2, ",
        ),
        ("--config=configs/nosuch.py", "cannot be read: No such file or directory: 'configs/nosuch.py'."),
        ("--config=configs", "cannot be read: Is a directory: 'configs'."),
        (
            "--mode=nosuch",
            "<run|train|evaluate|plan|sample|prepare|statistics|table|fetch-weights|import|noise-levels|benchmark|transfer|tune-variance|analyse|trajectory>",
        ),
        ("--mod=train", "Did you mean: mode"),
        ("--num=ten", "--num=ten: must be a whole number."),
        ("--w=big", "--w=big: must be a number."),
    ],
)
def test_wrong_usage_is_one_message_and_code_2(parse, argument, expected):
    message, code = parse(argument)
    assert code == 2
    assert expected in message
    assert message.startswith("Error: ")
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("import nosuchmodule", "ModuleNotFoundError: No module named 'nosuchmodule' ({file}, line 1)."),
        ("def get_config(:", "({file}, line 1)."),
        ("def get_config():\n    return unknown", "NameError: name 'unknown' is not defined ({file}, line 2)."),
        ("x = 1", "no attribute 'get_config'"),
    ],
)
def test_a_broken_config_file_is_named_with_the_line(parse, tmp_path, content, expected):
    file = tmp_path / "broken.py"
    file.write_text(content)
    message, code = parse(f"--config={file}")
    assert code == 2
    assert expected.format(file=file) in message
    assert message.count("\n") == 1


def failed(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_leftover_arguments_are_refused():
    failed(main("--mode=plan", "train"), 2, "Unexpected arguments: train.")


def test_data_that_is_not_there_is_code_1_and_leaves_nothing(tmp_path):
    done = main(
        *(SMOKE, "--mode=train", f"--workdir={tmp_path / 'run'}"),
        *("--config.data.source=images", f"--config.data.path={tmp_path / 'nosuch'}"),
    )
    failed(done, 1, f"{tmp_path / 'nosuch'} does not exist")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_is_code_3(tmp_path):
    done = main(
        *(SMOKE, "--mode=train", f"--workdir={tmp_path}", "--config.teacher.learning_rate=1e38"),
        *("--config.guided.num_updates=0", "--config.progressive.num_updates=0", "--config.model.multipliers=(1,)"),
        *("--config.model.attention_resolutions=()", "--config.training.updates_per_call=1"),
    )
    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: Stage teacher: ")


@pytest.mark.parametrize(("arguments", "code"), [(["--mode=table"], 0), (["--mode=table", "more"], 2)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_work_changes_nothing(arguments, code, number):
    """A run that was over said KeyboardInterrupt when the signal came while Python ended."""
    late = (
        f"import atexit, os; from diffdistill import cli; atexit.register(os.kill, os.getpid(), {number:d}); cli.main()"
    )
    command = [sys.executable, "-c", late, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    usual = main(*arguments)
    assert (done.returncode, done.stdout) == (usual.returncode, usual.stdout) == (code, usual.stdout)
    assert "KeyboardInterrupt" not in done.stderr


def test_a_device_without_enough_memory_is_one_message(tmp_path):
    done = main(
        *(
            SMOKE,
            "--mode=train",
            f"--workdir={tmp_path}",
            "--config.model.channels=16384",
            "--config.model.multipliers=(256,)",
        )
    )
    failed(done, 1, "The memory of a device does not suffice")
    assert "Traceback" not in done.stderr
    assert "--config.teacher.parts" in done.stderr


def test_fields_of_another_config_are_not_taken_for_those_of_the_run(smoke_run):
    refused = main("--mode=evaluate", f"--workdir={smoke_run.path}", "--config.evaluation.num_samples=8")
    failed(refused, 2, f"--config=configs/workdir.py:{smoke_run.path}")


def test_samples_are_written_and_what_cannot_be_sampled_is_refused(smoke_run, tmp_path):
    done = main("--mode=sample", f"--workdir={smoke_run.path}", "--num=3", "--labels=1,2", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert {path.name for path in tmp_path.iterdir()} == {"samples.png", "samples.npz"}
    failed(main("--mode=sample", f"--workdir={smoke_run.path}", "--w=7"), 2, "from 0.0 to 2.0")
    failed(
        main("--mode=analyse", f"--workdir={smoke_run.path}", "--stage=guided"), 2, "--stage=guided cannot reconstruct"
    )


def full_disk(folder: Path, size: str) -> bool:
    """Mounts a small file system of its own."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_full_disk_loses_nothing_and_the_same_command_continues(tmp_path):
    # A checkpoint takes 1.6 MB, sometimes more, in as many pieces as tensorstore chooses: one fits, two do not.
    if not full_disk(tmp_path, "2600k"):
        pytest.skip("needs the right to mount a small file system")
    try:
        command = (SMOKE, "--mode=train", f"--workdir={tmp_path / 'run'}", "--config.progressive.num_updates=0")
        command += ("--config.guided.num_updates=0",)
        done = main(*command)
        assert done.returncode == 1, done.stderr
        assert "the disk is full" in done.stderr.splitlines()[-1]
        assert [path.name for path in (tmp_path / "run" / "teacher").iterdir() if path.name.isdigit()] == ["3"]
        subprocess.run(["mount", "-o", "remount,size=20m", str(tmp_path)], check=True)
        done = main(*command)
        assert done.returncode == 0, done.stderr
        assert "resumed at update 3 of 6" in done.stdout
    finally:
        subprocess.run(["umount", str(tmp_path)], check=False)


def test_tables_need_no_run(tmp_path):
    listed = main("--mode=table")
    assert listed.returncode == 0
    assert "progressive/2 (21 published figures)" in listed.stdout
    shown = main("--mode=table", "--table=progressive/2", f"--out={tmp_path}")
    assert shown.returncode == 0
    assert "9.12           not measured" in shown.stdout
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".csv", ".png"}
    refused = main("--mode=table", "--table=progressive/9")
    assert refused.returncode == 2
    assert "no table 'progressive/9'" in refused.stderr
    absent = main("--mode=table", "--table=progressive/2", f"--results={tmp_path / 'nowhere'}")
    assert absent.returncode == 1
    assert "nowhere does not exist" in absent.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--mode=statistics", "--out=stats.npy"], 2, "needs --out=FILE.npz"),
        (["--mode=evaluate", "--images=x.zip"], 2, "needs --reference=PATH"),
        (["--mode=statistics", "--out=x.npz", "--inception_weights=absent.pth"], 1, "absent.pth is not a file"),
        (["--mode=statistics", "--out=x.npz", "--inception_weights=README.md"], 1, "its sha256 is"),
        (
            ["--mode=run", "--config=configs/digits.py:smoke", "--config.evaluation.features=inception"],
            1,
            "fetch-weights",
        ),
        (["--mode=fetch-weights", "--inception_weights=README.md"], 1, "is there, but is not pt_inception"),
    ],
)
def test_mistakes_about_evaluation_are_one_message(tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.delenv("DIFFDISTILL_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = main(*arguments, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("Error: ") == 1
    assert not (tmp_path / "run").exists()
