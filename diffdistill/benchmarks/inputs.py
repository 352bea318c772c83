"""The rates of what feeds the programs and of what judges their images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffdistill import chain, plan, runner
from diffdistill.benchmarks import device, training
from diffdistill.config import Config
from diffdistill.data import augmentation
from diffdistill.data.contract import Source
from diffdistill.data.pipeline import Batches
from diffdistill.evaluation import features, inception, results
from diffdistill.methods.base import ARGUMENTS
from diffdistill.training import mesh as meshes
from diffdistill.training.loop import MAX_IN_FLIGHT
from diffdistill.training.prefetch import AHEAD, Calls

_IMAGES = 4096  # drawn, where a config has no data yet
AUGMENTED = 0.12  # the probability of EDM's configuration F


def pipeline(config: Config, facts: chain.DataFacts, mesh: Mesh, seconds: float) -> Iterator[results.Record]:
    """Images a second that one process reads and stacks, plain and mirrored, and that the devices augment."""
    source, size = _source(config, facts), config.teacher.batch_size
    for flip in (False, True):
        batches = Batches(source, size, 0, flip, *meshes.process_slice(size))
        number = iter(range(10**9))
        rate = device.calls_per_second(lambda batches=batches, number=number: batches(next(number)), seconds)
        yield {
            "what": "read, mirrored" if flip else "read",
            "data": source.name,
            "batch_size": size,
            "images_per_second": rate * size,
            "seconds": 1 / rate,
        }
    rows = meshes.batch_sharding(mesh)
    images = jax.device_put(np.zeros((size, *facts.image_shape), np.float32), rows)
    program = device.compiled(
        jax.jit(lambda key, images: augmentation.augment(key, images, probability=AUGMENTED)), jax.random.key(0), images
    )
    rate = device.calls_per_second(lambda: program.run(jax.random.key(0), images), seconds)
    yield {
        "what": "augmented on the devices",
        "batch_size": size,
        "images_per_second": rate * size,
        "seconds": 1 / rate,
        "bytes": program.bytes_accessed,
        "compile_seconds": program.compile_seconds,
        "compile_cached": program.cached,
        "program_memory": program.memory,
    }


def wait(config: Config, facts: chain.DataFacts, mesh: Mesh, seconds: float) -> results.Record:
    """How much faster a teacher's training would be if its batches were there already, as a share of its time.

    As in the training loop, batches are read while calls of the device are in flight; the same calls on one batch that
    stays on the devices say what the device alone takes. The share is negative where the two differ by chance alone.
    """
    config, stage = training.with_stage(config, "teacher")
    method = chain.method_of(config, stage, facts)
    key, size = jax.random.key(0), stage.settings.batch_size
    step = runner.compile_method(config, method, mesh, jax.eval_shape(method.init, key, {}))
    state = meshes.place(jax.jit(method.init)(key, {}), step.state_sharding)
    arguments = meshes.replicate(mesh, {name: jnp.int32(1) for name in ARGUMENTS})
    flag = meshes.per_device_flag(mesh, False)
    batches = Batches(_source(config, facts), size, 0, config.data.flip, *meshes.process_slice(size))
    calls = Calls(batches, mesh, 0, 10**9, step.updates_per_call, 0)

    def seconds_an_update(stacks: Iterator[tuple[int, int, Any]]) -> float:
        def call() -> Any:
            nonlocal state
            _, count, rows = next(stacks)
            state, metrics, _ = step.function(state, {}, rows, key, arguments, np.int32(count), flag)
            return metrics

        # So many stacks may lie there already, read for nothing.
        rate = device.calls_per_second(call, seconds, untimed=AHEAD + 1, in_flight=MAX_IN_FLIGHT)
        return 1 / (rate * step.updates_per_call)

    try:
        alone = seconds_an_update(itertools.repeat(next(iter(calls))))
        spent = seconds_an_update(iter(calls))
    finally:
        calls.close()
    return {
        "what": "training from the data",
        "batch_size": size,
        "images_per_second": size / spent,
        "seconds": spent,
        "waiting": 1.0 - alone / spent,
    }


def networks(facts: chain.DataFacts, seconds: float) -> Iterator[results.Record]:
    """Images a second of the networks that judge images: the classifier of small images and Inception, untrained.

    Both compute in float32 without faster passes, on one device.
    """
    drawn = np.random.default_rng(0).integers(0, 256, (features.APPLY_BATCH, *facts.image_shape), dtype=np.uint8)
    classes = max(facts.num_classes, 2)
    variables = features.Classifier(classes).init(jax.random.key(0), drawn[:1])
    judge = lambda variables, images: features.Classifier(classes).apply(variables, images)  # noqa: E731
    yield _network("classifier", judge, variables, drawn, seconds)
    shapes = jax.eval_shape(inception.InceptionV3().init, jax.random.key(0), jnp.zeros((1, 299, 299, 3)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    few = drawn[: features.APPLY_BATCH if meshes.is_accelerator(meshes.make_mesh()) else 8]
    extract = lambda variables, images: inception.apply(variables, images, "tf", ("2048",))  # noqa: E731
    yield _network("Inception", extract, zeros, few, seconds)


def _network(
    name: str, network: Callable[..., Any], variables: Any, images: np.ndarray, seconds: float
) -> results.Record:
    program = device.compiled(jax.jit(network), variables, images)
    rate = device.calls_per_second(lambda: program.run(variables, images), seconds)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (variables, images))
    return {
        "what": name,
        "dtype": "float32",
        "devices": 1,
        "batch_size": len(images),
        "images_per_second": rate * len(images),
        "seconds": 1 / rate,
        "flops": plan.counted(network, *abstract),
        "bytes": program.bytes_accessed,
        "compile_seconds": program.compile_seconds,
        "compile_cached": program.cached,
        "program_memory": program.memory,
    }


def _source(config: Config, facts: chain.DataFacts) -> Source:
    """The images of the config; random ones before it has any."""
    if config.data.source == "digits" or config.data.path:
        return runner.open_data(config)[0]
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (_IMAGES, *facts.image_shape), dtype=np.uint8)
    labels = random.integers(0, max(facts.num_classes, 1), _IMAGES, dtype=np.int32)
    names = tuple(map(str, range(facts.num_classes)))
    read = lambda index: (images[index], int(labels[index]))  # noqa: E731
    return Source("random images", facts.image_shape, names, _IMAGES, read, lambda: "", images, labels)
