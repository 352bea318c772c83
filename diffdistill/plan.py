"""What a run will do, before it does it: stages, parameters, memory and FLOPs, all computed abstractly."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffdistill import chain, runner
from diffdistill import config as configs
from diffdistill.chain import DataFacts, Stage
from diffdistill.config import Config, DisbackConfig
from diffdistill.methods.base import ARGUMENTS, shown
from diffdistill.models.denoiser import Condition, Denoiser
from diffdistill.training import mesh as meshes


def summary(run: runner.Run) -> str:
    """The first line of a run: devices, data, parameters, plan."""
    config, facts = run.config, run.facts
    denoiser = chain.denoiser_of(config, run.stages[-1], facts)
    size = "x".join(str(n) for n in facts.image_shape)
    updates = sum(stage.num_updates for stage in run.stages)
    return (
        f"{config.name}: {meshes.describe(run.mesh)} | {run.source.name}, {len(run.source)} images {size}, "
        f"{facts.num_classes} classes | {readable(denoiser.num_parameters())} parameters | "
        f"{len(run.stages)} stages, {updates} updates | {run.workdir.path}"
    )


def describe(config: Config) -> str:
    """The resolved config, every tensor, and the stages with their parameters, FLOPs and memory. Trains nothing."""
    facts, images = data_facts(config)
    stages = chain.plan(config)
    lines = [json.dumps(configs.to_dict(config), indent=2), ""]
    lines += [f"parameters of {stages[-1].name}:", _tensors(config, stages[-1], facts), ""]
    lines.append(f"data: {images} {facts.image_shape}, {facts.num_classes} classes")
    lines.append(f"devices here: {meshes.describe(meshes.make_mesh())}")
    lines.append("")
    head = ("stage", "learns from", "steps", "updates", "batch", "parameters", "FLOPs/update", "FLOPs", "memory")
    rows: list[tuple[str, ...]] = [head]
    total = 0.0
    for stage in stages:
        flops = flops_per_update(config, stage, facts)
        total += flops * stage.num_updates
        rows.append(
            (
                stage.name,
                stage.teacher or "data",
                str(stage.num_steps or "-"),
                str(stage.num_updates),
                str(stage.settings.batch_size),
                readable(chain.denoiser_of(config, stage, facts).num_parameters()),
                readable(flops),
                readable(flops * stage.num_updates),
                readable_bytes(memory(config, stage, facts)),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("")
    lines.append(f"FLOPs in all: {readable(total)}")
    lines.append(
        "memory: parameters, optimiser, average and teacher on every device (with config.training.shard_state a share "
        "of optimiser and average), plus what the backward pass keeps of the whole batch, which is shared among the "
        "devices; an upper bound, since the compiler fuses."
    )
    return "\n".join(lines)


def data_facts(config: Config) -> tuple[DataFacts, str]:
    """Shape and classes of the images: of the data, or, before there is a path, what the config is made for."""
    data = config.data
    if data.source == "digits" or data.path or len(data.image_shape) != 3:
        source, facts = runner.open_data(config)
        return facts, f"{source.name}, {len(source)} images"
    height, width, channels = data.image_shape
    return DataFacts((height, width, channels), data.num_classes), "not given yet (config.data.path), expected images"


def _tensors(config: Config, stage: Stage, facts: DataFacts) -> str:
    """Every tensor of a stage's network with its shape."""
    from clu import parameter_overview

    shapes = chain.denoiser_of(config, stage, facts).shapes()
    return parameter_overview.get_parameter_overview(shapes, include_stats=False, max_lines=None)


def flops_per_update(config: Config, stage: Stage, facts: DataFacts) -> float:
    """Floating-point operations of one update of the whole batch, as XLA counts them before optimisation."""
    # XLA counts the body of a loop over parts once; the whole batch at once has the same operations.
    settings = dataclasses.replace(stage.settings, parts=1)
    config = _countable(dataclasses.replace(config, **{stage.group: settings}))
    stage = dataclasses.replace(stage, settings=settings)
    return _flops(config, chain.method_of(config, stage, facts), settings.batch_size, facts)


@functools.cache
def _flops(config: Config, method: Any, batch_size: int, facts: DataFacts) -> float:
    state, teacher = _abstract(config, method, facts)
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, *facts.image_shape), jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    # A function of its own: the trace of the step that training compiles stays the only one of its kind.
    step = lambda *arguments: method.step(*arguments)  # noqa: E731
    return counted(step, state, teacher, batch, key, dict.fromkeys(ARGUMENTS, scalar))


