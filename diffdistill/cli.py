"""The command line: one flag --mode, one config, one workdir; every expected mistake ends in one message.

Exit codes: 0 done; 1 the run failed (data, disk, checkpoint); 2 wrong usage or config; 3 the loss is not finite;
130 and 143 stopped by Ctrl-C and SIGTERM, with everything saved: the same command continues.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

FLAGS = flags.FLAGS
DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "digits.py"

EXIT_FAILED, EXIT_USAGE, EXIT_NOT_FINITE, EXIT_SIGINT, EXIT_SIGTERM = 1, 2, 3, 130, 143


def define_flags() -> None:
    """Defines the flags of main.py."""
    flags.DEFINE_enum(
        "mode",
        "run",
        list(MODES),
        "run: train every stage, evaluate, report. train: stages only. evaluate: measure finished stages and report, "
        "or images made elsewhere (--images). plan: show what a run would do. sample: images from a stage. prepare: "
        "images -> ArrayRecord (--config.data.image_size and --config.data.channels convert). statistics: of the "
        "images of --config.data, for later evaluations. table: published figures beside measured ones. "
        "fetch-weights: the Inception network. import: a published model (--source, then its file) as the teacher of a "
        "run. noise-levels: proposes EDM's training noise and noise range for the images of --config.data. benchmark: "
        "how fast the teacher trains here.",
    )
    config_flags.DEFINE_config_file(
        "config", str(DEFAULT_CONFIG), "Config file, optionally file.py:row; fields with --config.x.y=z."
    )
    flags.DEFINE_string("workdir", "", "Folder of the run (default runs/<name of the config>).")
    flags.DEFINE_string("stage", "", "sample: the stage (default the last finished one).")
    flags.DEFINE_integer("steps", 0, "sample: sampler steps (default what the stage was trained for).")
    flags.DEFINE_float("w", 0.0, "sample: guidance weight of (1 + w) conditional - w unconditional; 0 is no guidance.")
    flags.DEFINE_string(
        "sampler", "", "sample: ddim, ancestral, euler, heun, churn or ablation (default from the config)."
    )
    flags.DEFINE_integer("num", 0, "sample: number of images (default 100, or as many as there are latents).")
    flags.DEFINE_integer("seed", 0, "sample: number of the first image; image k depends on seed + k alone.")
    flags.DEFINE_list(
        "labels",
        [],
        "sample: classes by number or name, or an .npy file of numbers or one-hot rows; repeated in turn (default all "
        "classes).",
    )
    flags.DEFINE_enum(
        "quantisation", "", ["", "edm", "adm", "none"], "sample: how images become bytes; none: float32 in [-1, 1]."
    )
    flags.DEFINE_string("latents", "", "sample: .npy file with the initial noise, (num, H, W, C) float32.")
    flags.DEFINE_string(
        "out",
        "",
        "sample: folder for samples.png and samples.npz (default <workdir>/samples). statistics: the .npz file to "
        "write. table: folder for Markdown, CSV and plots. evaluate --images: folder for results.jsonl. benchmark: "
        "file to which records are appended.",
    )
    flags.DEFINE_string(
        "inception_weights", "", "evaluate: file of the Inception network (default $DIFFDISTILL_INCEPTION_WEIGHTS)."
    )
    flags.DEFINE_string("images", "", "evaluate: folder, zip, tar, .npz or .npy of images made elsewhere.")
    flags.DEFINE_string("reference", "", "evaluate --images: statistics (.npz), or images as --images takes them.")
    flags.DEFINE_string("table", "", "table: which, such as progressive/2; without it all are listed.")
    flags.DEFINE_list("results", ["runs"], "table: results.jsonl files, or folders that are searched for them.")
    flags.DEFINE_string(
        "source",
        "",
        "prepare: folder, zip, tar, CIFAR-10 archive or downsampled-ImageNet batches. import: whose format the file is "
        "in, edm, guided-diffusion or progressive.",
    )
    flags.DEFINE_string("output", "", "import --source=progressive: what the network puts out, x or v (default x).")
    flags.DEFINE_string("destination", "", "prepare: folder for the ArrayRecord files.")
    flags.DEFINE_bool("distributed", False, "Join the other processes of a multi-host job before anything else.")
    flags.DEFINE_string("coordinator", "", "distributed: host:port of process 0 (default: from the cluster).")
    flags.DEFINE_integer("num_processes", 0, "distributed: number of processes (default: from the cluster).")
    flags.DEFINE_integer("process_id", -1, "distributed: number of this process (default: from the cluster).")
    for flag in FLAGS.flags_by_module_dict().get(__name__, []):
        FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # so that --helpshort shows them


def main() -> None:
    """Runs the program and exits with one of the documented codes."""
    quiet()
    try:
        app.run(_main, flags_parser=_parse)
    except KeyboardInterrupt:
        _stop("Stopped at once. Checkpoints that were complete are intact; the same command continues from the newest.")
        sys.exit(EXIT_SIGINT)


def quiet() -> None:
    """Silences what the libraries say about themselves; what concerns the user stays."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.set_verbosity(logging.WARNING)
    warnings.filterwarnings("ignore", module="orbax|flax|tensorflow_datasets|grain")


