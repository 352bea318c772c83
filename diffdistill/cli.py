"""The command line: one flag --mode, one config, one workdir; every expected mistake ends in one message.

Exit codes: 0 done; 1 the run failed (data, disk, checkpoint); 2 wrong usage or config; 3 the loss is not finite;
130 and 143 stopped by Ctrl-C and SIGTERM, with everything saved: the same command continues.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

from absl import app, flags, logging

from diffdistill.command_flags import parse
from diffdistill.modes import MODES, import_file
from diffdistill.terminal import EXIT_FAILED, EXIT_NOT_FINITE, EXIT_SIGINT, EXIT_SIGTERM, EXIT_USAGE, fail, say, stopped

if TYPE_CHECKING:
    from diffdistill.training.interrupt import Interrupt

FLAGS = flags.FLAGS


def main() -> None:
    """Runs the program and exits with one of the documented codes."""
    quiet()
    try:
        app.run(_main, flags_parser=parse)
    except SystemExit as end:
        # After a write that failed Orbax's threads wait for each other, and so would the usual end (up to 10 minutes).
        for code in (EXIT_FAILED, EXIT_NOT_FINITE, *([EXIT_USAGE] if _is_one_of_several() else [])):
            if end.code == code:
                _leave(code)
        _leave_at_a_signal(end.code if isinstance(end.code, int) else EXIT_FAILED if end.code else 0)
        raise
    except Exception:
        if not _is_one_of_several():
            raise
        traceback.print_exc()
        _leave(EXIT_FAILED)
    except KeyboardInterrupt:
        stopped(
            "Stopped at once. Checkpoints that were complete are intact; the same command continues from the newest."
        )
        _leave_at_a_signal(EXIT_SIGINT)
        sys.exit(EXIT_SIGINT)


def _is_one_of_several() -> bool:
    """Whether this is a process of a job that was joined."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def _leave(code: int) -> NoReturn:
    """Ends this process at once: the usual end waits for threads, and for the others of a job, who may wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _leave_at_a_signal(code: int) -> None:
    """From here on a signal cuts the end of this process short: its work is over, and what became of it is said."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: _leave(code))


def quiet() -> None:
    """Silences what the libraries say about themselves; what concerns the user stays."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.set_verbosity(logging.WARNING)
    warnings.filterwarnings("ignore", module="orbax|flax|tensorflow_datasets|grain")


def _main(arguments: list[str]) -> None:
    if len(arguments) > 1 and FLAGS.mode != "import":
        fail(
            f"Unexpected arguments: {' '.join(arguments[1:])}. Options start with --, such as --mode=plan.", EXIT_USAGE
        )
    from diffdistill import compilation, modes, store
    from diffdistill.training import processes
    from diffdistill.training.interrupt import Interrupt, catch_signals

    if FLAGS.distributed and FLAGS.mode in modes.ALONE:
        fail(f"--mode={FLAGS.mode} is the work of one process: leave --distributed away.", EXIT_USAGE)
    # Before our signal handlers, because jax.distributed installs one of its own for SIGTERM.
    try:
        processes.initialize(
            FLAGS.distributed,
            coordinator=FLAGS.coordinator or None,
            num_processes=FLAGS.num_processes or None,
            process_id=FLAGS.process_id if FLAGS.process_id >= 0 else None,
        )
    except ValueError as error:
        fail(str(error), EXIT_USAGE)
    # The other modes have nothing to save: a signal ends them as it ends any program.
    interruptible = FLAGS.mode in ("run", "train", "evaluate", "statistics", "tune-variance", "trajectory")
    mode = functools.partial(import_file, paths=arguments[1:]) if FLAGS.mode == "import" else MODES[FLAGS.mode]
    with catch_signals() if interruptible else contextlib.nullcontext(Interrupt()) as interrupt:
        if not FLAGS.distributed:
            compilation.use_cache()
        with _messages(interrupt):
            modes.check_config()  # before anything is fetched
            modes.agree()
            address = FLAGS.workdir if FLAGS.mode in modes.IN_WORKDIR else ""
            # What ends the work is said before the last copy to an address, which may take long.
            with store.kept(address, interrupt, say), _messages(interrupt):
                mode(interrupt)
            if FLAGS.mode in ("run", "train", "evaluate", "benchmark") and compilation.counted():
                say(compilation.counted())


@contextlib.contextmanager
def _messages(interrupt: Interrupt) -> Iterator[None]:
    """Ends the program with a message and a code where something ends that is expected to happen."""
    from diffdistill.config import ConfigError
    from diffdistill.data.contract import DataError
    from diffdistill.evaluation.published import TableError
    from diffdistill.evaluation.reference import StatisticsError
    from diffdistill.evaluation.results import ResultsError
    from diffdistill.evaluation.stream import EvaluationInterrupted, FeaturesError
    from diffdistill.generator import SampleError
    from diffdistill.mirror import StoreError
    from diffdistill.training import processes
    from diffdistill.training.errors import Interrupted, NonFiniteLoss, TrainingError
    from diffdistill.weights import WeightsError
    from diffdistill.workdir import WorkdirError

    try:
        yield
    except (Interrupted, EvaluationInterrupted) as stop:
        stopped(str(stop))
        sys.exit(EXIT_SIGINT if interrupt.reason == "SIGINT" else EXIT_SIGTERM)
    except NonFiniteLoss as error:
        fail(str(error), EXIT_NOT_FINITE)
    except (ConfigError, SampleError, TableError) as error:
        fail(str(error), EXIT_USAGE)
    except (
        DataError,
        WorkdirError,
        TrainingError,
        ResultsError,
        StatisticsError,
        FeaturesError,
        WeightsError,
        StoreError,
    ) as error:
        fail(str(error), EXIT_FAILED)
    except RuntimeError as error:
        text = processes.explained(error)
        if not text:
            raise
        fail(text, EXIT_FAILED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(
            f"{where}{error.strerror or error}. What was saved before is intact; put it right and start the same "
            "command again.",
            EXIT_FAILED,
        )
