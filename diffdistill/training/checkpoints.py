"""Checkpoints of one stage: an Orbax chain of step directories with params, ema, optimizer and meta as separate items.

A checkpoint appears whole or not at all: Orbax writes into a temporary directory and renames it when every byte is
there. Whatever a kill leaves half done is ignored and removed when the stage is opened for writing again; what merely
looks like it but is a damaged checkpoint is refused. The checksums of its files are part of it, and compared before it
is read.

Of several processes the main one alone writes and reads; the others send it what they hold and are told what it reads.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.options import MultiprocessingOptions

from diffdistill.training import checkpoint_messages as messages
from diffdistill.training import checksums, processes, quiet, trees
from diffdistill.training import mesh as meshes
from diffdistill.training.errors import CheckpointError

META = "meta"
COMMITTED = "_CHECKPOINT_METADATA"
"""The file Orbax writes into every checkpoint directory."""


class StageCheckpoints:
    """The checkpoints of one stage, in `directory`/<updates done>/.

    save_every: updates between checkpoints (0 = only those that are forced). keep: how many of the newest stay.
    keep_every: checkpoints at multiples of it stay as well (0 = none).
    read_only: for users of a finished (or still training) stage; touches nothing.
    Saving happens in the background; `close` (or leave the `with` block) before the process ends.
    Of several processes all call everything but `wait` and `close` together.
    The state is a flax.struct.dataclass with an int32 field `step`; every other field that is not None is one item.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        save_every: int = 0,
        keep: int = 2,
        *,
        keep_every: int = 0,
        read_only: bool = False,
    ) -> None:
        if save_every < 0 or keep < 1:
            raise ValueError(f"save_every={save_every} and keep={keep}: expected save_every >= 0 and keep >= 1.")
        quiet.orbax()
        self.directory = Path(os.path.abspath(directory))
        self.save_every = save_every
        self._read_only = read_only
        self._manager: ocp.CheckpointManager | None = None
        self._saving = 0
        self._known: list[int] = []
        """On all but the main process: the complete checkpoints, and some that have been deleted since."""
        self._known = processes.on_main(lambda: self._open(keep, keep_every))

    def _open(self, keep: int, keep_every: int) -> list[int]:
        read_only = self._read_only
        if read_only and not self.directory.is_dir():
            return []  # nothing was ever saved
        stay = [policies.LatestN(keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(stay),
            cleanup_tmp_directories=not read_only,
            save_interval_steps=0 if read_only else 1,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            read_only=read_only,
            create=False,
            multiprocessing_options=_of_processes(),
        )
        try:
            if not read_only:
                self.directory.mkdir(parents=True, exist_ok=True)
                if damaged := _remove_torn(self.directory, keep_every):
                    raise CheckpointError(damaged)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise CheckpointError(messages.explain(error, "open", self.directory)) from error
        return self.all()

    def latest(self) -> int | None:
        """Updates done at the newest complete checkpoint; None where there is none."""
        return max(self.all(), default=None)

    def all(self) -> list[int]:
        """Updates done at every complete checkpoint, oldest first."""
        return self._known if self._manager is None else sorted(self._manager.all_steps())

    def save(self, state: Any, meta: dict[str, Any] | None = None, *, force: bool = False) -> bool:
        """Save `state` if its update number is due (a multiple of save_every) or `force`; True if it was.

        meta: JSON values. Returns when the arrays are copied; the writing goes on in the background. An error of an
        earlier background write is raised here. Never replaces a checkpoint that exists.
        """
        if self._read_only:
            raise CheckpointError(f"The checkpoints in {self.directory} were opened for reading only.")
        step = int(state.step)
        due = force or bool(self.save_every and step % self.save_every == 0)
        if not due or step in self.all():
            return False
        items = {name: trees.to_dict(tree) for name, tree in _items(state).items()}
        if jax.process_count() > 1:
            items = meshes.to_main(items)
        saved = processes.on_main(lambda: self._begin(step, items, {**(meta or {}), "step": step}))
        self._known = [*self._known, step]
        return saved

    def _begin(self, step: int, items: dict[str, Any], meta: dict[str, Any]) -> bool:
        assert self._manager is not None
        if (self.directory / str(step)).exists():  # Orbax would replace it
            raise CheckpointError(
                f"{self.directory / str(step)} is there already, but another program has written it. Nothing was "
                "saved. Let only one program work in a workdir; start the same command again to continue."
            )
        self._check_room(items)
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self.wait()
        self._saving = step
        try:
            return self._manager.save(
                step, args=ocp.args.Composite(**args, **{META: ocp.args.JsonSave(meta)}), force=True
            )
        except Exception as error:
            raise self._failed_save(error) from error

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """The newest state and its meta. like: the abstract state, with shardings (`mesh.abstract`).

        Raises CheckpointError where there is none, where it is damaged, or where its tensors are not those of `like`.
        """
        step = processes.on_main(self._newest)
        like = _placed(like)
        items = _items(like)

        def check() -> None:
            self._verify(step, [*items, META])
            saved = {path.name for path in (self.directory / str(step)).iterdir() if path.is_dir()}
            self._compare(step, items | {name: {} for name in sorted(saved - items.keys() - {META})})

        restored, meta = self._read(step, items, check)
        sharding = like.step.sharding
        restored["step"] = jax.make_array_from_callback((), sharding, lambda _: np.asarray(step, like.step.dtype))
        return dataclasses.replace(like, **restored), meta

    def restore_params(self, like: Any, *, ema: bool = True, step: int | None = None, average: str = "") -> Any:
        """The parameters alone: the moving average where there is one (and `ema`), otherwise the parameters.

        like: abstract parameters, with shardings. step: which checkpoint, by default the newest. average: the name of
        one of the further averages, instead. Reads this one item and nothing else.
        """
        like = _placed(like)

        def choose() -> tuple[int, str, list[str]]:
            chosen = self._chosen(step)
            if average:
                return chosen, "averages", self._averages(chosen, average)
            if not ema or (self.directory / str(chosen) / "ema").is_dir():
                return chosen, "ema" if ema else "params", []
            self._verify(chosen, ["ema"])  # it may have been there
            return chosen, "params", []

        chosen, name, known = processes.on_main(choose)
        wanted = dict.fromkeys(known, like) if average else like

        def check() -> None:
            self._verify(chosen, [name])
            self._compare(chosen, {name: wanted})

        found = self._read(chosen, {name: wanted}, check, with_meta=False)[0][name]
        return found[average] if average else found

    def _averages(self, step: int, average: str) -> list[str]:
        """The names of the further averages of a checkpoint, `average` among them."""
        self._verify(step, ["averages"])
        known = sorted({path.split("/")[0] for path in self._tensors(step, "averages")})
        if average not in known:
            raise CheckpointError(
                f"The checkpoint {self.directory / str(step)} has no average {average!r}; it has "
                f"{', '.join(known) or 'none beside the usual one'}."
            )
        return known

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The meta of a checkpoint, by default of the newest."""

        def read() -> dict[str, Any]:
            chosen = self._chosen(step)
            self._verify(chosen, [META])
            return dict(self._restored(chosen, {META: ocp.args.JsonRestore()})[META])

        return processes.on_main(read)

    def _read(
        self, step: int, items: dict[str, Any], check: Callable[[], None], *, with_meta: bool = True
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Items of a checkpoint, placed as their trees say, and its meta. First the main process calls `check`."""
        several = jax.process_count() > 1
        here: dict[str, Any] = {}

        def read() -> dict[str, Any]:
            check()
            nested = {name: trees.to_dict(tree) for name, tree in items.items()}
            if several:  # arrays of the host, from where they go to all devices
                nested = jax.tree.map(_host, nested)
            args: dict[str, Any] = {name: ocp.args.StandardRestore(tree) for name, tree in nested.items()}
            here.update(self._restored(step, {**args, **({META: ocp.args.JsonRestore()} if with_meta else {})}))
            return dict(here[META]) if with_meta else {}

        meta = processes.on_main(read)
        found = {}
        for name, tree in items.items():
            read_here = trees.from_dict(tree, here[name]) if here else tree
            found[name] = jax.tree.map(_sent, read_here, tree) if several else read_here
        return found, meta

    def wait(self) -> None:
        """Return when everything saved so far is on disk. Raises CheckpointError if it could not be written."""
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed_save(error) from error

    def close(self) -> None:
        """Wait, then release threads. The object must not be used again."""
        manager = self._manager
        try:
            self.wait()
        finally:
            self._manager = None
            if manager is not None:
                try:
                    manager.close()
                except Exception as error:  # of a write that failed, in most cases that of wait() again
                    raise self._failed_save(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _seal(self) -> None:
        """Called by Orbax when the files of the checkpoint that is being saved are there, before it appears."""
        hidden = [*self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"), self.directory / str(self._saving)]
        checksums.write(hidden[0])

    def _verify(self, step: int, items: Iterable[str]) -> None:
        try:
            checksums.check(self.directory / str(step), items)
        except checksums.Damaged as error:
            raise CheckpointError(
                messages.damaged(self.directory / str(step), str(error), self._after(step))
            ) from error
        except OSError as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(messages.unreadable(self.directory / str(step), error, self._after(step)))

    def _after(self, step: int) -> list[int]:
        """The complete checkpoints after one: where there are any, that one is read for its own sake."""
        return [other for other in self.all() if other > step]

    def _check_room(self, items: dict[str, Any]) -> None:
        """Refuse before anything is written where the disk has less room than the arrays take."""
        need = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
        free = shutil.disk_usage(self.directory).free
        if free < need:
            raise CheckpointError(
                f"Cannot write a checkpoint in {self.directory}: the disk is full ({need / 1e6:.1f} MB needed, "
                f"{free / 1e6:.1f} MB free). Free some space. {messages.KEPT}"
            )

    def _newest(self) -> int:
        self.wait()
        step = self.latest()
        if step is None:
            raise CheckpointError(f"There is no complete checkpoint in {self.directory}: train this stage first.")
        return step

    def _chosen(self, step: int | None) -> int:
        if step is None:
            return self._newest()
        if step not in self.all():
            raise CheckpointError(messages.absent(self.directory, step, self.all()))
        return step

    def _restored(self, step: int, args: dict[str, Any]) -> Any:
        assert self._manager is not None  # _newest() found a checkpoint through it
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:
            raise self._unreadable(step, error) from error

    def _compare(self, step: int, items: dict[str, Any]) -> None:
        """Every tensor of `items` must be in the checkpoint with its shape and dtype, and no other."""
        for name, tree in items.items():
            found = self._tensors(step, name)
            expected = trees.flat(trees.to_dict(tree))
            for path in sorted(found.keys() | expected.keys()):
                a, b = _shape(found.get(path)), _shape(expected.get(path))
                if a != b:
                    raise CheckpointError(
                        f"The checkpoint {self.directory / str(step)} belongs to another network or optimiser: "
                        f"tensor {name}/{path} is {a} in the checkpoint and {b} in this configuration. "
                        "Use the configuration it was trained with, or another workdir."
                    )

    def _tensors(self, step: int, name: str) -> dict[str, Any]:
        """Path -> shape and dtype of what an item of a checkpoint holds; {} where it has no such item."""
        path = self.directory / str(step) / name
        if not path.is_dir():
            return {}
        try:
            metadata: Any = ocp.Checkpointer(ocp.StandardCheckpointHandler()).metadata(path)
            return trees.flat(getattr(metadata, "item_metadata", metadata).tree)
        except Exception as error:
            raise self._unreadable(step, error) from error

    def _failed_save(self, error: Exception) -> CheckpointError:
        """Say why, after removing what the failed write left (a full disk needs the room)."""
        for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
        if self._manager is not None:
            self._manager.reload()  # it counts a checkpoint from the moment its writing began
        return CheckpointError(messages.explain(error, "write", self.directory))


def _items(state: Any) -> dict[str, Any]:
    """The fields of a state that become items: all but `step` and what is None."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "step"}
    return {name: tree for name, tree in fields.items() if jax.tree.leaves(tree)}


def _placed(like: Any) -> Any:
    """`like` with a sharding on every leaf: its own, or the first device of this process."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)

    return jax.tree.map(place, like)


def _host(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """What Orbax takes for "an array of the host of this shape": one of no size."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _sent(leaf: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """A tensor of the main process, placed as `like` says, on every process."""
    host = leaf if isinstance(leaf, np.ndarray) else _host(like)
    return meshes.place(processes.from_main(host), like.sharding)


def _of_processes() -> MultiprocessingOptions:
    """Of several processes the main one alone saves and reads, without waiting for the others."""
    if jax.process_count() == 1:
        return MultiprocessingOptions()
    return MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="main")


def _shape(leaf: Any) -> str:
    """A tensor as a person reads it: "float32 (3, 3, 1, 8)", or "absent"."""
    if leaf is None:
        return "absent"
    return f"{np.dtype(leaf.dtype).name} {tuple(leaf.shape)}"


def _remove_torn(directory: Path, keep_every: int) -> str:
    """Removes the step directories without Orbax's mark that a kill left half deleted.

    Returns what to say where the mark is all that is missing, or where no kill can have left such a directory since
    nothing newer is complete or it was to stay: then it is damaged, and stays.
    """
    steps = {int(path.name): path for path in directory.iterdir() if path.name.isdigit() and path.is_dir()}
    complete = [step for step, path in steps.items() if (path / COMMITTED).exists()]
    for step in sorted(steps.keys() - set(complete)):
        is_needed = bool(keep_every and step % keep_every == 0)
        if is_needed or step > max(complete, default=-1) or checksums.are_right(steps[step]):
            newer = sorted(other for other in complete if is_needed and other > step)
            return messages.damaged(steps[step], f"its file {COMMITTED} is missing", newer)
        shutil.rmtree(steps[step], ignore_errors=True)
    return ""
