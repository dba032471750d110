"""Parameters with their description: a checkpoint folder that says which model it is for, in `model.json`."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from etils import epath

from florence_jax.errors import UserError
from florence_jax.models.resize import resize_bias_tables, resize_position_embedding
from florence_jax.params.checkpoint import Checkpoints
from florence_jax.params.rules import path_string

MODEL_FILE = "model.json"


def save_pretrained(
    directory: str, params: Any, variant: str, overrides: Mapping[str, Any], source: Mapping[str, Any]
) -> None:
    """Writes `params` as step 0 of a checkpoint folder, and `model.json` beside it.

    Args:
      directory: path or bucket URL; created if missing. `--config.init=directory` reads it.
      params: nested dict of float32 arrays.
      variant, overrides: as for `florence.build`; JSON-able.
      source: where the parameters come from, kept in `model.json` for people.

    Raises:
      UserError: the folder already holds a checkpoint, or cannot be written.
    """
    folder = epath.Path(directory)
    checkpoints = Checkpoints(directory, keep=1)
    try:
        if checkpoints.latest_step() is not None:
            raise UserError(f"{directory} already holds a checkpoint: choose another folder")
        partial = folder / f"{MODEL_FILE}.partial"
        content = {"variant": variant, "overrides": dict(overrides), "source": dict(source)}
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(folder / MODEL_FILE)
        checkpoints.save(0, {"params": params})
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error}; choose another folder") from error
    finally:
        checkpoints.close()


class Description(NamedTuple):
    """Which model a checkpoint folder is for.

    Attributes:
      folder: that holds the checkpoints.
      variant, overrides: as for `florence.build`.
      tokenizer: as for `data.tokenizers.load_tokenizer`; '' where the folder does not say.
      towers: names of the parameters' top-level entries: 'image', 'text', 'head', ...
    """

    folder: str
    variant: str
    overrides: dict[str, Any]
    tokenizer: str
    towers: tuple[str, ...]


def checkpoint_folder(init: str) -> str:
    """The folder with the checkpoints of `init`: itself, or `checkpoints/` in it where it is the workdir of a run.

    Raises:
      UserError: if there is no such folder.
    """
    folder = epath.Path(init)
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    if not folder.is_dir():
        raise UserError(
            f"no weights at {init}: give --config.init=DIR, the checkpoints/ folder of a run (train one with "
            "python -m florence_jax.main --config=configs/pretrain.py) or one written by "
            "python -m florence_jax.tools.import_torch"
        )
    return str(folder)


def describe(init: str) -> Description:
    """Reads what a checkpoint folder is for.

    Args:
      init: a folder written by `save_pretrained`; or `checkpoints/` of a run, whose `config.json` lies beside it; or
        the workdir of a run.

    Raises:
      UserError: for anything else, naming both kinds.
    """
    folder = epath.Path(checkpoint_folder(init))
    model_file, run_file = folder / MODEL_FILE, folder.parent / "config.json"
    try:
        if model_file.exists():
            content = json.loads(model_file.read_text())
            variant, overrides, tokenizer = content["variant"], content["overrides"], ""
        else:
            content = json.loads(run_file.read_text())
            variant, overrides = content["model"]["variant"], content["model"]["overrides"]
            tokenizer = content["text"]["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot tell which model {init} is for: neither {model_file} nor {run_file} describes one ({error!r})"
        ) from error
    checkpoints = Checkpoints(str(folder), read_only=True)
    try:
        towers = checkpoints.entries("params")
    finally:
        checkpoints.close()
    given = {name: value for name, value in overrides.items() if value is not None}
    return Description(str(folder), variant, given, tokenizer, towers)


def load_parameters(
    folder: str, like: Mapping[str, Any], new: tuple[str, ...] = (), average: bool = True
) -> dict[str, Any]:
    """Parameters of the newest checkpoint, on the devices of `like`.

    Bias tables and position embeddings of another window or image size are resized (bicubic); everything else must
    have its shape.

    Args:
      folder: that holds the checkpoints.
      like: arrays, or `jax.ShapeDtypeStruct` with shardings.
      new: top-level entries that are not read, but taken from `like`; and, where the checkpoint has them, left there.
      average: take the moving average where the run kept one.

    Raises:
      UserError: for missing, unknown and mis-shaped parameters, all in one message.
    """
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        part = "ema" if average and checkpoints.entries("ema") else "params"
        saved = checkpoints.shapes(part)
        wanted = {name: tree for name, tree in like.items() if name not in new}

        def target(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
            name = path_string(path)
            shape = saved.get(name, leaf.shape) if _resizable(name) else leaf.shape
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)

        tree = jax.tree_util.tree_map_with_path(target, wanted)
        ignored = {name: shape for name, shape in saved.items() if name.split("/")[0] in new}
        for name, shape in ignored.items():
            _insert(tree, name, jax.ShapeDtypeStruct(shape, np.float32, sharding=jax.tree.leaves(like)[0].sharding))
        read = checkpoints.restore({part: tree})[part]
    finally:
        checkpoints.close()
    read = {name: read[name] for name in wanted}
    fitted = jax.tree_util.tree_map_with_path(_fitted, read, wanted)
    return fitted | {name: like[name] for name in new if name in like}


def load_optimizer(init: str, like: Any) -> Any:
    """The optimizer state of the newest checkpoint of a run, to go on with the same moments in another stage.

    The learning-rate schedule keeps the count of `like`, that is, starts anew. Moments of bias tables and position
    embeddings whose shape is another now start at zero: a resized second moment could be negative.

    Args:
      init: as for `checkpoint_folder`.
      like: the fresh state, placed on the devices.

    Raises:
      UserError: no checkpoint, or one of another optimizer or architecture.
    """
    checkpoints = Checkpoints(checkpoint_folder(init), read_only=True)
    try:
        saved = checkpoints.shapes("opt_state")

        def target(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
            name = path_string(path)
            shape = saved.get(name, leaf.shape) if _resizable(name) else leaf.shape
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)

        read = checkpoints.restore({"opt_state": jax.tree_util.tree_map_with_path(target, like)})["opt_state"]
    finally:
        checkpoints.close()

    def choose(fresh: Any, old: Any) -> Any:
        return fresh if isinstance(fresh, optax.ScaleByScheduleState) or fresh.shape != old.shape else old

    return jax.tree.map(choose, like, read, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))


def _insert(tree: dict[str, Any], path: str, leaf: Any) -> None:
    *parents, last = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = leaf


def _resizable(name: str) -> bool:
    return name.endswith(("relative_position_bias_table", "image/position_embedding"))


def _fitted(path: Any, leaf: jax.Array, like: Any) -> jax.Array:
    """A leaf of the checkpoint in the shape of `like`."""
    if leaf.shape == like.shape:
        return leaf
    name = path_string(path)
    if name == "image/position_embedding":
        table = resize_position_embedding(np.asarray(leaf), round((like.shape[0] - 1) ** 0.5))
    else:
        last = "relative_position_bias_table"
        table = resize_bias_tables({last: np.asarray(leaf)}, (round(like.shape[-2] ** 0.5) + 1) // 2)[last]
    if table.shape != like.shape:
        raise UserError(f"{name}: {leaf.shape} in the checkpoint cannot be resized to {like.shape} of the model")
    return jax.device_put(table, like.sharding)
