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
import optax
import orbax.checkpoint as ocp
import pytest

from configs import digits
from configs import disback as disback_rows
from diffdistill import chain, judges, plan, runner, trajectory
from diffdistill.chain import DataFacts
from diffdistill.config import ConfigError, default_config, resolve, smoke, to_dict
from diffdistill.data.pipeline import Batches
from diffdistill.diffusion import process
from diffdistill.evaluation import results
from diffdistill.generator import SampleError
from diffdistill.judges.contract import Figures
from diffdistill.methods import base, score_distillation
from diffdistill.models.denoiser import Condition
from diffdistill.sample import load, load_from
from diffdistill.training import mesh as meshes
from diffdistill.training import relay
from diffdistill.training.checkpoints import StageCheckpoints
from diffdistill.training.errors import CheckpointError, Interrupted
from diffdistill.training.interrupt import Interrupt
from diffdistill.training.loop import compile_step, fit
from diffdistill.workdir import WorkdirError

FACTS = DataFacts((8, 8, 1), 10)
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


def test_an_adaptive_walk_and_further_averages_resume_bit_for_bit(tmp_path, beginning):
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
    measured = []

    class Mean:
        """A judge whose distance is the mean pixel."""

        needs_reference = False
        protocol = staticmethod(lambda item, generator: "mean")
        metrics = staticmethod(lambda item, generator: ("frechet_to_data", "paired_rmse_to_teacher"))

        def measure(self, item, generator, wanted, digest, interrupt):
            assert list(wanted) == ["frechet_to_data"]
            measured.append(digest)
            samples = generator.sample(20, seed=item.seed, w=item.w)
            return Figures({"frechet_to_data": float(samples.images.mean())}, samples, 0.1)

    monkeypatch.setattr(judges, "make", lambda *rest: Mean())
    records = trajectory.measure(run.workdir, None, Interrupt(), say=lambda line: None)
    assert [(entry["update"], entry["updates_before"]) for entry in records] == [(2, 6), (4, 6), (6, 6)]
    assert len(set(measured)) == 3
    seconds = [entry["seconds"] for entry in records]
    assert seconds == sorted(seconds)
    assert records[0]["seconds_before"] > 0
    assert records[0]["method"] == "disback"
    assert trajectory.measure(run.workdir, None, Interrupt(), say=lambda line: None) == records
    assert len(measured) == 3  # nothing again
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


def variant(**groups):
    settings = smoke(default_config())
    settings.teacher.num_updates = 2
    settings.disback.num_updates, settings.disback.path = 4, 2
    for group, values in groups.items():
        settings[group].update(values)
    return settings


VARIANTS = {
    "edm": digits.get_config("edm-smoke").to_dict(),
    "unconditional": variant(model={"conditional": False}).to_dict(),
    "discrete": variant(
        model={"prediction": "eps"}, process={"schedule": "discrete_linear"}, disback={"fake_updates": 2}
    ).to_dict(),
    "student": variant(progressive={"num_updates": 2}, disback={"start": "student", "sigma_init": 0.0}).to_dict(),
    "sid": variant(disback={"signal": "sid", "parts": 2}).to_dict(),
    "bfloat16": variant(model={"dtype": "bfloat16", "remat": True}).to_dict(),
}
VARIANTS["edm"]["disback"]["num_updates"] = 4
VARIANTS["discrete"]["disback"]["levels"]["noise"] = "schedule"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_teacher_and_start_has_its_stages(name):
    """Shapes alone: the step of both stages, from what the plan says they start from."""
    settings = resolve(VARIANTS[name])
    stages = chain.plan(settings)
    assert stages[-1].generator == ("round_01_steps_0001" if name == "student" else stages[-1].teacher)
    batch = {
        "image": jax.ShapeDtypeStruct((16, 8, 8, 1), jnp.uint8),
        "label": jax.ShapeDtypeStruct((16,), jnp.int32),
    }
    arguments = {name: jnp.int32(4) for name in base.ARGUMENTS}
    for stage in stages[-2:]:
        method = chain.method_of(settings, stage, FACTS)
        params = jax.eval_shape(chain.denoiser_of(settings, stage, FACTS).init, jax.random.key(0))
        state = jax.eval_shape(method.init, jax.random.key(0), dict.fromkeys(("teacher", "generator", "fake"), params))
        frozen = {"teacher": params, "generator": params}
        after, metrics = jax.eval_shape(method.step, state, frozen, batch, jax.random.key(0), arguments)
        assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, state)
        assert {"loss", "gradient_norm"} <= metrics.keys()
        assert jax.tree.structure(method.export(after)) == jax.tree.structure(params)
    assert {"mismatch", "mismatch_by_log_snr", "fake_gradient_norm"} <= metrics.keys()


