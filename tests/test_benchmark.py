"""--mode=benchmark: the rates of the programs that training and sampling run."""

import dataclasses

import pytest

from configs import digits
from diffdistill import benchmark, chain, plan
from diffdistill.config import ConfigError, resolve
from diffdistill.training import mesh as meshes


def test_rates_are_those_of_the_teachers_updates():
    config = resolve(digits.get_config("smoke"))
    said: list[str] = []
    records = list(benchmark.run(config, said.append, seconds=0.0))
    assert [record["dtype"] for record in records] == list(benchmark.DTYPES)
    stage, facts = chain.plan(config)[0], chain.DataFacts((8, 8, 1), 10)
    for record, line in zip(records, said, strict=True):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=record["dtype"]))
        flops = plan.flops_per_update(changed, chain.plan(changed)[0], facts)
        assert record["flops_per_second"] == pytest.approx(
            flops * record["images_per_second"] / stage.settings.batch_size
        )
        assert record["share_of_matmul"] == record["flops_per_second"] / record["matmul_flops_per_second"]
        assert record["share_of_published"] is None  # of a CPU no data sheet is known
        assert f"{record['images_per_second']:.4g} images/s" in line
        assert "% of the" in line


def test_the_rate_of_matrix_products_is_plausible():
    """A core of the last twenty years makes between 1e9 and 1e13 operations a second."""
    assert 1e9 < benchmark.matmul_rate(meshes.make_mesh(), "float32") < 1e14


def test_halving_and_sampling_run_at_the_teachers_batch_and_network():
    config = resolve(digits.get_config("smoke"))
    facts, teacher = chain.DataFacts((8, 8, 1), 10), chain.plan(config)[0]
    teacher_alone = dataclasses.replace(config, progressive=dataclasses.replace(config.progressive, num_updates=0))
    records = list(
        benchmark.run(teacher_alone, print, benchmarks=benchmark.BENCHMARKS, dtypes=("float32",), seconds=0.0)
    )
    assert [record["benchmark"] for record in records] == ["teacher", "halving"] + ["sampling"] * 3
    first, halving, *sampling = records
    assert halving["batch_size"] == first["batch_size"] == teacher.settings.batch_size
    assert halving["cost_of_teacher"] == pytest.approx(first["images_per_second"] / halving["images_per_second"])
    # Two evaluations of the teacher beside forward and backward of the student, which cost about three.
    per_image = [record["flops_per_second"] / record["images_per_second"] for record in records]
    assert 1.5 < per_image[1] / per_image[0] < 1.8
    evaluation = plan.flops_per_evaluation(config, teacher, facts)
    assert per_image[0] == pytest.approx(3 * evaluation, rel=0.15)
    evaluations = [32, 1, 35]  # of DDIM in 32 steps and in 1, and of Heun in 18
    assert per_image[2:] == pytest.approx([count * evaluation for count in evaluations])
    assert [(record["sampler"], record["num_steps"]) for record in sampling] == list(benchmark.SAMPLINGS)


def test_unknown_benchmarks_are_refused():
    config = resolve(digits.get_config("smoke"))
    with pytest.raises(ConfigError, match=r"--benchmarks.*'teaching'"):
        next(benchmark.run(config, print, benchmarks=("teaching",)))
    with pytest.raises(ConfigError, match=r"--dtypes.*'float16'"):
        next(benchmark.run(config, print, dtypes=("float16",)))
