"""Configs: what is refused before anything starts, and how it is said."""

import dataclasses
import importlib
import json

import pytest

from configs import cifar10_small, digits, disback, guided, progressive
from diffdistill import chain, config, data_checks, fields
from diffdistill.config import Config, ConfigError, default_config, resolve


def changed(**groups):
    settings = default_config()
    settings.teacher.num_updates = 10
    for group, values in groups.items():
        settings[group].update(values)
    return settings


def message(**groups) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(changed(**groups))
    return str(caught.value)


def test_defaults_survive_the_way_through_a_config_dict_and_json():
    assert resolve(changed()) == dataclasses.replace(
        Config(), teacher=dataclasses.replace(Config().teacher, num_updates=10)
    )
    settings = config.to_dict(resolve(changed()))
    assert resolve(json.loads(json.dumps(settings))) == resolve(changed())


def test_an_unknown_field_is_named_with_the_nearest_known_one():
    settings = changed().to_dict()
    settings["teacher"]["learning_rat"] = 1.0
    with pytest.raises(ConfigError, match=r"config\.teacher\.learning_rat is not a field.*'learning_rate'"):
        resolve(settings)
    with pytest.raises(ConfigError, match=r"config\.techer is not a field.*'teacher'"):
        resolve({**changed().to_dict(), "techer": {}})


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("teacher.batch_size", "many", "whole number"),
        ("teacher.batch_size", 1.5, "whole number"),
        ("teacher.batch_size", True, "whole number"),
        ("teacher.learning_rate", "fast", "a number"),
        ("data.flip", 1, "True or False"),
        ("data.source", 3, "text"),
        ("model.multipliers", 2, "list of whole numbers"),
        ("model.multipliers", (1, 2.5), "whole number"),
        ("teacher.anneal", "cosine", "constant, linear"),
        ("teacher", 5, "group of fields"),
        ("teacher.learning_rate", 10**400, "too large for a number"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_place(path, value, expected):
    settings = changed().to_dict()
    *groups, name = path.split(".")
    target = settings
    for group in groups:
        target = target[group]
    target[name] = value
    with pytest.raises(ConfigError) as caught:
        resolve(settings)
    assert f"config.{path}" in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"data": {"source": "digit"}}, ["config.data.source", "'digits'"]),
        ({"process": {"schedule": "cosin"}}, ["config.process.schedule", "'cosine'"]),
        ({"model": {"prediction": "u"}}, ["config.model.prediction", "eps"]),
        ({"teacher": {"weight": "snr_truncated"}}, ["config.teacher.weight", "'snr_trunc'"]),
        ({"sampling": {"sampler": "dim"}}, ["config.sampling.sampler", "'ddim'"]),
        ({"teacher": {"num_updates": 0}}, ["config.teacher.num_updates", "at least 1"]),
        ({"teacher": {"label_dropout": 1.5}}, ["config.teacher.label_dropout", "from 0.0 to 0.999"]),
        ({"model": {"channels": 33}}, ["num_groups", "33"]),
        ({"model": {"multipliers": ()}}, ["config.model.multipliers", "empty"]),
        ({"guided": {"num_updates": 5}, "model": {"conditional": False}}, ["guidance needs classes"]),
        ({"guided": {"num_updates": 5}, "teacher": {"label_dropout": 0.0}}, ["null class", "label_dropout"]),
        ({"sampling": {"average": 5}}, ["config.sampling.average is 5", "none"]),
        ({"guided": {"num_updates": 5, "w_min": 3.0, "w_max": 1.0}}, ["w_min (3.0)", "w_max (1.0)"]),
        ({"progressive": {"num_updates": 5, "start_steps": 24}}, ["start_steps (24)", "doubled"]),
        ({"progressive": {"num_updates": 5, "start_steps": 4, "end_steps": 4}}, ["start_steps (4)"]),
        ({"progressive": {"num_updates": 5}, "model": {"prediction": "eps"}}, ["'eps'", "zero signal-to-noise"]),
        (
            {"progressive": {"num_updates": 5, "start_steps": 1024}, "process": {"schedule": "discrete_linear"}},
            ["less than", "1000", "no more steps"],
        ),
        ({"progressive": {"num_updates": 5, "weight": "snr"}}, ["config.progressive.weight='snr'", "t = 1"]),
        ({"progressive": {"num_updates": 5, "weight": "p2"}}, ["config.progressive.weight='p2'", "t = 1"]),
        ({"data": {"image_shape": (32, 32)}}, ["config.data.image_shape", "(height, width, channels)"]),
        ({"teacher": {"learning_rate": 0.0}}, ["config.teacher.learning_rate"]),
        ({"evaluation": {"num_samples": 1}}, ["config.evaluation.num_samples"]),
        ({"data": {"path": "/somewhere"}}, ["embedded"]),
        ({"process": {"log_snr_min": 5.0, "log_snr_max": 1.0}}, ["config.process", "log_snr_min=5.0"]),
        ({"process": {"log_snr_max": 90.0}}, ["config.process", "log_snr_max=90.0"]),
        ({"progressive": {"num_updates": 5}, "model": {"prediction": "ve"}}, ["'ve'", "'edm'"]),
        ({"model": {"sigma_data": 0.0}}, ["config.model.sigma_data"]),
        (
            {"progressive": {"label_dropout": 0.1, "num_updates": 5}, "guided": {"num_updates": 5}},
            ["config.progressive.label_dropout", "w-conditioned"],
        ),
        ({"encoder": {"label_dropout": 0.1}}, ["config.encoder.label_dropout", "must be 0"]),
        ({"evaluation": {"transfers": ("3-8",)}}, ["config.evaluation.transfers", "as in '3 to 8'"]),
        ({"evaluation": {"transfers": ("3 to 8",)}}, ["needs classes, encoder stages and decoder stages"]),
        (
            {
                "evaluation": {"transfers": ("3 to 8",)},
                "encoder": {"num_updates": 5},
                "progressive": {"num_updates": 5},
                "guided": {"num_updates": 5, "w_min": 1.0},
            },
            ["encoded without guidance", "w from 1.0 to 4.0"],
        ),
        ({"sampling": {"quantisation": "none"}}, ["config.sampling.quantisation is 'none'", "num_samples=0"]),
        ({"teacher": {"noise": "lognorm"}}, ["config.teacher.noise", "'lognormal'", "schedule"]),
        ({"teacher": {"noise_sigma_min": 5.0, "noise_sigma_max": 1.0}}, ["config.teacher.noise_sigma_min", "to 1.0"]),
        ({"sampling": {"solver": "hen"}}, ["config.sampling.solver", "'heun'"]),
        ({"sampling": {"discretisation": "v"}}, ["config.sampling.discretisation", "iddpm"]),
        ({"sampling": {"noise_schedule": "line"}}, ["config.sampling.noise_schedule", "'linear'"]),
        ({"sampling": {"scaling": "v"}}, ["config.sampling.scaling", "none, vp"]),
        ({"sampling": {"alpha": 0.0}}, ["config.sampling.alpha", "from 0.01 to 1.0"]),
        ({"sampling": {"s_churn": -1.0}}, ["config.sampling.s_churn", "at least 0.0"]),
        ({"sampling": {"sigma_min": 90.0}}, ["config.sampling", "sigma_min=90", "no noise levels"]),
        ({"process": {"log_snr_max": -10.0}}, ["config.sampling", "leave no noise levels of the schedule 'cosine'"]),
        # Numbers that would fill the memory, never end or end in a traceback.
        ({"process": {"schedule": "discrete_cosine", "num_train_steps": 10**8}}, ["num_train_steps is 1", "at most 1"]),
        ({"data": {"latent_shift": (0.0, 10**400)}}, ["config.data.latent_shift[1]", "too large"]),
        ({"teacher": {"weight_decay": float("nan")}}, ["config.teacher.weight_decay is nan"]),
        ({"teacher": {"weight_shift": -1e31}}, ["config.teacher.weight_shift", "at least -1e+30"]),
        ({"teacher": {"batch_size": 1 << 20_000}}, ["config.teacher.batch_size", "thousands of digits"]),
        ({"teacher": {"parts": 10**30}}, ["config.teacher.parts", "at most"]),
        ({"model": {"channels": 10**21}}, ["config.model.channels", "at most"]),
        ({"model": {"multipliers": (0, 2)}}, ["config.model.multipliers[0] is 0", "at least 1"]),
        ({"model": {"multipliers": (1,) * 100}}, ["config.model.multipliers has 100 entries"]),
        ({"model": {"num_heads": 0}}, ["config.model.num_heads is 0", "at least 1"]),
        ({"model": {"blocks_per_level": 10**8}}, ["config.model.blocks_per_level", "at most 100"]),
        ({"progressive": {"start_steps": 2**60}}, ["config.progressive.start_steps", "at most"]),
        ({"sampling": {"rho": float("inf")}}, ["config.sampling.rho is inf", "at most"]),
        (
            {"evaluation": {"transfers": ("/tmp/evil to 8",)}},
            ["config.evaluation.transfers", "'/tmp/evil to 8'", "slash"],
        ),
        ({"evaluation": {"transfers": ("8 to ../evil",)}}, ["config.evaluation.transfers", "'8 to ../evil'", "number"]),
    ],
)
def test_impossible_choices_are_refused(groups, words):
    text = message(**groups)
    for word in words:
        assert word in text


