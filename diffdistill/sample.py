"""From the parameters of a stage to images.

An image is named by its seed: its noise and, unless given, its class are functions of the seed alone, so image 7 is
the same picture in a batch of one or of fifty thousand, on one device or on eight.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffdistill import chain, runner, samplers, workdir
from diffdistill.chain import Stage
from diffdistill.diffusion.schedules import Schedule
from diffdistill.evaluation import protocols
from diffdistill.evaluation.stream import Chunk
from diffdistill.models.denoiser import Condition, Denoiser, guided
from diffdistill.training import mesh as meshes
from diffdistill.workdir import Workdir

# Stages that are no generators of the data: one leads from images to noise, one knows the samples of a generator.
NOT_SHOWN = ("encoder", "degradation")


class SampleError(ValueError):
    """Samples were asked for that this model cannot give; the message says what it can."""


@dataclass(frozen=True)
class Samples:
    """Images (N, H, W, C) with the labels (N,) and seeds (N,) that made them.

    Images are uint8, or, of a generator whose quantisation is "none", float32 in units of [-1, 1], not clipped.
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
      is_encoder: whether it was distilled to go from images to noise; such a model cannot be sampled.
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
          progress: called with the number of images done so far.

        Raises:
          SampleError: labels, latents, w, num_steps or a sampler that do not suit the model.
        """
        num_steps = self.num_steps if num_steps is None else num_steps
        settings = {"labels": labels, "w": w, "num_steps": num_steps, "sampler": sampler, "latents": latents}
        dtype = np.float32 if self.quantisation == "none" else np.uint8
        pictures = np.empty((num, *self.denoiser.image_shape), dtype)
        for chunk in self.stream(num, seed=seed, **settings):
            pictures[chunk.first : chunk.stop] = meshes.all_rows(chunk.images)[: chunk.stop - chunk.first]
            progress(chunk.stop)
        seeds = np.arange(seed, seed + num, dtype=np.int32)
        return Samples(
            pictures,
            self._labels(seeds, labels),
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
        first: int = 0,
    ) -> Iterator[Chunk]:
        """The same images as `sample`, chunk by chunk and left on the devices; arguments and errors are those of it.

        `first`: number of images at the beginning that are left out, a multiple of `chunk_size(num)`.
        """
        num_steps = self.num_steps if num_steps is None else num_steps
        sampler = self.sampler if sampler is None else sampler
        self._check(num, seed, w, num_steps, sampler, latents)
        seeds = np.arange(seed, seed + num, dtype=np.int32)
        chosen = self._labels(seeds, labels)
        run = self._compiled(sampler, two_branches=self._two_branches(w))
        mesh = meshes.make_mesh()
        chunk = self.chunk_size(num)
        for start in range(first, num, chunk):
            rows = np.minimum(np.arange(start, start + chunk), num - 1)  # the last chunk is filled with its last image
            noise = None if latents is None else np.asarray(latents, np.float32)[rows]
            inputs = jax.tree.map(functools.partial(meshes.shard_rows, mesh), (seeds[rows], chosen[rows], noise))
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
        own = [f"{name} {value}" for name, value in samplers.settings_of(sampler, self.settings).items()]
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
            if not low <= w <= high:
                raise SampleError(
                    f"w is {w}, but stage {self.name} was distilled for guidance weights from {low} to {high} "
                    f"(w = 0 is no guidance; the other common scale is 1 + w)."
                )
        elif w != 0.0 and not self.has_null_class:
            raise SampleError(
                f"w is {w}, but stage {self.name} cannot be guided: it was trained without classes or without dropping "
                "them (config.teacher.label_dropout). Use w = 0."
            )

    def _labels(self, seeds: np.ndarray, labels: Sequence[int | str] | np.ndarray | None) -> np.ndarray:
        classes = self.denoiser.num_classes
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

    def _compiled(self, sampler: str, *, two_branches: bool) -> Callable[..., jax.Array]:
        return _compiled(
            self.denoiser,
            self.schedule,
            sampler,
            self.clip,
            tuple(samplers.settings_of(sampler, self.settings).items()),
            self.quantisation,
            two_branches,
            self.guidance_range is not None,
        )


@functools.lru_cache(maxsize=16)
def _compiled(
    denoiser: Denoiser,
    schedule: Schedule,
    sampler: str,
    clip: bool,
    settings: tuple[tuple[str, Any], ...],
    quantisation: str,
    two_branches: bool,
    takes_guidance: bool,
) -> Callable[..., jax.Array]:
    """One compiled program for every stage with these networks, every number of steps and every w."""
    model = guided(denoiser) if two_branches else denoiser
    mesh = meshes.make_mesh()
    everywhere, rows = meshes.replicated(mesh), meshes.batch_sharding(mesh)

    @functools.partial(
        jax.jit,
        in_shardings=(everywhere, rows, rows, rows, everywhere, everywhere),
        out_shardings=rows,
    )
    def run(
        params: Any, seeds: jax.Array, labels: jax.Array, latents: jax.Array | None, w: jax.Array, num_steps: jax.Array
    ) -> jax.Array:
        keys = jax.vmap(jax.random.key)(seeds)
        if latents is None:
            draw = lambda key: jax.random.normal(jax.random.fold_in(key, 0), denoiser.image_shape, jnp.float32)  # noqa: E731
            latents = jax.vmap(draw)(keys)
        condition = Condition(
            label=labels if denoiser.num_classes else None,
            guidance=jnp.full(seeds.shape, w) if two_branches or takes_guidance else None,
        )
        x = samplers.get(sampler)(
            lambda z, log_snr: model(params, z, log_snr, condition),
            latents,
            schedule,
            num_steps,
            keys=jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys),
            clip=clip,
            **dict(settings),
        )
        return protocols.quantise(x, quantisation)

    return run


def samplers_for(stage: Stage, wanted: Sequence[str]) -> tuple[str, ...]:
    """Those of the samplers `wanted` that suit a stage; a round of halving has learnt the steps of one sampler."""
    if stage.method in ("disback", "diff_instruct"):
        return ("one_step",)
    if stage.method == "stochastic":
        return ("stochastic",)
    suitable = tuple(name for name in wanted if not stage.num_steps or name in samplers.SCHEDULED)
    return suitable or ("ddim",)


def load(path: str | os.PathLike[str], stage: str = "") -> Generator:
    """A trained model, ready to sample: ``diffdistill.load("runs/digits").sample(10, w=1.0).images``.

    Args:
      path: the workdir of a run, or the folder of one of its stages.
      stage: name of a stage of that run; by default the one that `path` is, or the last finished one.

    Raises:
      WorkdirError: there is no run at that path.
      SampleError: the run has no such finished stage.
      CheckpointError: its checkpoint cannot be read.
    """
    return load_from(*locate(path, stage))


def locate(path: str | os.PathLike[str], stage: str = "") -> tuple[Workdir, str]:
    """(the run, the name of its stage) of a workdir or the folder of a stage in it. Raises WorkdirError."""
    folder = Path(path)
    if not stage and not (folder / "config.json").exists() and (folder.parent / "config.json").exists():
        folder, stage = folder.parent, folder.name
    return workdir.read(folder), stage


def load_from(opened: Workdir, stage: str = "") -> Generator:
    """The same as `load` of an opened run, which may be sampled otherwise than it was to be (Workdir.measured_as)."""
    done = list(runner.finished(opened))
    sampled = [each for each in done if each.method not in NOT_SHOWN]
    chosen = [each for each in done if each.name == stage] if stage else sampled[-1:]
    if not chosen:
        names = ", ".join(each.name for each in done) or "none"
        asked = f"Stage {stage!r} of {opened.path}" if stage else f"{opened.path}: a stage"
        raise SampleError(f"{asked} is not there or not finished. Finished stages: {names}.")
    return load_stage(opened, chosen[0])


def load_stage(folder: Workdir, stage: Stage, update: int | None = None) -> Generator:
    """A stage of an opened run, ready to sample: as it is, or as it was at the checkpoint of an update."""
    config = folder.config
    return Generator(
        name=stage.name,
        denoiser=chain.denoiser_of(config, stage, folder.facts),
        params=runner.read_params(folder, stage, meshes.make_mesh(), update),
        schedule=chain.sampling_schedule_of(config.process, config.model.prediction),
        num_steps=stage.num_steps or chain.full_steps(config),
        guidance_range=chain.guidance_range(config, stage),
        has_null_class=chain.has_null_class(config, stage),
        sampler=samplers_for(stage, (config.sampling.sampler,))[0],
        clip=config.sampling.clip,
        settings={**dataclasses.asdict(config.sampling), "sigma_init": config.disback.sigma_init},
        quantisation=config.sampling.quantisation,
        batch_size=config.sampling.batch_size,
        class_names=folder.facts.class_names,
        is_encoder=stage.method == "encoder",
    )
