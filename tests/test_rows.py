"""Every row of the papers' tables is built at full size without allocating anything; some train as smoke variants."""

import importlib

import jax
import numpy as np
import pytest

from configs import guided, progressive
from diffdistill import chain, data_checks, runner
from diffdistill.config import resolve
from diffdistill.training.interrupt import Interrupt

ROWS = [("progressive", row) for row in progressive.ROWS] + [("guided", row) for row in guided.ROWS]
# One cell of the ablation, of which test_every_output_trains_with_every_weight trains all, and every variant of the
# guided rows once.
TRAINED = [("progressive", row) for row in ("imagenet64", progressive.CELLS[0])] + [
    ("guided", row) for row in ("cifar10-stochastic", "imagenet64-encoder", "cifar10-separate", "imagenet64-single-0.3")
]
MILLIONS = {  # parameters of the teachers; guided CIFAR-10 and ImageNet-64 have one output channel set and classes
    ("progressive", "cifar10"): 60.0,
    ("progressive", "imagenet64"): 295.9,
    ("progressive", "lsun128"): 139.6,
    ("guided", "cifar10"): 60.0,
    ("guided", "imagenet64"): 295.9,
}


def config(file, row):
    return importlib.import_module(f"configs.{file}").get_config(row)


@pytest.mark.parametrize(("file", "row"), ROWS)
def test_every_row_is_built_at_full_size(file, row):
    """Plan, shapes and parameters of every stage; nothing is allocated."""
    found = resolve(config(file, row))
    facts = chain.DataFacts(found.data.image_shape, found.data.num_classes)
    data_checks.check_data(found, facts)
    plan = chain.plan(found)
    assert plan[0].method == "teacher"
    counts = {stage.conditioned_on_guidance: chain.denoiser_of(found, stage, facts) for stage in plan}
    millions = {flag: denoiser.num_parameters() / 1e6 for flag, denoiser in counts.items()}
    dataset = row.partition("-")[0]
    assert millions[False] == pytest.approx(MILLIONS[file, dataset], abs=0.05)
    if True in millions:
        assert 0 < millions[True] - millions[False] < 3  # the embedding of w
    for method in ("progressive", "stochastic", "encoder"):
        last = {"progressive": 1, "stochastic": 2, "encoder": 1}[method]
        steps = [stage.num_steps for stage in plan if stage.method == method]
        assert steps == [last * 2**power for power in reversed(range(len(steps)))]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "row"), TRAINED)
def test_rows_train_in_their_smoke_variants(file, row, tmp_path):
    settings = config(file, f"{row}-smoke")
    settings.progressive.start_steps = settings.encoder.start_steps = 2  # one round of each chain
    settings.stochastic.start_steps = 4  # its last round is the one to two steps
    for group in ("teacher", "guided", "progressive", "stochastic", "encoder"):
        settings[group].num_updates = min(settings[group].num_updates, 2)
    settings.training.updates_per_call = 1
    settings.model.multipliers, settings.model.attention_resolutions = (1,), (8,)
    run = runner.prepare(resolve(settings), str(tmp_path / "run"))
    runner.train(run, Interrupt(), say=lambda text: None)
    finished = list(runner.finished(run.workdir))
    assert finished == list(run.stages)
    params = runner.read_params(run.workdir, finished[-1], run.mesh)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(params)))