@pytest.mark.parametrize("name", ["/tmp/elsewhere", "../..", ".hidden", "a/b", "a\\b", "a\0b"])
def test_a_name_that_leads_out_of_the_folder_of_runs_is_refused(name):
    with pytest.raises(ConfigError, match=r"config\.name is .*--workdir=FOLDER"):
        resolve({**changed().to_dict(), "name": name})


def test_images_that_the_network_cannot_halve_are_refused():
    settings = resolve(changed(model={"multipliers": (1, 2, 2, 2)}))
    with pytest.raises(ConfigError, match="multiples of 8"):
        data_checks.check_data(settings, chain.DataFacts((12, 12, 1), 10))
    data_checks.check_data(settings, chain.DataFacts((16, 16, 1), 10))


def test_transfers_between_classes_that_the_data_lacks_are_refused():
    settings = digits.get_config("full")
    settings.evaluation.transfers = ("3 to 99",)
    with pytest.raises(ConfigError, match="no class '99'; it has 0, 1"):
        data_checks.check_data(resolve(settings), chain.DataFacts((8, 8, 1), 10))


def test_a_plan_is_the_teacher_the_guided_student_and_the_rounds_in_order():
    settings = changed(
        guided={"num_updates": 7}, progressive={"num_updates": 5, "final_num_updates": 9, "start_steps": 16}
    )
    stages = chain.plan(resolve(settings))
    assert [(stage.name, stage.teacher, stage.num_steps, stage.num_updates) for stage in stages] == [
        ("teacher", "", 0, 10),
        ("guided", "teacher", 0, 7),
        ("round_00_steps_0008", "guided", 8, 5),
        ("round_01_steps_0004", "round_00_steps_0008", 4, 5),
        ("round_02_steps_0002", "round_01_steps_0004", 2, 9),
        ("round_03_steps_0001", "round_02_steps_0002", 1, 9),
    ]
    assert [stage.conditioned_on_guidance for stage in stages] == [False] + [True] * 5