# What a config file may raise while it is read. Errors of its files reach us when the config is first looked at.
_CONFIG_FILE_ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    SyntaxError,
    TypeError,
    ValueError,
)
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)(?:=.*)?", re.DOTALL)
_BAD_VALUE = re.compile(r"flag --(?P<name>[^=]+)=(?P<value>.*?): (?P<why>.*)", re.DOTALL)


def _parse(arguments: list[str]) -> list[str]:
    """Defines and parses the flags; whatever is wrong with them or with the config file ends here."""
    try:
        for argument in arguments[1:]:
            if override := _OVERRIDE.fullmatch(argument):
                _expected(override[1])
        define_flags()  # reads the default config, with the overrides of the command line
        rest = FLAGS(arguments)
        getattr(FLAGS.config, "to_dict", None)
        return rest
    except flags.Error as error:
        _fail(_explain_flag(str(error)), EXIT_USAGE)
    except OSError as error:
        why = str(error).rpartition("] ")[2]
        _fail(
            f"The config file cannot be read: {why}. --config takes a Python file with a function get_config, such as "
            "configs/digits.py, and optionally a row, as in configs/guided.py:cifar10.",
            EXIT_USAGE,
        )
    except _CONFIG_FILE_ERRORS as error:
        _fail(_explain_config(error), EXIT_USAGE)
    raise AssertionError("unreachable")


def _expected(path: str) -> str:
    from diffdistill.config import expected

    return expected(path)


def _explain_flag(text: str) -> str:
    """One sentence for a flag that cannot be parsed."""
    bad = _BAD_VALUE.fullmatch(text)
    if bad is None:
        return text
    if "Traceback (most recent call last)" in text:  # of a config file, where ml_collections hands it on as a whole
        kind, _, why = text.strip().splitlines()[-1].partition(": ")
        return f"--{bad['name']}={bad['value']}: {why if kind == 'ValueError' else f'{kind}: {why}'}"
    why = bad["why"]
    if bad["name"].startswith("config."):
        why = f"must be {_expected(bad['name'].removeprefix('config.'))}."
    elif why.startswith("invalid literal for int()"):
        why = "must be a whole number."
    elif why.startswith("could not convert string to float"):
        why = "must be a number."
    return f"--{bad['name']}={bad['value']}: {why}"


def _explain_config(error: Exception) -> str:
    """One sentence for what a config file raised, with the line of the file."""
    from diffdistill.config import ConfigError

    text = " ".join(str(error.args[0] if error.args else error).split())
    if isinstance(error, ConfigError):
        return text
    place = ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == __file__:
            break
        if not re.search(r"[/\\](ml_collections|absl)[/\\]|^<", frame.filename):
            place = f" ({frame.filename}, line {frame.lineno})"
            break
    if isinstance(error, SyntaxError):
        place = f" ({error.filename}, line {error.lineno})"
    return f"The config file does not work: {type(error).__name__}: {text}{place}."


