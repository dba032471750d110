"""Checkpoints: round trip, another mesh, partial restore, and mismatches named in full."""

import asyncio
import os
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from florence_jax.errors import UserError
from florence_jax.params.checkpoint import Checkpoints, UnreadableCheckpoint
from florence_jax.params.digest import digests
from florence_jax.params.lazy import LazyArray
from florence_jax.params.sharding import make_mesh
from florence_jax.train.state import init_state


def make_state(width=8):
    params = {"a": {"kernel": jnp.arange(4.0 * width).reshape(4, width)}, "logit_scale": jnp.float32(2.6)}
    return init_state(params, optax.adam(1e-3), ema=True)


def shapes(state, mesh, spec):
    def place(x):
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec if x.ndim == 2 else PartitionSpec())
        )

    return jax.tree.map(place, state)


def test_round_trip_onto_two_meshes(tmp_path):
    state = make_state()
    checkpoints = Checkpoints(str(tmp_path / "c"), keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state | {"step": jnp.int32(step)})
    checkpoints.wait()
    assert checkpoints.latest_step() == 3
    assert sorted(int(p.name) for p in (tmp_path / "c").iterdir() if p.name.isdigit()) == [2, 3]
    for mesh, spec in ((make_mesh(1, 8), PartitionSpec(None, "fsdp")), (make_mesh(4, 2), PartitionSpec("fsdp", None))):
        restored = checkpoints.restore(shapes(state, mesh, spec))
        assert int(restored["step"]) == 3
        kernel = restored["opt_state"][0].mu["a"]["kernel"]
        assert kernel.sharding.spec == spec
        jax.tree.map(np.testing.assert_array_equal, restored | {"step": 0}, state | {"step": 0})
    checkpoints.close()


def test_saved_on_eight_devices_and_restored_on_fewer_and_on_other_meshes(tmp_path):
    state, directory = make_state(), str(tmp_path / "c")
    spread = jax.device_put(
        state, jax.tree.map(lambda s: s.sharding, shapes(state, make_mesh(2, 4), PartitionSpec(None, "fsdp")))
    )
    assert len(spread["params"]["a"]["kernel"].sharding.device_set) == 8
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, spread)
    checkpoints.close()
    for data, fsdp in ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (4, 2), (8, 1)):
        mesh = make_mesh(data, fsdp, jax.devices()[: data * fsdp])
        reader = Checkpoints(directory, read_only=True)
        restored = reader.restore(shapes(state, mesh, PartitionSpec("fsdp", None)))
        reader.close()
        assert restored["ema"]["a"]["kernel"].sharding.device_set == set(mesh.devices.flat)
        jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_newest_and_every_kth_are_kept(tmp_path):
    checkpoints = Checkpoints(str(tmp_path / "c"), keep=2, keep_every=4)
    for step in range(1, 11):
        checkpoints.save(step, {"step": jnp.int32(step)})
    checkpoints.close()
    assert sorted(int(path.name) for path in (tmp_path / "c").iterdir()) == [4, 8, 9, 10]


def _truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def _flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate, _flip, os.remove])
@pytest.mark.parametrize("which", ["default/_METADATA", "default/manifest.ocdbt", "default/ocdbt.process_0/d/*"])
def test_damage_is_one_message(damage, which, tmp_path):
    state = {"params": {"kernel": jax.random.normal(jax.random.key(0), (64, 256))}}
    checkpoints = Checkpoints(str(tmp_path / "c"))
    checkpoints.save(1, state)
    checkpoints.close()
    damage(max((tmp_path / "c" / "1").glob(which), key=lambda file: file.stat().st_size))
    reader = Checkpoints(str(tmp_path / "c"), read_only=True)
    with pytest.raises(UnreadableCheckpoint, match=r"c/1 is damaged: ") as error:
        reader.restore(shapes(state, make_mesh(8, 1), PartitionSpec()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError("reset by peer"), OSError(24, "too many files"), ValueError("UNAVAILABLE: CURL")],
)
def test_storage_that_does_not_answer_is_not_damage(error, tmp_path, monkeypatch):
    checkpoints = Checkpoints(str(tmp_path / "c"))
    checkpoints.save(1, {"step": jnp.int32(1)})
    checkpoints.wait()

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoints._manager, "restore", fail)
    with pytest.raises(UserError, match="c/1 cannot be read now: .*run the same command again") as raised:
        checkpoints.restore({"step": jnp.int32(0)})
    assert not isinstance(raised.value, UnreadableCheckpoint)


def test_restored_in_another_dtype(tmp_path):
    checkpoints = Checkpoints(str(tmp_path / "c"))
    checkpoints.save(1, {"mu": jnp.arange(8) / 7})
    checkpoints.wait()
    target = {"mu": jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=NamedSharding(make_mesh(8, 1), PartitionSpec()))}
    restored = checkpoints.restore(target)["mu"]
    assert restored.sharding == target["mu"].sharding
    np.testing.assert_array_equal(restored, (jnp.arange(8) / 7).astype(jnp.bfloat16))
    checkpoints.close()


def test_two_processes_may_set_the_same_checkpoint_aside(tmp_path):
    first = Checkpoints(str(tmp_path / "c"))
    for step in (1, 2):
        first.save(step, {"step": jnp.int32(step)})
    first.wait()
    second = Checkpoints(str(tmp_path / "c"))
    assert "2.damaged-" in first.set_aside(2) and second.set_aside(2) == "another name"
    assert first.latest_step() == 1


