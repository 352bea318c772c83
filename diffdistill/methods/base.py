"""The contract between a training method and the machinery that runs it, and what every method shares.

A batch is ``{"image": (B, H, W, C) uint8 or float32, "label": (B,) int32}``. The arguments of a step are traced int32
scalars, ARGUMENTS, so that one compiled step serves every round of a halving chain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from diffdistill.diffusion import process, weighting
from diffdistill.diffusion.schedules import Schedule
from diffdistill.models.denoiser import Denoiser

Params = Any
State = Any
Metrics = dict[str, jax.Array]
Loss = Callable[
    [Params, Any, Mapping[str, jax.Array], jax.Array, Mapping[str, jax.Array]], tuple[jax.Array, dict[str, Any]]
]

ARGUMENTS = ("num_steps", "num_updates", "num_targets")
"""Of the student's sampler; of the stage; of the targets that a generator is led to, one after another."""

RECORD = "record"
"""The entry of a loss's metrics that is no metric, but what its Memory is to keep."""

LOG_SNR_BINS = 8
_LOG_SNR_RANGE = (-20.0, 20.0)
_STREAMS = ("time", "noise", "guidance", "dropout", "label", "augmentation", "image", "latent")


class Updater(Protocol):
    """How parameters become a training state and gradients change it; ``training.state.Updater`` is one."""

    def init(self, params: Params) -> State: ...

    def apply(self, state: State, grads: Params, num_updates: jax.Array) -> tuple[State, Metrics]: ...

    def averaged(self, state: State) -> Params: ...


@dataclass(frozen=True)
class Method:
    """A way of training, as pure functions.

    Attributes:
      name: the method's name.
      init: ``(key, sources) -> state``; ``sources`` maps the role of an earlier stage ("teacher") to its parameters.
      step: ``(state, frozen, batch, key, arguments) -> (state, metrics)``: one update. ``frozen`` holds what the
        method reads and never changes; metrics are float32 scalars or short vectors and contain ``"loss"``.
      export: ``state -> params``, what the next stage and the samplers use.
    """

    name: str
    init: Callable[[jax.Array, Mapping[str, Params]], State]
    step: Callable[..., tuple[State, Metrics]]
    export: Callable[[State], Params]


@dataclass(frozen=True)
class Memory:
    """What a method keeps in the training state beside the parameters, so that a resumed run goes on with it.

    Its loss finds it as ``frozen["memory"]`` and puts what is to be remembered of each example, a tree of (B, ...),
    under RECORD into its metrics.

    Attributes:
      init: () -> the memory before the first update, a tree of arrays.
      update: (memory, record) -> the memory after an update.
    """

    init: Callable[[], Any]
    update: Callable[[Any, Any], Any]


def from_loss(
    name: str,
    init_params: Callable[[jax.Array, Mapping[str, Params]], Params],
    loss: Loss,
    updater: Updater,
    *,
    parts: int = 1,
    memory: Memory | None = None,
) -> Method:
    """A method that follows the gradient of one loss ``(params, frozen, batch, key, arguments) -> (loss, metrics)``.

    parts: number of equal parts of a batch whose gradients are taken one after the other and averaged: memory of one
    part, and the gradient of the whole batch, each part with random draws of its own.
    """

    def init(key: jax.Array, sources: Mapping[str, Params]) -> State:
        state = updater.init(init_params(key, sources))
        return state if memory is None else state.replace(memory=memory.init())

    def step(
        state: State, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array, arguments: Mapping[str, jax.Array]
    ) -> tuple[State, Metrics]:
        if memory is not None:
            frozen = {**frozen, "memory": state.memory}
        grads, metrics = gradient(loss, parts)(state.params, frozen, batch, key, arguments)
        state, more = updater.apply(state, grads, arguments["num_updates"])
        if memory is not None:
            state = state.replace(memory=memory.update(state.memory, metrics.pop(RECORD)))
        return state, {**metrics, **more}

    return Method(name, init, step, updater.averaged)


def gradient(loss: Loss, parts: int) -> Callable[..., tuple[Params, Metrics]]:
    """(params, frozen, batch, key, arguments) -> (gradient of the mean loss over all parts, mean metrics)."""
    whole = jax.grad(loss, has_aux=True)
    if parts == 1:
        return whole

    def accumulated(
        params: Params, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array, arguments: Mapping[str, jax.Array]
    ) -> tuple[Params, Metrics]:
        # Every parts-th row: with a batch sharded by rows each device then has its share of every part.
        split = jax.tree.map(lambda rows: rows.reshape(-1, parts, *rows.shape[1:]), batch)

        def add(total: Params, index: jax.Array) -> tuple[Params, Metrics]:
            part = jax.tree.map(lambda rows: rows[:, index], split)
            grads, metrics = whole(params, frozen, part, jax.random.fold_in(key, index), arguments)
            return jax.tree.map(lambda t, g: t + g / parts, total, grads), metrics

        total, metrics = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), jnp.arange(parts))
        record = {RECORD: metrics.pop(RECORD)} if RECORD in metrics else {}
        record = jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), record)
        # NaN marks what one part has no example of.
        return total, record | jax.tree.map(
            lambda rows: jnp.nanmean(rows, axis=0) if rows.ndim > 1 else rows.mean(0), metrics
        )

    return accumulated


