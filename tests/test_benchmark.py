"""--mode=benchmark: the rates of the programs that train, sample, read and judge."""

import dataclasses

import pytest

from configs import digits
from diffdistill import benchmarks, chain, plan, samplers
from diffdistill.benchmarks import device, table, where
from diffdistill.config import Config, ConfigError, resolve
from diffdistill.diffusion import schedules

FACTS = chain.DataFacts((8, 8, 1), 10)


def settings() -> Config:
    """The smoke variant of the digits with one level, no attention and no loop on the device: what compiles fast."""
    config = digits.get_config("smoke")
    config.model.multipliers, config.model.attention_resolutions = (1,), ()
    config.training.updates_per_call = 1
    return resolve(config)


def measured(*names: str, dtypes: tuple[str, ...] = ("float32",), traced: int = 0) -> tuple[list, list[str]]:
    said: list[str] = []
    options = {"benchmarks": names, "dtypes": dtypes, "seconds": 0.0, "traced": traced}
    return list(benchmarks.run(settings(), said.append, **options)), said


def test_rates_are_those_of_the_updates_and_the_floors_those_of_the_device():
    config = settings()
    records, said = measured("teacher", dtypes=benchmarks.DTYPES)
    assert [record["dtype"] for record in records] == list(benchmarks.DTYPES)
    for record, text in zip(records, said, strict=True):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=record["dtype"]))
        stage = chain.plan(changed)[0]
        assert record["flops"] == plan.flops_per_update(changed, stage, FACTS)
        assert record["images_per_second"] == pytest.approx(stage.settings.batch_size / record["seconds"])
        assert record["flops_per_second"] == pytest.approx(record["flops"] / record["seconds"])
        assert record["share_of_matmul"] == pytest.approx(
            record["flops_per_second"] / record["matmul_flops_per_second"]
        )
        assert record["share_of_published"] is None  # of a CPU no data sheet is known
        assert record["floor_by_flops"] == pytest.approx(record["flops"] / record["matmul_flops_per_second"])
        assert record["floor_by_bytes"] == pytest.approx(record["bytes"] / record["memory_bytes_per_second"])
        assert record["gap"] == record["seconds"] / max(record["floor_by_flops"], record["floor_by_bytes"])
        assert f"{record['images_per_second']:.4g} images/s" in text
        assert "% of the" in text
        # An update reads the parameters and writes them, with two moments and an average beside them.
        size = 4 * chain.denoiser_of(changed, stage, FACTS).num_parameters()
        assert record["program_memory"] > 4 * size
        assert record["bytes"] > 8 * size
    shown = table.markdown(records).splitlines()
    assert len(shown) == 2 + len(records)
    assert {row.count("|") for row in shown} == {shown[0].count("|")}


def test_where_the_time_of_an_update_goes():
    (record,), said = measured("teacher", traced=2)
    found = record["where"]
    assert min(found["convolutions"]["forward"], found["convolutions"]["backward"]) > 0
    assert min(found["norms"]["forward"], found["norms"]["backward"], found["other"]["update"]) > 0
    assert not any(found["dropout"].values())  # this network drops nothing
    shown = said[1].splitlines()
    assert {row.count("|") for row in shown} == {len(where.DIRECTIONS) + 3}
    total = sum(sum(part.values()) for part in found.values())
    assert f"{1000 * total:.2f} |" in shown[-1]


def test_a_profiler_that_sees_nothing_says_so():
    assert "saw nothing" in where.table(where.by_part("", {"another": 1.0}))


def test_operations_are_told_apart_by_their_names():
    program = """HloModule jit_call

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %m = f32[4]{0} multiply(%p, %p), metadata={op_name="jit(call)/transpose(jvp(UNet))/norm1/mul"}
}

ENTRY %main.1 (x: f32[4]) -> (f32[4], u8[0]) {
  %x = f32[4]{0} parameter(0)
  %conv.1 = (f32[4]{0}, u8[0]{0}) custom-call(%x), metadata={op_name="jvp(UNet)/conv1/conv_general_dilated"}
  %conv.2 = f32[4]{0} convolution(%x, %x)
  %fusion.1 = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  %adam = f32[4]{0} add(%x, %x), metadata={op_name="jit(call)/add"}
  %loop = f32[4]{0} while(%x), condition=%c, body=%b
  ROOT %copy.1 = f32[4]{0} copy(%x)
}
"""
    seen = {"conv.1": 1.0, "conv.2": 2.0, "fusion.1": 4.0, "adam": 8.0, "loop": 16.0, "copy.1": 32.0, "another": 64.0}
    found = where.by_part(program, seen)
    assert {(part, way): s for part, each in found.items() for way, s in each.items() if s} == {
        ("convolutions", "forward"): 1.0,
        ("convolutions", "unnamed"): 2.0,
        ("norms", "backward"): 4.0,
        ("other", "update"): 8.0,
        ("other", "unnamed"): 32.0,
    }