def test_checksums_depend_on_every_element_and_not_on_the_mesh():
    x = np.arange(96, dtype=np.float32).reshape(8, 12) / 7
    bits = x.view(np.uint32).ravel().astype(object)
    expected = sum(int(b) * (2 * i + 1) for i, b in enumerate(bits)) % 2**32
    split = NamedSharding(make_mesh(4, 2), PartitionSpec("data", "fsdp"))
    assert int(digests([x])[0]) == int(digests([jax.device_put(x, split)])[0]) == expected
    long = np.arange(2**20 + 3, dtype=np.float32)  # more than a block of the sum on the host
    assert digests([LazyArray(long.shape, lambda: long)]) == digests([long])
    swapped = x.copy()
    swapped[0, 1], swapped[5, 2] = x[5, 2], x[0, 1]
    assert int(digests([swapped])[0]) != expected
    half = jnp.bfloat16(x)
    assert digests([half, np.int32(3), np.bool_(True)]).shape == (3,)


def test_parameters_alone_can_be_restored(tmp_path):
    checkpoints = Checkpoints(str(tmp_path / "c"))
    state = make_state()
    checkpoints.save(1, state)
    checkpoints.close()
    reader = Checkpoints(str(tmp_path / "c"), read_only=True)
    target = shapes({"params": state["params"]}, make_mesh(8, 1), PartitionSpec())
    np.testing.assert_array_equal(reader.restore(target)["params"]["a"]["kernel"], state["params"]["a"]["kernel"])
    reader.close()


def test_every_mismatch_is_listed(tmp_path):
    checkpoints = Checkpoints(str(tmp_path / "c"))
    checkpoints.save(1, make_state())
    checkpoints.wait()
    other = {"params": {"a": {"kernel": jnp.ones((4, 6))}, "b": {"bias": jnp.ones(3)}}}
    with pytest.raises(UserError) as error:
        checkpoints.restore(shapes(other, make_mesh(8, 1), PartitionSpec()))
    message = str(error.value)
    for part in (
        "3 mismatches",
        "params/a/kernel: (4, 8) in the checkpoint, (4, 6) in the model",
        "params/b/bias: not in the checkpoint",
        "params/logit_scale: not in the model",
    ):
        assert part in message
    checkpoints.close()


def test_missing_checkpoints_say_so(tmp_path):
    with pytest.raises(UserError, match="no checkpoints at"):
        Checkpoints(str(tmp_path / "none"), read_only=True)
    with pytest.raises(UserError, match="no complete checkpoint"):
        Checkpoints(str(tmp_path / "empty")).restore({"step": jnp.int32(0)})


def test_unwritable_directory_is_one_message(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write checkpoints"):
        Checkpoints(str(tmp_path / "file" / "c"))


def test_lazy_arrays_are_read_one_by_one(tmp_path):
    """What is saved is what they hold; each is written before the next is read to be written."""
    order = []

    def lazy(i):
        def read():
            order.append(i)
            return np.full((2, 3), i, np.float32)

        return LazyArray((2, 3), read)

    with Checkpoints(str(tmp_path / "run")) as checkpoints:
        checkpoints.save(0, {"params": {f"p{i}": lazy(i) for i in range(3)}})
    like = {f"p{i}": jnp.zeros((2, 3)) for i in range(3)}
    with Checkpoints(str(tmp_path / "run"), read_only=True) as checkpoints:
        restored = checkpoints.restore({"params": like})["params"]
    jax.tree.map(np.testing.assert_array_equal, restored, {f"p{i}": np.full((2, 3), i) for i in range(3)})
    assert order == [0, 1, 2, 0, 1, 2]  # for the checksums, and to be written


def test_writes_that_end_after_their_save_has_failed_say_nothing(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_value))
    Checkpoints(str(tmp_path)).close()
    promise, write = tensorstore.Promise.new()

    async def begin():
        waiting = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        return waiting

    async def wait():
        await write

    loop = asyncio.new_event_loop()
    waiting = loop.run_until_complete(begin())
    loop.close()
    promise.set_result(None)  # TensorStore calls into the closed loop
    write.result()
    assert not told
    broken, other = tensorstore.Promise.new()
    other.add_done_callback(lambda future: 1 / 0)
    broken.set_result(None)
    assert [type(error) for error in told] == [ZeroDivisionError]
    waiting._log_destroy_pending = False


def test_a_save_that_fails_is_one_message(tmp_path, capfd, caplog):
    """Without the tracebacks of Orbax's threads. The array is read for its checksum, but not when it is written."""
    asked = []

    def read():
        asked.append(1)
        if len(asked) > 1:
            raise ValueError('writing "a/0": "/x/y": Failed to write: No space left on device [os_error_code=\'28\']')
        return np.zeros(3, np.float32)

    checkpoints = Checkpoints(str(tmp_path))
    told = f"saving a checkpoint to {tmp_path} failed: No space left on device; free space"
    with pytest.raises(UserError, match=re.escape(told)):
        checkpoints.save(1, {"params": {"a": LazyArray((3,), read), "b": jnp.zeros(3)}})
        checkpoints.wait()
    checkpoints.close()
    assert "Traceback" not in "".join(capfd.readouterr()) and not [r for r in caplog.records if r.exc_info]
    assert checkpoints.latest_step() is None
