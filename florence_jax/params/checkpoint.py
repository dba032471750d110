"""Checkpoints: the only place that knows Orbax.

Saves are asynchronous and atomic (a checkpoint directory appears under its step number only when complete). Every
leaf is restored onto the sharding of the state it is restored into, so a run may continue on another mesh. A checksum
of every leaf is saved too, under 'digest', because a byte changed on the disk would otherwise go unnoticed.
"""

import contextlib
import gc
import logging as python_logging
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from florence_jax.errors import UserError
from florence_jax.params.digest import digests
from florence_jax.params.lazy import LazyArray
from florence_jax.params.rules import path_string

DIGEST = "digest"
# In messages of TensorStore and Orbax: the storage did not answer, which says nothing about what it holds.
PASSING = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|UNAUTHENTICATED)\b")


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Saves arrays of `LazyArray` one by one: each is read when its turn comes, and written before the next is read."""

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
            for future in await super().serialize([np.asarray(value)], [info], [arg]):
                future.result()
        return []


OTHER_TYPES = [kind for kind in ocp.type_handlers.supported_types() if kind is not jax.Array]
SLICED_FROM = 2**20  # bytes: a smaller array that all devices hold is written by one, not as a slice by each
HANDLERS = ocp.type_handlers.create_type_handler_registry(
    (LazyArray, _LazyHandler(deepcopy_host_arrays=False)),  # first: they are restored as the plain arrays that they are
    *((kind, ocp.type_handlers.get_type_handler(kind)) for kind in OTHER_TYPES),
    (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICED_FROM)),
)


ORBAX = str(epath.Path(ocp.__file__).parent)


def _is_told(record: python_logging.LogRecord) -> bool:
    """Whether a message is shown: not the tracebacks that each of Orbax's threads logs of what is raised here too."""
    return not (record.exc_info and record.pathname.startswith(ORBAX))


class _WithoutLateWrites:
    """An unraisable hook that leaves out what TensorStore says of the writes of a save that has failed already.

    Orbax raises the first failure and closes the event loop of that thread. The writes that were under way then are
    finished later, at any time, and each finds the loop closed.
    """

    def __init__(self, hook: Callable[[Any], object]):
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed" and unraisable.object is None):
            self._hook(unraisable)


class UnreadableCheckpoint(UserError):
    """A checkpoint that is truncated or corrupt."""


def newest_step(folder: str) -> int | None:
    """Step of the newest complete checkpoint of a folder, None if it has none.

    For processes that only ask: `Checkpoints` would take hold of the accelerator, which their workers need.
    """
    return max(
        (found.step for found in ocp.path.step.standard_name_format().find_all(epath.Path(folder))), default=None
    )


