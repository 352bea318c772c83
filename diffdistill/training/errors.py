"""Why training stops early. The front door catches these and prints their message alone."""


class TrainingError(RuntimeError):
    """Base of what ends a run with a message for a person. Checkpoints that were complete stay intact."""


class CheckpointError(TrainingError):
    """A checkpoint could not be written or read. The message names the directory and says what to do."""


class MetricsError(TrainingError):
    """The metrics could not be written. The message names the file and says what to do."""


class NonFiniteLoss(TrainingError):
    """The loss or the parameters are no longer finite. The message says where; nothing of it was saved."""


class ProcessesDisagree(TrainingError):
    """The processes of one run were started differently, or hold other parameters. Nothing of it was saved."""


class ProcessLost(TrainingError):
    """Another process of the run has ended or cannot be reached. Checkpoints that were complete stay intact."""


class OtherProcessFailed(TrainingError):
    """This process had no fault, but another one of the run had, and says itself which."""

    def __init__(self) -> None:
        super().__init__(
            "Stopped, since another process of this run failed: see its message. What was saved before is kept; put it "
            "right and start the same command again."
        )


class Interrupted(Exception):
    """The run was asked to stop, and did so after saving update `update`. Not an error: the same command continues."""

    def __init__(self, stage: str, update: int, num_updates: int, reason: str) -> None:
        super().__init__(
            f"Stage {stage} stopped by {reason} after update {update} of {num_updates}, which is saved. "
            "Start the same command again to continue."
        )
        self.stage, self.update, self.reason = stage, update, reason
