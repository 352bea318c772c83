"""configs/edm.py: sizes of the networks as published, and the tables of hyper-parameters (spec 03)."""

import dataclasses
import json

import numpy as np
import pytest

from configs import edm
from diffdistill import chain, plan, runner
from diffdistill.config import Config, resolve
from diffdistill.samplers.heun import TUNED_CHURN
from diffdistill.training.interrupt import Interrupt


def config(row: str) -> Config:
    return resolve(edm.get_config(row))


def parameters(found: Config) -> int:
    facts = chain.DataFacts(found.data.image_shape, found.data.num_classes)
    return chain.denoiser_of(found, chain.plan(found)[0], facts).num_parameters()


@pytest.mark.parametrize("row", edm.ROWS)
def test_every_row_resolves_to_a_teacher_alone(row):
    found = config(row)
    assert [stage.name for stage in chain.plan(found)] == ["teacher"]
    assert found.name == f"edm-{row}"
    assert sum(stage.num_updates for stage in chain.plan(config(row + "-smoke"))) <= 6


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("cifar10-cond-ddpmpp-F", 55_735_299),
        ("cifar10-uncond-ddpmpp-F", 55_733_891),
        ("cifar10-cond-ncsnpp-F", 56_400_643),
        ("cifar10-uncond-ncsnpp-F", 56_397_827),
        ("ffhq64-uncond-ddpmpp-F", 61_805_571),
        ("afhqv2_64-uncond-ncsnpp-F", 62_761_091),
        ("imagenet64-cond-adm-F", 295_899_267),
    ],
)
def test_networks_have_the_published_number_of_parameters(row, expected):
    assert parameters(config(row)) == expected


TRAINING = {  # millions of images, batch, rate, ramp and half-life (images), ramp-up, clip, dropout, augmentation, flip
    "cifar10-cond-ddpmpp-A": (200, 128, 2e-4, 640_000, 890_000, 0.0, 1 / 3072, 0.10, 0.0, True),
    "ffhq64-uncond-ncsnpp-A": (200, 128, 2e-4, 640_000, 90_000, 0.0, 1 / 12288, 0.10, 0.0, True),
    "cifar10-uncond-ddpmpp-B": (200, 512, 1e-3, 10_000_000, 500_000, 0.05, 0.0, 0.13, 0.0, True),
    "cifar10-cond-ncsnpp-E": (200, 512, 1e-3, 10_000_000, 500_000, 0.05, 0.0, 0.13, 0.0, True),
    "cifar10-cond-ddpmpp-F": (200, 512, 1e-3, 10_000_000, 500_000, 0.05, 0.0, 0.13, 0.12, False),
    "ffhq64-uncond-ddpmpp-F": (200, 256, 2e-4, 10_000_000, 500_000, 0.05, 0.0, 0.05, 0.15, False),
    "afhqv2_64-uncond-ncsnpp-F": (200, 256, 2e-4, 10_000_000, 500_000, 0.05, 0.0, 0.25, 0.15, False),
    "imagenet64-cond-adm-F": (2500, 4096, 1e-4, 10_000_000, 50_000_000, 0.05, 0.0, 0.10, 0.0, False),
}


@pytest.mark.parametrize("row", TRAINING)
def test_training_is_that_of_the_table(row):
    found = config(row)
    teacher = found.teacher
    images = teacher.num_updates * teacher.batch_size
    assert (
        round(images / 1e6),
        teacher.batch_size,
        teacher.learning_rate,
        teacher.warmup_images,
        teacher.ema_half_life,
        teacher.ema_ramp_ratio,
        teacher.gradient_clip,
        teacher.dropout,
        teacher.augmentation,
        found.data.flip,
    ) == TRAINING[row]
    assert teacher.non_finite == "replace"
    # The reference sums over the values of an image, and its Adam adds 1e-8 to gradients that are so much longer.
    height, width, channels = found.data.image_shape
    assert teacher.adam_eps * height * width * channels == pytest.approx(1e-8)
    assert bool(found.model.augmentation_features) == bool(teacher.augmentation)