class Checkpoints:
    """The checkpoints of one run, under `directory`/<step>/.

    Args:
      directory: local path or bucket URL; created if missing (unless `read_only`).
      keep: how many of the newest checkpoints stay.
      keep_every: also checkpoints of steps that are multiples of this stay; 0: none.
      read_only: never creates or deletes anything.

    Raises:
      UserError: if the directory cannot be written, or does not exist in read-only mode.
    """

    def __init__(self, directory: str, *, keep: int = 2, keep_every: int = 0, read_only: bool = False):
        self.directory = epath.Path(directory)
        if read_only and not self.directory.exists():
            raise UserError(f"no checkpoints at {directory}: train first, or point --workdir at a finished run")
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else _preservation(keep, keep_every),
            create=not read_only,
            read_only=read_only,
            save_interval_steps=0 if read_only else 1,  # other values get a warning in read-only mode
            cleanup_tmp_directories=not read_only,
        )
        logging.get_absl_logger().addFilter(_is_told)  # once, however often
        if not isinstance(sys.unraisablehook, _WithoutLateWrites):
            sys.unraisablehook = _WithoutLateWrites(sys.unraisablehook)
        verbosity = logging.get_verbosity()
        try:
            if read_only:
                logging.set_verbosity(logging.ERROR)  # Orbax warns that what is read only is read only
            self._manager = ocp.CheckpointManager(
                self.directory.absolute() if "://" not in directory else self.directory,
                options=options,
                item_handlers=ocp.PyTreeCheckpointHandler(type_handler_registry=HANDLERS),
            )
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {directory}: {error}; choose another --workdir") from error
        finally:
            logging.set_verbosity(verbosity)

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Starts an asynchronous save of `state` (device arrays are copied before this returns).

        Raises:
          UserError: if the previous save failed, for example on a full disk.
        """
        try:
            if step not in self._manager.all_steps():
                state = dict(state)
                with _quiet_failure():
                    self._manager.save(step, args=ocp.args.PyTreeSave(state | {DIGEST: _all_digests(state)}))
        except (OSError, ValueError) as error:
            raise self._save_failed(error) from error

    def wait(self) -> None:
        """Blocks until every started save is complete; raises `UserError` if one failed."""
        try:
            with _quiet_failure():
                self._manager.wait_until_finished()
                self._manager.check_for_errors()
        except (OSError, ValueError) as error:
            raise self._save_failed(error) from error

    def _save_failed(self, error: Exception) -> UserError:
        # TensorStore puts the system's reason at the end of names of arrays and files.
        reason = re.search(r": ([^:]+) \[os_error_code=", str(error))
        first = reason[1] if reason else str(error).split("\n", 1)[0]
        return UserError(
            f"saving a checkpoint to {self.directory} failed: {first}; free space or fix the permissions and run the "
            "same command again: it resumes from the last complete checkpoint"
        )

    def restore(self, target: Any, step: int | None = None, *, partial: bool = False) -> Any:
        """Reads a checkpoint into the structure, dtypes and shardings of `target`.

        Args:
          target: tree of `jax.ShapeDtypeStruct` with shardings (or arrays); may be a part of what was saved, such as
            `{"params": ...}` alone.
          step: which checkpoint; default the newest.
          partial: what `target` has may be a part of what was saved at any depth; nothing else is read.

        Raises:
          UserError: if there is none, if names or shapes differ (all differences are listed), or if the storage does
            not answer.
          UnreadableCheckpoint: if it is truncated or corrupt.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise UserError(f"no complete checkpoint in {self.directory}: train first, or point at a finished run")
        try:
            with _quiet_failure():
                return self._read(target, step, partial)
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):
            raise  # none of them says that the files are damaged
        except Exception as error:  # TensorStore and Orbax raise every kind for damaged files
            first = (str(error) or type(error).__name__).split("\n", 1)[0][:200]
            if PASSING.search(str(error)) or isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise UserError(
                    f"checkpoint {self.directory}/{step} cannot be read now: {first}; nothing was changed, run the "
                    "same command again"
                ) from error
        raise UnreadableCheckpoint(f"checkpoint {self.directory}/{step} is damaged: {first}")

    def _read(self, target: Any, step: int, partial: bool) -> Any:
        metadata = self._manager.item_metadata(step)
        if not metadata:
            raise UnreadableCheckpoint(f"checkpoint {self.directory}/{step} is damaged: its list of arrays is missing")
        self._check_match(target, step, partial)
        kinds = {_name(path): leaf.dtype for path, leaf in _leaves(metadata)}
        wanted = jax.tree_util.tree_map_with_path(
            lambda path, x: jax.ShapeDtypeStruct(x.shape, kinds[_name(path)], sharding=x.sharding), dict(target)
        )
        args = ocp.checkpoint_utils.construct_restore_args(wanted)
        if DIGEST in metadata:
            saved = {root: metadata[DIGEST][root] for root in target}
            wanted[DIGEST] = {root: np.zeros(leaf.shape, np.uint32) for root, leaf in saved.items()}
            args[DIGEST] = {root: ocp.RestoreArgs(restore_type=np.ndarray) for root in target}
        state = self._manager.restore(
            step, args=ocp.args.PyTreeRestore(item=wanted, restore_args=args, partial_restore=True)
        )
        expected = state.pop(DIGEST, {})
        found = _all_digests(state)
        for root in expected if partial else ():
            there = sorted(name for name in kinds if name == root or name.startswith(f"{root}/"))
            places = {name: i for i, name in enumerate(there)}
            read = sorted(_name(path) for path, _ in jax.tree_util.tree_leaves_with_path({root: state[root]}))
            expected[root] = expected[root][[places[name] for name in read]]
        if bad := [root for root in expected if not np.array_equal(expected[root], found[root])]:
            raise UnreadableCheckpoint(
                f"checkpoint {self.directory}/{step} is damaged: the checksums of {', '.join(bad)} are not those of "
                "what was saved"
            )
        return jax.tree.map(lambda x, like: x.astype(like.dtype), state, dict(target))

    def set_aside(self, step: int) -> str:
        """Renames a damaged checkpoint, so that it is not found again; returns its new name.

        Raises:
          UserError: if there is no other checkpoint.
        """
        if len(self._manager.all_steps()) < 2:
            raise UserError(
                f"checkpoint {self.directory}/{step} is damaged and there is no earlier one: put back a copy, or train "
                "anew with another --workdir"
            )
        aside = self.directory / f"{step}.damaged-{int(time.time())}"
        try:
            (self.directory / str(step)).rename(aside)
        except OSError:
            if (self.directory / str(step)).exists():
                raise
            return "another name"  # another process of the job was first
        self._manager.reload()
        return str(aside)

    def shapes(self, root: str) -> dict[str, tuple[int, ...]]:
        """Shape of every leaf under `root` in the newest checkpoint, by path, such as 'image/norm/scale'.

        Raises:
          UserError: if there is no checkpoint.
        """
        if (step := self.latest_step()) is None:
            raise UserError(f"no complete checkpoint in {self.directory}: train first, or point at a finished run")
        found = {_name(path): tuple(leaf.shape) for path, leaf in _leaves(self._manager.item_metadata(step))}
        prefix = f"{root}/"
        return {name.removeprefix(prefix): shape for name, shape in found.items() if name.startswith(prefix)}

    def _check_match(self, target: Any, step: int, partial: bool) -> None:
        """Compares names and shapes of the parameters before anything is read; if partial, of those of `target`."""
        saved = {_name(p): tuple(m.shape) for p, m in _leaves(self._manager.item_metadata(step))}
        wanted = {_name(p): tuple(leaf.shape) for p, leaf in _leaves(target)}
        roots = {name.split("/", 1)[0] for name in wanted}
        lines = [f"{n}: not in the checkpoint" for n in sorted(wanted.keys() - saved.keys())]
        others = () if partial else sorted(saved.keys() - wanted.keys())
        lines += [f"{n}: not in the model" for n in others if n.split("/", 1)[0] in roots]
        lines += [
            f"{n}: {saved[n]} in the checkpoint, {wanted[n]} in the model"
            for n in sorted(wanted.keys() & saved.keys())
            if saved[n] != wanted[n]
        ]
        if lines:
            raise UserError(
                f"checkpoint {self.directory}/{step} is of another architecture; {len(lines)} mismatches: "
                + "; ".join(lines)
                + ". Use the configuration it was trained with, or another --workdir"
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """As `close`; when the block failed, the save that it had begun is waited for all the same."""
        if error is None:
            self.close()
            return
        try:
            self.close()
        except UserError as second:
            print(f"warning: {second}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Waits for pending saves and releases the manager's threads."""
        self.wait()
        self._manager.close()


@contextlib.contextmanager
def _quiet_failure() -> Iterator[None]:
    """Where an array cannot be read or saved, what Orbax has begun with all others ends in tracebacks: left out."""
    hook, logger = sys.unraisablehook, python_logging.getLogger("asyncio")
    level = logger.level
    sys.unraisablehook = lambda unraisable: logging.debug("%s", unraisable.exc_value)
    logger.setLevel("CRITICAL")
    try:
        yield
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        gc.collect()  # of the reads
        raise
    finally:
        sys.unraisablehook = hook
        logger.setLevel(level)


def _all_digests(state: dict[str, Any]) -> dict[str, np.ndarray]:
    """uint32 (leaves,) for each root of the state: the digests of its leaves in the order of their names."""
    found = {}
    for root, tree in state.items():
        leaves = {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
        found[root] = digests([leaves[name] for name in sorted(leaves)])
    return found


def _preservation(keep: int, keep_every: int) -> ocp.checkpoint_managers.PreservationPolicy:
    policies = ocp.checkpoint_managers
    latest = policies.LatestN(keep)
    return policies.AnyPreservationPolicy([latest, policies.EveryNSteps(keep_every)]) if keep_every else latest


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return [(p, x) for p, x in jax.tree_util.tree_flatten_with_path(tree)[0] if hasattr(x, "shape")]


def _name(path: Any) -> str:
    """Path of a leaf, the same for optax's named tuples and for the dicts that Orbax stores them as."""
    return path_string(path)
