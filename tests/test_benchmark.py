"""--mode=benchmark: the rates of the teacher's own program, in both types."""

import dataclasses

import pytest

from configs import digits
from diffdistill import benchmark, chain, plan
from diffdistill.config import resolve
from diffdistill.training import mesh as meshes


def test_rates_are_those_of_the_teachers_updates():
    config = resolve(digits.get_config("smoke"))
    said: list[str] = []
    records = benchmark.run(config, said.append, seconds=0.0)
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
