"""Parameters with their description: a checkpoint folder that says which model it is for, in `model.json`."""

import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from florence_jax.errors import UserError
from florence_jax.models.florence import Model, ModelConfig, resolve_config
from florence_jax.train.checkpoint import Checkpoints

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


def model_config(directory: str, **overrides: Any) -> ModelConfig:
    """The model that a folder written by `save_pretrained` is for.

    Args:
      directory: that folder.
      **overrides: on top of the file's, such as `dtype` or `drop_path`.

    Raises:
      UserError: no or an unreadable `model.json`, or options that do not exist.
    """
    path = epath.Path(directory) / MODEL_FILE
    try:
        content = json.loads(path.read_text())
        return resolve_config(content["variant"], **{**content["overrides"], **overrides})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read {path}: {error}; give a folder written by florence_jax.tools.import_torch"
        ) from error


def load_pretrained(directory: str, **overrides: Any) -> tuple[Model, dict[str, Any]]:
    """The model of a folder written by `save_pretrained`, and its parameters on the default device.

    A folder of a Swin classifier holds only the image tower, and so do the parameters returned.

    Args:
      directory: that folder.
      **overrides: as for `model_config`; sizes cannot change.

    Raises:
      UserError: as `model_config`, or parameters that do not fit the model.
    """
    model = Model(model_config(directory, **overrides))
    checkpoints = Checkpoints(directory, read_only=True)
    try:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        shapes = {name: shapes[name] for name in checkpoints.entries("params") if name in shapes}
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
        return model, checkpoints.restore({"params": target})["params"]
    finally:
        checkpoints.close()
