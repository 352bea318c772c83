"""DisBack in a run: the path on disk, the walk back, what is compiled, resuming, sampling, measuring.

The runs go on from one w-conditioned teacher with output v, of a network of a single resolution.
"""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import digits
from diffdistill import chain, evaluate, judges, runner, trajectory
from diffdistill.config import resolve, to_dict
from diffdistill.data.pipeline import Batches
from diffdistill.diffusion import process
from diffdistill.evaluation import results
from diffdistill.generator import SampleError
from diffdistill.judges.contract import Figures
from diffdistill.methods import score_distillation
from diffdistill.models.denoiser import Condition
from diffdistill.sample import load, load_from
from diffdistill.training import mesh as meshes
from diffdistill.training import relay
from diffdistill.training.checkpoints import StageCheckpoints
from diffdistill.training.errors import CheckpointError, Interrupted
from diffdistill.training.interrupt import Interrupt
from diffdistill.training.loop import compile_step, fit
from diffdistill.workdir import WorkdirError

pytestmark = pytest.mark.slow

PATH, INTERVAL, LEG, UPDATES = 3, 2, 1, 6


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs of one config share a compiled step: most of the time would be spent on making it again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "compile_step", functools.cache(compile_step))
        yield


def config(**changes):
    settings = digits.get_config("smoke")
    settings.progressive.num_updates = 0
    settings.model.multipliers, settings.model.attention_resolutions = (1,), ()
    disback = settings.disback
    disback.num_updates, disback.batch_size, disback.learning_rate = UPDATES, 16, 1e-3
    disback.fake_learning_rate = disback.path_learning_rate = 1e-3
    disback.path, disback.interval, disback.leg, disback.keep_every = PATH, INTERVAL, LEG, 2
    disback.sigma_init, disback.guidance, disback.ema_decay = 2.5, (1.0,), 0.5
    disback.update(changes)
    return resolve(settings)


def trained(folder, beginning, settings, interrupt=None):
    if not folder.exists():
        shutil.copytree(beginning, folder)
    run = runner.prepare(settings, str(folder))
    runner.train(run, interrupt or Interrupt(), say=lambda line: None)
    return run


def leaves(path):
    """Every tensor of the newest checkpoint of a stage, raw."""
    checkpoints = StageCheckpoints(path, read_only=True)
    folder = path / str(checkpoints.latest())
    items = sorted(each.name for each in folder.iterdir() if each.is_dir() and each.name != "meta")
    handler = ocp.Checkpointer(ocp.StandardCheckpointHandler())
    return {item: jax.tree.map(np.asarray, handler.restore(folder / item)) for item in items}


def same(one, other):
    flat, others = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(flat) == len(others) and all(np.array_equal(a, b) for a, b in zip(flat, others, strict=True))


@pytest.fixture(scope="module")
def beginning(tmp_path_factory):
    """The folder of a run that has its w-conditioned teacher."""
    folder = tmp_path_factory.mktemp("beginning") / "run"
    runner.train(runner.prepare(config(num_updates=0), str(folder)), Interrupt(), say=lambda line: None)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, beginning):
    """An uninterrupted run, the targets in use at each of its calls, and the number of traces of its signal."""
    traces, used = [], []
    original = score_distillation.diff_instruct

    class Watched(relay.Relay):
        def at(self, update, state):
            tree = super().at(update, state)
            used.append((update, jax.device_get(tree["teacher"])))
            return tree

    def counted(*arguments):
        traces.append(1)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(score_distillation.SIGNALS, "diff_instruct", counted)
        patch.setattr(relay, "Relay", Watched)
        chain._method.cache_clear()
        run = trained(tmp_path_factory.mktemp("whole") / "run", beginning, config())
        chain._method.cache_clear()
    return run, used, traces


