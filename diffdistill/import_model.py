"""A published model becomes the finished first stage of a run: sampled, evaluated and distilled as one trained here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from diffdistill import chain, presets, workdir
from diffdistill.chain import DataFacts
from diffdistill.config import Config, default_config, resolve
from diffdistill.training import mesh as meshes
from diffdistill.training.checkpoints import StageCheckpoints
from diffdistill.weights import WeightsError
from diffdistill.weights.imported import ImportedModel
from diffdistill.weights.sources import import_weights


@flax.struct.dataclass
class _Imported:
    """What a checkpoint keeps of a model that is not trained further."""

    step: jax.Array
    params: Any


def import_model(
    source: str, path: str, folder: str, options: dict[str, str | int], say: Callable[[str], Any] = print
) -> None:
    """Reads a published model and writes it as the stage "teacher" of a new run without further stages.

    Args:
      source, path, options: see weights.sources.import_weights.
      folder: workdir of the run.

    Raises:
      WeightsError: the file is refused; the message names the tensor or what it asked for.
      WorkdirError: the folder holds another run or cannot be written.
      CheckpointError: the disk is full.
    """
    model = import_weights(source, path, **options)
    config = _config(model, Path(path).stem)
    facts = DataFacts(model.image_shape, model.num_classes)
    stage = chain.plan(config)[0]
    denoiser = chain.denoiser_of(config, stage, facts)
    if jax.tree.map(jnp.shape, jax.eval_shape(denoiser.init, jax.random.key(0))) != jax.tree.map(
        jnp.shape, model.params
    ):
        raise WeightsError(f"{path} holds a network that no config describes; please report it.")
    if any(Path(folder).glob("*/*/_CHECKPOINT_METADATA")):
        raise workdir.WorkdirError(f"{folder} holds a run already; choose another --workdir for the imported model.")
    opened = workdir.create(folder, config, facts, None, write=meshes.is_main())
    with StageCheckpoints(opened.stage(stage.name)) as checkpoints:
        meta = {"stage": stage.name, "seconds": 0.0, "source": source, "sha256": model.sha256, "file": path}
        params = meshes.replicate(meshes.make_mesh(), model.params)
        checkpoints.save(_Imported(jnp.int32(stage.num_updates), params), meta, force=True)
    height, width, channels = model.image_shape
    say(
        f"{path}: {denoiser.num_parameters():,} parameters, {config.model.architecture}, output "
        f"{config.model.prediction}, {height}x{width}x{channels}, "
        f"{model.num_classes or 'no'} classes, sha256 {model.sha256[:12]}\n"
        f"It is the teacher of {opened.path}. Sample it with --mode=sample --workdir={folder}; distil it with "
        f"--config=configs/workdir.py:{folder} --workdir={folder} and the fields of what is to follow, such as "
        "--config.progressive.num_updates=50000."
    )


def _config(model: ImportedModel, stem: str) -> Config:
    settings = default_config()
    settings.name = f"imported-{stem}"
    if model.prediction in presets.PRESETS:
        presets.apply(settings, model.prediction)
        settings.sampling.sampler = "heun"  # as Karras et al. sample all of them
    settings.model.update(model.model)
    settings.model.prediction = model.prediction
    settings.model.update(model.prediction_settings)
    settings.model.conditional = model.num_classes > 0
    settings.data.image_shape, settings.data.num_classes = model.image_shape, model.num_classes
    teacher = settings.teacher
    teacher.num_updates, teacher.dropout = 1, model.dropout
    teacher.label_dropout = teacher.augmentation = 0.0
    if model.num_steps:
        settings.evaluation.num_steps = (model.num_steps,)
    return resolve(settings)