def test_a_plan_without_guidance_halves_the_teacher_itself():
    settings = changed(guided={"num_updates": 0}, progressive={"num_updates": 5, "start_steps": 8, "end_steps": 2})
    stages = chain.plan(resolve(settings))
    assert [(stage.name, stage.teacher) for stage in stages] == [
        ("teacher", ""),
        ("round_00_steps_0004", "teacher"),
        ("round_01_steps_0002", "round_00_steps_0004"),
    ]
    assert not any(stage.conditioned_on_guidance for stage in stages)


ROWS = {
    "digits": [f"{row}-smoke".removeprefix("-") if smoke else row for row in digits.VARIANTS for smoke in (0, 1)],
    "fashion_mnist": ["", "smoke"],
    "cifar10_small": ["", "6-minutes", "4.5-minutes", "6-minutes-smoke", "edm-6-minutes", "edm-6-minutes-smoke"],
    "progressive": [*progressive.ROWS, *(f"{row}-smoke" for row in progressive.ROWS)],
    "guided": [*guided.ROWS, *(f"{row}-smoke" for row in guided.ROWS)],
    "disback": [f"{row}{variant}" for row in disback.ROWS for variant in disback.VARIANTS],
}


@pytest.mark.parametrize(("file", "row"), [(file, row) for file, rows in ROWS.items() for row in rows])
def test_every_config_resolves_and_says_how_to_start_it(file, row):
    module = importlib.import_module(f"configs.{file}")
    settings = module.get_config(row) if row else module.get_config()
    if settings.data.source != "digits":
        settings.data.path = settings.data.path or "/data"
    resolved = resolve(settings)
    assert chain.plan(resolved)
    assert "python main.py" in (module.__doc__ or "")
    if row.endswith("smoke"):
        assert sum(stage.num_updates for stage in chain.plan(resolved)) < 100


