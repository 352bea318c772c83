"""What the config says of one-step generators: teachers, starts and precisions, memory, rows, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import digits
from configs import disback as disback_rows
from diffdistill import chain, plan
from diffdistill.chain import DataFacts
from diffdistill.config import ConfigError, default_config, resolve, smoke
from diffdistill.methods import base

FACTS = DataFacts((8, 8, 1), 10)


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
        resolve(variant(disback=changes))


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
