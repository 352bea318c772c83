"""The Denoiser: a network and a parameterisation as one function D(params, z, log_snr, condition) -> x_hat."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffdistill.diffusion import guidance
from diffdistill.diffusion.conditioning import Task
from diffdistill.diffusion.parameterisation import Parameterisation

Params = Any

_ADVICE = " Give both stages the same network settings; only the embedding of w may be added."


@flax.struct.dataclass
class Condition:
    """What a denoiser is told besides z and the noise level; each entry may be absent (None).

    Attributes:
      label: class, int32, (B,) or scalar; `num_classes` of the denoiser is the null class.
      guidance: weight w of x_w = (1 + w) x_cond - w x_uncond, float32, (B,) or scalar; w = 0 is plain conditional.
      augmentation: (B, K) parameters of the augmentation that was applied to the image.
      image: (B, H, W, K) what is shown of the image that is to be made (diffusion.conditioning).
    """

    label: ArrayLike | None = None
    guidance: ArrayLike | None = None
    augmentation: jax.Array | None = None
    image: jax.Array | None = None


@flax.struct.dataclass
class Prediction:
    """What a denoiser says of z.

    Attributes:
      x: x_hat, (B, H, W, C) float32.
      variance_fraction: where between its bounds the log-variance of a step lies, per pixel, as x; 0 is the posterior's
        (see diffusion.variational). None of a network that does not learn it.
    """

    x: jax.Array
    variance_fraction: jax.Array | None


class DenoiseFunction(Protocol):
    """The contract that samplers, targets and scores rely on; a Denoiser and `guided(denoiser)` both keep it."""

    def __call__(
        self,
        params: Params,
        z: jax.Array,
        log_snr: ArrayLike,
        condition: Condition,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array: ...

    def predict(
        self,
        params: Params,
        z: jax.Array,
        log_snr: ArrayLike,
        condition: Condition,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Prediction: ...


class Network(Protocol):
    """What a Denoiser needs of a network: a Flax linen module such as models.unet.UNet.

    init and apply take (inputs (B, H, W, C), time (B,), label (B,) or None, guidance (B,) or None, deterministic=...).
    One that has `augmentation_features` above 0 also takes augmentation=(B, augmentation_features), absent for images
    as they are.
    """

    @property
    def num_classes(self) -> int: ...
    @property
    def output_channels(self) -> int: ...
    @property
    def guidance_embedding(self) -> str: ...
    @property
    def init(self) -> Callable[..., Any]: ...
    @property
    def apply(self) -> Callable[..., Any]: ...


@dataclass(frozen=True)
class Denoiser:
    """Network and parameterisation, bound; without state, so that it can be a static argument of jit.

    Attributes:
      network: the network; its output has parameterisation.output_channels(C) channels.
      parameterisation: what the network is given and what its output means.
      num_classes: as the network's; 0 is unconditional.
      image_shape: (H, W, C) of one image or latent.
      task: of models from image to image, what Condition.image is of theirs; None for all others.
    """

    network: Network
    parameterisation: Parameterisation
    num_classes: int
    image_shape: tuple[int, int, int]
    task: Task | None = None

    def __post_init__(self) -> None:
        needed = self.parameterisation.output_channels(self.image_shape[-1])
        if self.network.output_channels != needed:
            raise ValueError(
                f"output {self.parameterisation.name!r} of images with {self.image_shape[-1]} channels needs a network "
                f"with output_channels={needed}; got {self.network.output_channels}."
            )
        if self.network.num_classes != self.num_classes:
            raise ValueError(
                f"the network has num_classes={self.network.num_classes} and the denoiser num_classes="
                f"{self.num_classes}; give both the same number."
            )

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters, a nested dict, from a typed key."""
        # Under jit the forward pass, whose result nobody uses, is not run.
        return jax.jit(self._init)(key)

    def num_parameters(self) -> int:
        """Number of scalars in the parameters; nothing is allocated."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes()))

    def shapes(self) -> Params:
        """Shapes and dtypes of the parameters, as `jax.eval_shape` of `init` gives them; nothing is allocated."""
        return _shapes(self)

    def __call__(
        self,
        params: Params,
        z: jax.Array,
        log_snr: ArrayLike,
        condition: Condition,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """The prediction x_hat (B, H, W, C) float32 for z (B, H, W, C) at log_snr, (B,) or a scalar.

        Dropout acts only where `dropout_key` is given. ValueError where shapes or the condition do not fit the network.
        """
        return self.predict(params, z, log_snr, condition, dropout_key=dropout_key).x

    def predict(
        self,
        params: Params,
        z: jax.Array,
        log_snr: ArrayLike,
        condition: Condition,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Prediction:
        """x_hat as above, and the variance of a step from z where the network learns it."""
        if z.shape[1:] != self.image_shape:
            raise ValueError(
                f"this denoiser is made for batches of images of shape {self.image_shape}; got z of shape {z.shape}."
            )
        options: dict[str, Any] = {}
        if condition.augmentation is not None:
            if not getattr(self.network, "augmentation_features", 0):
                raise ValueError("this network takes no augmentation parameters; leave Condition.augmentation out.")
            options["augmentation"] = condition.augmentation
        batch_size = z.shape[0]
        log_snr = per_image(log_snr, batch_size, "log_snr")
        inputs = self.parameterisation.network_input(z, log_snr)
        if self.task is not None or condition.image is not None:
            inputs = jnp.concatenate([inputs, self._shown(condition, batch_size)], axis=-1)
        output = self.network.apply(
            {"params": params},
            inputs,
            self.parameterisation.network_time(log_snr),
            None if condition.label is None else per_image(condition.label, batch_size, "label"),
            None if condition.guidance is None else per_image(condition.guidance, batch_size, "guidance"),
            deterministic=dropout_key is None,
            **options,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
        )
        x_hat = self.parameterisation.to_x(output, z, log_snr).astype(jnp.float32)
        if not self.parameterisation.learned_variance:
            return Prediction(x_hat, None)
        return Prediction(x_hat, 0.5 * (output[..., -z.shape[-1] :].astype(jnp.float32) + 1.0))

    def _shown(self, condition: Condition, batch_size: int) -> jax.Array:
        expected = None
        if self.task is not None:
            height, width, channels = self.image_shape
            expected = batch_size, height, width, self.task.channels(channels)
        given = None if condition.image is None else condition.image.shape
        if expected is None or given != expected:
            raise ValueError(
                f"this denoiser takes {f'Condition.image of shape {expected}' if expected else 'no Condition.image'}; "
                f"got {given}."
            )
        assert condition.image is not None
        return condition.image.astype(jnp.float32)

    def _init(self, key: jax.Array) -> Params:
        one = jnp.zeros((1,), jnp.float32)
        label = jnp.zeros((1,), jnp.int32) if self.num_classes else None
        w = None if self.network.guidance_embedding == "none" else one
        height, width, channels = self.image_shape
        channels += self.task.channels(channels) if self.task else 0
        return self.network.init(key, jnp.zeros((1, height, width, channels), jnp.float32), one, label, w)["params"]


def per_image(value: ArrayLike, batch_size: int, name: str) -> jax.Array:
    """`value`, a scalar or (B,), as (B,): one value for each image."""
    value = jnp.asarray(value)
    if value.shape not in ((), (batch_size,)):
        raise ValueError(f"{name} must be a scalar or have one value per image, ({batch_size},); got {value.shape}.")
    return jnp.broadcast_to(value, (batch_size,))


def guided(denoiser: Denoiser) -> DenoiseFunction:
    """The guided denoiser x_w = (1 + w) x_cond - w x_uncond, w = condition.guidance; same contract as a Denoiser.

    Both branches are one network call on a doubled batch, combined in x (Ho & Salimans 2022; convention of spec 00).
    ValueError for a denoiser that has no classes, or that knows w itself and needs no second branch.
    """
    if denoiser.num_classes == 0:
        raise ValueError("guidance needs a class-conditional denoiser; this one is unconditional (num_classes=0).")
    if denoiser.network.guidance_embedding != "none":
        raise ValueError("this denoiser is conditional on w itself: call it with Condition(guidance=w), not guided().")

    return _Guided(denoiser)


@dataclass(frozen=True)
class _Guided:
    """See `guided`. The variance of a step is that of the conditional branch."""

    denoiser: Denoiser

    def __call__(
        self,
        params: Params,
        z: jax.Array,
        log_snr: ArrayLike,
        condition: Condition,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        return self.predict(params, z, log_snr, condition, dropout_key=dropout_key).x

    def predict(
        self,
        params: Params,
        z: jax.Array,
        log_snr: ArrayLike,
        condition: Condition,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Prediction:
        if condition.label is None or condition.guidance is None:
            raise ValueError(
                "a guided denoiser needs Condition(label=..., guidance=w); w = 0 is the plain conditional model."
            )
        batch_size = z.shape[0]
        label = per_image(condition.label, batch_size, "label")
        w = per_image(condition.guidance, batch_size, "guidance")
        # The two branches of an image are neighbours in the batch, so that they stay on the device that holds it.
        labels = jnp.stack([label, jnp.full_like(label, self.denoiser.num_classes)], axis=1).reshape(-1)
        log_snrs = jnp.repeat(per_image(log_snr, batch_size, "log_snr"), 2)
        augmentation, image = (
            None if each is None else jnp.repeat(each, 2, axis=0) for each in (condition.augmentation, condition.image)
        )
        both = Condition(label=labels, augmentation=augmentation, image=image)
        pairs = self.denoiser.predict(params, jnp.repeat(z, 2, axis=0), log_snrs, both, dropout_key=dropout_key)
        pairs = jax.tree.map(lambda rows: rows.reshape(batch_size, 2, *z.shape[1:]), pairs)
        variance = None if pairs.variance_fraction is None else pairs.variance_fraction[:, 0]
        return Prediction(guidance.combine(pairs.x[:, 0], pairs.x[:, 1], w), variance)


def transfer(params_from: Params, params_into: Params, fresh: tuple[str, ...] = ("guidance_",)) -> Params:
    """Parameters of the structure of `params_into` with the values of `params_from`.

    Only modules whose name starts with one of `fresh` (the w branch, zero-initialised) may be missing from
    `params_from`; they keep the values of `params_into`. Any other difference means that the two networks are not the
    same, and is a ValueError that names the first tensor, so that nothing is left random or dropped by accident.
    """
    source: dict[str, Any] = flax.traverse_util.flatten_dict(params_from, sep="/")
    target: dict[str, Any] = flax.traverse_util.flatten_dict(params_into, sep="/")
    for name, leaf in source.items():
        if name not in target:
            raise ValueError(f"the source has the tensor {name} {leaf.shape}, which the new network lacks.{_ADVICE}")
        if leaf.shape != target[name].shape:
            raise ValueError(
                f"the tensor {name} has shape {leaf.shape} in the source and {target[name].shape} in the new network."
                f"{_ADVICE}"
            )
    for name, leaf in target.items():
        if name not in source and not name.startswith(fresh):
            raise ValueError(f"the new network has the tensor {name} {leaf.shape}, which the source lacks.{_ADVICE}")
    return flax.traverse_util.unflatten_dict({**target, **source}, sep="/")


@functools.lru_cache(maxsize=64)
def _shapes(denoiser: Denoiser) -> Params:
    """Tracing a large network takes seconds, and the stages of a chain have one or two networks in common."""
    return jax.eval_shape(denoiser.init, jax.random.key(0))