class MeanJudge:
    """A judge whose distance is the mean pixel; `measured` are the parameters it has seen."""

    needs_reference = False

    def __init__(self):
        self.measured = []

    def protocol(self, item, generator):
        return "mean"

    def metrics(self, item, generator):
        return ("frechet_to_data", "paired_rmse_to_teacher")

    def measure(self, item, generator, wanted, digest, interrupt):
        assert list(wanted) == ["frechet_to_data"]
        self.measured.append(digest)
        samples = generator.sample(20, seed=item.seed, w=item.w)
        return Figures({"frechet_to_data": float(samples.images.mean())}, samples, 0.1)


def params_of(run, name, update=None):
    stage = next(stage for stage in run.stages if stage.name == name)
    return jax.device_get(runner.read_params(run.workdir, stage, run.mesh, update))


def test_the_plan_has_a_path_and_a_generator_that_say_what_they_learn_from(whole):
    path, generator = whole[0].stages[-2:]
    assert (path.name, path.method, path.teacher, path.generator) == ("degradation", "degradation", "guided", "guided")
    assert path.num_updates == PATH * INTERVAL
    assert (generator.name, generator.method, generator.num_steps) == ("one_step", "disback", 1)
    assert (generator.teacher, generator.path) == ("guided", "degradation")
    alone = chain.plan(config(path=0))[-1]
    assert (alone.name, alone.method, alone.path) == ("one_step", "diff_instruct", "")
    assert "degradation" not in [stage.name for stage in chain.plan(config(path=0))]
    assert [stage.name for stage in chain.plan(config(num_updates=0))] == ["teacher", "guided"]


def test_the_whole_path_is_on_disk_and_moves_away_from_the_teacher(whole):
    run = whole[0]
    assert StageCheckpoints(run.workdir.stage("degradation"), read_only=True).all() == [2, 4, 6]
    checkpoints = [params_of(run, "guided"), *(params_of(run, "degradation", update) for update in (2, 4, 6))]
    assert not any(same(checkpoints[i], checkpoints[i + 1]) for i in range(3))


def test_the_walk_takes_every_target_in_its_turn_and_ends_at_the_teacher_bit_for_bit(whole):
    run, used, _ = whole
    used = dict(used)
    assert sorted(used) == [0, 1, 2, 4]  # calls of at most two updates, cut where the target changes
    assert same(used[0], params_of(run, "degradation", 2 * INTERVAL))
    assert same(used[1], params_of(run, "degradation", INTERVAL))
    for update in (2, 4):
        assert same(used[update], params_of(run, "guided"))


def test_the_fake_denoiser_starts_at_the_end_of_the_path_bit_for_bit(whole):
    run = whole[0]
    starts, frozen, count = runner._inputs(run, run.stages[-1], lambda line: None)
    frozen.close()
    assert count == PATH
    assert same(starts["fake"], params_of(run, "degradation"))
    assert same(starts["generator"], params_of(run, "guided"))


def test_the_whole_walk_is_one_trace(whole):
    assert len(whole[2]) == 1


def interrupted(folder, beginning, settings):
    """Trains until a signal comes while the fourth batch of the first stage is read that is not finished."""
    interrupt = Interrupt()
    original = Batches.__call__

    def reading(self, index):
        if index == 3:
            interrupt.request("test")
        return original(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "__call__", reading)
        with pytest.raises(Interrupted):
            trained(folder, beginning, settings, interrupt)


def test_a_path_that_was_interrupted_ends_in_the_same_bits(tmp_path, beginning, whole):
    interrupted(tmp_path / "run", beginning, config())
    assert not (tmp_path / "run" / "one_step").exists()
    run = trained(tmp_path / "run", beginning, config())
    for stage in ("degradation", "one_step"):
        assert same(leaves(run.workdir.stage(stage)), leaves(whole[0].workdir.stage(stage)))
    # The path is whole whatever was saved in between.
    assert set(StageCheckpoints(run.workdir.stage("degradation"), read_only=True).all()) >= {2, 4, 6}