def streams(key: jax.Array) -> dict[str, jax.Array]:
    """The fixed list of random streams of one update, folded last (spec: no chained splits)."""
    return {name: jax.random.fold_in(key, index) for index, name in enumerate(_STREAMS)}


def images(batch: Mapping[str, jax.Array]) -> jax.Array:
    """(B, H, W, C) float32 data: bytes are mapped to [-1, 1], floating-point data (latents) are taken as they are."""
    image = batch["image"]
    if image.dtype == jnp.uint8:
        return image.astype(jnp.float32) / 127.5 - 1.0
    return image.astype(jnp.float32)


def uniform(key: jax.Array, batch_size: int, *, stratified: bool) -> jax.Array:
    """(B,) draws whose marginals are U[0, 1).

    Stratified draws share one random offset and lie 1/B apart, modulo 1 (Kingma et al. 2021, appendix I.1): each
    example is still uniform, and the loss of a batch varies less with the times that it happens to hold.
    """
    if not stratified:
        return jax.random.uniform(key, (batch_size,))
    shifted = jnp.arange(batch_size) / batch_size + jax.random.uniform(key, ())
    return shifted - jnp.floor(shifted)


def guidance_weights(key: jax.Array, batch_size: int, w_min: float, w_max: float) -> jax.Array:
    """(B,) guidance weights, uniform on [w_min, w_max]."""
    return jax.random.uniform(key, (batch_size,), minval=w_min, maxval=w_max)


def labels(key: jax.Array, batch: Mapping[str, jax.Array], num_classes: int, dropout: float) -> jax.Array | None:
    """(B,) classes of a batch, a share `dropout` of them replaced by the null class `num_classes`; None without any."""
    if not num_classes:
        return None
    if not dropout:
        return batch["label"]
    dropped = jax.random.bernoulli(key, dropout, batch["label"].shape)
    return jnp.where(dropped, num_classes, batch["label"])


def shown(denoiser: Denoiser, key: jax.Array, x: jax.Array) -> jax.Array | None:
    """What a model from image to image is shown of x (B, H, W, C), for Condition.image; None for any other model."""
    return None if denoiser.task is None else denoiser.task.example(key, x)


def training_times(key: jax.Array, batch_size: int, schedule: Schedule, *, stratified: bool) -> jax.Array:
    """(B,) times in [0, 1]: uniform, or uniform over n/T, n = 1..T, for a schedule of T discrete steps."""
    return times(uniform(key, batch_size, stratified=stratified), schedule)


def times(draws: jax.Array, schedule: Schedule) -> jax.Array:
    """Times of uniform draws in [0, 1), any shape: the draws, or n/T, n = 1..T, for a schedule of T discrete steps."""
    if schedule.num_train_steps is None:
        return draws
    return (jnp.floor(draws * schedule.num_train_steps) + 1.0) / schedule.num_train_steps


def noised(key: jax.Array, x: jax.Array, log_snr: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(z, eps): data x at noise level log_snr (B,) and the noise that was added."""
    eps = jax.random.normal(key, x.shape, jnp.float32)
    return process.add_noise(x, eps, log_snr), eps


def weighted_loss(
    x_hat: jax.Array, target: jax.Array, log_snr: jax.Array, weight: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, Metrics]:
    """Mean over the batch of weight(log_snr) times the mean squared error of x_hat, and what `summary` says of it."""
    losses = weighted_losses(x_hat, target, log_snr, weight)
    return jnp.mean(losses), summary(losses, log_snr)


def weighted_losses(
    x_hat: jax.Array, target: jax.Array, log_snr: jax.Array, weight: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """(B,) losses: weight(log_snr) times the mean squared error of x_hat."""
    return weight(log_snr) * jnp.mean(jnp.square(x_hat - target), axis=tuple(range(1, x_hat.ndim)))


def summary(losses: jax.Array, log_snr: jax.Array) -> Metrics:
    """The "loss", mean of losses (B,), and the same per noise level.

    For LOG_SNR_BINS equal bins of log-SNR in [-20, 20] "loss_by_log_snr"; for the regimes coarse, content and clean-up
    (weighting.REGIMES) "loss_by_regime". NaN where the batch has no example.
    """
    regimes = jax.nn.one_hot(weighting.regime(log_snr), len(weighting.REGIMES))
    return {
        "loss": jnp.mean(losses),
        "loss_by_log_snr": by_log_snr(losses, log_snr),
        "loss_by_regime": (losses @ regimes) / jnp.sum(regimes, axis=0),
    }


def by_log_snr(
    values: jax.Array, log_snr: jax.Array, low: float = _LOG_SNR_RANGE[0], high: float = _LOG_SNR_RANGE[1]
) -> jax.Array:
    """(LOG_SNR_BINS,) means of values (B,) over equal bins of log-SNR from `low` to `high`; NaN where there is none.

    Values beyond an end count in the bin next to it.
    """
    index = jnp.clip(((log_snr - low) / (high - low) * LOG_SNR_BINS).astype(jnp.int32), 0, LOG_SNR_BINS - 1)
    member = jax.nn.one_hot(index, LOG_SNR_BINS)
    return (values @ member) / jnp.sum(member, axis=0)
