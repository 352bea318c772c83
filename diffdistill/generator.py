"""A trained stage that makes images, and what it refuses to make.

An image is named by its seed: its noise and, unless given, its class are functions of the seed alone, so image 7 is
the same picture in a batch of one or of fifty thousand, on one device or on eight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from diffdistill import samplers, sampling_program
from diffdistill.data.pipeline import Batch
from diffdistill.diffusion.schedules import Schedule
from diffdistill.evaluation.image_statistics import Chunk
from diffdistill.models.denoiser import Denoiser
from diffdistill.samplers import respaced
from diffdistill.training import mesh as meshes


class SampleError(ValueError):
    """Samples were asked for that this model cannot give; the message says what it can."""


@dataclass(frozen=True)
class Samples:
    """Images (N, H, W, C) with the labels (N,) and seeds (N,) that made them.

    Images are uint8, or, of a generator whose quantisation is "none", float32 in units of [-1, 1], not clipped; latents
    are float32 in the units of the data.
    """

    images: np.ndarray
    labels: np.ndarray
    seeds: np.ndarray
    network_evaluations: int


@dataclass(frozen=True, eq=False)
class Generator:
    """A trained stage, ready to sample.

    Attributes:
      name: the stage, for messages.
      denoiser, params, schedule: what it is made of.
      num_steps: the number of steps that it is meant for.
      guidance_range: (w_min, w_max) of a w-conditioned model; None for any other.
      has_null_class: whether the null class was trained, so that two evaluations can guide the model.
      sampler, clip, quantisation, batch_size: defaults of `sample`.
      learned_variance: whether its steps have the variance that its network says. Not so of students, which learn from
        their teacher's x_hat alone.
      is_encoder: whether it was distilled to go from images to noise; such a model cannot be sampled.
      extrapolates: whether a guidance weight outside guidance_range is accepted.
      latent_scaling: (shift (C,), scale) between the data and what the network sees of it; None for images.
      examples: seeds -> images and labels that a model from image to image is shown where no others are given.
      learnt_sampler: the only sampler whose steps it has learnt; empty: as samplers_for says.
      settings: settings of samplers by name, for all of them together (samplers.settings_of finds each its own).
    """

    name: str
    denoiser: Denoiser
    params: Any
    schedule: Schedule
    num_steps: int
    guidance_range: tuple[float, float] | None = None
    has_null_class: bool = False
    sampler: str = "ddim"
    clip: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    quantisation: str = "edm"
    batch_size: int = 250
    class_names: tuple[str, ...] = ()
    is_encoder: bool = False
    extrapolates: bool = False
    latent_scaling: tuple[np.ndarray, np.float32] | None = None
    examples: Callable[[np.ndarray], Batch] | None = None
    learnt_sampler: str = ""
    learned_variance: bool = False

    def sample(
        self,
        num: int = 1,
        *,
        seed: int = 0,
        labels: Sequence[int | str] | np.ndarray | None = None,
        w: float = 0.0,
        num_steps: int | None = None,
        sampler: str | None = None,
        latents: np.ndarray | None = None,
        pictures: np.ndarray | None = None,
        masks: np.ndarray | None = None,
        progress: Callable[[int], Any] = lambda done: None,
    ) -> Samples:
        """Images number seed, seed + 1, ..., seed + num - 1.

        Args:
          num: how many, 1 or more.
          seed: number of the first image.
          labels: (num,) classes by number or name, or fewer, which are then repeated in turn; by default class seed
            modulo the number of classes.
          w: guidance weight, (1 + w) conditional - w unconditional; 0 is no guidance.
          num_steps: steps of the sampler; by default those that the stage was trained for.
          sampler: a name of samplers.SAMPLERS.
          latents: (num, H, W, C) float32, initial noise of unit variance in place of the seeds', for any sampler: those
            of EDM multiply it by their first noise level themselves.
          pictures: (num, H, W, C) uint8 images, or float32 latents as the network sees them, of which a model from
            image to image is shown what its task says; by default `examples`.
          masks: (num, H, W), 1 or True where the image is to be made, of a model that fills holes; by default a random
            rectangle that depends on the seed.
          progress: called with the number of images done so far.

        Raises:
          SampleError: labels, latents, w, num_steps, a sampler, pictures or masks that do not suit the model.
        """
        num_steps = self.num_steps if num_steps is None else num_steps
        settings = {"labels": labels, "w": w, "num_steps": num_steps, "sampler": sampler, "latents": latents}
        dtype = np.float32 if self.quantisation == "none" else np.uint8
        made = np.empty((num, *self.denoiser.image_shape), dtype)
        for chunk in self.stream(num, seed=seed, pictures=pictures, masks=masks, **settings):
            made[chunk.first : chunk.stop] = meshes.all_rows(chunk.images)[: chunk.stop - chunk.first]
            progress(chunk.stop)
        if self.latent_scaling is not None:
            shift, scale = self.latent_scaling
            made = made / scale + shift
        seeds = np.arange(seed, seed + num, dtype=np.int32)
        return Samples(
            made,
            self._labels(seeds, labels, pictures),
            seeds,
            self.network_evaluations(num_steps, w, sampler or self.sampler),
        )

    def stream(
        self,
        num: int,
        *,
        seed: int = 0,
        labels: Sequence[int | str] | np.ndarray | None = None,
        w: float = 0.0,
        num_steps: int | None = None,
        sampler: str | None = None,
        latents: np.ndarray | None = None,
        pictures: np.ndarray | None = None,
        masks: np.ndarray | None = None,
        first: int = 0,
    ) -> Iterator[Chunk]:
        """The same images as `sample`, chunk by chunk and left on the devices; arguments and errors are those of it.

        `first`: number of images at the beginning that are left out, a multiple of `chunk_size(num)`.
        """
        num_steps = self.num_steps if num_steps is None else num_steps
        sampler = self.sampler if sampler is None else sampler
        self._check(num, seed, w, num_steps, sampler, latents)
        self._check_pictures(num, pictures, masks)
        seeds = np.arange(seed, seed + num, dtype=np.int32)
        chosen = self._labels(seeds, labels, pictures)
        fixed_steps = num_steps if sampler in samplers.FIXED_STEPS else None
        run = self._compiled(sampler, two_branches=self._two_branches(w), fixed_steps=fixed_steps)
        mesh = meshes.make_mesh()
        chunk = self.chunk_size(num)
        for start in range(first, num, chunk):
            rows = np.minimum(np.arange(start, start + chunk), num - 1)  # the last chunk is filled with its last image
            noise = None if latents is None else np.asarray(latents, np.float32)[rows]
            given = self._shown(seeds[rows], None if pictures is None else pictures[rows])
            holes = None if masks is None else np.asarray(masks, np.float32)[rows]
            inputs = jax.tree.map(
                functools.partial(meshes.shard_rows, mesh), (seeds[rows], chosen[rows], noise, given, holes)
            )
            pixels = run(self.params, *inputs, np.float32(w), np.int32(num_steps))
            yield Chunk(pixels, start, min(start + chunk, num))

    def chunk_size(self, num: int) -> int:
        """How many of `num` images are made at once: a multiple of the number of devices."""
        devices = meshes.make_mesh().size
        # Few images do not need a whole batch; powers of two keep the number of compiled programs small.
        wanted = min(self.batch_size, 2 ** math.ceil(math.log2(num)))
        return -(-wanted // devices) * devices

    def network_evaluations(self, num_steps: int, w: float, sampler: str) -> int:
        """Evaluations of the network per image: those of the sampler, each twice where two branches guide the model."""
        settings = samplers.settings_of(sampler, self.settings)
        return samplers.num_evaluations(sampler, num_steps, settings) * (2 if self._two_branches(w) else 1)

    def settings_text(self, sampler: str) -> str:
        """What samples of one seed depend on besides steps, sampler and w, in words."""
        settings = samplers.settings_of(sampler, self.settings)
        if self.learned_variance and sampler in samplers.LEARNED_VARIANCE:
            settings["variance_fraction"] = "learned"
        own = [f"{name} {value}" for name, value in settings.items()]
        return ", ".join(["clip" if self.clip else "no clip", *own, f"{self.quantisation} quantisation"])

    def _two_branches(self, w: float) -> bool:
        return self.guidance_range is None and w != 0.0

    def _check(self, num: int, seed: int, w: float, num_steps: int, sampler: str, latents: np.ndarray | None) -> None:
        if self.is_encoder:
            raise SampleError(f"stage {self.name} leads from images to noise: use it with --mode=transfer.")
        if num < 1:
            raise SampleError(f"{num} images were asked for; give a number of at least 1.")
        if not 0 <= seed <= 2**31 - num:
            raise SampleError(f"{num} images were asked for from seed {seed} on; seeds run from 0 to {2**31 - 1}.")
        if num_steps < 1:
            raise SampleError(f"num_steps is {num_steps}; give a number of at least 1.")
        if sampler not in samplers.SAMPLERS:
            raise SampleError(f"sampler is {sampler!r}; known are {', '.join(samplers.SAMPLERS)}.")
        if self.learnt_sampler and sampler != self.learnt_sampler:
            raise SampleError(
                f"sampler is {sampler!r}, but stage {self.name} has learnt the steps of {self.learnt_sampler!r}. Take "
                "a round_ stage for DDIM."
            )
        if sampler in samplers.FIXED_STEPS:
            try:
                respaced.check(sampler, self.schedule, num_steps)
            except ValueError as error:
                raise SampleError(f"stage {self.name}: {error}.") from error
        if sampler == "one_step" and num_steps != 1:
            raise SampleError(f"num_steps is {num_steps}, but sampler one_step evaluates the network once: give 1.")
        if not math.isfinite(w):
            raise SampleError(f"w is {w}; give a finite guidance weight (0 is no guidance).")
        if latents is not None and latents.shape != (num, *self.denoiser.image_shape):
            raise SampleError(
                f"the latents have shape {latents.shape}, but {num} images of stage {self.name} need "
                f"{(num, *self.denoiser.image_shape)}."
            )
        if latents is not None and not (np.issubdtype(latents.dtype, np.floating) and np.isfinite(latents).all()):
            raise SampleError(f"the latents ({latents.dtype}) must be finite floating-point numbers.")
        if self.guidance_range is not None:
            low, high = self.guidance_range
            if not (low <= w <= high or self.extrapolates):
                raise SampleError(
                    f"w is {w}, but stage {self.name} was distilled for guidance weights from {low} to {high} "
                    f"(w = 0 is no guidance; the other common scale is 1 + w). --extrapolate_w samples it nevertheless."
                )
        elif w != 0.0 and not self.has_null_class:
            raise SampleError(
                f"w is {w}, but stage {self.name} cannot be guided: it was trained without classes or without dropping "
                "them (config.teacher.label_dropout). Use w = 0."
            )

    def _check_pictures(self, num: int, pictures: np.ndarray | None, masks: np.ndarray | None) -> None:
        task, shape = self.denoiser.task, self.denoiser.image_shape
        if task is None:
            if pictures is not None or masks is not None:
                raise SampleError(f"stage {self.name} makes images from noise alone; leave pictures and masks out.")
            return
        if pictures is None and self.examples is None:
            raise SampleError(f"stage {self.name} ({task.name}) makes images from images: give some (--images=PATH).")
        if pictures is not None and pictures.shape != (num, *shape):
            raise SampleError(
                f"the pictures have shape {pictures.shape}, but {num} images of stage {self.name} need {(num, *shape)}."
            )
        if masks is not None and not task.takes_mask:
            raise SampleError(f"stage {self.name} ({task.name}) takes no mask; leave it out.")
        if masks is not None and (masks.shape != (num, *shape[:2]) or not np.isin(masks, (0, 1)).all()):
            raise SampleError(
                f"the masks have shape {masks.shape}, but {num} images of stage {self.name} need {(num, *shape[:2])}, "
                "1 where the image is to be made and 0 elsewhere."
            )

    def _shown(self, seeds: np.ndarray, pictures: np.ndarray | None) -> np.ndarray | None:
        if pictures is not None or self.denoiser.task is None:
            return pictures
        assert self.examples is not None  # checked before
        return self.examples(seeds)["image"]

    def _labels(
        self, seeds: np.ndarray, labels: Sequence[int | str] | np.ndarray | None, pictures: np.ndarray | None
    ) -> np.ndarray:
        classes = self.denoiser.num_classes
        if labels is None and classes and self.denoiser.task is not None and pictures is None and self.examples:
            return self.examples(seeds)["label"]
        if labels is None and classes and pictures is not None:
            raise SampleError(f"say the classes of the pictures (--labels): stage {self.name} is told the class.")
        if labels is None:
            return (seeds % max(classes, 1)).astype(np.int32)
        if not classes:
            raise SampleError(f"labels were given, but stage {self.name} is unconditional; leave them out.")
        given = np.array([self.class_number(label) for label in labels], np.int64)
        if not given.size or given.min() < 0 or given.max() >= classes:
            raise SampleError(f"labels are {given.tolist()}, but stage {self.name} knows classes 0 to {classes - 1}.")
        if given.size > len(seeds):
            raise SampleError(f"{given.size} labels were given for {len(seeds)} images; give at most one for each.")
        return given[np.arange(len(seeds)) % given.size].astype(np.int32)

    def class_number(self, label: int | str) -> int:
        """The number of a class given by number or name. Raises SampleError for anything else."""
        if isinstance(label, str) and label in self.class_names:
            return self.class_names.index(label)
        if isinstance(label, int | np.integer) or (isinstance(label, str) and label.isdecimal()):
            return int(label)
        names = f" or one of {', '.join(self.class_names[:20])}" if self.class_names else ""
        raise SampleError(
            f"label {label!r} is no class of stage {self.name}: give a number from 0 to {self.denoiser.num_classes - 1}"
            f"{names}{', ...' if len(self.class_names) > 20 else ''}."
        )

    def _compiled(self, sampler: str, *, two_branches: bool, fixed_steps: int | None) -> Callable[..., jax.Array]:
        return sampling_program.compiled(
            self.denoiser,
            self.schedule,
            sampler,
            self.clip,
            tuple(samplers.settings_of(sampler, self.settings).items()),
            self.quantisation,
            two_branches,
            self.guidance_range is not None,
            self.learned_variance and sampler in samplers.LEARNED_VARIANCE,
            fixed_steps,
        )
