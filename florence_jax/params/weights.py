"""Parameters with their description: a checkpoint folder that says what it holds and what for, in `model.json`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from etils import epath

from florence_jax.errors import UserError
from florence_jax.files import write_bytes
from florence_jax.models.resize import resize_bias_tables, resize_position_embedding
from florence_jax.params.checkpoint import Checkpoints
from florence_jax.params.rules import path_string

MODEL_FILE = "model.json"
FORMAT = 1
TOKENIZER_BYTES = 16 * 2**20  # a larger file is not copied beside model.json, only named
COMPANIONS = {"vocab.json": ("merges.txt",)}  # files that a tokenizer's file is of no use without


class Description(NamedTuple):
    """What a checkpoint folder holds.

    Attributes:
      folder: that holds the checkpoints.
      task: that trained it, such as 'pretrain'; 'import' of converted weights.
      parts: by name ('towers', 'head', 'detector', ...), what is needed to build that part of the model again,
        JSON-able: for the towers "variant" and "overrides" as for `florence.build`. Each has "entries", the top-level
        names of its parameters: 'image', 'text', 'image_projection', ...
      tokenizer: as for `data.tokenizers.load_tokenizer`; '' where the folder does not say.
      classes: names of the classes, in the order of a head's outputs; () where it has none.
      source: where the weights come from, for people.
    """

    folder: str
    task: str
    parts: dict[str, dict[str, Any]]
    tokenizer: str
    classes: tuple[str, ...]
    source: dict[str, Any]

    @property
    def entries(self) -> tuple[str, ...]:
        """Top-level names of the parameters of all parts."""
        return tuple(name for part in self.parts.values() for name in part["entries"])


def make_description(
    task: str,
    parts: Mapping[str, Mapping[str, Any]],
    *,
    tokenizer: str = "",
    classes: Sequence[str] = (),
    source: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of a `model.json`, for `write_description`; arguments as the attributes of `Description`.

    What is None in a part's "overrides" was not given, and is left out.
    """
    filled = {}
    for name, part in parts.items():
        options = {key: dict(value) if isinstance(value, Mapping) else value for key, value in part.items()}
        if "overrides" in options:
            options["overrides"] = {key: value for key, value in options["overrides"].items() if value is not None}
        filled[name] = options | {"entries": list(part["entries"])}
    return {
        "format": FORMAT,
        "task": task,
        "parts": filled,
        "tokenizer": tokenizer,
        "classes": list(classes),
        "source": dict(source or {}),
    }


def write_description(directory: str, description: Mapping[str, Any]) -> None:
    """Writes `model.json` into a folder of checkpoints, in one step; by the main process alone.

    A run does this once, when it starts from nothing and before its first checkpoint; a resumed run leaves the file as
    it is. The file of a tokenizer (a user's `*.model`, CLIP's merges, ...) is copied beside it where it has at most
    `TOKENIZER_BYTES`, so that the folder can be moved to another machine; its path is kept in any case.

    Args:
      directory: path or bucket URL, created if missing.
      description: from `make_description`.

    Raises:
      UserError: if the folder cannot be written.
    """
    folder, spec = epath.Path(directory), description["tokenizer"]
    try:
        copied = _copy_tokenizer(spec, folder)
        content = {**description, "tokenizer": {"given": spec, "file": copied}}
        write_bytes(str(folder / MODEL_FILE), (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error}; choose another folder") from error


def _copy_tokenizer(spec: str, folder: epath.Path) -> str:
    """The name, in the folder, of the copied file; '' for a tokenizer without a file, or with one that is too large."""
    path = epath.Path(spec)
    if not path.suffix or path.name == MODEL_FILE or not path.is_file():
        return ""
    files = [path, *(path.parent / name for name in COMPANIONS.get(path.name, ()))]
    if sum(file.stat().length for file in files) > TOKENIZER_BYTES:
        return ""
    for file in files:
        if file != folder / file.name:
            write_bytes(str(folder / file.name), file.read_bytes())
    return path.name


def save_pretrained(directory: str, params: Any, description: Mapping[str, Any]) -> None:
    """Writes `params` as step 0 of a checkpoint folder, and `model.json` beside it.

    Args:
      directory: path or bucket URL; created if missing. `--config.init=directory` reads it.
      params: nested dict of float32 arrays.
      description: from `make_description`.

    Raises:
      UserError: the folder already holds a checkpoint, or cannot be written.
    """
    checkpoints = Checkpoints(directory, keep=1)
    try:
        if checkpoints.latest_step() is not None:
            raise UserError(f"{directory} already holds a checkpoint: choose another folder")
        write_description(directory, description)
        checkpoints.save(0, {"params": params})
    finally:
        checkpoints.close()


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
    """Reads what a checkpoint folder holds from its `model.json`, and nothing else.

    Args:
      init: as for `checkpoint_folder`.

    Raises:
      UserError: for a folder without such a file, or with one that is not of this format.
    """
    folder = epath.Path(checkpoint_folder(init))
    file = folder / MODEL_FILE
    try:
        content = json.loads(file.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, this version reads {FORMAT}")
        tokenizer = content["tokenizer"]
        found = Description(
            str(folder),
            content["task"],
            content["parts"],
            str(folder / tokenizer["file"]) if tokenizer["file"] else tokenizer["given"],
            tuple(content["classes"]),
            content["source"],
        )
        _ = found.entries
    except FileNotFoundError as error:
        raise UserError(
            f"cannot tell which model {init} is for: there is no {file}, which every run and import writes; give the "
            "folder of a run, or import the weights again"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot tell which model {init} is for: {file} cannot be used ({error!r})") from error
    return found


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
