"""Reads PyTorch checkpoints as numpy arrays: safetensors and TorchScript archives without PyTorch, the rest with it.

Nothing stored in a file is ever executed: pickles are read by `torch.load(..., weights_only=True)`, and TorchScript
archives (the form in which OpenAI released CLIP) by an unpickler that knows tensors and otherwise makes empty objects.
"""

import collections
import pickle
import zipfile
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from florence_jax.errors import UserError

# Names under which training scripts keep the weights beside the optimizer and the epoch, in the order of preference:
# averages, and a teacher's, where there are no others.
WRAPPERS = ("state_dict", "model", "module", "state_dict_ema", "model_ema", "teacher")
STORAGE_DTYPES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def read_state_dict(path: str) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint by name; floating point ones as float32.

    Args:
      path: a .safetensors file; a TorchScript archive; or what `torch.save` wrote (.pth, .pt, .bin, .ckpt), a state
        dict itself or under one of `WRAPPERS`.

    Raises:
      UserError: a missing or damaged file, an unknown format, one that holds other things than tensors and numbers, or
        a pickle without PyTorch installed.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no such file: {path}")
    if file.suffix == ".safetensors":
        try:
            tensors = safetensors.numpy.load_file(file)
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is not a safetensors file: {error}") from error
    elif _is_torchscript(file):
        tensors = _read_torchscript(file)
    else:
        tensors = _read_pickle(file)
    return {name: _as_float32(value) for name, value in tensors.items()}


def _as_float32(value: np.ndarray) -> np.ndarray:
    integral = value.dtype.kind in "biu"
    return value if integral else value.astype(np.float32)


def _read_pickle(file: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"reading {file.name} needs PyTorch: pip install '.[torch]', or give a .safetensors file"
        ) from error
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        # PyTorch's own message proposes to load without the safeguard; that advice is not passed on.
        raise UserError(
            f"{file} is damaged, or holds objects other than tensors, which are never loaded: download it again, or "
            "save its state dict as safetensors"
        ) from error
    while wrapper := _wrapper(content):
        content = content[wrapper]
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds a {type(content).__name__}, not a state dict")
    others = [f"{name} ({type(v).__name__})" for name, v in content.items() if not isinstance(v, (torch.Tensor, Real))]
    if others:
        some = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise UserError(
            f"{file} holds other things than tensors: {some}; save the state dict alone, or under 'state_dict'"
        )
    tensors = {}
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            value = value.float() if value.is_floating_point() else value
            value = value.numpy()
        tensors[str(name)] = np.asarray(value)
    return tensors


def _wrapper(content: Any) -> str | None:
    """The key that holds the weights, None if `content` is the state dict itself."""
    if not isinstance(content, Mapping):
        return None
    return next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.split("/", 1)[-1] == "constants.pkl" for name in archive.namelist())


class _Object:
    """Stands for any scripted module: keeps its attributes, runs nothing."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


class _TensorUnpickler(pickle.Unpickler):
    """Knows tensors, ordered dicts and attribute holders, and refuses every other global."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        """The few names that a TorchScript archive needs; raises `UnpicklingError` for others."""
        if module.split(".")[0] == "__torch__":
            return type(name, (_Object,), {})
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")):
            return getattr(self, name)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        if module == "torch.jit._pickle":  # build_intlist(list), restore_type_tag(value, type): the value itself
            return lambda value, *_: value
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of weights")

    def persistent_load(self, pid: tuple[Any, ...]) -> np.ndarray:
        """A storage ('storage', dtype, key, device, elements) as a flat array."""
        _, dtype, key, _, _ = pid
        return np.frombuffer(self._archive.read(f"{self._root}/data/{key}"), dtype)

    @staticmethod
    def _rebuild_tensor_v2(
        storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
    ) -> np.ndarray:
        if not shape:
            return storage[offset : offset + 1].reshape(())
        span = offset + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if min(strides) < 0 or offset < 0 or (min(shape) and span > len(storage)):
            raise pickle.UnpicklingError("a tensor reaches beyond its storage")
        in_bytes = tuple(stride * storage.itemsize for stride in strides)
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, in_bytes).copy()

    @staticmethod
    def _rebuild_parameter(data: np.ndarray, *_: Any) -> np.ndarray:
        return data


def _read_torchscript(file: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}

    def collect(node: _Object, prefix: str) -> None:
        for name, value in vars(node).items():
            if isinstance(value, np.ndarray):
                tensors[prefix + name] = value
            elif isinstance(value, _Object):
                collect(value, f"{prefix}{name}.")

    try:
        with zipfile.ZipFile(file) as archive:
            root = next(name.split("/", 1)[0] for name in archive.namelist() if name.endswith("/data.pkl"))
            module = _TensorUnpickler(archive, root).load()
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        StopIteration,
        LookupError,
        ValueError,
        TypeError,
        EOFError,
    ) as error:
        raise UserError(f"{file} is not a readable TorchScript archive: {error}") from error
    if isinstance(module, _Object):
        collect(module, "")
    return tensors