def _main(arguments: list[str]) -> None:
    if len(arguments) > 1 and FLAGS.mode != "import":
        _fail(
            f"Unexpected arguments: {' '.join(arguments[1:])}. Options start with --, such as --mode=plan.", EXIT_USAGE
        )
    from diffdistill.config import ConfigError
    from diffdistill.data.contract import DataError
    from diffdistill.evaluation.published import TableError
    from diffdistill.evaluation.reference import StatisticsError
    from diffdistill.evaluation.results import ResultsError
    from diffdistill.evaluation.stream import EvaluationInterrupted, FeaturesError, OtherProcessFailed
    from diffdistill.sample import SampleError
    from diffdistill.training import mesh
    from diffdistill.training.errors import Interrupted, NonFiniteLoss, TrainingError
    from diffdistill.training.interrupt import Interrupt, catch_signals
    from diffdistill.weights import WeightsError
    from diffdistill.workdir import WorkdirError

    # Before our signal handlers, because jax.distributed installs one of its own for SIGTERM.
    try:
        mesh.initialize(
            FLAGS.distributed,
            coordinator=FLAGS.coordinator or None,
            num_processes=FLAGS.num_processes or None,
            process_id=FLAGS.process_id if FLAGS.process_id >= 0 else None,
        )
    except ValueError as error:
        _fail(str(error), EXIT_USAGE)
    # The other modes have nothing to save: a signal ends them as it ends any program.
    interruptible = FLAGS.mode in ("run", "train", "evaluate", "statistics")
    with catch_signals() if interruptible else contextlib.nullcontext(Interrupt()) as interrupt:
        try:
            mode = functools.partial(_import, paths=arguments[1:]) if FLAGS.mode == "import" else MODES[FLAGS.mode]
            mode(interrupt)
        except (Interrupted, EvaluationInterrupted) as stop:
            _stop(str(stop))
            sys.exit(EXIT_SIGINT if interrupt.reason == "SIGINT" else EXIT_SIGTERM)
        except NonFiniteLoss as error:
            _fail(str(error), EXIT_NOT_FINITE)
        except (ConfigError, SampleError, TableError) as error:
            _fail(str(error), EXIT_USAGE)
        except (
            DataError,
            WorkdirError,
            TrainingError,
            ResultsError,
            StatisticsError,
            FeaturesError,
            OtherProcessFailed,
            WeightsError,
        ) as error:
            _fail(str(error), EXIT_FAILED)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _fail(
                f"{where}{error.strerror or error}. What was saved before is intact; put it right and start the same "
                "command again.",
                EXIT_FAILED,
            )


def _config() -> Any:
    from diffdistill.config import resolve

    return resolve(FLAGS.config)


def _workdir(config: Any) -> str:
    return FLAGS.workdir or str(Path("runs") / config.name)


def _run(interrupt: Any) -> None:
    if FLAGS.images:
        _fail("--images is for --mode=evaluate; --mode=run measures what it trains.", EXIT_USAGE)
    from diffdistill import judges

    judges.check(_config(), FLAGS.inception_weights)
    _train(interrupt)
    _evaluate(interrupt)


def _train(interrupt: Any) -> None:
    from diffdistill import plan, runner

    config = _config()
    run = runner.prepare(config, _workdir(config))
    _say(plan.summary(run))
    runner.train(run, interrupt, say=_say)


def _evaluate(interrupt: Any) -> None:
    if FLAGS.images:
        _evaluate_images(interrupt)
        return
    from diffdistill import evaluate, runner, workdir
    from diffdistill.data.pipeline import in_memory
    from diffdistill.report import save_overview, stage_costs, write_report
    from diffdistill.training.mesh import is_main

    config = _config()
    folder = _as_asked(workdir.read(_workdir(config)), config)
    # An imported model may be compared with published statistics, without any images here.
    needs_images = folder.has_data or not folder.config.evaluation.reference
    source = in_memory(runner.open_data(folder.config)[0]) if needs_images else None
    evaluate.evaluate(folder, source, interrupt, inception_weights=FLAGS.inception_weights, say=_say)
    costs = list(stage_costs(folder))  # on every process: checkpoints are opened by all together
    if is_main():
        save_overview(folder, source)
        table, page = write_report(folder, costs)
        _say(f"{table}\nReport: {page}")


def _as_asked(folder: Any, config: Any) -> Any:
    """A run, sampled and evaluated as the command line says, where it says anything of a config."""
    if not any(re.match("--?(no)?config[.=]|--?config$", argument) for argument in sys.argv):
        return folder
    if config.name != folder.config.name and not FLAGS["config"].present:
        _fail(
            f"{folder.path} holds a run of the config {folder.config.name}, but without --config the fields given are "
            f"those of {config.name}. Change the run's own: --config=configs/workdir.py:{folder.path}",
            EXIT_USAGE,
        )
    return folder.measured_as(config)