def test_the_losses_of_the_path_are_measured_once_and_kept_beside_it(whole):
    file = whole[0].workdir.stage("degradation") / "path.json"
    found = json.loads(file.read_text())
    assert found["update"] == [0, 2, 4, 6]
    run, stage = whole[0], whole[0].stages[-1]
    loss = jax.jit(lambda *rest: chain.path_loss(run.config, stage, run.facts)(*rest, {})[0])
    batch = {"label": jnp.arange(16, dtype=jnp.int32) % 10}
    for number, name, update in ((0, "guided", 0), (3, "degradation", 6)):
        frozen = {"generator": params_of(run, "guided")}
        draws = [jax.random.fold_in(jax.random.key(run.config.seed), draw) for draw in range(8)]
        values = [loss(params_of(run, name, update), frozen, batch, key) for key in draws]
        np.testing.assert_allclose(found["loss"][number], np.mean(values), rtol=1e-5)
    before = file.stat().st_mtime_ns
    said = []
    runner._inputs(run, stage, said.append)[1].close()
    assert file.stat().st_mtime_ns == before
    assert said[0].endswith("targets: update 4, update 2, the teacher")
    whole_text = file.read_text()
    first = str(found["loss"][0])
    for text, message in (
        ("{", "cannot be read"),
        ('{"loss": [1.0]}', "holds 1 losses, expected 4"),
        (whole_text.replace(first, first[:-1]), r"cannot be read \(.*the checksums differ\)"),
    ):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=f"path.json {message}"):
            runner._inputs(run, stage, said.append)
    file.write_text(whole_text)


def test_an_adaptive_walk_and_further_averages_resume_bit_for_bit(tmp_path, beginning, monkeypatch):
    """Targets by what the state says; averages whose half-lives are a hundredth and a thousand updates."""
    changes = {"walk": "adaptive", "walk_window": 1, "walk_fall": 0.5, "leg": 2, "ema_half_lives": (1, 16_000)}
    run = trained(tmp_path / "run", beginning, config(**changes))
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "one_step")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # A mismatch does not halve in an update: two for each target, one to have something to compare with.
    assert [line["target"] for line in lines if line["stage"] == "one_step" and "target" in line] == [0, 1, 2]

    interrupted(tmp_path / "cut", beginning, config(**changes))
    again = trained(tmp_path / "cut", beginning, config(**changes))
    assert same(leaves(again.workdir.stage("one_step")), leaves(run.workdir.stage("one_step")))

    stage = run.stages[-1]
    kept = leaves(run.workdir.stage("one_step"))
    short, long = (runner.read_params(run.workdir, stage, run.mesh, average=name) for name in ("1", "16000"))
    distance = lambda a, b: max(float(np.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))  # noqa: E731
    assert distance(short, kept["params"]) < 1e-6  # it forgets within an update
    start = params_of(run, "guided")
    assert distance(long, start) == pytest.approx(0.0, abs=0.01 * distance(kept["params"], start))
    asked = resolve({**to_dict(run.config), "sampling": {**to_dict(run.config)["sampling"], "average": 16_000}})
    generator = load_from(run.workdir.measured_as(asked))
    assert same(generator.params, long)
    with pytest.raises(CheckpointError, match="has no average '5'; it has 1, 16000"):
        runner.read_params(run.workdir, stage, run.mesh, average="5")

    # Along the training each average is measured by itself.
    judge = MeanJudge()
    monkeypatch.setattr(judges, "make", lambda *rest: judge)
    for folder, name in ((run.workdir, 0), (run.workdir.measured_as(asked), 16_000)):
        records = trajectory.measure(folder, None, Interrupt(), say=lambda line: None)
        assert [(entry["update"], entry["average"]) for entry in records] == [(n, name) for n in (2, 4, 6)]
    assert len(set(judge.measured)) == 6
    assert judge.measured[-1] == evaluate.params_hash(long)
    assert (run.workdir.path / "grids" / "one_step-16000" / "00000006.png").exists()