@pytest.mark.parametrize("file", ROWS)
def test_an_unknown_row_is_refused_with_the_known_ones(file):
    module = importlib.import_module(f"configs.{file}")
    with pytest.raises(ValueError, match="smoke"):
        module.get_config("cifar1000")


def test_cifar10_small_fills_its_minutes():
    """What is left of the budget is spent as the shares say, at the rate for which the minutes hold."""
    for minutes in (6, 25):
        settings = cifar10_small.get_config(f"{minutes}-minutes")
        stages = chain.plan(resolve(settings))
        cost = {
            "teacher": 1.0,
            "guided": cifar10_small.GUIDED_COST,
            "progressive": cifar10_small.HALVING_COST,
        }
        images = [stage.num_updates * stage.settings.batch_size * cost[stage.method] for stage in stages]
        seconds = sum(images) / cifar10_small.REFERENCE_RATE
        assert seconds == pytest.approx(60 * minutes - cifar10_small.OVERHEAD, rel=0.02)
        assert images[0] / sum(images) == pytest.approx(cifar10_small.TEACHER_SHARE, rel=0.02)
        assert settings.name == f"cifar10_small-{minutes}-minutes"
    with pytest.raises(ValueError, match=r"more than 3\.5 minutes"):
        cifar10_small.get_config("3-minutes")


def test_cifar10_small_fills_its_minutes_with_disback_too():
    settings = cifar10_small.get_config("edm-10-minutes")
    stages = chain.plan(resolve(settings))
    assert [stage.method for stage in stages] == ["teacher", "degradation", "disback"]
    cost = {"teacher": 1.0, "degradation": cifar10_small.PATH_COST, "disback": cifar10_small.DISBACK_COST}
    images = [stage.num_updates * stage.settings.batch_size * cost[stage.method] for stage in stages]
    seconds = [count / cifar10_small.REFERENCE_RATE for count in images]
    assert sum(seconds) == pytest.approx(600 - cifar10_small.OVERHEAD, rel=0.02)
    assert seconds[0] / sum(seconds) == pytest.approx(cifar10_small.EDM_TEACHER_SHARE, rel=0.02)
    walked = settings.disback.path * settings.disback.leg  # updates before the teacher itself is the target
    assert walked == pytest.approx(settings.disback.num_updates / 2, rel=0.1)


CIFAR10, IMAGENET64, LSUN128 = ((32, 32, 3), 10), ((64, 64, 3), 1000), ((128, 128, 3), 0)
PUBLISHED = {  # spec 01: millions of parameters, data, first teacher's steps, and the table of optimisation
    ("progressive", "cifar10"): (60.0, CIFAR10, 8192, False, "x"),
    ("progressive", "imagenet64"): (295.9, IMAGENET64, 1024, True, "both"),
    ("progressive", "lsun128"): (139.6, LSUN128, 1024, False, "both"),
    ("guided", "cifar10"): (None, CIFAR10, 1024, True, "v"),
    ("guided", "imagenet64"): (None, IMAGENET64, 1024, True, "v"),
}


@pytest.mark.parametrize(("file", "row"), PUBLISHED)
def test_published_rows_have_the_published_sizes_and_chains(file, row):
    millions, (shape, classes), start, conditional, output = PUBLISHED[file, row]
    resolved = resolve(importlib.import_module(f"configs.{file}").get_config(row))
    stages = chain.plan(resolved)
    if millions:
        parameters = chain.denoiser_of(resolved, stages[0], chain.DataFacts(shape, classes)).num_parameters()
        assert round(parameters / 1e6, 1) == millions
    assert (resolved.data.image_shape, resolved.data.num_classes) == (shape, classes)
    assert resolved.data.flip
    assert (resolved.model.conditional, resolved.model.prediction) == (conditional, output)
    rounds = [stage for stage in stages if stage.method == "progressive"]
    assert [stage.num_steps for stage in rounds] == [start >> k for k in range(1, start.bit_length())]
    assert [stage.num_updates for stage in rounds[-3:]] == [50_000, 100_000, 100_000]


