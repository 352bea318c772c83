"""Judges: what is measured on the samples of a model. One file each, all with the same contract (contract.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffdistill import chain, fields
from diffdistill.config import Config
from diffdistill.data.contract import Source
from diffdistill.judges import domain, inception
from diffdistill.judges.contract import Judge
from diffdistill.training.interrupt import Interrupt
from diffdistill.workdir import Workdir


def make(
    folder: Workdir, source: Source | None, inception_weights: str, interrupt: Interrupt, say: Callable[[str], Any]
) -> Judge | None:
    """The judge that a run's config asks for; None, with a word about it, where the data does not allow one.

    Raises:
      DataError, WeightsError, StatisticsError: what the judge needs is not there.
      EvaluationInterrupted: a signal arrived.
    """
    if folder.config.evaluation.features == "inception":
        return inception.make(folder, source, inception_weights, interrupt, say)
    if source is None:
        say("evaluation: left out, since domain features need images")
        return None
    if source.num_classes < 2:
        say(f"evaluation: left out, since domain features need classes and {source.name} has {source.num_classes}")
        return None
    return domain.make(folder, source, say)


def check(config: Config, inception_weights: str) -> None:
    """Refuses, before a run trains for days, an evaluation that could not start.

    Raises:
      ConfigError: a stage is to be measured that the run does not have.
      WeightsError, StatisticsError: the network or the reference file is not there or not the right one.
    """
    evaluation = config.evaluation
    for index, name in enumerate(evaluation.stages):
        fields.one_of(f"config.evaluation.stages[{index}]", name, [stage.name for stage in chain.plan(config)])
    if evaluation.features == "inception" and evaluation.num_samples:
        network = inception.load_network(evaluation, inception_weights)
        if evaluation.reference:
            network.read_reference(evaluation.reference, evaluation.reference_protocol)
