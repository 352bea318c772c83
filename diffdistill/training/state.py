"""The training state and what one gradient does to it: clip, Adam, weight decay, learning rate, moving average."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct

Params = Any


@struct.dataclass
class TrainState:
    """What training changes and a checkpoint keeps.

    step: () int32, updates done. params: the network's parameters. ema: their moving average, or None. optimizer: the
    optax state. averages: further moving averages by name, or None. memory: what a method keeps between updates
    besides, or None. In a checkpoint every field but `step` is an item of its own.
    """

    step: jax.Array
    params: Params
    ema: Params | None
    optimizer: optax.OptState
    averages: dict[str, Params] | None = None
    memory: Any = None


@dataclasses.dataclass(frozen=True)
class Optimization:
    """How gradients become updates.

    learning_rate: peak rate. warmup_updates: linear rise from 0 over so many updates (0 = none); warmup_from_zero: the
    first update has rate 0, as in EDM, instead of the first step of the rise. anneal: "constant", or "linear" to zero
    at the end of the stage. weight_decay: decoupled, multiplied by the rate. gradient_clip: largest global norm (0 =
    none). ema_decay: 0 = no average. ema_ramp: decay at most (1+n)/(10+n) after n updates, so that a short run is not
    an average over its random initialisation. ema_half_life: the average as EDM states it, instead of ema_decay:
    updates after which a parameter's share has halved, never more than ema_ramp_ratio (0 = no bound) of the updates
    done. averages: (name, half-life in updates) of further averages, with the same bound. replace_non_finite: gradients
    that are NaN count as 0, infinite ones as 1e5, before the clip. b1, b2, eps: Adam's.
    """

    learning_rate: float
    warmup_updates: float = 0
    warmup_from_zero: bool = False
    anneal: Literal["constant", "linear"] = "constant"
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    ema_decay: float = 0.0
    ema_ramp: bool = True
    ema_half_life: float = 0.0
    ema_ramp_ratio: float = 0.0
    averages: tuple[tuple[str, float], ...] = ()
    replace_non_finite: bool = False
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.anneal not in ("constant", "linear"):
            raise ValueError(f"anneal={self.anneal!r}: expected 'constant' or 'linear'.")
        for name in ("learning_rate", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a number above 0.")
        for name in ("warmup_updates", "weight_decay", "gradient_clip", "ema_half_life", "ema_ramp_ratio"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected 0 or more.")
        for name in ("ema_decay", "b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected at least 0 and less than 1.")


def learning_rate(optimization: Optimization, step: jax.Array, num_updates: jax.Array | int) -> jax.Array:
    """Rate of the update that follows `step` finished ones, () float32.

    Warm-up: (step+1)/warmup_updates, so that the first update already moves, or step/warmup_updates. Linear anneal:
    1 - step/num_updates, so that the first update has the full rate and the last one 1/num_updates of it (Salimans &
    Ho 2022, appendix).
    num_updates may be traced: rounds of different length share one compilation.
    """
    done = jnp.asarray(step, jnp.float32)
    rate = jnp.float32(optimization.learning_rate)
    if optimization.warmup_updates:
        begun = done if optimization.warmup_from_zero else done + 1.0
        rate = rate * jnp.minimum(1.0, begun / optimization.warmup_updates)
    if optimization.anneal == "linear":
        rate = rate * jnp.maximum(0.0, 1.0 - done / jnp.asarray(num_updates, jnp.float32))
    return rate


def ema_decay(optimization: Optimization, step: jax.Array) -> jax.Array:
    """Decay of the moving average at the update that brings the count to `step` >= 1, () float32."""
    if optimization.ema_half_life:
        return half_life_decay(optimization.ema_half_life, optimization.ema_ramp_ratio, step)
    decay = jnp.float32(optimization.ema_decay)
    if optimization.ema_ramp:
        done = jnp.asarray(step, jnp.float32)
        decay = jnp.minimum(decay, (1.0 + done) / (10.0 + done))
    return decay


def half_life_decay(half_life: float, ramp_ratio: float, step: jax.Array) -> jax.Array:
    """Decay at that update of an average with a half-life in updates, at most `ramp_ratio` (0 = any) of those done."""
    life = jnp.float32(half_life)
    if ramp_ratio:  # nothing was done before the first update: the average becomes its outcome
        life = jnp.minimum(life, (jnp.asarray(step, jnp.float32) - 1.0) * ramp_ratio)
    return 0.5 ** (1.0 / jnp.maximum(life, 1e-8))


@dataclasses.dataclass(frozen=True)
class Updater:
    """Applies gradients to a TrainState as an Optimization says. Pure functions; usable inside jit."""

    optimization: Optimization

    def init(self, params: Params) -> TrainState:
        """A fresh state at update 0. Copies: no leaf shares memory with `params` or another leaf, as donation needs."""
        params = _copy(params)
        ema = _copy(params) if self.optimization.ema_decay or self.optimization.ema_half_life else None
        averages = {name: _copy(params) for name, _ in self.optimization.averages} or None
        return TrainState(jnp.zeros((), jnp.int32), params, ema, self._chain().init(params), averages)

    def apply(
        self, state: TrainState, grads: Params, num_updates: jax.Array | int
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update. grads: of the mean loss over the whole batch (what jit over a sharded batch gives), so that the
        clip is the same on any number of devices. Returns the next state and {"gradient_norm" (before the clip),
        "learning_rate"}, both () float32.
        """
        if self.optimization.replace_non_finite:
            grads = jax.tree.map(lambda g: jnp.nan_to_num(g, nan=0.0, posinf=1e5, neginf=-1e5), grads)
        rate = learning_rate(self.optimization, state.step, num_updates)
        direction, optimizer = self._chain().update(grads, state.optimizer, state.params)
        params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)
        step = state.step + 1
        ema, averages = state.ema, state.averages
        if ema is not None:
            ema = _towards(ema, params, ema_decay(self.optimization, step))
        if averages is not None:
            ratio, lives = self.optimization.ema_ramp_ratio, dict(self.optimization.averages)
            averages = {
                name: _towards(average, params, half_life_decay(lives[name], ratio, step))
                for name, average in averages.items()
            }
        metrics = {"gradient_norm": optax.tree.norm(grads).astype(jnp.float32), "learning_rate": rate}
        state = dataclasses.replace(state, step=step, params=params, ema=ema, averages=averages, optimizer=optimizer)
        return state, metrics

    def averaged(self, state: TrainState) -> Params:
        """The moving average where there is one, otherwise the parameters."""
        return state.params if state.ema is None else state.ema

    def _chain(self) -> optax.GradientTransformation:
        """Gradient -> descent direction at rate 1; the rate is applied outside, since it is traced."""
        o = self.optimization
        parts = [optax.clip_by_global_norm(o.gradient_clip)] if o.gradient_clip else []
        parts.append(optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps))
        if o.weight_decay:
            parts.append(optax.add_decayed_weights(o.weight_decay))
        return optax.chain(*parts)


def _towards(average: Params, params: Params, decay: jax.Array) -> Params:
    return jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), average, params)


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)
