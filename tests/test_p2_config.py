"""configs/p2.py: the light ADM and the settings of the paper (spec 05), and the small rows from training to samples."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import p2
from diffdistill import chain, evaluate, runner
from diffdistill.config import Config, ConfigError, resolve
from diffdistill.evaluation import results
from diffdistill.generator import SampleError
from diffdistill.sample import load_from
from diffdistill.training import mesh as meshes
from diffdistill.training.checkpoints import StageCheckpoints
from diffdistill.training.errors import Interrupted
from diffdistill.training.interrupt import Interrupt


def config(row: str) -> Config:
    return resolve(p2.get_config(row))


@pytest.mark.parametrize("row", p2.ROWS)
def test_every_row_is_a_teacher_with_its_weight(row):
    found = config(row)
    _, schedule, gamma = row.rsplit("-", 2)
    assert found.name == f"p2-{row}"
    assert (found.teacher.weight, found.teacher.weight_k, found.teacher.weight_gamma) == ("p2", 1.0, float(gamma))
    assert found.process.num_train_steps == 1000
    stages = chain.plan(found)
    if schedule == "chain":
        assert stages[-1].num_steps == 1
    else:
        assert found.process.schedule == f"discrete_{schedule}"
        assert found.model.learned_variance
        assert [stage.name for stage in stages] == ["teacher"]
    assert sum(stage.num_updates for stage in chain.plan(config(row + "-smoke"))) <= 24


def test_the_published_network_and_training():
    found = config("ffhq-linear-0.5")
    for name in list(p2.DATASETS)[1:]:
        other = config(f"{name}-linear-0.5")
        assert (other.model, other.teacher, other.process) == (found.model, found.teacher, found.process)
    facts = chain.DataFacts(found.data.image_shape, found.data.num_classes)
    denoiser = chain.denoiser_of(found, chain.plan(found)[0], facts)
    assert denoiser.network.output_channels == 6
    assert denoiser.num_parameters() == 93_563_910
    teacher = found.teacher
    assert (teacher.learning_rate, teacher.batch_size, teacher.ema_decay) == (2e-5, 8, 0.9999)
    assert (teacher.warmup_updates, teacher.anneal, teacher.weight_decay, teacher.dropout) == (0, "constant", 0, 0)
    assert (found.data.flip, teacher.importance_sampling, teacher.stratified_times) == (True, False, False)
    assert (found.sampling.sampler, found.evaluation.num_steps, found.sampling.clip) == ("respaced", (250,), True)
    assert (found.evaluation.protocol, found.evaluation.num_samples) == ("clean", 50_000)


@pytest.mark.parametrize("row", ["ffhq-quadratic-1", "ffhq-linear-2", "imagenet-linear-1", ""])
def test_rows_that_do_not_exist_are_refused_with_the_form_of_a_row(row):
    with pytest.raises(ValueError, match=r"no row .*-<linear\|cosine>-<0\|0.5\|1>"):
        p2.get_config(row)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The smoke variant of the published rows, its steps drawn by importance, stopped at half and gone on with."""
    whole = config("ffhq-cosine-1-smoke")
    steps = dataclasses.replace(whole.process, num_train_steps=50)
    teacher = dataclasses.replace(whole.teacher, importance_sampling=True, parts=2)
    whole = dataclasses.replace(whole, process=steps, teacher=teacher)
    folder = tmp_path_factory.mktemp("p2")
    run = runner.prepare(whole, str(folder / "whole"))
    runner.train(run, Interrupt(), say=lambda text: None)
    return run


def test_the_smoke_variant_trains_and_samples_with_its_own_variance(trained):
    lines = [json.loads(line) for line in (trained.workdir.path / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([line["loss"] for line in lines]).all()
    assert np.isfinite([line["bits_per_dim"] for line in lines]).all()
    assert all(len(line["loss_by_regime"]) == 3 for line in lines)
    generator = load_from(trained.workdir)
    assert generator.learned_variance
    assert "variance_fraction learned" in generator.settings_text("respaced")
    images = {name: generator.sample(4, num_steps=5, sampler=name).images for name in ("respaced", "respaced_ddim")}
    assert all(image.dtype == np.uint8 for image in images.values())
    again = generator.sample(2, seed=2, num_steps=5, sampler="respaced").images
    np.testing.assert_array_equal(again, images["respaced"][2:])
    with pytest.raises(SampleError, match="the nearest is 25"):
        generator.sample(1, num_steps=23, sampler="respaced_ddim")


def test_a_resumed_run_with_importance_sampling_ends_with_the_same_bits(trained, tmp_path):
    """The history of losses is part of the checkpoint; what is compared is the last one, item by item."""
    path = tmp_path / "cut"
    run = runner.prepare(trained.config, str(path))
    interrupt = Interrupt()
    interrupt.request("SIGTERM")  # as if a signal had come before the first update was done
    with pytest.raises(Interrupted) as stop:
        runner.train(run, interrupt, say=lambda text: None)
    assert "update 2 of 6" in str(stop.value)
    runner.train(run, Interrupt(), say=lambda text: None)
    states = [final_state(each) for each in (trained, run)]
    assert int(states[0].memory["counts"].sum()) == 6 * 16
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(one, other)


def final_state(run: runner.Run):
    """The newest training state of the teacher."""
    stage = run.stages[0]
    method = chain.method_of(run.config, stage, run.facts)
    like = meshes.abstract(jax.eval_shape(method.init, jax.random.key(0), {}), meshes.replicated(run.mesh))
    return StageCheckpoints(run.workdir.stage(stage.name), read_only=True).restore(like)[0]


def test_the_evaluation_writes_bits_per_dimension_once(trained):
    evaluation = dataclasses.replace(trained.config.evaluation, bits_images=8)
    folder = trained.workdir.measured_as(dataclasses.replace(trained.config, evaluation=evaluation))
    for _ in range(2):
        evaluate._measure_bits(folder, trained.source, trained.stages)
    (record,) = results.read(folder.path / evaluate.RESULTS)
    assert (record["metric"], record["num_steps"], record["num_samples"]) == ("bits_per_dim", 50, 8)
    assert 0 < record["value"] < 100
    assert "variance_fraction learned" in record["protocol"]


def test_a_learned_variance_needs_the_steps_of_a_schedule():
    settings = p2.get_config("digits-linear-1")
    settings.process.schedule, settings.evaluation.samplers = "cosine", ("ddim",)
    with pytest.raises(ConfigError, match=r"config.model.learned_variance needs the steps of a discrete schedule"):
        resolve(settings)
