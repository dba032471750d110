"""Opens PyTorch checkpoints as lazy arrays: safetensors and archives without PyTorch, the rest with it.

A tensor is read from the file when it is used, each time, so that the memory is that of one tensor.

Nothing stored in a file is ever executed: archives, of TorchScript (the form in which OpenAI released CLIP) and of
`torch.save`, are read by an unpickler that knows tensors and otherwise makes empty objects; older pickles, and what
holds more than tensors, by `torch.load(..., weights_only=True)`.
"""

import collections
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from florence_jax.errors import UserError
from florence_jax.params.lazy import LazyArray

# Names under which training scripts keep the weights beside the optimizer and the epoch, in the order of preference:
# averages, and a teacher's, where there are no others.
WRAPPERS = ("state_dict", "model", "module", "state_dict_ema", "model_ema", "teacher")
SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
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


def read_state_dict(path: str) -> dict[str, LazyArray]:
    """All tensors of a checkpoint by name, each read when it is used, in the dtype of the file.

    Args:
      path: a .safetensors file; a TorchScript archive; or what `torch.save` wrote (.pth, .pt, .bin, .ckpt), a state
        dict itself or under one of `WRAPPERS`; of a file in several parts ('x-00001-of-00002.bin') any one.

    Raises:
      UserError: a missing or damaged file, an unknown format, one that holds other things than tensors and numbers, or
        a pickle without PyTorch installed.
    """
    tensors: dict[str, LazyArray] = {}
    for file in _parts(Path(path)):
        if not file.is_file():
            raise UserError(f"no such file: {file}")
        tensors |= _read_file(file)
    return tensors


def _parts(file: Path) -> list[Path]:
    """All files of which `file` is one."""
    if match := re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\..*)", file.name):
        return [file.with_name(f"{match[1]}{i:05d}{match[2]}") for i in range(1, int(match[3]) + 1)]
    return [file]


def _read_file(file: Path) -> dict[str, LazyArray]:
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    return _read_torchscript(file) if _is_torchscript(file) else _read_pickle(file)


def _read_safetensors(file: Path) -> dict[str, LazyArray]:
    """The format is 8 bytes, the length of the header; the header, JSON; the tensors, at offsets from its end."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length) if length < file.stat().st_size else b"")
        header.pop("__metadata__", None)
        return {name: _safetensor(file, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a safetensors file, or only a part of one: download it again") from error


def _safetensor(file: Path, base: int, entry: Mapping[str, Any]) -> LazyArray:
    dtype, shape = np.dtype(SAFETENSORS_DTYPES[entry["dtype"]]), tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    count = int(np.prod(shape, dtype=np.int64))
    if stop - start != count * dtype.itemsize or base + stop > file.stat().st_size:
        raise ValueError("a tensor reaches beyond the file")
    return LazyArray(shape, lambda: np.fromfile(file, dtype, count, offset=base + start).reshape(shape), dtype)


def _read_pickle(file: Path) -> dict[str, LazyArray]:
    content = _unwrapped(_load_plain(file))
    if isinstance(content, Mapping) and all(isinstance(v, LazyArray | Real) for v in content.values()):
        return {str(name): _of_torch(value) for name, value in content.items()}
    return _read_with_torch(file)


def _load_plain(file: Path) -> Any:
    """What `torch.save` wrote in the format of its versions from 1.6 on, None where it holds more than tensors."""
    try:
        with zipfile.ZipFile(file) as archive:
            root = next(name.split("/", 1)[0] for name in archive.namelist() if name.endswith("/data.pkl"))
            little = f"{root}/byteorder" not in archive.namelist() or archive.read(f"{root}/byteorder") == b"little"
            return _TensorUnpickler(file, archive, root).load() if little else None
    except (zipfile.BadZipFile, pickle.UnpicklingError, StopIteration, LookupError, ValueError, TypeError, EOFError):
        return None  # PyTorch reads it, or says what is wrong with it


def _read_with_torch(file: Path) -> dict[str, LazyArray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"reading {file.name} needs PyTorch: pip install '.[torch]', or give a .safetensors file"
        ) from error
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        # PyTorch's own message proposes to load without the safeguard; that advice is not passed on.
        raise UserError(
            f"{file} is damaged, or holds objects other than tensors, which are never loaded: download it again, or "
            "save its state dict as safetensors"
        ) from error
    content = _unwrapped(content)
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds a {type(content).__name__}, not a state dict")
    others = [f"{name} ({type(v).__name__})" for name, v in content.items() if not isinstance(v, (torch.Tensor, Real))]
    if others:
        some = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise UserError(
            f"{file} holds other things than tensors: {some}; save the state dict alone, or under 'state_dict'"
        )
    return {str(name): _of_torch(value) for name, value in content.items()}


def _of_torch(value: Any) -> LazyArray:
    if isinstance(value, LazyArray):
        return value
    if isinstance(value, Real):
        return LazyArray((), lambda: np.asarray(value), np.asarray(value).dtype)

    def read() -> np.ndarray:
        return (value.float() if value.is_floating_point() else value).numpy()  # bfloat16 has no numpy form

    return LazyArray(tuple(value.shape), read)


def _unwrapped(content: Any) -> Any:
    """The state dict in what a training script saved, `content` itself if that is one."""
    while isinstance(content, Mapping):
        wrapper = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if wrapper is None:
            break
        content = content[wrapper]
    return content


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

    def __init__(self, file: Path, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self._file, self._archive, self._root = file, archive, root

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

    def persistent_load(self, pid: tuple[Any, ...]) -> "_Storage":
        """A storage ('storage', dtype, key, device, elements)."""
        _, dtype, key, _, _ = pid
        name = f"{self._root}/data/{key}"
        return _Storage(self._file, name, np.dtype(dtype), self._archive.getinfo(name).file_size)

    @staticmethod
    def _rebuild_tensor_v2(
        storage: "_Storage", offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
    ) -> LazyArray:
        span = offset + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if min(strides, default=0) < 0 or offset < 0 or (min(shape, default=1) and span > storage.entries):
            raise pickle.UnpicklingError("a tensor reaches beyond its storage")
        in_bytes = tuple(stride * storage.dtype.itemsize for stride in strides)

        def read() -> np.ndarray:
            return np.lib.stride_tricks.as_strided(storage.read()[offset:], shape, in_bytes)

        return LazyArray(tuple(shape), read, storage.dtype)

    @staticmethod
    def _rebuild_parameter(data: LazyArray, *_: Any) -> LazyArray:
        return data


class _Storage(NamedTuple):
    """A flat array in an archive."""

    file: Path
    name: str
    dtype: np.dtype
    bytes: int

    @property
    def entries(self) -> int:
        return self.bytes // self.dtype.itemsize

    def read(self) -> np.ndarray:
        with zipfile.ZipFile(self.file) as archive:
            return np.frombuffer(archive.read(self.name), self.dtype)


def _read_torchscript(file: Path) -> dict[str, LazyArray]:
    tensors: dict[str, LazyArray] = {}

    def collect(node: _Object, prefix: str) -> None:
        for name, value in vars(node).items():
            if isinstance(value, LazyArray):
                tensors[prefix + name] = value
            elif isinstance(value, _Object):
                collect(value, f"{prefix}{name}.")

    try:
        with zipfile.ZipFile(file) as archive:
            root = next(name.split("/", 1)[0] for name in archive.namelist() if name.endswith("/data.pkl"))
            module = _TensorUnpickler(file, archive, root).load()
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