def test_without_a_path_it_is_diff_instruct_bit_for_bit(tmp_path, beginning):
    """The run of path=0 against the loop with the teacher as the one and only target."""
    run = trained(tmp_path / "run", beginning, config(path=0))
    stage, index = run.stages[-1], len(run.stages) - 1
    method = chain.method_of(run.config, stage, run.facts)
    teacher = meshes.replicate(run.mesh, params_of(run, "guided"))
    key = jax.random.fold_in(jax.random.key(run.config.seed), index)
    data_seed = int(np.random.SeedSequence((run.config.seed, index)).generate_state(1)[0])
    with StageCheckpoints(tmp_path / "alone") as checkpoints:
        fit(
            runner.compile_step(method.step, run.mesh, 2),
            method.init(key, {"generator": teacher, "fake": teacher}),
            {"teacher": teacher},
            {"num_steps": 1, "num_updates": UPDATES},
            stage="alone",
            batches=Batches(run.source, 16, data_seed, False, 0, 16),
            stage_key=key,
            num_updates=UPDATES,
            checkpoints=checkpoints,
        )
    assert same(leaves(tmp_path / "alone"), leaves(run.workdir.stage("one_step")))


def test_samples_are_one_evaluation_at_the_level_of_training(whole):
    run = whole[0]
    generator = dataclasses.replace(load(run.workdir.path), quantisation="none", clip=False)
    assert (generator.name, generator.sampler, generator.num_steps) == ("one_step", "one_step", 1)
    assert generator.guidance_range == (1.0, 1.0)
    found = generator.sample(5, w=1.0)
    assert found.network_evaluations == 1
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))(jnp.arange(5))
    eps = jax.vmap(lambda key: jax.random.normal(key, (8, 8, 1)))(keys)
    log_snr = process.log_snr_from_ve_sigma(2.5)
    condition = Condition(label=jnp.arange(5), guidance=jnp.float32(1.0))
    expected = generator.denoiser(params_of(run, "one_step"), process.ve_to_vp(2.5 * eps, log_snr), log_snr, condition)
    np.testing.assert_allclose(found.images, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(SampleError, match="one_step evaluates the network once"):
        generator.sample(1, w=1.0, num_steps=2)
    with pytest.raises(SampleError, match=r"from 1\.0 to 1\.0"):
        generator.sample(1, w=0.0)


def test_the_trajectory_measures_every_kept_checkpoint_once_and_counts_the_path(whole, monkeypatch):
    run = whole[0]
    judge = MeanJudge()
    monkeypatch.setattr(judges, "make", lambda *rest: judge)
    records = trajectory.measure(run.workdir, None, Interrupt(), say=lambda line: None)
    assert [(entry["update"], entry["updates_before"]) for entry in records] == [(2, 6), (4, 6), (6, 6)]
    assert len(set(judge.measured)) == 3
    seconds = [entry["seconds"] for entry in records]
    assert seconds == sorted(seconds)
    assert records[0]["seconds_before"] > 0
    assert records[0]["method"] == "disback"
    assert trajectory.measure(run.workdir, None, Interrupt(), say=lambda line: None) == records
    assert len(judge.measured) == 3  # nothing again
    assert results.read(run.workdir.path / trajectory.FILE) == records
    assert all((run.workdir.path / "grids" / "one_step" / f"{update:08d}.png").exists() for update in (2, 4, 6))
    updates, minutes = trajectory.curve(records, "DisBack")
    assert [x for x, _ in updates.points] == [8, 10, 12]
    assert minutes.points[-1][0] == pytest.approx((records[-1]["seconds"] + records[-1]["seconds_before"]) / 60)
    assert trajectory.save_plot(run.workdir.path / "plots" / "trajectory.png", [updates, minutes]).stat().st_size > 1000
    assert len(trajectory.table(records).splitlines()) == 4
    with pytest.raises(SampleError, match="no checkpoints of a stage 'two_step'"):
        trajectory.measure(run.workdir, None, Interrupt(), stage="two_step")


def test_what_a_generator_was_trained_with_cannot_be_changed_later(whole):
    with pytest.raises(WorkdirError, match=r"config\.disback\.sigma_init: 2\.5 -> 1\.0"):
        runner.prepare(config(sigma_init=1.0), str(whole[0].workdir.path))
