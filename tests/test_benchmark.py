"""--mode=benchmark: the rates of the programs that train, sample, read and judge."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from configs import digits
from diffdistill import benchmarks, chain, plan, samplers
from diffdistill.benchmarks import device, table, where
from diffdistill.config import Config, ConfigError, resolve
from diffdistill.diffusion import schedules
from diffdistill.training import mesh as meshes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
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
        assert record["seconds_of_flops"] == pytest.approx(record["flops"] / record["matmul_flops_per_second"])
        assert record["seconds_of_bytes"] == pytest.approx(record["bytes"] / record["memory_bytes_per_second"])
        assert record["gap"] == record["seconds"] / max(record["seconds_of_flops"], record["seconds_of_bytes"])
        assert record["matmul_flops_per_second"] == pytest.approx(sum(record["rates"]["matmul"]) / 2)
        assert record["memory_bytes_per_second"] == pytest.approx(sum(record["rates"]["memory"]) / 2)
        assert record["wall_seconds"] > record["compile_seconds"]
        assert record["peak_memory"] is None  # CPUs do not say
        assert f"{record['images_per_second']:.4g} images/s" in text
        assert "% of the" in text
        # An update reads the parameters and writes them, with two moments and an average beside them.
        size = 4 * chain.denoiser_of(changed, stage, FACTS).num_parameters()
        assert record["program_memory"] > 4 * size
        assert record["bytes"] > 8 * size
    shown, *rates = table.markdown(records).split("\n\n")
    assert len(shown.splitlines()) == 2 + len(records)
    assert {row.count("|") for row in shown.splitlines()} == {shown.splitlines()[0].count("|")}
    assert [text.split(":")[0] for text in rates] == [f"One device, {dtype}" for dtype in benchmarks.DTYPES]


def test_bytes_of_a_batch_in_parts_are_not_known():
    """The compiler counts the body of a loop once: the FLOPs are counted of the whole batch, the bytes cannot be."""
    config = settings()
    whole = next(benchmarks.run(config, print, dtypes=("float32",), seconds=0.0))
    config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, parts=4))
    (record,) = benchmarks.run(config, print, dtypes=("float32",), seconds=0.0)
    assert record["parts"] == 4
    assert record["flops"] == whole["flops"]
    assert record["bytes"] is None
    assert record["seconds_of_bytes"] is None
    assert record["gap"] == record["seconds"] / record["seconds_of_flops"]
    assert table.markdown([record])


def test_a_peak_of_memory_is_that_of_the_measurement_or_not_told(monkeypatch):
    monkeypatch.setattr(device, "peak_memory", lambda mesh: 100)
    assert device.risen(meshes.make_mesh(), 60) == 100
    assert device.risen(meshes.make_mesh(), 100) is None  # what came before has held as much
    monkeypatch.setattr(device, "peak_memory", lambda mesh: None)
    assert device.risen(meshes.make_mesh(), None) is None


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
    assert "saw nothing" in where.table(where.by_part("", {("another", "another"): 1.0}))


def test_operations_are_told_apart_by_their_names():
    program = """HloModule jit_call

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %m = f32[4]{0} multiply(%p, %p), metadata={op_name="jit(call)/transpose(jvp(UNet))/norm1/mul"}
}

%fused.2 (p: f32[4]) -> f32[4] {
  %p.2 = f32[4]{0} parameter(0)
  ROOT %convolution.3 = f32[4]{0} convolution(%p.2, %p.2), dim_labels=b01f_01io->b01f
}