@pytest.mark.parametrize("row", progressive.CELLS)
def test_every_cell_of_table_1_is_a_row(row):
    _, output, weight = row.split("-")
    found = resolve(progressive.get_config(row))
    assert (found.model.prediction, found.teacher.weight) == (output, weight)
    assert found.evaluation.samplers == ("ddim", "ancestral")
    (stage,) = chain.plan(found)
    facts = chain.DataFacts(*CIFAR10)
    denoiser = chain.denoiser_of(found, stage, facts)
    assert denoiser.network.output_channels == (6 if output == "both" else 3)
    assert round(denoiser.num_parameters() / 1e6, 1) == 60.0


@pytest.mark.parametrize("dataset", guided.IMAGES)
def test_baselines_and_stochastic_students_of_guided_models_are_rows(dataset):
    def found(variant):
        return resolve(guided.get_config(f"{dataset}-{variant}"))

    stochastic = chain.plan(found("stochastic"))
    assert [stage.num_steps for stage in stochastic if stage.method == "stochastic"] == [512 >> k for k in range(9)]
    single = found("single-0.3")
    assert (single.guided.w_min, single.guided.w_max, single.evaluation.guidance) == (0.3, 0.3, (0.3,))
    separate = found("separate")
    assert not separate.guided.num_updates
    stage = chain.plan(separate)[-1]
    assert chain.has_null_class(separate, stage)
    assert not stage.conditioned_on_guidance


OPTIMISATION = {  # spec 01 and 02: batch, rate, warm-up, anneal, weight decay, EMA, dropout, weight
    ("progressive", "cifar10", "teacher"): (128, 2e-4, 1000, "constant", 1e-3, 0.9999, 0.2, "snr_trunc"),
    ("progressive", "cifar10", "progressive"): (128, 5e-5, 0, "linear", 0.0, 0.0, 0.0, "snr_trunc"),
    ("progressive", "imagenet64", "teacher"): (2048, 3e-4, 1000, "constant", 0.0, 0.9999, 0.1, "snr_trunc"),
    ("progressive", "imagenet64", "progressive"): (2048, 1e-4, 0, "linear", 0.0, 0.0, 0.0, "snr_trunc"),
    ("progressive", "lsun128", "teacher"): (2048, 3e-4, 1000, "constant", 0.0, 0.9999, 0.1, "snr_trunc"),
    ("progressive", "lsun128", "progressive"): (2048, 1e-4, 0, "linear", 0.0, 0.0, 0.0, "snr_trunc"),
    ("guided", "cifar10", "guided"): (128, 1e-4, 0, "constant", 0.0, 0.9999, 0.0, "snr"),
    ("guided", "cifar10", "progressive"): (128, 1e-4, 0, "linear", 0.0, 0.0, 0.0, "snr_trunc"),
    ("guided", "imagenet64", "guided"): (2048, 3e-4, 0, "constant", 0.0, 0.9999, 0.0, "snr"),
    ("guided", "imagenet64", "progressive"): (256, 1e-4, 0, "linear", 0.0, 0.0, 0.0, "snr_trunc"),
}


@pytest.mark.parametrize(("file", "row", "stage"), OPTIMISATION)
def test_published_rows_train_as_published(file, row, stage):
    found = getattr(resolve(importlib.import_module(f"configs.{file}").get_config(row)), stage)
    assert (
        found.batch_size,
        found.learning_rate,
        found.warmup_updates,
        found.anneal,
        found.weight_decay,
        found.ema_decay,
        found.dropout,
        found.weight,
    ) == OPTIMISATION[file, row, stage]
    assert found.gradient_clip == 1.0
    assert not found.stratified_times


def test_differences_between_configs_name_the_field():
    one, other = config.to_dict(resolve(changed())), config.to_dict(resolve(changed(teacher={"batch_size": 7})))
    assert fields.differences(one, other) == ["config.teacher.batch_size: 128 -> 7"]
    assert fields.differences(one, one) == []
