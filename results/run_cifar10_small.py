"""Runs configs/cifar10_small.py within a given time and collects what it measured into one folder.

    python results/run_cifar10_small.py --data=cifar10_jpeg.tar.xz --workdir=runs/cifar10_small --seconds=1500

First teacher, guided student and chain to one step, then the EDM teacher and DisBack (--parts=chain,edm). The rate of
the teacher is measured at the beginning, unless it is given, and the budget that the config is given is what fits into
the time here. Training that takes longer is stopped in time to evaluate what is finished; stopped itself by SIGTERM,
the script still collects. Its own process touches no accelerator.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

# Only the programs that it starts work on the accelerator.
PLATFORMS = os.environ.get("JAX_PLATFORMS")
os.environ["JAX_PLATFORMS"] = "cpu"

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import cifar10_small  # noqa: E402
from diffdistill import report, runner, workdir  # noqa: E402
from diffdistill.data.pipeline import in_memory  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
COLLECTED = (
    *("config.json", "metrics.jsonl", "overview.png", "report.html", "grids"),
    *("evaluation/results.jsonl", "evaluation/trajectory.jsonl"),
)
STOPPING = 20  # seconds that a program gets to save and end
REPORTING = 15  # seconds for report and collection
MARGIN = 0.86  # of the rate, which is that of a device that does nothing else: the share that training had on an H200


class Stopped(Exception):
    """SIGTERM."""


def program(log: Path, *arguments: str, memory: float = 0.6) -> subprocess.Popen:
    """main.py as a process of its own, its output in `log`; memory: its share of the device."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": str(memory), "PYTHONUNBUFFERED": "1"}
    environment.pop("JAX_PLATFORMS")
    if PLATFORMS is not None:
        environment["JAX_PLATFORMS"] = PLATFORMS
    with log.open("a") as output:
        print("$ main.py", *arguments, file=output, flush=True)
        command = [sys.executable, str(ROOT / "main.py"), *arguments]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, seconds: float) -> int:
    """The exit code of a process that is told to stop after so many seconds."""
    try:
        return process.wait(max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        return stop(process)
    except Stopped:
        stop(process)
        raise


def stop(process: subprocess.Popen) -> int:
    """Ends a process, which may save first."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(STOPPING)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


PARTS = {"chain": ("", 0.6), "edm": ("edm-", 0.4)}  # variants of the config, and their shares of the time
STAGES = {"chain": ("guided.num_updates", "progressive.num_updates", "progressive.final_num_updates")}


def budget(training: float, rate: float) -> float:
    """Minutes of the config whose stages train so many seconds where the teacher makes `rate` images a second."""
    return (cifar10_small.OVERHEAD + max(training, 5.0) * rate / cifar10_small.REFERENCE_RATE) / 60


def measured_rate(path: Path) -> float:
    """Images a second of the teacher as --mode=benchmark wrote them, or the reference's where it did not."""
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["images_per_second"] if lines else cifar10_small.REFERENCE_RATE


def work(options: argparse.Namespace, log: Path) -> None:
    """Data, benchmark, training, evaluation, each within what is left of the time."""
    end = time.monotonic() + options.seconds - REPORTING
    suffix = "-smoke" if options.smoke else ""
    data: list[str] = []
    if not options.smoke:
        prepared = options.workdir / "data"
        finish(program(log, "--mode=prepare", f"--source={options.data}", f"--destination={prepared}"), 300)
        data = [f"--config.data.path={prepared}"]
    flags = [*data, *options.flags]

    config = f"--config={ROOT / 'configs' / 'cifar10_small.py'}:"
    if not options.rate:
        rates = options.workdir / "benchmark.jsonl"
        benchmark = ["--mode=benchmark", "--dtypes=bfloat16", "--benchmark_seconds=5", f"--out={rates}"]
        finish(program(log, *benchmark, f"{config}6-minutes{suffix}", *flags), 0.4 * options.seconds)
        options.rate = measured_rate(rates)
    print(f"teacher: {options.rate:.0f} images/s", flush=True)
    for index, part in enumerate(options.parts):
        shares = [PARTS[each][1] for each in options.parts[index:]]
        seconds = (end - time.monotonic()) * shares[0] / sum(shares)
        work_on(part, time.monotonic() + seconds, config, suffix, flags, options, log)


def work_on(
    part: str, end: float, config: str, suffix: str, flags: list[str], options: argparse.Namespace, log: Path
) -> None:
    """Training and evaluation of a part until `end`."""
    training = end - time.monotonic() - options.evaluation - options.starting
    minutes = budget(MARGIN * training, options.rate)
    print(f"{part}: budget {minutes:.2f} minutes", flush=True)
    flags = [f"{config}{PARTS[part][0]}{minutes:.2f}-minutes{suffix}", *flags]
    run = f"--workdir={options.workdir / part}"
    ahead = None
    if options.ahead and part in STAGES:
        tiny = [f"--config.{field}=10" for field in ("teacher.num_updates", *STAGES[part])]
        tiny += ["--config.evaluation.num_samples=1000", "--config.evaluation.num_steps=1"]
        scratch = f"--workdir={options.workdir / 'ahead'}"
        ahead = program(options.workdir / "ahead.log", "--mode=run", scratch, *flags, *tiny, memory=0.25)
    try:
        left = end - time.monotonic() - options.evaluation
        finish(program(log, "--mode=train", run, *flags), left)
    finally:
        if ahead is not None and ahead.poll() is None:
            stop(ahead)
    finish(program(log, "--mode=evaluate", run, *flags), end - STOPPING - time.monotonic())
    if part == "edm":  # the generator along its training, if there is time
        finish(program(log, "--mode=trajectory", run), end - STOPPING - time.monotonic())


def collect(options: argparse.Namespace) -> None:
    """Copies what is there; a report that an interrupted evaluation did not write is written now."""
    options.out.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        run, out = options.workdir / part, options.out / part
        if not (run / "config.json").exists():
            continue
        if not (run / "report.html").exists():
            folder = workdir.read(run)
            report.save_overview(folder, in_memory(runner.open_data(folder.config)[0]))
            print(report.write_report(folder, [])[0])
        out.mkdir(exist_ok=True)
        for name in COLLECTED:
            if (run / name).is_dir():
                shutil.copytree(run / name, out / name, dirs_exist_ok=True)
            elif (run / name).exists():
                shutil.copy(run / name, out)
    for path in options.workdir.glob("*.*"):
        if path.suffix in (".log", ".jsonl"):
            shutil.copy(path, options.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="folder, zip or tar of pictures, one folder per class")
    parser.add_argument("--workdir", type=Path, default=Path("runs/cifar10_small"))
    parser.add_argument("--out", type=Path, default=Path("collected"))
    parser.add_argument("--seconds", type=float, default=1500.0, help="for all of it")
    parser.add_argument("--evaluation", type=float, default=150.0, help="seconds that training must leave")
    text = "seconds for the start of a program and of its stages: compiled ahead, 6, 35 and 8 on one H200"
    parser.add_argument("--starting", type=float, default=50.0, help=text)
    parser.add_argument("--rate", type=float, default=0.0, help="images/s of the teacher; by default it is measured")
    parser.add_argument("--ahead", action="store_true", help="compile the later stages while the teacher trains")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help="some of chain,edm")
    parser.add_argument("--smoke", action="store_true", help="the config's smoke variant, on the digits")
    parser.add_argument("flags", nargs="*", help="further flags of main.py, after --")
    options = parser.parse_args()
    options.workdir, options.out = options.workdir.resolve(), options.out.resolve()
    options.workdir.mkdir(parents=True, exist_ok=True)

    def stopped(*_: object) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stopped)
    try:
        work(options, options.workdir / "main.log")
    except Stopped:
        print("stopped by SIGTERM", flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    collect(options)


if __name__ == "__main__":
    main()