def gradients(**model):
    """Those of generator and fake denoiser in one update of all three roles, as flat vectors, and the metrics."""
    settings = digits.get_config("smoke")
    settings.model.update({"multipliers": (1,), "attention_resolutions": (), **model})
    settings.guided.num_updates = settings.progressive.num_updates = settings.disback.path = 0
    settings.disback.num_updates = 4
    chosen = resolve(settings)
    stage = chain.plan(chosen)[-1]
    method, denoiser = chain.method_of(chosen, stage, FACTS), chain.denoiser_of(chosen, stage, FACTS)

    def network(number):
        flat, structure = jax.tree.flatten(denoiser.init(jax.random.key(0)))
        keys = jax.random.split(jax.random.key(number), len(flat))
        moved = [p + 0.05 * jax.random.normal(key, p.shape) for p, key in zip(flat, keys, strict=True)]
        return jax.tree.unflatten(structure, moved)

    state = method.init(jax.random.key(0), {"generator": network(1), "fake": network(2)})
    batch = {"label": jnp.arange(16, dtype=jnp.int32) % 10}
    arguments = {name: jnp.int32(4) for name in base.ARGUMENTS}
    after, metrics = jax.jit(method.step)(state, {"teacher": network(1)}, batch, jax.random.key(3), arguments)
    # Adam without a first average keeps the gradient itself.
    kept = [jax.tree.leaves(optax.tree.get(role.optimizer, "mu")) for role in (after, after.fake)]
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype("float32")}
    return [np.concatenate([np.ravel(leaf) for leaf in leaves]) for leaves in kept], metrics


def test_rematerialisation_changes_no_gradient_and_bfloat16_little():
    plain, metrics = gradients()
    recomputed, _ = gradients(remat=True)
    rough, rough_metrics = gradients(dtype="bfloat16")
    for exact, again, near in zip(plain, recomputed, rough, strict=True):
        scale = np.linalg.norm(exact)
        assert scale > 0
        assert np.linalg.norm(again - exact) < 1e-4 * scale
        assert 1e-5 * scale < np.linalg.norm(near - exact) < 0.1 * scale
    np.testing.assert_allclose(rough_metrics["mismatch"], metrics["mismatch"], rtol=0.05)


def test_the_plan_counts_three_networks_two_optimisers_and_the_average():
    settings = resolve(VARIANTS["edm"])
    with_average = dataclasses.replace(
        settings, disback=dataclasses.replace(settings.disback, ema_half_life=100, gradient_clip=0.0)
    )
    params = 4 * chain.denoiser_of(settings, chain.plan(settings)[-1], FACTS).num_parameters()
    known = {}
    for name, each in (("plain", settings), ("average", with_average)):
        for path in (0, 2):
            chosen = dataclasses.replace(each, disback=dataclasses.replace(each.disback, path=path))
            known[name, path] = plan.memory(chosen, chain.plan(chosen)[-1], FACTS)
    assert known["average", 0] - known["plain", 0] == params
    assert known["plain", 2] - known["plain", 0] == params  # the target that is read ahead
    # Generator, fake denoiser, two Adam moments of each, the teacher, and the gradient of one of them.
    activations = known["plain", 0] - 8 * params
    assert 0 < activations < known["plain", 0]
    parts = dataclasses.replace(settings, disback=dataclasses.replace(settings.disback, path=0, parts=16))
    assert plan.memory(parts, chain.plan(parts)[-1], FACTS) - 9 * params == pytest.approx(activations / 16, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"signal": "diff_instrct"}, "Did you mean 'diff_instruct'"),
        ({"path": -1}, "path is -1, but must be at least 0"),
        ({"leg": 0}, "leg is 0, but must be at least 1"),
        ({"path": 5, "leg": 2}, "ends before the path does"),
        ({"start": "student"}, "knows the noise at t = 1"),
        ({"guidance": (1.0, 3.0)}, r"must be \(w,\) or \(w_min, w_max\)"),
        ({"guidance": (1.0, 1.5, 2.0)}, r"must be \(w,\) or \(w_min, w_max\)"),
        ({"sigma_init": 1e6}, "noise levels of config.process run from"),
        ({"walk": "adaptive", "leg": 3, "walk_window": 2, "num_updates": 9}, "is not a multiple of"),
        ({"walk": "adaptve"}, "adaptive"),
        ({"path_share": 1.5}, r"path_share is 1.5, but must be from 0.0 to 0.999"),
        ({"ema_half_lives": (5, 5)}, "must be different numbers of images"),
        ({"levels": {"noise": "lognorm"}}, "Did you mean 'lognormal'"),
        ({"fake_levels": {"first": 0.8, "last": 0.2}}, "fake_levels.first is 0.8, but must be from 0.0 to 0.2"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        config(**changes)


def test_a_network_that_predicts_noise_does_not_start_where_all_is_noise():
    with pytest.raises(ConfigError, match="no longer determines one"):
        resolve(variant(model={"prediction": "eps"}, disback={"sigma_init": 0.0}))


def test_the_rows_end_in_a_generator_and_their_baselines_differ_by_the_path_alone():
    for row in disback_rows.ROWS:
        whole, baseline = (resolve(_with_path(disback_rows.get_config(f"{row}{end}"))) for end in ("", "-baseline"))
        assert [stage.name for stage in chain.plan(whole)] == ["teacher", "degradation", "one_step"]
        assert [stage.method for stage in chain.plan(baseline)] == ["teacher", "diff_instruct"]
        alike = dataclasses.replace(whole, name=baseline.name, disback=dataclasses.replace(whole.disback, path=0))
        assert alike == baseline
        updater = chain.updater_of(chain.plan(whole)[-1]).optimization
        assert (updater.b1, updater.b2, updater.gradient_clip) == (0.0, 0.999, 0.0)


def _with_path(settings):
    settings.data.path = "" if settings.data.source == "digits" else "/data"
    return settings
