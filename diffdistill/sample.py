"""From the checkpoints of a run to a generator of images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from diffdistill import chain, runner, samplers, workdir
from diffdistill.chain import Stage
from diffdistill.data import remote
from diffdistill.data.latents import scaling
from diffdistill.generator import Generator, SampleError
from diffdistill.training import mesh as meshes
from diffdistill.training import processes
from diffdistill.workdir import Workdir

# Stages that are no generators of the data: one leads from images to noise, one knows the samples of a generator.
NOT_SHOWN = ("encoder", "degradation")


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
      path: the workdir of a run, also at an address such as gs://bucket/run, or the folder of one of its stages.
      stage: name of a stage of that run; by default the one that `path` is, or the last finished one.

    Raises:
      WorkdirError: there is no run at that path.
      SampleError: the run has no such finished stage.
      CheckpointError: its checkpoint cannot be read.
    """
    return load_from(*locate(path, stage))


def locate(path: str | os.PathLike[str], stage: str = "") -> tuple[Workdir, str]:
    """(the run, the name of its stage) of a workdir or the folder of a stage in it. Raises WorkdirError."""
    if remote.is_remote(path):
        address = str(path).rstrip("/")
        run, _, name = address.rpartition("/")

        def is_stage_there() -> bool:
            return not remote.exists(f"{address}/config.json") and remote.exists(f"{run}/config.json")

        if not stage and processes.on_main(is_stage_there):
            return workdir.read(run), name
        return workdir.read(address), stage
    folder = Path(path)

    def is_stage() -> bool:
        return not (folder / "config.json").exists() and (folder.parent / "config.json").exists()

    if not stage and processes.on_main(is_stage):
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


def load_stage(folder: Workdir, stage: Stage, update: int = 0) -> Generator:
    """A stage of an opened run, ready to sample: as it is, or as it was at the checkpoint of an update.

    Its parameters are the average that config.sampling.average asks for where the stage keeps further ones.
    """
    config = folder.config
    average = str(config.sampling.average) if config.sampling.average and stage.settings.ema_half_lives else ""
    return Generator(
        name=stage.name,
        denoiser=chain.denoiser_of(config, stage, folder.facts),
        params=runner.read_params(folder, stage, meshes.make_mesh(), update, average),
        schedule=chain.sampling_schedule_of(config.process, config.model.prediction),
        num_steps=stage.num_steps or chain.full_steps(config),
        guidance_range=chain.guidance_range(config, stage),
        has_null_class=chain.has_null_class(config, stage),
        sampler=samplers_for(stage, (config.sampling.sampler,))[0],
        learnt_sampler="stochastic" if stage.method == "stochastic" else "",
        clip=config.sampling.clip and not folder.facts.latents,
        settings={**dataclasses.asdict(config.sampling), "sigma_init": config.disback.sigma_init},
        quantisation="none" if folder.facts.latents else config.sampling.quantisation,
        batch_size=config.sampling.batch_size,
        class_names=folder.facts.class_names,
        is_encoder=stage.method == "encoder",
        latent_scaling=scaling(config.data.latent_shift, config.data.latent_scale, folder.facts.image_shape[-1])
        if folder.facts.latents
        else None,
        learned_variance=config.model.learned_variance and stage.method == "teacher",
    )
