"""What each --mode does: the flags handed to the room that does it."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from diffdistill.terminal import EXIT_USAGE, STARTED, fail, say

FLAGS = flags.FLAGS


def _config() -> Any:
    from diffdistill.config import resolve

    return resolve(FLAGS.config)


def check_config() -> None:
    """Refuses a config that no mode can use. Raises ConfigError."""
    _config()


def agree() -> None:
    """Refuses processes of one job that were started with different commands. Raises ProcessesDisagree."""
    if not FLAGS.distributed:
        return
    import json

    from diffdistill import command_flags
    from diffdistill.config import to_dict
    from diffdistill.data import remote
    from diffdistill.evaluation import program
    from diffdistill.training import processes
    from diffdistill.training.errors import ProcessesDisagree

    address = FLAGS.workdir if remote.is_remote(FLAGS.workdir) else ""
    processes.assert_same(f"{FLAGS.mode} {address}", "--mode or the address of --workdir")
    packages = {name: version for name, version in program.versions().items() if name != "python"}
    processes.assert_same(json.dumps(packages), "the versions of the packages")
    processes.assert_same(json.dumps(to_dict(_config()), sort_keys=True), "the config")
    values = command_flags.shared()
    try:
        processes.assert_same(json.dumps(values), "the flags")
    except ProcessesDisagree:  # of all of them at once
        for name, value in values.items():
            processes.assert_same(value, f"--{name}")
        raise


def _images_of(folder: Any) -> Any:
    """The images of a run, in memory; of several processes all have the same."""
    from diffdistill import runner
    from diffdistill.data.pipeline import in_memory
    from diffdistill.training import processes

    source = in_memory(runner.open_data(folder.config)[0])
    if FLAGS.distributed:
        processes.assert_same(source.fingerprint(), "the images")
    return source


def _workdir(config: Any) -> str:
    from diffdistill import store
    from diffdistill.data import remote

    if remote.is_remote(FLAGS.workdir) and FLAGS.mode in IN_WORKDIR:
        return str(store.Store(FLAGS.workdir).folder)  # open, since such modes run within store.kept
    return FLAGS.workdir or str(Path("runs") / config.name)


def _run(interrupt: Any) -> None:
    if FLAGS.images:
        fail("--images is for --mode=evaluate; --mode=run measures what it trains.", EXIT_USAGE)
    from diffdistill import judges

    judges.check(_config(), FLAGS.inception_weights)
    _train(interrupt)
    _evaluate(interrupt)


def _train(interrupt: Any) -> None:
    from diffdistill import plan, runner

    config = _config()
    run = runner.prepare(config, _workdir(config))
    say(plan.summary(run))
    runner.train(run, interrupt, say=say)


def _evaluate(interrupt: Any) -> None:
    if FLAGS.images:
        _evaluate_images(interrupt)
        return
    from diffdistill import evaluate, transfer_files, workdir
    from diffdistill.report import save_overview, stage_costs, write_report
    from diffdistill.training.processes import is_main

    config = _config()
    folder = _as_asked(workdir.read(_workdir(config)), config)
    # An imported model may be compared with published statistics, without any images here.
    needs_images = folder.has_data or not folder.config.evaluation.reference
    source = _images_of(folder) if needs_images else None
    evaluate.evaluate(folder, source, interrupt, inception_weights=FLAGS.inception_weights, say=say)
    if source is not None:
        transfer_files.evaluate(folder, source, interrupt, say)
    costs = list(stage_costs(folder))  # on every process: checkpoints are opened by all together
    if is_main():
        save_overview(folder, source)
        table, page = write_report(folder, costs)
        say(f"{table}\nReport: {page}")


def _tune_variance(interrupt: Any) -> None:
    from diffdistill import tune_variance, workdir

    config = _config()
    folder = _as_asked(workdir.read(_workdir(config)), config)
    source = _images_of(folder)
    try:
        fractions = [float(text) for text in FLAGS.fractions] or tune_variance.FRACTIONS
    except ValueError:
        fail(f"--fractions={','.join(FLAGS.fractions)}: give numbers from 0 to 1, such as 0,0.5,1.", EXIT_USAGE)
    tune_variance.search(folder, source, fractions, interrupt, inception_weights=FLAGS.inception_weights, say=say)


def _trajectory(interrupt: Any) -> None:
    from diffdistill import trajectory, workdir
    from diffdistill.training.processes import is_main

    config = _config()
    folder = _as_asked(workdir.read(_workdir(config)), config)
    stage = FLAGS.stage or "one_step"
    records = trajectory.measure(
        folder,
        _images_of(folder),
        interrupt,
        stage=stage,
        inception_weights=FLAGS.inception_weights,
        say=say,
    )
    if records and is_main():
        curves = trajectory.curve(records, f"{folder.config.name}, {stage}")
        say(trajectory.table(records))
        say(f"Plot: {trajectory.save_plot(folder.path / 'plots' / 'trajectory.png', curves)}")


def _as_asked(folder: Any, config: Any) -> Any:
    """A run, sampled and evaluated as the command line says, where it says anything of a config."""
    if not any(re.match("--?(no)?config[.=]|--?config$", argument) for argument in sys.argv):
        return folder
    if config.name != folder.config.name and not FLAGS["config"].present:
        fail(
            f"{folder.path} holds a run of the config {folder.config.name}, but without --config the fields given are "
            f"those of {config.name}. Change the run's own: --config=configs/workdir.py:{FLAGS.workdir or folder.path}",
            EXIT_USAGE,
        )
    return folder.measured_as(config)


def _evaluate_images(interrupt: Any) -> None:
    from diffdistill import evaluate_images

    if not FLAGS.reference:
        fail(
            "--mode=evaluate --images=PATH needs --reference=PATH: reference statistics (.npz), or the images to "
            "compare with.",
            EXIT_USAGE,
        )
    evaluate_images.evaluate(
        FLAGS.images, FLAGS.reference, _config(), FLAGS.inception_weights, FLAGS.out, interrupt, say=say
    )


def _statistics(interrupt: Any) -> None:
    from diffdistill import evaluate_images, runner
    from diffdistill.training import processes

    if not FLAGS.out.endswith(".npz"):
        fail(f"--mode=statistics needs --out=FILE.npz, the file to write; given --out={FLAGS.out!r}.", EXIT_USAGE)
    config = _config()
    source, _ = runner.open_data(config)
    if FLAGS.distributed:
        processes.assert_same(source.fingerprint(), "the images")
    evaluate_images.write_statistics(source, config, FLAGS.inception_weights, FLAGS.out, interrupt, say=say)


def _table(interrupt: Any) -> None:
    del interrupt
    from diffdistill.evaluation import comparison, published, results

    if not FLAGS.table:
        say("Choose a table with --table=NAME:")
        say("\n".join(f"  {name} ({count} published figures)" for name, count in published.tables().items()))
        return
    # Nothing measured yet is no mistake; a path that was asked for and is not there is one.
    places = FLAGS.results if FLAGS["results"].present else [path for path in FLAGS.results if Path(path).exists()]
    say(comparison.write(FLAGS.table, results.read_all(places), Path(FLAGS.out) if FLAGS.out else None))


def _fetch_weights(interrupt: Any) -> None:
    del interrupt
    from diffdistill.weights import fetch

    say(f"{fetch.fetch(fetch.INCEPTION, FLAGS.inception_weights)} is there and is the published network.")


def _plan(interrupt: Any) -> None:
    del interrupt
    from diffdistill import plan

    say(plan.describe(_config()))


def import_file(interrupt: Any, paths: Sequence[str] = ()) -> None:
    del interrupt
    from diffdistill.import_model import import_model

    if len(paths) != 1 or not FLAGS.source:
        fail(
            "--mode=import needs --source=edm, guided-diffusion or progressive, and the path of one file: "
            f"main.py --mode=import --source=edm FILE --workdir=FOLDER; given {' '.join(paths) or 'no path'}.",
            EXIT_USAGE,
        )
    options: dict[str, Any] = {"prediction": FLAGS.output} if FLAGS.output else {}
    if FLAGS.config.data.image_size:
        options["image_size"] = FLAGS.config.data.image_size
    folder = _workdir(None) if FLAGS.workdir else str(Path("runs") / Path(paths[0]).stem)
    import_model(FLAGS.source, paths[0], folder, options, name=FLAGS.workdir or folder, say=say)


def _benchmark(interrupt: Any) -> None:
    del interrupt
    import json

    from diffdistill import benchmarks
    from diffdistill.benchmarks.table import markdown
    from diffdistill.training.processes import is_main

    measured = []
    for record in benchmarks.run(
        _config(),
        say,
        benchmarks=FLAGS.benchmarks,
        dtypes=FLAGS.dtypes,
        seconds=FLAGS.benchmark_seconds,
        traced=FLAGS.traced,
        steps=[_number("--benchmark_steps", text) for text in FLAGS.benchmark_steps],
        sampler=FLAGS.sampler,
    ):  # each is written at once: a program that does not fit must not take the others along
        measured.append(record)
        if not FLAGS.out:
            say(json.dumps(record))
        elif is_main():
            with open(FLAGS.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    say("\n" + markdown(measured))
    say(f"\nThe whole command took {time.monotonic() - STARTED:.0f} s.")


def _number(flag: str, text: str) -> int:
    if not text.strip().isdecimal():
        fail(f"{flag}: {text!r} is not a whole number.", EXIT_USAGE)
    return int(text)


def _noise_levels(interrupt: Any) -> None:
    del interrupt
    from diffdistill import noise_levels, runner

    say(noise_levels.propose(runner.open_images(_config())).text())


def _sample(interrupt: Any) -> None:
    del interrupt
    from diffdistill import sample, sample_files

    config = _config()
    folder, stage = sample.locate(_workdir(config), FLAGS.stage)
    sample_files.to_files(
        _as_asked(folder, config),
        stage,
        out=FLAGS.out,
        num=FLAGS.num,
        seed=FLAGS.seed,
        labels=FLAGS.labels,
        latents=FLAGS.latents,
        pictures=FLAGS.images,
        mask=FLAGS.mask,
        w=FLAGS.w,
        extrapolate=FLAGS.extrapolate_w,
        num_steps=FLAGS.steps or None,
        sampler=FLAGS.sampler or None,
        quantisation=FLAGS.quantisation,
        say=say,
    )


def _transfer(interrupt: Any) -> None:
    del interrupt
    from diffdistill import transfer_files, workdir

    if not (FLAGS.encoder and FLAGS.decoder and FLAGS.source_class and len(FLAGS.labels) == 1):
        fail(
            "--mode=transfer needs --encoder=STAGE, --decoder=STAGE, --source_class=CLASS of the images and "
            "--labels=CLASS that they are to become.",
            EXIT_USAGE,
        )
    config = _config()
    transfer_files.to_files(
        _as_asked(workdir.read(_workdir(config)), config),
        encoder=FLAGS.encoder,
        decoder=FLAGS.decoder,
        pictures=FLAGS.images,
        source_class=FLAGS.source_class,
        target_class=FLAGS.labels[0],
        w=FLAGS.w,
        extrapolate=FLAGS.extrapolate_w,
        num=FLAGS.num,
        num_steps=FLAGS.steps or None,
        out=FLAGS.out,
        say=say,
    )


def _analyse(interrupt: Any) -> None:
    del interrupt
    from diffdistill import analyse, analysis_distances, sample, workdir
    from diffdistill.data.remote import is_remote

    config, folder, generator = _config(), None, None
    path = Path(_workdir(config))
    if is_remote(FLAGS.workdir) or (path / "config.json").exists():
        folder = _as_asked(workdir.read(FLAGS.workdir or path), config)
        path = folder.path
        config = folder.config
        generator = sample.load_from(folder, FLAGS.stage or "teacher")
        if generator.guidance_range is not None or generator.is_encoder or generator.sampler == "one_step":
            fail(f"--stage={generator.name} cannot reconstruct: choose the teacher or a student without w.", EXIT_USAGE)
    place = Path(FLAGS.out) if FLAGS.out else path / "analysis"
    place.mkdir(parents=True, exist_ok=True)
    source, distance, title = analysis_distances.choose(config, place, FLAGS.lpips, say)
    options = {"num": FLAGS.num or 8, "num_steps": FLAGS.steps or 100, "seed": FLAGS.seed}
    written = analyse.to_files(config, place, source, generator, distance, title=title, **options)
    if generator is None:
        say(f"{path} holds no run: nothing is reconstructed. Train first with --mode=train and the same --workdir.")
    say("\n".join(map(str, written)))


def _prepare(interrupt: Any) -> None:
    del interrupt
    from diffdistill.data.prepare import prepare

    if not FLAGS.source or not FLAGS.destination:
        fail("--mode=prepare needs --source=PATH (what to read) and --destination=FOLDER (where to write).", EXIT_USAGE)
    data = _config().data
    written = prepare(
        FLAGS.source,
        FLAGS.destination,
        image_size=data.image_size or None,
        channels=data.channels or None,
        log=None if sys.stderr.isatty() else say,
    )
    for split, source in written.items():
        size = "x".join(str(side) for side in source.image_shape)
        say(f"{split}: {len(source)} images {size}, {source.num_classes} classes in {FLAGS.destination}")
    say(f"Train on it with --config.data.source=array_record --config.data.path={FLAGS.destination}")


MODES: dict[str, Callable[[Any], None]] = {
    "run": _run,
    "train": _train,
    "evaluate": _evaluate,
    "plan": _plan,
    "sample": _sample,
    "prepare": _prepare,
    "statistics": _statistics,
    "table": _table,
    "fetch-weights": _fetch_weights,
    "import": import_file,
    "noise-levels": _noise_levels,
    "benchmark": _benchmark,
    "transfer": _transfer,
    "tune-variance": _tune_variance,
    "analyse": _analyse,
    "trajectory": _trajectory,
}

IN_WORKDIR = ("run", "train", "evaluate", "import", "tune-variance", "trajectory")
"""The modes that change a run."""

ALONE = ("analyse", "import", "prepare")
"""The modes that several processes cannot share."""
