"""A published model becomes the finished first stage of a run: sampled, evaluated and distilled as one trained here."""

from __future__ import annotations

import math
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
from diffdistill.training import processes
from diffdistill.training.checkpoints import StageCheckpoints
from diffdistill.weights import WeightsError
from diffdistill.weights.imported import ImportedModel
from diffdistill.weights.sources import import_weights

_HALVED = ("x", "v", "both", "edm")  # those that predict the noise alone are not halved (config_checks)
_HOW_TO_DISTIL = (
    "; distil it with --mode=train, the same config and workdir, its data (--config.data.path=PATH) and the fields of "
    "what is to follow, such as --config.progressive.num_updates=50000."
)


@flax.struct.dataclass
class _Imported:
    """What a checkpoint keeps of a model that is not trained further."""

    step: jax.Array
    params: Any


def import_model(
    source: str,
    path: str,
    folder: str,
    options: dict[str, str | int],
    name: str = "",
    say: Callable[[str], Any] = print,
) -> None:
    """Reads a published model and writes it as the stage "teacher" of a new run without further stages.

    Args:
      source, path, options: see weights.sources.import_weights.
      folder: workdir of the run.
      name: what to call it in advice, such as its address; empty: the folder.

    Raises:
      WeightsError: the file is refused; the message names the tensor or what it asked for.
      WorkdirError: the folder holds another run or cannot be written.
      CheckpointError: the disk is full.
    """
    if processes.on_main(lambda: workdir.has_checkpoints(Path(folder))):
        raise workdir.WorkdirError(f"{folder} holds a run already; choose another --workdir for the imported model.")
    model = import_weights(source, path, **options)
    config = _config(model, Path(path).stem)
    facts = DataFacts(model.image_shape, model.num_classes)
    stage = chain.plan(config)[0]
    denoiser = chain.denoiser_of(config, stage, facts)
    if jax.tree.map(jnp.shape, denoiser.shapes()) != jax.tree.map(jnp.shape, model.params):
        raise WeightsError(f"{path} holds a network that no config describes; please report it.")
    opened = workdir.create(folder, config, facts, None)
    with workdir.alone(opened.path), StageCheckpoints(opened.stage(stage.name)) as checkpoints:
        meta = {"stage": stage.name, "seconds": 0.0, "source": source, "sha256": model.sha256, "file": path}
        params = meshes.replicate(meshes.make_mesh(), model.params)
        checkpoints.save(_Imported(jnp.int32(stage.num_updates), params), meta, force=True)
    height, width, channels = model.image_shape
    name = name or folder
    say(
        f"{path}: {denoiser.num_parameters():,} parameters, {config.model.architecture}, output "
        f"{config.model.prediction}, {height}x{width}x{channels}, "
        f"{model.num_classes or 'no'} classes, sha256 {model.sha256[:12]}\n"
        f"It is the teacher of {opened.path}. Sample it with --mode=sample --workdir={name}; measure it with "
        f"--mode=evaluate --config=configs/workdir.py:{name} --workdir={name} --config.evaluation.reference=FILE"
        f"{_HOW_TO_DISTIL if config.model.prediction in _HALVED else '.'}"
    )


def _config(model: ImportedModel, stem: str) -> Config:
    settings = default_config()
    settings.name = f"imported-{stem}"
    if model.prediction == "ddpm":
        presets.discrete(settings, "linear")
        settings.evaluation.features, settings.evaluation.guidance = "inception", (0.0,)
    elif model.prediction in presets.PRESETS:
        presets.apply(settings, model.prediction)
        presets.as_published(settings, model.image_shape[0], model.num_classes, model.prediction)
        if model.prediction == "ve":  # trained on the levels that its file names
            settings.process.log_snr_min = -2.0 * math.log(model.sigma_max)
            settings.process.log_snr_max = -2.0 * math.log(model.sigma_min)
    else:
        settings.sampling.quantisation, settings.evaluation.features = "adm", "inception"
        settings.evaluation.guidance, settings.evaluation.num_steps = (0.0,), (model.num_steps or 1024,)
        if model.num_steps > 1:
            settings.progressive.start_steps = model.num_steps  # it knows no finer steps
    settings.model.update(model.model)
    if settings.model.learned_variance:
        settings.teacher.noise = "schedule"  # which the hybrid loss needs; its levels are those of the preset
    settings.model.prediction = model.prediction
    settings.model.update(model.prediction_settings)
    settings.model.conditional = model.num_classes > 0
    settings.data.image_shape, settings.data.num_classes = model.image_shape, model.num_classes
    teacher = settings.teacher
    teacher.num_updates, teacher.dropout = 1, model.dropout
    teacher.label_dropout, teacher.augmentation = model.label_dropout, 0.0
    return resolve(settings)
