"""Files of weights without PyTorch: safetensors, archives, pickles, parts."""

import io
import pickle
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
from test_import_torch import save

from florence_jax.errors import UserError
from florence_jax.tools.import_torch.files import read_state_dict


class Tensor:
    """The little of `torch.Tensor` that the import needs."""

    shape = (2,)

    def is_floating_point(self):
        return True

    def float(self):
        return self

    def numpy(self):
        return np.full(2, 0.5, np.float32)


def test_pickles_need_torch_and_are_weights_only(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    path.write_bytes(pickle.dumps({}))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        with pytest.raises(UserError, match=r"'\.\[torch\]'"):
            read_state_dict(str(path))

    calls = []

    def load(file, **options):
        calls.append(options)
        if file.name == "bad.pth":
            raise pickle.UnpicklingError("Weights only load failed")
        return {"model": {"module": {"w": Tensor(), "n": 3}}, "epoch": 7}

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load, Tensor=Tensor))
    state = read_state_dict(str(path))
    np.testing.assert_array_equal(state["w"], [0.5, 0.5])
    assert set(state) == {"w", "n"} and calls == [{"map_location": "cpu", "weights_only": True, "mmap": False}]
    path.rename(tmp_path / "bad.pth")
    with pytest.raises(UserError, match="other than tensors"):
        read_state_dict(str(tmp_path / "bad.pth"))


@pytest.mark.parametrize(
    "content,expected",
    [
        ({"model_ema": {"w": Tensor()}, "epoch": 3}, {"w"}),
        ({"student": {"v": Tensor()}, "teacher": {"w": Tensor()}}, {"w"}),
        ({"model_ema": {"v": Tensor()}, "model": {"w": Tensor()}}, {"w"}),
        ({"a": Tensor(), "name": "vit", "extra": None}, r"other things than tensors: name \(str\), extra \(NoneType\)"),
        ({"weights": {"w": Tensor()}, "epoch": 3}, r"other things than tensors: weights \(dict\)"),
    ],
)
def test_what_lies_beside_the_tensors_of_a_pickle(content, expected, tmp_path, monkeypatch):
    (tmp_path / "x.pth").write_bytes(b"")
    stand_in = types.SimpleNamespace(load=lambda file, **options: content, Tensor=Tensor)
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            read_state_dict(str(tmp_path / "x.pth"))
    else:
        assert set(read_state_dict(str(tmp_path / "x.pth"))) == expected


class _Rebuilt:
    """An array that pickles as TorchScript stores tensors: `_rebuild_tensor_v2` of a persistent storage."""

    def __init__(self, key, shape, strides, offset=0):
        self.args = (key, offset, shape, strides, False, {})


def torch_archive(path, storages, build, scripted=True):
    """Writes an archive as `torch.jit.save`, or `torch.save`, does; `build(script class)` makes the root object."""
    names = {
        "__torch__": [],
        "__torch__.model": ["CLIP"],
        "torch._utils": ["_rebuild_tensor_v2"],
        "torch": ["FloatStorage", "HalfStorage"],
    }
    modules = {}
    for module, members in names.items():
        modules[module] = types.ModuleType(module)
        for member in members:
            if member == "_rebuild_tensor_v2":
                value = types.FunctionType((lambda *args: None).__code__, {}, member)
            else:
                value = type(member, (), {})
            value.__module__, value.__qualname__ = module, member
            setattr(modules[module], member, value)

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            if isinstance(item, tuple) and item and item[0] == "storage":
                return item
            return None

        def reducer_override(self, item):
            if not isinstance(item, _Rebuilt):
                return NotImplemented
            key, *rest = item.args
            dtype = {np.dtype("float32"): "FloatStorage", np.dtype("float16"): "HalfStorage"}[storages[key].dtype]
            storage = ("storage", getattr(modules["torch"], dtype), key, "cpu", storages[key].size)
            return modules["torch._utils"]._rebuild_tensor_v2, (storage, *rest)

    buffer = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        for module, value in modules.items():
            patch.setitem(sys.modules, module, value)
        Pickler(buffer, protocol=2).dump(build(modules["__torch__.model"].CLIP))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ViT/data.pkl", buffer.getvalue())
        if scripted:
            archive.writestr("ViT/constants.pkl", pickle.dumps(()))
        for key, value in storages.items():
            archive.writestr(f"ViT/data/{key}", value.tobytes())


def test_torchscript_archive_without_torch(tmp_path):
    """OpenAI's files: tensors of nested modules, views of shared storages, half precision; no code, no other class."""
    storages = {"0": np.arange(12, dtype=np.float32), "1": np.array([0.5, 2], np.float16)}

    def build(script):
        root, inner = script(), script()
        inner.weight, inner.training = _Rebuilt("0", (2, 3), (1, 2), 4), True
        root.visual, root.scale, root.bias = inner, _Rebuilt("1", (), (), 1), _Rebuilt("1", (2,), (1,))
        return root

    path = tmp_path / "ViT-B-32.pt"
    torch_archive(path, storages, build)
    state = read_state_dict(str(path))
    assert list(state) == ["visual.weight", "scale", "bias"]
    np.testing.assert_array_equal(state["visual.weight"], [[4, 6, 8], [5, 7, 9]])
    np.testing.assert_array_equal(state["bias"], [0.5, 2])
    assert state["scale"].shape == () and np.asarray(state["scale"]) == 2
    torch_archive(path, storages, lambda script: _Rebuilt("0", (13,), (1,)))
    with pytest.raises(UserError, match="beyond its storage"):
        read_state_dict(str(path))
    torch_archive(path, storages, lambda script: print)
    with pytest.raises(UserError, match="not allowed in a file of weights"):
        read_state_dict(str(path))


def test_archives_of_torch_save_without_torch(tmp_path, monkeypatch):
    """State dicts, also under a wrapper, are read without PyTorch; other objects are for it to judge."""
    monkeypatch.setitem(sys.modules, "torch", None)
    storages, path = {"0": np.arange(6, dtype=np.float32)}, tmp_path / "x.pth"
    torch_archive(path, storages, lambda script: {"model": {"w": _Rebuilt("0", (2, 3), (3, 1)), "n": 3}}, False)
    state = read_state_dict(str(path))
    np.testing.assert_array_equal(state["w"], [[0, 1, 2], [3, 4, 5]])
    assert state["w"].shape == (2, 3) and state["n"].shape == ()
    torch_archive(path, storages, lambda script: {"w": _Rebuilt("0", (2,), (1,)), "args": script()}, False)
    with pytest.raises(UserError, match="needs PyTorch"):
        read_state_dict(str(path))


def test_a_file_in_several_parts(tmp_path):
    """Any part names all of them; one that is not there is said."""
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(names):
        save({f"w{i}": np.float32([i])}, tmp_path / name)
    state = read_state_dict(str(tmp_path / names[1]))
    assert {name: float(np.asarray(value)[0]) for name, value in state.items()} == {"w0": 0, "w1": 1}
    (tmp_path / names[0]).unlink()
    with pytest.raises(UserError, match="no such file: .*00001-of-00002"):
        read_state_dict(str(tmp_path / names[1]))


def test_bfloat16_safetensors(tmp_path):
    save({"w": np.float32([1.5, -2.25])}, tmp_path / "w.safetensors", ml_dtypes.bfloat16)
    state = read_state_dict(str(tmp_path / "w.safetensors"))
    np.testing.assert_array_equal(np.asarray(state["w"], np.float32), [1.5, -2.25])
