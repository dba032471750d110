"""A learning rate of 0 is frozen for real: no gradient, no moments, no decay, no average, bit for bit what it was."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from florence_jax.losses.grad_cache import encode_cached
from florence_jax.params.checkpoint import Checkpoints
from florence_jax.params.rules import Policy, frozen_entries, path_string, split
from florence_jax.params.sharding import ambient_batch_axes, batch_sharding, make_mesh, param_shardings, state_shardings
from florence_jax.train.defaults import common
from florence_jax.train.optim import make_optimizer
from florence_jax.train.state import eval_params, eval_part, init_state
from florence_jax.train.step import make_train_step

WIDTH, BATCH = 128, 16


class Toy:
    """A tower, of which one layer can be frozen, and a head; the gradient cache on the tower."""

    def __init__(self, lr=(), cached=False):
        self.policy, self.cached = Policy(lr=lr), cached

    def init(self, key):
        first, second, third = jax.random.split(key, 3)
        tower = {
            name: {"kernel": 0.1 * jax.random.normal(k, (WIDTH, WIDTH))}
            for name, k in (("low", first), ("top", second))
        }
        head = {"kernel": jax.random.normal(third, (WIDTH, 1)), "bias": jnp.ones(1)}
        return {"tower": tower, "head": head, "logit_scale": jnp.float32(9.0)}

    def encode(self, params, x):
        for name in ("low", "top"):
            x = jnp.tanh(x @ params["tower"][name]["kernel"])
        return x

    def loss(self, params, batch, key):
        if self.cached:
            axes = ambient_batch_axes()
            replicated = [axis for axis in axes if axis != "fsdp"]
            x = encode_cached(self.encode, params, batch["x"], micro_batch=1, axes=axes, replicated=replicated)
        else:
            x = self.encode(params, batch["x"])
        out = params["logit_scale"] * (x @ params["head"]["kernel"] + params["head"]["bias"][None])
        return jnp.mean(jnp.square(out[:, 0] - batch["y"])), {}

    def project(self, params):
        return params | {"logit_scale": jnp.clip(params["logit_scale"], 0, 5)}


def random_batch():
    rng = np.random.default_rng(0)
    return {"x": np.float32(rng.normal(size=(BATCH, WIDTH))), "y": np.float32(rng.normal(size=BATCH))}


FROZEN = ((".*low/.*", 0.0), ("logit_scale", 0.0))


class Training:
    """A compiled step over a mesh, and a fresh state."""

    def __init__(self, task, data=4, fsdp=2, ema=0.9):
        optim = common("unused").optim
        optim.update(learning_rate=0.01, weight_decay=0.5, clip_norm=0.1, ema_decay=ema)
        mesh = make_mesh(data, fsdp, jax.devices()[: data * fsdp])
        shapes = jax.eval_shape(task.init, jax.random.key(0))
        self.optimizer = make_optimizer(optim, 10, shapes, task.policy)
        transform, _, frozen = self.optimizer

        def fresh(key):
            return init_state(task.init(key), transform, ema=ema > 0, frozen=frozen)

        abstract = jax.eval_shape(fresh, jax.random.key(0))
        shardings = state_shardings(abstract, param_shardings(shapes, mesh), mesh)
        self.target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
        self.state = jax.jit(fresh, out_shardings=shardings)(jax.random.key(0))
        self.batch = jax.device_put(random_batch() | {"corrupt": np.zeros(BATCH, np.int32)}, batch_sharding(mesh))
        step = make_train_step(
            task,
            transform,
            self.optimizer.schedule,
            seed=0,
            ema_decay=ema,
            mesh=mesh,
            shardings=shardings,
            frozen=frozen,
        )
        self.step = step.lower(self.target, self.batch).compile()

    def run(self, state, steps):
        for _ in range(steps):
            state, metrics = self.step(state, self.batch)
        return state, metrics


def paths(tree):
    return {path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def training():
    return Training(Toy(FROZEN))


@pytest.fixture(scope="module")
def trained(training):
    """The parameters before, on the host, and the state after three steps with its metrics."""
    before = jax.tree.map(np.asarray, training.state["params"])
    return before, *training.run(jax.tree.map(jnp.copy, training.state), 3)


def test_what_is_frozen_stays_bit_for_bit_and_the_rest_learns(trained):
    before, state, _ = trained
    after = state["params"]
    np.testing.assert_array_equal(after["tower"]["low"]["kernel"], before["tower"]["low"]["kernel"])
    assert float(after["logit_scale"]) == 9.0  # not even clamped
    for name in ("tower/top/kernel", "head/kernel", "head/bias"):
        old, new = (split(tree, {name})[1] for tree in (before, after))
        assert np.abs(jax.tree.leaves(old)[0] - jax.tree.leaves(new)[0]).max() > 1e-3, name
    average = eval_params(state)
    assert paths(average) == paths(before)
    np.testing.assert_array_equal(average["tower"]["low"]["kernel"], before["tower"]["low"]["kernel"])
    assert np.abs(average["tower"]["top"]["kernel"] - after["tower"]["top"]["kernel"]).max() > 1e-4


def test_moments_and_average_are_of_what_is_trained(trained, training):
    _, state, _ = trained
    assert paths(state["ema"]) == {"tower/top/kernel", "head/kernel", "head/bias"}
    moments = {name.split("/", 2)[2] for name in paths(state["opt_state"]) if name.split("/")[1] in ("mu", "nu")}
    assert moments == paths(state["ema"])
    adam = next(part for part in state["opt_state"] if hasattr(part, "mu"))
    assert adam.mu["head"]["kernel"].sharding.spec == PartitionSpec("fsdp", None)  # one output: along its inputs
    assert training.optimizer.frozen == {"tower/low/kernel", "logit_scale"}
    shapes = jax.eval_shape(Toy().init, jax.random.key(0))
    assert frozen_entries((("tower/top/.*", 0.0),), shapes, Policy(lr=FROZEN)) == {"tower", "logit_scale"}


@pytest.mark.parametrize("cached", [False, True])
def test_steps_are_those_of_the_trained_part_alone(cached, trained):
    """A reference that differentiates everything and looks at the gradients of what is trained only."""
    before, state, metrics = trained
    if cached:
        other = Training(Toy(FROZEN, cached=True))
        state, metrics = other.run(other.state, 3)
    task = Toy()
    optimizer = optax.chain(
        optax.clip_by_global_norm(0.1),
        optax.scale_by_adam(b2=0.98),
        optax.add_decayed_weights(
            0.5, mask={"tower": {"top": {"kernel": True}}, "head": {"kernel": True, "bias": False}}
        ),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(0.01, 10, 0.01)),
    )
    still = {"tower": {"low": before["tower"]["low"]}, "logit_scale": before["logit_scale"]}
    part = {"tower": {"top": before["tower"]["top"]}, "head": before["head"]}
    memory = optimizer.init(part)
    for _ in range(3):
        params = still | part | {"tower": part["tower"] | still["tower"]}
        grads = jax.grad(lambda p: task.loss(p, random_batch(), None)[0])(params)
        grads = {"tower": {"top": grads["tower"]["top"]}, "head": grads["head"]}
        norm = optax.tree.norm(grads)
        updates, memory = optimizer.update(grads, memory, part)
        part = optax.apply_updates(part, updates)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    for name in ("tower", "head"):
        got = split(state["params"], {"tower/low/kernel"})[0][name]
        # Adam divides a gradient by its size: of one that is nearly 0 the rounding counts, by less than .01 of a step.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, part[name])


def test_a_resumed_run_is_the_undisturbed_one(trained, training, tmp_path):
    before, expected, _ = trained
    state, _ = training.run(jax.tree.map(jnp.copy, training.state), 1)
    checkpoints = Checkpoints(str(tmp_path / "c"))
    checkpoints.save(1, state)
    checkpoints.wait()
    resumed, _ = training.run(checkpoints.restore(training.target), 2)
    jax.tree.map(np.testing.assert_array_equal, resumed, expected)
    part = checkpoints.restore(eval_part(training.target), partial=True)
    checkpoints.close()
    assert paths(part["params"]) == {"tower/low/kernel", "logit_scale"}
    np.testing.assert_array_equal(eval_params(part)["tower"]["low"]["kernel"], before["tower"]["low"]["kernel"])


def test_memory_falls_by_gradients_and_moments():
    """On one device, of a frozen kernel of WIDTH x WIDTH: two moments and the average in, and its gradient."""
    sizes = {}
    for name, rules in (("all", ()), ("frozen", ((".*low/.*", 0.0),))):
        memory = Training(Toy(rules), data=1, fsdp=1).step.memory_analysis()
        sizes[name] = np.array([memory.argument_size_in_bytes, memory.temp_size_in_bytes])
    saved = sizes["all"] - sizes["frozen"]
    kernel = 4 * WIDTH**2
    assert 3 * kernel <= saved[0] <= 3.1 * kernel
    assert saved[1] >= 0.9 * kernel