def flops_per_evaluation(config: Config, stage: Stage, facts: DataFacts) -> float:
    """Floating-point operations of one evaluation of a stage's network for one image."""
    denoiser = chain.denoiser_of(_countable(config), stage, facts)

    def evaluate(params: Any, z: jax.Array, log_snr: jax.Array, label: jax.Array, w: jax.Array) -> jax.Array:
        return denoiser(params, z, log_snr, _condition(denoiser, stage, z, label, w))

    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    return counted(
        evaluate,
        denoiser.shapes(),
        jax.ShapeDtypeStruct((1, *facts.image_shape), jnp.float32),
        one,
        jax.ShapeDtypeStruct((1,), jnp.int32),
        one,
    )


def _countable(config: Config) -> Config:
    """The config with attention written out: what XLA counts has no kernels of a vendor in it."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla"))


def counted(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of a function of abstract arguments, as it would run on a CPU: GPUs do not count."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        analysis = jax.jit(function).lower(*arguments).cost_analysis()
    return float(analysis["flops"]) if analysis else math.nan


def _condition(denoiser: Denoiser, stage: Stage, z: jax.Array, label: jax.Array, w: jax.Array) -> Condition:
    """What the network of a stage takes beside z."""
    return Condition(
        label=label if denoiser.num_classes else None,
        guidance=w if stage.conditioned_on_guidance else None,
        image=shown(denoiser, jax.random.key(0), z),
    )


def _abstract(config: Config, method: Any, facts: DataFacts) -> tuple[Any, Any]:
    """Shapes of a method's state and of what it reads, from the shapes of its teacher."""
    stages = chain.plan(config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    for stage in stages:
        if chain.method_of(config, stage, facts) is method:
            before = next((each for each in stages if each.name == stage.teacher), stage)
            params = chain.denoiser_of(config, before, facts).shapes()
            starts, frozen = roles(stage)
            state = jax.eval_shape(method.init, key, dict.fromkeys(starts, params))
            return state, dict.fromkeys(frozen, params)
    raise AssertionError("a method of another config")


def roles(stage: Stage) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The roles of the networks that a stage starts from, and of those that its step reads."""
    if stage.method == "degradation":
        return ("teacher",), ("generator",)
    if stage.group == "disback":
        return ("generator", "fake"), ("teacher",)
    return (("teacher",), ("teacher",)) if stage.teacher else ((), ())


def memory(config: Config, stage: Stage, facts: DataFacts) -> int:
    """Bytes of the training state, the teacher and what the student's backward pass keeps for a part of the batch."""
    method = chain.method_of(config, stage, facts)
    state, frozen = _abstract(config, method, facts)
    denoiser = chain.denoiser_of(config, stage, facts)
    size = stage.settings.batch_size // stage.settings.parts

    def residuals(params: Any, z: jax.Array, log_snr: jax.Array, label: jax.Array, w: jax.Array) -> Any:
        condition = _condition(denoiser, stage, z, label, w)
        return jax.vjp(lambda params: denoiser(params, z, log_snr, condition), params)[1]

    vector = jax.ShapeDtypeStruct((size,), jnp.float32)
    kept = jax.eval_shape(
        residuals,
        state.params,
        jax.ShapeDtypeStruct((size, *facts.image_shape), jnp.float32),
        vector,
        jax.ShapeDtypeStruct((size,), jnp.int32),
        vector,
    )
    # The residuals include the parameters themselves, which the state holds already.
    gradients = _bytes(state.params) * (2 if stage.settings.parts > 1 else 1)  # of the part, and their sum so far
    activations = max(0, _bytes(kept) - _bytes(state.params))
    if isinstance(stage.settings, DisbackConfig) and stage.method != "degradation":
        if stage.settings.path > 1:
            frozen = (frozen, frozen)  # the next target is read while one is in use
        if stage.settings.signal == "sid":
            activations *= 3  # the gradient passes through both denoisers too
    kept = _bytes_per_device(state) if config.training.shard_state else _bytes(state)
    return kept + _bytes(frozen) + activations + gradients


def _bytes_per_device(state: Any) -> int:
    """Of a training state that is spread over the devices here."""
    spread = meshes.state_sharding(meshes.make_mesh(), state)
    sizes = jax.tree.map(lambda leaf, s: math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize, state, spread)
    return sum(jax.tree.leaves(sizes))


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def readable(number: float) -> str:
    """1234567 -> "1.23 M"."""
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g} {unit}" if abs(number) < 1000 * limit else f"{number / limit:.0f} {unit}"
    return f"{number:.3g}"


def readable_bytes(number: int) -> str:
    """Bytes as "1.5 GiB"."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:.3g} {unit}"
    return f"{number} B"
