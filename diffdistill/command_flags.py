"""The flags of the command line, and what is wrong with one in one sentence."""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from diffdistill.modes import MODES
from diffdistill.terminal import EXIT_FAILED, EXIT_USAGE, fail

FLAGS = flags.FLAGS
DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "digits.py"


# What processes of one job agree on otherwise, or may differ in: files of their hosts.
_NOT_SHARED = ("config", "mode", "workdir", "out", "inception_weights", "coordinator", "process_id")


def shared() -> dict[str, str]:
    """The values of the flags that all processes of a job must have in common, by name."""
    ours = FLAGS.get_flags_for_module(__name__)
    return {flag.name: str(flag.value) for flag in ours if flag.name.split(".")[0] not in _NOT_SHARED}


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
        "how fast stages train here, samplers sample and images are read (--benchmarks). transfer: images of "
        "one class become another (--encoder, --decoder, --source_class, --labels). tune-variance: which variance "
        "fraction of the ancestral sampler is best for each number of steps of --config.evaluation.num_steps "
        "(--fractions: those to try). analyse: what is learnt at which signal-to-noise ratio (Choi et al. 2022): "
        "weights of the config, distances of its noised images and, of a run, images sampled back from noise. "
        "trajectory: measures the kept checkpoints of --stage (default one_step) and plots distance against updates "
        "and time.",
    )
    config_flags.DEFINE_config_file(
        "config", str(DEFAULT_CONFIG), "Config file, optionally file.py:row; fields with --config.x.y=z."
    )
    flags.DEFINE_string(
        "workdir", "", "Folder of the run, or its address, such as gs://bucket/run (default runs/<name of the config>)."
    )
    flags.DEFINE_string("stage", "", "sample, trajectory: the stage (default the last finished one, and one_step).")
    flags.DEFINE_integer(
        "steps",
        0,
        "sample, transfer: steps (default what the stage was trained for). analyse: back from any noise (default 100).",
    )
    flags.DEFINE_float("w", 0.0, "sample, transfer: guidance weight of (1 + w) conditional - w unconditional; 0: none.")
    flags.DEFINE_bool("extrapolate_w", False, "sample, transfer: accept a w that the stage was not distilled for.")
    flags.DEFINE_string(
        "sampler",
        "",
        "sample: ddim, ancestral, stochastic, respaced, respaced_ddim, euler, heun, churn, ablation or "
        "one_step (default from the config). benchmark: the only sampler to measure (default all).",
    )
    flags.DEFINE_integer(
        "num",
        0,
        "sample, transfer: number of images (default 100, or as many as are given). analyse: images shown (default 8).",
    )
    flags.DEFINE_integer("seed", 0, "sample: number of the first image; image k depends on seed + k alone.")
    flags.DEFINE_list(
        "labels",
        [],
        "sample: classes by number or name, or an .npy file of numbers or one-hot rows; repeated in turn (default all "
        "classes). transfer: the class that images are to become.",
    )
    flags.DEFINE_enum(
        "quantisation", "", ["", "edm", "adm", "none"], "sample: how images become bytes; none: float32 in [-1, 1]."
    )
    flags.DEFINE_string("latents", "", "sample: .npy file with the initial noise, (num, H, W, C) float32.")
    flags.DEFINE_string(
        "out",
        "",
        "sample: folder for samples.png and samples.npz (default <workdir>/samples). transfer: folder for transfer.png "
        "and transfer.npz (default <workdir>/transfer). statistics: the .npz file. table: folder for Markdown, "
        "CSV and plots. evaluate --images: folder for results.jsonl. benchmark: file to which "
        "records are appended as JSON lines (default: they are printed).",
    )
    flags.DEFINE_string(
        "inception_weights", "", "evaluate: file of the Inception network (default $DIFFDISTILL_INCEPTION_WEIGHTS)."
    )
    flags.DEFINE_string(
        "images",
        "",
        "evaluate: folder, zip, tar, .npz or .npy of images made elsewhere. sample: images that a model from image to "
        "image is shown. transfer: images of --source_class (default those of the data).",
    )
    flags.DEFINE_list("fractions", [], "tune-variance: variance fractions to try, from 0 to 1 (default nine of them).")
    flags.DEFINE_string("mask", "", "sample: picture or .npy file, bright or 1 where the --images are to be made anew.")
    flags.DEFINE_string("reference", "", "evaluate --images: statistics (.npz), or images as --images takes them.")
    flags.DEFINE_string("table", "", "table: which, such as progressive/2; without it all are listed.")
    flags.DEFINE_list("results", ["runs"], "table: results.jsonl files, or folders that are searched for them.")
    flags.DEFINE_string(
        "source",
        "",
        "prepare: folder, zip, tar, CIFAR-10 archive or downsampled-ImageNet batches. import: whose format the file is "
        "in, edm, guided-diffusion or progressive.",
    )
    flags.DEFINE_string(
        "output",
        "",
        "import: what the network puts out. progressive: x or v (default x). guided-diffusion: ddpm on the linear "
        "schedule, iddpm on the cosine one (default by its size).",
    )
    flags.DEFINE_string("encoder", "", "transfer: stage that encodes, such as encoder_01_steps_0008, or its path.")
    flags.DEFINE_string("decoder", "", "transfer: stage that decodes, of this run or the path of another run's.")
    flags.DEFINE_string("source_class", "", "transfer: class of the images, by number or name.")
    flags.DEFINE_list(
        "benchmarks",
        ["teacher"],
        "benchmark: what to measure: teacher, guided, halving, distillation, batches, sides, devices, "
        "sampling, inputs, features.",
    )
    flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "benchmark: the types to compute in.")
    flags.DEFINE_float("benchmark_seconds", 20.0, "benchmark: seconds of measuring for each record.")
    flags.DEFINE_list("benchmark_steps", ["1", "4", "18"], "benchmark: numbers of steps that samplers are measured in.")
    flags.DEFINE_integer(
        "traced",
        0,
        "benchmark: further calls of each stage, in which a profiler sees where the time goes.",
        lower_bound=0,
    )
    flags.DEFINE_string(
        "lpips", "", "analyse: file of torch.save(lpips.LPIPS(...).state_dict()); default: features of a classifier."
    )
    flags.DEFINE_string("destination", "", "prepare: folder for the ArrayRecord files.")
    flags.DEFINE_bool("distributed", False, "Join the other processes of a multi-host job before anything else.")
    flags.DEFINE_string("coordinator", "", "distributed: host:port of process 0 (default: from the cluster).")
    flags.DEFINE_integer("num_processes", 0, "distributed: number of processes (default: from the cluster).")
    flags.DEFINE_integer("process_id", -1, "distributed: number of this process (default: from the cluster).")
    for flag in FLAGS.flags_by_module_dict().get(__name__, []):
        FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # so that --helpshort shows them


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


def parse(arguments: list[str]) -> list[str]:
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
        fail(_explain_flag(str(error)), EXIT_USAGE)
    except OSError as error:
        why = str(error).rpartition("] ")[2]
        fail(
            f"The config file cannot be read: {why}. --config takes a Python file with a function get_config, such as "
            "configs/digits.py, and optionally a row, as in configs/guided.py:cifar10.",
            EXIT_USAGE,
        )
    except _CONFIG_FILE_ERRORS as error:
        fail(_explain_config(error), EXIT_USAGE)
    except RuntimeError as error:  # of the run that configs/workdir.py is to read
        from diffdistill.workdir import WorkdirError

        if not isinstance(error, WorkdirError):
            raise
        fail(str(error), EXIT_FAILED)


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
