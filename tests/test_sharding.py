"""Eight devices give the loss and gradients of one, and no tensor is replicated silently."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec

from florence_jax.errors import UserError
from florence_jax.losses.unicl import unicl
from florence_jax.models import florence
from florence_jax.params.sharding import (
    batch_sharding,
    make_mesh,
    param_shardings,
    replicated,
    split_over_slices,
    state_shardings,
)
from florence_jax.train.state import init_state

MODEL = florence.build(
    "ti",
    image_width=32,
    depths=(2, 2),
    heads=(1, 2),
    text_width=32,
    vocab_size=64,
    text_length=8,
    projection=32,
    drop_path=0.2,
)


@pytest.fixture(scope="module")
def problem():
    params = jax.jit(MODEL.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(16, 32, 32, 3)), jnp.float32),
        "text": jnp.asarray(rng.integers(1, 64, (16, 8)), jnp.int32),
        "label": jnp.asarray(rng.integers(0, 9, (16, 1)), jnp.int32),
    }
    return params, batch


def loss(params, batch):
    inputs = {name: batch[name] for name in ("image", "text")}
    out = MODEL.apply(params, inputs, train=True, rngs={"drop_path": jax.random.key(7)})
    return unicl(out["image/embedding"], out["text/embedding"], batch["label"], out["logit_scale"])[0]


def value_and_grad_on(mesh, problem):
    params, batch = problem
    shardings = param_shardings(params, mesh)
    function = jax.jit(
        jax.value_and_grad(loss),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(replicated(mesh), shardings),
    )
    return function(jax.device_put(params, shardings), jax.device_put(batch, batch_sharding(mesh)))


@pytest.mark.parametrize("data,fsdp", [(8, 1), (2, 4)])
def test_eight_devices_equal_one(problem, data, fsdp):
    one = value_and_grad_on(make_mesh(1, 1, jax.devices()[:1]), problem)
    eight = value_and_grad_on(make_mesh(data, fsdp), problem)
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(eight[1]), jax.tree.leaves(one[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.abs(b).max()) + 1e-8)


def test_optimizer_state_follows_its_parameters(problem):
    params, _ = problem
    mesh = make_mesh(2, 4)
    shardings = param_shardings(params, mesh)
    state = jax.eval_shape(lambda p: init_state(p, optax.adam(1e-3), ema=True), params)
    placed = state_shardings(state, shardings, mesh)
    assert placed["params"]["image_projection"]["kernel"].spec == PartitionSpec(None, "fsdp")
    assert placed["opt_state"][0].mu == shardings and placed["ema"] == shardings
    assert placed["step"].spec == PartitionSpec()


def moments(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]


@pytest.mark.parametrize("kind", ["multi_transform", "masked"])
def test_moments_of_a_wrapped_optimizer_follow_their_parameters(kind):
    """The structure of the state is another than that of the parameters."""
    params = {"a": {"kernel": jnp.ones((2, 4)), "scale": jnp.ones(4)}, "b": {"kernel": jnp.ones((3, 8))}}
    if kind == "multi_transform":
        optimizer = optax.multi_transform({"x": optax.adam(1e-3), "y": optax.sgd(0.1, 0.9)}, {"a": "x", "b": "y"})
    else:
        optimizer = optax.masked(optax.adam(1e-3), {"a": True, "b": False})
    mesh = make_mesh(4, 2)
    state = init_state(params, optimizer, ema=False)
    shardings = state_shardings(state, param_shardings(params, mesh), mesh)
    placed = jax.device_put(state, shardings)
    sharded = [leaf for leaf in moments(placed["opt_state"]) if leaf.ndim == 2]
    assert len(sharded) == (3 if kind == "multi_transform" else 2)
    for leaf in sharded:
        assert leaf.sharding.spec == PartitionSpec(None, "fsdp")
        assert leaf.addressable_shards[0].data.size == leaf.size // 2


def test_an_array_of_the_state_without_a_parameter_is_an_error():
    params = {"a": {"kernel": jnp.ones((2, 4))}}
    mesh = make_mesh(4, 2)
    opt_state = {"factors": {"a": {"kernel": jnp.ones(2)}}, "history": jnp.ones((5, 3)), "count": jnp.ones(())}
    with pytest.raises(UserError) as error:
        state_shardings({"params": params, "opt_state": opt_state}, param_shardings(params, mesh), mesh)
    assert "opt_state/history (5, 3)" in str(error.value)
    assert "opt_state/factors/a/kernel (2,), which is not the (2, 4) of a/kernel" in str(error.value)
    assert "count" not in str(error.value)


@pytest.mark.parametrize(
    "shape,split",
    [
        ((64, 1), ("fsdp", None)),
        ((64, 27), ("fsdp", None)),
        ((1024, 3129), ("fsdp", None)),
        ((6, 64, 27), (None, "fsdp", None)),
        ((64, 8), (None, "fsdp")),
        ((3, 3, 5, 7), ()),  # small, and 2 divides none
    ],
)
def test_heads_of_any_width_are_split_where_they_can_be(shape, split):
    params = {"head": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    assert param_shardings(params, make_mesh(4, 2))["head"]["kernel"].spec == PartitionSpec(*split)


def test_what_cannot_be_split_is_all_named():
    shapes = {
        "a": {"kernel": (513, 1027)},
        "b": {"kernel": (4, 10), "token_embedding": (9, 3)},
        "c": {"weight": (4, 6)},
    }
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    with pytest.raises(UserError) as error:
        param_shardings(params, make_mesh(2, 4), (("b/kernel", -1),), (("c/.*", -1),))
    for line in ("a/kernel (513, 1027) largest", "b/kernel (4, 10) axis -1", "b/token_embedding (9, 3) axis 0"):
        assert line in str(error.value)
    assert "c/weight (4, 6) axis -1" in str(error.value)
    given = (("a/.*", "replicate"), ("b/kernel", 0), (".*/token_embedding", "largest"), ("c/weight", 0))
    found = param_shardings(params, make_mesh(2, 4), given, (("c/.*", -1),))
    assert found["c"]["weight"].spec == PartitionSpec("fsdp", None) and found["a"]["kernel"].spec == PartitionSpec()
    assert found["b"]["token_embedding"].spec == PartitionSpec()
    with pytest.raises(UserError, match="sharding rules do not fit the model; rules that decide no parameter: 'd/.*'"):
        param_shardings(params, make_mesh(1, 1, jax.devices()[:1]), (("d/.*", 0),))


# -- several slices ---------------------------------------------------------------------------------------------------


class Chip:
    """A device of a slice, as far as a mesh looks at it."""

    platform, device_kind, client, process_index = "cpu", "cpu", None, 0

    def __init__(self, index: int, slice_index: int):
        self.id, self.slice_index = index, slice_index


def two_slices():
    chips = [Chip(i, i // 4) for i in range(8)]
    return chips[::2] + chips[1::2]  # in an order that mixes the slices


@pytest.mark.parametrize("data,fsdp", [(2, 4), (-1, 2), (8, 1)])
def test_fsdp_stays_inside_a_slice(data, fsdp):
    mesh = make_mesh(data, fsdp, two_slices())
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    assert mesh.devices.shape == (8 // fsdp, fsdp) and len(set(mesh.devices.flat)) == 8
    assert (slices == slices[:, :1]).all()
    assert (slices[:, 0] == np.repeat([0, 1], 4 // fsdp)).all()
    outer, inner = (2, 1), (4 // fsdp, fsdp)
    ids = np.vectorize(lambda chip: chip.id)
    reference = mesh_utils.create_hybrid_device_mesh(inner, outer, two_slices())
    np.testing.assert_array_equal(ids(mesh.devices), ids(reference))


def test_fsdp_crosses_slices_only_when_told():
    with pytest.raises(UserError, match="data=1, fsdp=8 does not lie across the 2 slices.*fsdp_across_slices=True"):
        make_mesh(1, 8, two_slices())
    mesh = make_mesh(1, 8, two_slices(), fsdp_across_slices=True)
    assert [chip.slice_index for chip in mesh.devices[0]] == [0] * 4 + [1] * 4
    assert split_over_slices(4, 8, 2, True) == (2, 1)  # data first
    assert split_over_slices(6, 8, 4, True) == (2, 2)
    with pytest.raises(UserError, match="across the 4 slices"):
        split_over_slices(2, 3, 4, True)


def test_mesh_that_does_not_use_the_devices_is_refused():
    with pytest.raises(UserError, match="data=3, fsdp=2"):
        make_mesh(3, 2)