DESIGN = {  # multipliers, preconditioning, training noise, loss weight
    "cifar10-cond-ddpmpp-A": ((1, 2, 2, 2), "vp", "vp", "snr"),
    "cifar10-cond-ncsnpp-B": ((1, 2, 2, 2), "ve", "ve", "snr"),
    "cifar10-cond-ddpmpp-C": ((2, 2, 2), "vp", "vp", "snr"),
    "cifar10-cond-ncsnpp-D": ((2, 2, 2), "edm", "ve", "snr"),
    "ffhq64-uncond-ddpmpp-A": ((1, 1, 2, 2, 2), "vp", "vp", "snr"),
    "afhqv2_64-cond-ddpmpp-D": ((1, 2, 2, 2), "edm", "vp", "snr"),
    "cifar10-cond-ddpmpp-E": ((2, 2, 2), "edm", "lognormal", "edm"),
    "ffhq64-uncond-ddpmpp-B": ((1, 1, 2, 2, 2), "vp", "vp", "snr"),
    "ffhq64-uncond-ddpmpp-C": ((1, 2, 2, 2), "vp", "vp", "snr"),
    "imagenet64-cond-adm-C": ((1, 2, 3, 4), "iddpm", "iddpm", "snr"),
    "imagenet64-cond-adm-F": ((1, 2, 3, 4), "edm", "lognormal", "edm"),
}


@pytest.mark.parametrize("row", DESIGN)
def test_every_letter_changes_what_the_paper_changes(row):
    found = config(row)
    design = found.model.multipliers, found.model.prediction, found.teacher.noise, found.teacher.weight
    assert design == DESIGN[row]


def test_sampling_has_the_published_number_of_evaluations():
    from diffdistill import samplers

    for row, sampler, evaluations in (
        ("cifar10-cond-ddpmpp-A", "heun", 35),
        ("ffhq64-uncond-ncsnpp-F", "heun", 79),
        ("imagenet64-cond-adm-F", "churn", 511),
    ):
        found = config(row)
        assert found.sampling.sampler == sampler
        assert not found.sampling.clip
        assert samplers.num_evaluations(sampler, found.evaluation.num_steps[0]) == evaluations
    assert config("imagenet64-cond-adm-F").sampling.s_churn == 40


def test_tuned_churn_is_that_of_the_paper():
    """S_churn, S_tmin, S_tmax, S_noise: spec 03."""
    assert {name: tuple(values.values()) for name, values in TUNED_CHURN.items()} == {
        "cifar10-vp": (30, 0.01, 1, 1.007),
        "cifar10-ve": (80, 0.05, 1, 1.007),
        "imagenet64-adm": (80, 0.05, 50, 1.003),
        "imagenet64-edm": (40, 0.05, 50, 1.003),
    }
    assert all(list(values) == ["s_churn", "s_tmin", "s_tmax", "s_noise"] for values in TUNED_CHURN.values())


SMOKE = (*(f"cifar10-cond-ddpmpp-{letter}" for letter in edm.LETTERS), "cifar10-uncond-ncsnpp-A", "ffhq64-uncond-adm-F")


@pytest.mark.parametrize("row", SMOKE)
def test_every_letter_trains_as_its_smoke_variant_or_smaller(row, tmp_path):
    settings = config(f"{row}-smoke")
    if row[-1] in "BCE":  # B and C have the network of A, E that of D: one level of it compiles faster
        model = dataclasses.replace(settings.model, multipliers=(1,), attention_resolutions=())
        settings = dataclasses.replace(settings, model=model)
    run = runner.prepare(settings, str(tmp_path))
    runner.train(run, Interrupt(), say=lambda text: None)
    assert [stage.name for stage in runner.finished(run.workdir)] == ["teacher"]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all()
    if row[-1] in "EF":  # EDM's loss weight: an untrained network is at 1 where sigma_data is that of the images
        assert 0.3 < losses[0] < 3


def test_parts_change_neither_operations_nor_the_meaning_of_a_plan():
    whole = config("cifar10-cond-ddpmpp-F-smoke")
    parts = dataclasses.replace(whole, teacher=dataclasses.replace(whole.teacher, parts=8))
    facts = chain.DataFacts((8, 8, 1), 10)
    flops = [plan.flops_per_update(found, chain.plan(found)[0], facts) for found in (whole, parts)]
    memory = [plan.memory(found, chain.plan(found)[0], facts) for found in (whole, parts)]
    assert flops[0] == flops[1] > 0
    assert memory[1] < memory[0]


@pytest.mark.parametrize("row", ["ffhq64-cond-ddpmpp-F", "cifar10-cond-ddpmpp-G", "cifar10", "cifar10-cond-unet-F", ""])
def test_rows_that_do_not_exist_are_refused_with_the_form_of_a_row(row):
    with pytest.raises(ValueError, match=r"no row .*<cond\|uncond>-<ddpmpp\|ncsnpp\|adm>-<A to F>"):
        edm.get_config(row)
