"""Presets of EDM's table 1: each resolves, says what its column says, and mixes with the others."""

import itertools

import pytest

from diffdistill import chain, presets, samplers
from diffdistill.config import default_config, resolve


def config(*names):
    settings = default_config()
    settings.teacher.num_updates = 1
    for name in names:
        presets.apply(settings, name)
    return settings


COLUMNS = {  # levels on which the network is trained, evaluations in 18 steps
    "vp": ((0.00100050, 152.167), 18),
    "ve": ((0.02, 100.0), 18),
    "iddpm": ((0.00642541, 20291.17), 18),
    "edm": ((0.002, 80.0), 35),
}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_is_its_column(name):
    levels, evaluations = COLUMNS[name]
    resolved = resolve(config(name))
    assert chain.schedule_of(resolved.process).sigma_range() == pytest.approx(levels, rel=1e-4)
    assert resolved.model.prediction == name
    assert resolved.teacher.weight == ("edm" if name == "edm" else "snr")
    own = samplers.settings_of("ablation", vars(resolved.sampling))
    assert samplers.num_evaluations(resolved.sampling.sampler, 18, own) == evaluations
    assert not resolved.sampling.clip


def test_a_later_preset_leaves_nothing_of_an_earlier_one():
    for first, second in itertools.permutations(presets.PRESETS, 2):
        assert resolve(config(first, second)) == resolve(config(second))


def test_networks_with_a_table_of_levels_are_sampled_at_those_in_any_process():
    """Rounding belongs to the network (spec 03): that of iDDPM in EDM's process, and no other there."""
    mixed, plain = config("edm"), resolve(config("edm"))
    mixed.model.prediction = "iddpm"
    mixed = resolve(mixed)
    found = chain.sampling_schedule_of(mixed.process, mixed.model.prediction)
    assert float(found.nearest_sigma(70.0)) == pytest.approx(71.2912, rel=1e-5)  # u_9
    assert found.sigma_range() == chain.schedule_of(mixed.process).sigma_range()
    assert float(chain.sampling_schedule_of(plain.process, "edm").nearest_sigma(70.0)) == 70.0
    own = resolve(config("iddpm"))
    assert chain.sampling_schedule_of(own.process, "iddpm") is chain.schedule_of(own.process)


def test_any_mixture_is_legal():
    """Every group of fields from another preset."""
    groups = ("process", "model", "teacher", "sampling")
    for choice in itertools.product(presets.PRESETS, repeat=len(groups)):
        settings = config("edm")
        for group, name in zip(groups, choice, strict=True):
            settings[group].update(presets.PRESETS[name][group])
        resolve(settings)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"unknown preset 'edn'; known: vp, ve, iddpm, edm"):
        presets.apply(default_config(), "edn")