ENTRY %main.1 (x: f32[4]) -> (f32[4], u8[0]) {
  %x = f32[4]{0} parameter(0)
  %conv.1 = (f32[4]{0}, u8[0]{0}) custom-call(%x), metadata={op_name="jvp(UNet)/conv1/conv_general_dilated"}
  %conv.2 = f32[4]{0} convolution(%x, %x)
  %fusion.1 = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  %ynn_fusion.1 = f32[4]{0} fusion(%x), kind=kCustom, calls=%fused.2
  %adam = f32[4]{0} add(%x, %x), metadata={op_name="jit(call)/add"}
  %loop = f32[4]{0} while(%x), condition=%c, body=%b
  ROOT %copy.1 = f32[4]{0} copy(%x)
}
"""
    seen = {"conv.1": 1.0, "conv.2": 2.0, "fusion.1": 4.0, "adam": 8.0, "loop": 16.0, "copy.1": 32.0, "another": 64.0}
    seen["ynn_fusion.1"] = 128.0
    found = where.by_part(program, {(name, name): seconds for name, seconds in seen.items()})
    assert {(part, way): s for part, each in found.items() for way, s in each.items() if s} == {
        ("convolutions", "forward"): 1.0,
        ("convolutions", "unnamed"): 130.0,
        ("norms", "backward"): 4.0,
        ("other", "update"): 8.0,
        ("other", "unnamed"): 32.0,
    }


def test_what_a_gpu_launches_together_is_told_apart_by_its_kernels():
    """Names as jax 0.11.2 and cuDNN gave them on an H200: all that a CUDA graph does is one operation there."""
    program = """ENTRY %main.1 (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %cudnn-conv-bw-filter.3 = f32[4]{0} custom-call(%x), metadata={op_name="transpose(jvp(UNet))/conv_general_dilated"}
  %loop_add_fusion.19 = f32[4]{0} add(%x, %x), metadata={op_name="jvp(UNet)/norm1/add"}
  ROOT %wrapped_concatenate.18 = f32[4]{0} add(%x, %x), metadata={op_name="jit(call)/add"}
}
"""
    wgrad = "sm90_xmma_wgrad_indexed_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize256x128x64"
    seen = {
        ("cudnn-conv-bw-filter.3", wgrad): 1.0,
        ("cudnn-conv-bw-filter.3", "Memset 3"): 2.0,  # of the operation, since the profiler says so
        ("command_buffer_7", "loop_add_fusion_19"): 4.0,
        ("command_buffer", "wrapped_concatenate_18"): 8.0,
        ("command_buffer_7", wgrad): 16.0,
        ("command_buffer_7", "nvjet_sm90_tst_128x160_64x5_2x1_v_bz_NNT"): 32.0,
        ("command_buffer_7", "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26"): 64.0,
        ("command_buffer_7", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7"): 128.0,
        ("command_buffer_7", "memcpy128"): 256.0,
        ("another", "loop_add_fusion_19"): 512.0,
    }
    found = where.by_part(program, seen)
    assert {(part, way): s for part, each in found.items() for way, s in each.items() if s} == {
        ("convolutions", "backward"): 19.0,
        ("norms", "forward"): 4.0,
        ("other", "update"): 8.0,
        ("matrix products", "unnamed"): 32.0,
        ("attention", "backward"): 64.0,
        ("attention", "forward"): 128.0,
        ("other", "unnamed"): 256.0,
    }


def test_as_many_calls_as_in_training_are_in_flight():
    events: list[tuple[str, int]] = []

    class Result:
        def __init__(self) -> None:
            self.number = len([event for event, _ in events if event == "begun"])
            events.append(("begun", self.number))

        def block_until_ready(self) -> None:
            events.append(("waited for", self.number))

    device.calls_per_second(Result, 0.0, in_flight=1)
    untimed, timed = events[:2], events[2:]
    assert untimed == [("begun", 0), ("waited for", 0)]
    assert timed == [("begun", 1), ("begun", 2), ("waited for", 1), ("waited for", 2)]


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
    records, said = measured("batches", "sides")
    batch = settings().teacher.batch_size
    sizes = [(record["batch_size"], record["image_shape"][0]) for record in records]
    assert sizes == [(batch // 4, 8), (batch // 2, 8), (batch, 8), (batch, 4), (batch, 16)]
    assert 4 <= records[4]["flops"] / records[2]["flops"] < 8  # the attention in the middle grows faster
    assert "teacher at 16x16 on 1 devices" in said[4]


def test_devices_are_doubled_where_they_divide_the_batch():
    program = """if True:
        import test_benchmark
        from diffdistill.benchmarks import training
        from diffdistill.training import mesh
        for batch in (12, 18):
            config = test_benchmark.settings()
            teacher = test_benchmark.dataclasses.replace(config.teacher, batch_size=batch)
            config = test_benchmark.dataclasses.replace(config, teacher=teacher)
            sizes = training.SIZES["devices"](config, test_benchmark.FACTS, mesh.make_mesh())
            print([devices.size for _, _, devices in sizes])
    """
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "6", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[1, 2, 4, 6]", "[1, 2, 6]"]


def test_every_sampler_that_a_teacher_has_is_measured():
    records, said = measured("sampling")
    config = settings()
    assert schedules.get(config.process.schedule).num_train_steps is None
    continuous = set(samplers.SAMPLERS) - set(samplers.FIXED_STEPS)
    assert {record["sampler"] for record in records} == continuous
    left_out = [text for text in said if text.startswith("Left out: ")]
    assert [text.split(": ")[1] for text in left_out] == [
        "respaced in 1, 4, 18 steps",
        "respaced_ddim in 1, 4, 18 steps",
        "one_step in 4, 18 steps",
    ]
    assert "'cosine' has none" in left_out[0]
    assert all((r["compile_seconds"] is not None) == (r["num_steps"] == 1) for r in records)
    steps = {name: [r["num_steps"] for r in records if r["sampler"] == name] for name in continuous}
    assert steps.pop("one_step") == [1]
    assert set(map(tuple, steps.values())) <= {(1, 4, 18), (4, 18)}
    evaluation = plan.flops_per_evaluation(config, chain.plan(config)[0], FACTS)
    per_image = {(r["sampler"], r["num_steps"]): r["flops"] / r["batch_size"] for r in records}
    assert per_image["ddim", 4] == pytest.approx(4 * evaluation)
    assert per_image["heun", 18] == pytest.approx(35 * evaluation)


def test_one_sampler_in_other_steps():
    options = {"benchmarks": ("sampling",), "dtypes": ("float32",), "seconds": 0.0}
    records = benchmarks.run(settings(), print, **options, steps=(2, 3), sampler="euler")
    assert [(record["sampler"], record["num_steps"]) for record in records] == [("euler", 2), ("euler", 3)]


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
    assert -1 < records[3]["waiting"] < 1  # below 0 where nothing waits and chance decides
    assert "of the time is spent waiting" in said[3]
    classifier, inception = records[4:]
    assert classifier["devices"] == inception["devices"] == 1
    assert 10e9 < inception["flops"] / inception["batch_size"] < 13e9  # 5.7 G multiplications and additions
    assert min(classifier["flops"], classifier["bytes"], inception["bytes"]) > 0
    assert 0 < inception["share_of_matmul"] < 1.5


def test_what_cannot_be_measured_is_refused():
    config = settings()
    with pytest.raises(ConfigError, match=r"--benchmarks.*'teaching'"):
        next(benchmarks.run(config, print, benchmarks=("teaching",)))
    with pytest.raises(ConfigError, match=r"--dtypes.*'float16'"):
        next(benchmarks.run(config, print, dtypes=("float16",)))
    unguided = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, label_dropout=0.0))
    with pytest.raises(ConfigError, match="guided needs a teacher with a null class"):  # before the teacher is measured
        next(benchmarks.run(unguided, print, benchmarks=("teacher", "guided"), dtypes=("float32",)))
    with pytest.raises(ConfigError, match=r"--benchmark_steps is \[4, 0\]"):
        next(benchmarks.run(config, print, benchmarks=("sampling",), steps=(4, 0)))
    with pytest.raises(ConfigError, match=r"--sampler.*'dim'"):
        next(benchmarks.run(config, print, benchmarks=("sampling",), sampler="dim"))


def commands() -> list[str]:
    texts = [(ROOT / name).read_text().replace("\\\n", " ") for name in ("README.md", "benchmarks/README.md")]
    found = [each for text in texts for each in re.findall(r"python main\.py --mode=benchmark[^`\n]*", text)]
    return list(dict.fromkeys(found))


def test_there_are_commands():
    assert len(commands()) >= 6


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_can_be_measured(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command)[1:]
    own = [each for each in arguments if not each.startswith("--config")]
    asked = dict(each.removeprefix("--").split("=", 1) for each in own if each.startswith("--"))
    assert set(asked) <= {"mode", "benchmarks", "dtypes", "benchmark_seconds", "benchmark_steps", "sampler", "traced"}
    values = flags.FlagValues()
    command_line = ["main.py", *(each for each in arguments if each.startswith("--config"))]
    sys.modules.pop("config_config", None)  # the config file of the parse before
    monkeypatch.setattr(sys, "argv", command_line)  # where ml_collections looks for overrides
    config_flags.DEFINE_config_file("config", "configs/digits.py", flag_values=values)
    values(command_line)
    dtypes = asked.get("dtypes", "float32,bfloat16").split(",")
    steps = [int(number) for number in asked.get("benchmark_steps", "1,4,18").split(",")]
    names = asked.get("benchmarks", "teacher").split(",")
    benchmarks.check(resolve(values.config), names, dtypes, steps, asked.get("sampler", ""))


@pytest.mark.parametrize("to_file", [False, True])
def test_records_are_printed_or_appended(tmp_path, to_file):
    out = tmp_path / "records.jsonl"
    command = [sys.executable, "main.py", "--mode=benchmark", "--config=configs/digits.py:smoke", "--dtypes=float32"]
    command += ["--benchmarks=sampling", "--sampler=one_step", "--benchmark_steps=1", "--benchmark_seconds=0"]
    command += [f"--out={out}"] * to_file
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    printed = [text for text in done.stdout.splitlines() if text.startswith("{")]
    (text,) = out.read_text().splitlines() if to_file else printed
    assert json.loads(text)["sampler"] == "one_step"
    assert bool(printed) != to_file
    assert "| one_step in 1 steps |" in done.stdout
    assert "The whole command took" in done.stdout