def _evaluate_images(interrupt: Any) -> None:
    from diffdistill import evaluate_images

    if not FLAGS.reference:
        _fail(
            "--mode=evaluate --images=PATH needs --reference=PATH: reference statistics (.npz), or the images to "
            "compare with.",
            EXIT_USAGE,
        )
    evaluate_images.evaluate(
        FLAGS.images, FLAGS.reference, _config(), FLAGS.inception_weights, FLAGS.out, interrupt, say=_say
    )


def _statistics(interrupt: Any) -> None:
    from diffdistill import evaluate_images, runner

    if not FLAGS.out.endswith(".npz"):
        _fail(f"--mode=statistics needs --out=FILE.npz, the file to write; given --out={FLAGS.out!r}.", EXIT_USAGE)
    config = _config()
    source, _ = runner.open_data(config)
    evaluate_images.write_statistics(source, config, FLAGS.inception_weights, FLAGS.out, interrupt, say=_say)


def _table(interrupt: Any) -> None:
    del interrupt
    from diffdistill.evaluation import comparison, published, results

    if not FLAGS.table:
        _say("Choose a table with --table=NAME:")
        _say("\n".join(f"  {name} ({count} published figures)" for name, count in published.tables().items()))
        return
    # Nothing measured yet is no mistake; a path that was asked for and is not there is one.
    places = FLAGS.results if FLAGS["results"].present else [path for path in FLAGS.results if Path(path).exists()]
    _say(comparison.write(FLAGS.table, results.read_all(places), Path(FLAGS.out) if FLAGS.out else None))


def _fetch_weights(interrupt: Any) -> None:
    del interrupt
    from diffdistill.weights import fetch

    _say(f"{fetch.fetch(fetch.INCEPTION, FLAGS.inception_weights)} is there and is the published network.")


def _plan(interrupt: Any) -> None:
    del interrupt
    from diffdistill import plan

    _say(plan.describe(_config()))


def _import(interrupt: Any, paths: Sequence[str] = ()) -> None:
    del interrupt
    from diffdistill.import_model import import_model

    if len(paths) != 1 or not FLAGS.source:
        _fail(
            "--mode=import needs --source=edm, guided-diffusion or progressive, and the path of one file: "
            f"main.py --mode=import --source=edm FILE --workdir=FOLDER; given {' '.join(paths) or 'no path'}.",
            EXIT_USAGE,
        )
    options: dict[str, Any] = {"prediction": FLAGS.output} if FLAGS.output else {}
    if FLAGS.config.data.image_size:
        options["image_size"] = FLAGS.config.data.image_size
    folder = FLAGS.workdir or str(Path("runs") / Path(paths[0]).stem)
    import_model(FLAGS.source, paths[0], folder, options, say=_say)


def _benchmark(interrupt: Any) -> None:
    del interrupt
    import json

    from diffdistill import benchmark

    records = benchmark.run(_config(), _say)
    if FLAGS.out:
        with open(FLAGS.out, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def _noise_levels(interrupt: Any) -> None:
    del interrupt
    from diffdistill import noise_levels, runner

    _say(noise_levels.propose(runner.open_images(_config())).text())


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
        w=FLAGS.w,
        num_steps=FLAGS.steps or None,
        sampler=FLAGS.sampler or None,
        quantisation=FLAGS.quantisation,
        say=_say,
    )


def _prepare(interrupt: Any) -> None:
    del interrupt
    from diffdistill.data.prepare import prepare

    if not FLAGS.source or not FLAGS.destination:
        _fail(
            "--mode=prepare needs --source=PATH (what to read) and --destination=FOLDER (where to write).", EXIT_USAGE
        )
    data = _config().data
    written = prepare(
        FLAGS.source,
        FLAGS.destination,
        image_size=data.image_size or None,
        channels=data.channels or None,
        log=None if sys.stderr.isatty() else _say,
    )
    for split, source in written.items():
        size = "x".join(str(side) for side in source.image_shape)
        _say(f"{split}: {len(source)} images {size}, {source.num_classes} classes in {FLAGS.destination}")
    _say(f"Train on it with --config.data.source=array_record --config.data.path={FLAGS.destination}")


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
    "import": _import,
    "noise-levels": _noise_levels,
    "benchmark": _benchmark,
}


def _say(text: str) -> None:
    from diffdistill.training.mesh import is_main

    if is_main():
        print(text, flush=True)


def _stop(text: str) -> None:
    print(f"\n{text}", file=sys.stderr, flush=True)


def _fail(text: str, code: int) -> None:
    print(f"Error: {text}", file=sys.stderr, flush=True)
    sys.exit(code)