def test_the_rates_of_a_device_are_plausible():
    """A core of the last twenty years makes between 1e9 and 1e14 operations, and moves 1e8 to 1e12 bytes, a second."""
    assert 1e9 < device.matmul_rate("float32", large=False) < 1e14
    assert 1e8 < device.memory_rate(large=False) < 1e12


def test_every_way_of_training_runs_at_the_teachers_batch():
    records, _ = measured("teacher", "guided", "halving", "distillation")
    assert [record["benchmark"] for record in records] == ["teacher", "guided", "halving", "distillation"]
    config = settings()
    teacher, guided, halving, distillation = records
    assert {record["batch_size"] for record in records} == {config.teacher.batch_size}
    for record in (guided, halving, distillation):
        assert record["cost_of_teacher"] == pytest.approx(record["seconds"] / teacher["seconds"])
    # Forward and backward of a network cost about three evaluations. Beside those of the student: two of the teacher
    # (with and without class, or two steps); or, of a generator, an update of the fake denoiser on its sample (1 + 3)
    # and a sample (1, its backward pass 2) that two denoisers judge (2).
    evaluation = config.teacher.batch_size * plan.flops_per_evaluation(config, chain.plan(config)[0], FACTS)
    evaluations = [record["flops"] / evaluation for record in records]
    assert evaluations == pytest.approx([3, 5, 5, 9], rel=0.15)


def test_the_teacher_at_other_sizes():
    records, said = measured("growth")
    batch = settings().teacher.batch_size
    sizes = [(record["batch_size"], record["image_shape"][0]) for record in records]
    assert sizes == [(batch // 4, 8), (batch // 2, 8), (batch, 8), (batch, 4), (batch, 16)]
    assert 4 <= records[-1]["flops"] / records[2]["flops"] < 8  # the attention in the middle grows faster
    assert "teacher at 16x16 on 1 devices" in said[-1]


def test_every_sampler_that_a_teacher_has_is_measured():
    records, _ = measured("sampling")
    config = settings()
    assert schedules.get(config.process.schedule).num_train_steps is None
    continuous = set(samplers.SAMPLERS) - set(samplers.FIXED_STEPS)
    assert {record["sampler"] for record in records} == continuous
    steps = {name: [r["num_steps"] for r in records if r["sampler"] == name] for name in continuous}
    assert steps.pop("one_step") == [1]
    assert set(map(tuple, steps.values())) <= {(1, 4, 18), (4, 18)}
    evaluation = plan.flops_per_evaluation(config, chain.plan(config)[0], FACTS)
    per_image = {(r["sampler"], r["num_steps"]): r["flops"] / r["batch_size"] for r in records}
    assert per_image["ddim", 4] == pytest.approx(4 * evaluation)
    assert per_image["heun", 18] == pytest.approx(35 * evaluation)


def test_what_feeds_and_judges_is_measured():
    records, said = measured("inputs", "features")
    assert [record["what"] for record in records] == [
        "read",
        "read, mirrored",
        "augmented on the devices",
        "training from the data",
        "classifier",
        "Inception",
    ]
    assert all(record["images_per_second"] > 0 for record in records)
    assert 0 <= records[3]["waiting"] < 1
    assert "of the time is spent waiting" in said[3]


def test_what_cannot_be_measured_is_refused():
    config = settings()
    with pytest.raises(ConfigError, match=r"--benchmarks.*'teaching'"):
        next(benchmarks.run(config, print, benchmarks=("teaching",)))
    with pytest.raises(ConfigError, match=r"--dtypes.*'float16'"):
        next(benchmarks.run(config, print, dtypes=("float16",)))
    unguided = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, label_dropout=0.0))
    with pytest.raises(ConfigError, match="guided needs a teacher with a null class"):
        list(benchmarks.run(unguided, print, benchmarks=("guided",), dtypes=("float32",)))
