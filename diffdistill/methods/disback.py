"""One-step generators: Diff-Instruct (Luo et al. 2023) and DisBack (Zhang et al. 2025, "distribution backtracking").

Three networks have three roles: the generator, the frozen teacher, and the fake denoiser, which learns the generator's
own distribution. The generator follows a signal made of the two denoisers (methods.score_distillation).

DisBack is two stages. `degradation` records how the teacher turns into a denoiser of the initial generator's samples
(algorithm 1); `distillation` starts its fake denoiser there and takes the recorded checkpoints as teachers, last one
first, until it is the teacher itself (algorithm 2; methods.walk). Without a path this is Diff-Instruct. No stage looks
at images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from diffdistill.methods import base, walk
from diffdistill.methods.score_distillation import Signal
from diffdistill.models.denoiser import Condition, Denoiser
from diffdistill.samplers import one_step

Noise = Callable[[jax.Array, int], jax.Array]
MISMATCH_RANGE = (-8.0, 8.0)  # of log-SNR: s from 55 to 0.018


@struct.dataclass
class Roles:
    """The state of `distillation`.

    step: () int32, updates done. params, ema, averages, optimizer: of the generator. fake: the whole state of the fake
    denoiser, with a step of its own. walk: where an adaptive walk is; None where updates alone say it.
    """

    step: jax.Array
    params: base.Params
    ema: base.Params | None
    averages: dict[str, base.Params] | None
    optimizer: Any
    fake: base.State
    walk: walk.Walk | None = None


@dataclass(frozen=True)
class Origin:
    """How a generator makes samples: x_g = D(sigma_init eps; sigma_init).

    Attributes:
      denoiser: network and parameterisation of all three roles.
      log_snr: that of sigma_init.
      guidance_range: (w_min, w_max) of a w-conditioned denoiser, from which w is drawn; None for one without guidance.
    """

    denoiser: Denoiser
    log_snr: float
    guidance_range: tuple[float, float] | None = None

    def condition(self, key: jax.Array, batch: Mapping[str, jax.Array]) -> Condition:
        """The classes of a batch and, where the network asks for them, guidance weights."""
        label = batch["label"] if self.denoiser.num_classes else None
        if self.guidance_range is None:
            return Condition(label=label)
        return Condition(
            label=label, guidance=base.guidance_weights(key, batch["label"].shape[0], *self.guidance_range)
        )

    def samples(self, params: base.Params, key: jax.Array, batch_size: int, condition: Condition) -> jax.Array:
        """x_g (B, H, W, C) of the generator with these parameters."""
        eps = jax.random.normal(key, (batch_size, *self.denoiser.image_shape), jnp.float32)
        return one_step.generate(
            lambda z, log_snr: self.denoiser(params, z, log_snr, condition), eps, jnp.float32(self.log_snr)
        )


def degradation(
    origin: Origin,
    fake: Denoiser,
    noise: Noise,
    weight: Callable[[jax.Array], jax.Array],
    updater: base.Updater,
    *,
    parts: int = 1,
) -> base.Method:
    """Stage one: a denoiser that starts as ``sources["teacher"]`` learns the samples of a generator that never changes.

    Its checkpoints are the path. ``frozen["generator"]`` are the parameters of that generator.

    Args:
      origin: how it makes its samples.
      fake: the denoiser that learns: that of the origin, with dropout or without.
      noise: (key, B) -> (B,) log-SNR on which it learns.
      weight: factor on the mean squared error of x_hat.
    """
    loss = denoising(origin, fake, noise, weight)
    return base.from_loss("degradation", lambda key, sources: sources["teacher"], loss, updater, parts=parts)


def distillation(
    name: str,
    origin: Origin,
    fake: Denoiser,
    signal: Signal,
    noise: Noise,
    fake_noise: Noise,
    weight: Callable[[jax.Array], jax.Array],
    updater: base.Updater,
    fake_updater: base.Updater,
    *,
    fake_updates: int = 1,
    fake_first: bool = True,
    pace: walk.Pace | None = None,
    parts: int = 1,
) -> base.Method:
    """Stage two, and all of Diff-Instruct: generator and fake denoiser in turn.

    ``sources["generator"]`` and ``sources["fake"]`` are where the two start. ``frozen["teacher"]`` is the target of the
    moment, an argument of the step: putting another in its place compiles nothing. One update is one of the generator
    and `fake_updates` of the fake denoiser, each on samples of its own.

    Args:
      origin, fake, weight: see `degradation`; weight is of the loss of the fake denoiser.
      signal: see methods.score_distillation.
      noise, fake_noise: (key, B) -> (B,) log-SNR at which the generator is judged, and on which the fake one learns.
      fake_first: whether the fake denoiser or the generator comes first in an update.
      pace: of an adaptive walk, over arguments["num_targets"] targets; None: the state says nothing of the target.
    """
    denoised = base.gradient(denoising(origin, fake, fake_noise, weight), parts)
    judged = base.gradient(_generator_loss(origin, signal, noise), parts)

    def init(key: jax.Array, sources: Mapping[str, base.Params]) -> Roles:
        del key
        generator, learnt = updater.init(sources["generator"]), fake_updater.init(sources["fake"])
        return Roles(
            generator.step,
            generator.params,
            generator.ema,
            generator.averages,
            generator.optimizer,
            learnt,
            walk.start() if pace else None,
        )

    def step(
        state: Roles, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array, arguments: Mapping[str, jax.Array]
    ) -> tuple[Roles, base.Metrics]:
        metrics: base.Metrics = {}

        def learn(state: Roles) -> Roles:
            learnt = state.fake
            for number in range(fake_updates):
                own = jax.random.fold_in(key, 1 + number)
                grads, found = denoised(learnt.params, {"generator": state.params}, batch, own, arguments)
                learnt, more = fake_updater.apply(learnt, grads, fake_updates * arguments["num_updates"])
                metrics.update(found, fake_gradient_norm=more["gradient_norm"])
            return dataclasses.replace(state, fake=learnt)

        def follow(state: Roles) -> Roles:
            read = {"teacher": frozen["teacher"], "fake": state.fake.params}
            grads, found = judged(state.params, read, batch, jax.random.fold_in(key, 0), arguments)
            state, more = updater.apply(state, grads, arguments["num_updates"])
            metrics.update(found, **more)
            return state

        for part in (learn, follow) if fake_first else (follow, learn):
            state = part(state)
        if pace and state.walk:
            metrics["target"] = state.walk.position.astype(jnp.float32)
            moved = walk.advance(state.walk, pace, metrics["mismatch"], arguments["num_targets"])
            state = dataclasses.replace(state, walk=moved)
        return state, metrics

    return base.Method(name, init, step, updater.averaged)


def denoising(origin: Origin, fake: Denoiser, noise: Noise, weight: Callable[[jax.Array], jax.Array]) -> base.Loss:
    """The loss weight ||D(z) - x_g||^2 on samples of frozen["generator"]; arguments as in `degradation`."""

    def loss(
        params: Any, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array, arguments: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, base.Metrics]:
        del arguments
        random, size = base.streams(key), batch["label"].shape[0]
        condition = origin.condition(random["guidance"], batch)
        x_g = jax.lax.stop_gradient(origin.samples(frozen["generator"], random["latent"], size, condition))
        log_snr = noise(random["time"], size)
        z, _ = base.noised(random["noise"], x_g, log_snr)
        x_hat = fake(params, z, log_snr, condition, dropout_key=random["dropout"])
        return base.weighted_loss(x_hat, x_g, log_snr, weight)

    return loss


def _generator_loss(origin: Origin, signal: Signal, noise: Noise) -> base.Loss:
    """The signal, made of frozen["teacher"] and frozen["fake"], and how far the two are apart."""

    def loss(
        params: Any, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array, arguments: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, base.Metrics]:
        del arguments
        random, size = base.streams(key), batch["label"].shape[0]
        condition = origin.condition(random["guidance"], batch)
        x_g = origin.samples(params, random["latent"], size, condition)
        log_snr = noise(random["time"], size)
        teacher, fake = (
            lambda z, log_snr, role=role: origin.denoiser(frozen[role], z, log_snr, condition)
            for role in ("teacher", "fake")
        )
        value, delta = signal(x_g, teacher, fake, log_snr, random["noise"])
        mismatch = jnp.mean(jnp.abs(delta), axis=tuple(range(1, delta.ndim)))
        return value, {
            "generator_loss": value,
            "mismatch": jnp.mean(mismatch),
            "mismatch_by_log_snr": base.by_log_snr(mismatch, log_snr, *MISMATCH_RANGE),
        }

    return loss
