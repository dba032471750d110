"""Parameters with their description: a checkpoint folder that says what it holds and what for, in `model.json`."""

import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from florence_jax.errors import UserError
from florence_jax.files import check_store, write_bytes
from florence_jax.params.checkpoint import Checkpoints
from florence_jax.params.rules import Rules, first_match, path_string
from florence_jax.params.sharding import place, whole_like

MODEL_FILE = "model.json"
FORMAT = 1
ACTIONS = ("read", "new", "adapt", "inflated")  # what `load` does with a parameter
INFLATED_FROM = ("video/", "image/")  # a parameter of the first entry is made of the one of that name in the second
TOKENIZER_BYTES = 16 * 2**20  # a larger file is not copied beside model.json, only named
COMPANIONS = {"vocab.json": ("merges.txt",)}  # files that a tokenizer's file is of no use without


class Description(NamedTuple):
    """What a checkpoint folder holds.

    Attributes:
      folder: that holds the checkpoints.
      task: that trained it, such as 'pretrain'; 'import' of converted towers, 'detect' of converted detectors.
      parts: by name ('towers', 'head', 'detector', ...), what is needed to build that part of the model again,
        JSON-able: for the towers "variant" and "overrides" as for `florence.build`. Each has "entries", the top-level
        names of its parameters: 'image', 'text', 'image_projection', ...
      tokenizer: as for `data.tokenizers.load_tokenizer`; '' where the folder does not say.
      names: one or more of each class, in the order of a head's outputs; () where it has none.
      source: where the weights come from, for people.
      templates: prompts with one '{}' each that the names were put into in training; () where that was not done.
    """

    folder: str
    task: str
    parts: dict[str, dict[str, Any]]
    tokenizer: str
    names: tuple[tuple[str, ...], ...]
    source: dict[str, Any]
    templates: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The first name of each class."""
        return tuple(given[0] for given in self.names)

    @property
    def entries(self) -> tuple[str, ...]:
        """Top-level names of the parameters of all parts."""
        return tuple(name for part in self.parts.values() for name in part["entries"])


def make_description(
    task: str,
    parts: Mapping[str, Mapping[str, Any]],
    *,
    tokenizer: str = "",
    classes: Sequence[str | Sequence[str]] = (),
    source: Mapping[str, Any] | None = None,
    templates: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of a `model.json`, for `write_description`; arguments as the attributes of `Description`.

    `classes` are its `names`; of a class with one name, that name alone will do.
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
        "classes": [
            given if isinstance(given, str) else given[0] if len(given) == 1 else [*given] for given in classes
        ],
        "source": dict(source or {}),
        **({"templates": [*templates]} if templates else {}),
    }


def _names(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else [*given]


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
      UserError: if there is no such folder, or its store cannot be reached.
    """
    if "://" in init:
        check_store(init)
    folder = epath.Path(init)
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    if not folder.is_dir():
        raise UserError(
            f"no weights at {init}: give the workdir of a run (train one with "
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
            tuple(tuple(_names(given)) for given in content["classes"]),
            content["source"],
            tuple(content.get("templates", ())),
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


def load(
    folder: str,
    like: Mapping[str, Any],
    rules: Rules[str] = ((".*", "read"),),
    adapt: Callable[[str, np.ndarray, Any], np.ndarray | None] | None = None,
    average: bool = True,
    inflate: Callable[[str, np.ndarray, Any], np.ndarray | None] | None = None,
) -> dict[str, Any]:
    """Parameters of the newest checkpoint, on the devices of `like`.

    Only the leaves that are needed are read, each straight to its place. A folder may hold more parts (top-level
    entries) than `like` has: those are left.

    Args:
      folder: that holds the checkpoints.
      like: arrays, or `jax.ShapeDtypeStruct` with shardings.
      rules: (pattern, what) pairs, the first match of a leaf's whole path wins: 'read'; 'new', taken from `like`, and
        where the folder holds it, left there; 'adapt', read, and where its shape is another, put through `adapt`;
        'inflated', of the video tower, taken from the image tower's parameter of the same name, and where its shape is
        another, put through `inflate`.
      adapt: `adapt(path, saved, like) -> array of the shape of like`, or None where it cannot; a model's method.
      inflate: the same for inflated ones; a video model's method.
      average: take the moving average where the run kept one (of what it trained; the rest never changed).

    Raises:
      UserError: for missing, unknown and mis-shaped parameters, and leaves without a rule, all in one message.
    """
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        saved = {name: ("params", shape) for name, shape in checkpoints.shapes("params").items()}
        if average:
            saved |= {name: ("ema", shape) for name, shape in checkpoints.shapes("ema").items()}
        wanted = {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(like)}
        plan = _sorted_out(wanted, saved, rules)
        adapted, failed = _adapted(checkpoints, plan.adapted, wanted, saved, adapt)
        inflated, flat = _inflated(checkpoints, plan.inflated, wanted, saved, inflate)
        if wrong := sorted(plan.wrong + failed + flat):
            raise UserError(
                f"the weights in {folder} do not fit the model; {len(wrong)} mismatches: {'; '.join(wrong)}. Use the "
                "model they were trained with, or rules that say what is new"
            )
        values = {name: wanted[name] for name in plan.new} | adapted | inflated
        values |= _read(checkpoints, {name: wanted[name] for name in plan.read}, saved)
    finally:
        checkpoints.close()
    tops = "".join(
        f", {len(names)} {how} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for how, names in (("adapted", adapted), ("inflated", inflated), ("new", plan.new))
        if names
    )
    if tops:
        _say(f"weights of {folder}: {len(plan.read)} parameters read{tops}")
    return jax.tree_util.tree_map_with_path(lambda path, _: values[path_string(path)], dict(like))


class _Plan(NamedTuple):
    """Paths by what is done with them: to read as they are, to adapt, to inflate, to take new; and what is wrong."""

    read: list[str]
    adapted: list[str]
    inflated: list[str]
    new: list[str]
    wrong: list[str]


def _sorted_out(
    wanted: Mapping[str, Any], saved: Mapping[str, tuple[str, tuple[int, ...]]], rules: Rules[str]
) -> _Plan:
    """What is done with each parameter, and a line for each with which nothing can be."""
    if unknown := sorted({str(how) for _, how in rules} - set(ACTIONS)):
        raise UserError(f"rules for loading weights: unknown {', '.join(unknown)}; choose of {', '.join(ACTIONS)}")
    find = first_match(rules, "loading")
    plan = _Plan([], [], [], [], [])
    for name, leaf in wanted.items():
        hit = find(name)
        how = None if hit is None else rules[hit][1]
        origin = _origin(name) if how == "inflated" else name
        shape = saved.get(origin, (None, None))[1]
        if how is None:
            plan.wrong.append(f"{name}: no rule for it")
        elif how == "new":
            plan.new.append(name)
            if isinstance(leaf, jax.ShapeDtypeStruct):
                plan.wrong.append(f"{name}: new, but there are no values to take")
        elif shape is None:
            plan.wrong.append(f"{origin}: not in the checkpoint")
        elif how == "inflated":
            plan.inflated.append(name)
        elif shape == tuple(leaf.shape):
            plan.read.append(name)
        elif how == "adapt":
            plan.adapted.append(name)
        else:
            plan.wrong.append(f"{name}: {shape} in the checkpoint, {tuple(leaf.shape)} in the model")
    parts = {name.split("/", 1)[0] for name in wanted}
    for name in saved.keys() - wanted.keys():
        hit = find(name)
        if name.split("/", 1)[0] in parts and (hit is None or rules[hit][1] != "new"):
            plan.wrong.append(f"{name}: not in the model")
    return plan


def _origin(name: str) -> str:
    """Path of the parameter that an inflated one is made of."""
    made, of = INFLATED_FROM
    return of + name.removeprefix(made)


def _inflated(
    checkpoints: Checkpoints,
    names: Sequence[str],
    wanted: Mapping[str, Any],
    saved: Mapping[str, tuple[str, tuple[int, ...]]],
    inflate: Callable[[str, np.ndarray, Any], np.ndarray | None] | None,
) -> tuple[dict[str, jax.Array], list[str]]:
    """As `_adapted`, of the image tower's; those of the same shape are read straight to their place."""
    same = {name: saved[_origin(name)][1] == tuple(wanted[name].shape) for name in names}
    copied = [name for name in names if same[name]]
    read = _read(checkpoints, {_origin(name): wanted[name] for name in copied}, saved)
    others = [name for name in names if not same[name]]
    made, failed = _adapted(checkpoints, others, wanted, saved, inflate, _origin)
    return made | {name: read[_origin(name)] for name in copied}, failed


def _adapted(
    checkpoints: Checkpoints,
    names: Sequence[str],
    wanted: Mapping[str, Any],
    saved: Mapping[str, tuple[str, tuple[int, ...]]],
    adapt: Callable[[str, np.ndarray, Any], np.ndarray | None] | None,
    origin: Callable[[str], str] = str,
) -> tuple[dict[str, jax.Array], list[str]]:
    """Arrays of another shape in that of the model; and a line for each that cannot be."""
    whole = {name: whole_like(wanted[name].sharding) for name in names}
    shapes = {
        origin(name): jax.ShapeDtypeStruct(saved[origin(name)][1], wanted[name].dtype, sharding=whole[name])
        for name in names
    }
    found = _read(checkpoints, shapes, saved)
    adapted, failed = {}, []
    for name in names:
        leaf, value = wanted[name], found[origin(name)]
        target = leaf
        if isinstance(leaf, jax.Array):  # whole on every process, as `adapt` may take rows of it
            target = np.asarray(jax.jit(jnp.copy, out_shardings=whole[name])(leaf))
        made = None if adapt is None else adapt(name, np.asarray(value), target)
        if made is None or made.shape != leaf.shape:
            failed.append(f"{name}: {value.shape} in the checkpoint cannot be made {tuple(leaf.shape)} of the model")
        else:
            adapted[name] = place(made.astype(leaf.dtype), leaf.sharding)
    return adapted, failed


def _read(
    checkpoints: Checkpoints, shapes: Mapping[str, Any], saved: Mapping[str, tuple[str, tuple[int, ...]]]
) -> dict[str, jax.Array]:
    """The leaves with these paths, in these shapes, dtypes and places."""
    target: dict[str, Any] = {}
    for name, leaf in shapes.items():
        parent = target.setdefault(saved[name][0], {})
        *above, last = name.split("/")
        for part in above:
            parent = parent.setdefault(part, {})
        parent[last] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    if not target:
        return {}
    found = checkpoints.restore(target, partial=True)
    return {path_string(path[1:]): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}


def _of_names(node: Any, names: Collection[str], prefix: str = "") -> Any:
    """An optimizer's state without the leaves of other paths; what is no dict keeps its length, as it was saved so."""
    if isinstance(node, Mapping):
        inner = {key: _of_names(value, names, f"{prefix}{key}/") for key, value in node.items()}
        return {key: value for key, value in inner.items() if jax.tree.leaves(value)}
    if isinstance(node, tuple):
        keys = getattr(node, "_fields", range(len(node)))
        found = [_of_names(value, names, f"{prefix}{key}/") for key, value in zip(keys, node, strict=True)]
        return type(node)(*found) if hasattr(node, "_fields") else tuple(found)
    return node if prefix.rstrip("/") in names else {}


@functools.cache
def _say(text: str) -> None:
    """Prints a line, once: evaluators that compare with the start load it again."""
    if jax.process_index() == 0:
        print(text, flush=True)


def load_optimizer(init: str, like: Any) -> Any:
    """The optimizer state of the newest checkpoint of a run, to go on with the same moments in another stage.

    The learning-rate schedule keeps the count of `like`, that is, starts anew. Moments start at zero where that run has
    none (it froze the parameter), or of another shape now: a resized second moment could be negative.

    Args:
      init: as for `checkpoint_folder`.
      like: the fresh state, placed on the devices.

    Raises:
      UserError: no checkpoint, or one of another optimizer.
    """
    folder = checkpoint_folder(init)
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        saved = checkpoints.shapes("opt_state")
        leaves, structure = jax.tree_util.tree_flatten_with_path(like)
        names = [path_string(path) for path, _ in leaves]
        fresh = dict(zip(names, (leaf for _, leaf in leaves), strict=True))
        if missing := [name for name, leaf in fresh.items() if not leaf.shape and name not in saved]:
            raise UserError(
                f"the optimizer state in {folder} is of another optimizer: it lacks {', '.join(missing)}; leave out "
                "--config.init_optimizer"
            )
        known = {name: leaf for name, leaf in fresh.items() if saved.get(name) == tuple(leaf.shape)}
        read = checkpoints.restore({"opt_state": _of_names(like, known)}, partial=True)["opt_state"]
    finally:
        checkpoints.close()
    if len(known) < len(names):
        _say(f"optimizer state of {folder}: {len(known)} arrays read, {len(names) - len(known)} start at zero")
    fresh |= {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(read)}
    state = jax.tree_util.tree_unflatten(structure, list(fresh.values()))

    def choose(fresh: Any, old: Any) -> Any:
        return fresh if isinstance(fresh, optax.ScaleByScheduleState) else old

    return jax.tree.map(choose, like, state, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))
