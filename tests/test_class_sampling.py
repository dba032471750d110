"""Large vocabularies: the classes that a step draws, and that drawing all of them is the loss of all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from florence_jax.data.box_problems import Problems
from florence_jax.data.records import Subset
from florence_jax.data.sources.boxes import BoxColumns, FileBoxSource, RecordBoxSource, pictures_by_class
from florence_jax.errors import UserError
from florence_jax.losses.class_sampling import is_drawn, sample_classes
from florence_jax.losses.detection import detection_loss
from florence_jax.models.detector import Prediction
from florence_jax.tasks.class_sampler import ClassSampler

CLASSES = 20
draw = jax.jit(sample_classes, static_argnums=3)


def test_own_classes_come_first_and_none_comes_twice():
    present = np.array([[3, -1, 17], [3, 0, -1]])
    frequencies = np.arange(CLASSES)
    rows = np.stack([draw(jax.random.key(step), present, frequencies, 8) for step in range(30)])
    assert rows.dtype == np.int32 and (np.diff(rows, axis=1) > 0).all() and rows.min() >= 0 and rows.max() < CLASSES
    assert all({0, 3, 17} <= set(row) for row in rows.tolist()) and len(np.unique(rows, axis=0)) > 20
    np.testing.assert_array_equal(rows[5], draw(jax.random.key(5), present, frequencies, 8))
    np.testing.assert_array_equal(draw(jax.random.key(0), present, frequencies, CLASSES), np.arange(CLASSES))
    few = np.stack([draw(jax.random.key(step), present, frequencies, 2) for step in range(30)])
    assert set(few.ravel().tolist()) == {0, 3, 17}  # no room for all: any two of them
    np.testing.assert_array_equal(is_drawn(np.array([[3, 1], [-1, 19]]), np.array([0, 3, 17])), [[1, 0], [0, 0]])


def test_others_are_drawn_by_the_root_of_their_frequency():
    """The first draw's chances are exact; what is never seen counts as seen once."""
    frequencies, steps = np.array([100, 16, 4, 1, 0]), 4000
    keys = jax.random.split(jax.random.key(0), steps)
    none = jnp.full((1,), -1)
    first = jax.jit(jax.vmap(lambda key: sample_classes(key, none, jnp.asarray(frequencies), 1)[0]))(keys)
    weights = np.sqrt(np.maximum(frequencies, 1))
    shares = np.bincount(first, minlength=5) / steps
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=4 * np.sqrt(0.25 / steps))
    assert shares.min() > 0


def test_all_devices_draw_the_same():
    present = np.random.default_rng(0).integers(-1, CLASSES, (8, 5))
    frequencies = np.arange(CLASSES)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), "data"), PartitionSpec("data"))
    together = draw(jax.random.key(3), jax.device_put(present, sharding), frequencies, 19)
    assert len({tuple(np.asarray(shard.data).tolist()) for shard in together.addressable_shards}) == 1
    np.testing.assert_array_equal(together, draw(jax.random.key(3), present, frequencies, 19))


def example():
    """Features, a class layer, and what the loss needs beside its logits."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:4, :4] * 8 + 4
    centres = np.stack([x, y], -1).reshape(-1, 2)
    anchors = np.concatenate([centres - 16, centres + 16], 1).astype(np.float32)
    features = rng.normal(size=(3, 16, 6)).astype(np.float32)
    layer = {
        "kernel": rng.normal(size=(6, CLASSES)).astype(np.float32),
        "bias": rng.normal(size=CLASSES).astype(np.float32),
    }
    others = {
        "detector/centerness": np.zeros((3, 16), np.float32),
        "detector/boxes": np.tile(anchors, (3, 1, 1)),
        "detector/inside": np.ones((3, 16), bool),
        "detector/anchors": anchors,
    }
    corner = rng.uniform(0, 12, (3, 2, 2))
    batch = {
        "boxes": np.concatenate([corner, corner + 18], -1).astype(np.float32),
        "class_ids": np.array([[3, 17], [3, 0], [5, 5]], np.int32),
        "objects": np.array([[1, 1], [1, 1], [1, 0]], bool),
        "ignore": np.zeros((3, 2), bool),
        "judged": rng.random((3, CLASSES)) < 0.7,
    }
    return features, layer, others, batch


@functools.partial(jax.jit, static_argnames="all_of_them")
@functools.partial(jax.value_and_grad, has_aux=True)
def loss_of(layer, features, others, batch, all_of_them=False):
    columns = None if all_of_them else batch["drawn"]
    logits = Prediction(CLASSES).apply({"params": layer}, features, columns)
    return detection_loss(others | {"detector/logits": logits}, batch, (16,))


def test_all_classes_drawn_is_the_whole_loss():
    features, layer, others, batch = example()
    (whole, metrics), gradients = loss_of(layer, features, others, batch, all_of_them=True)
    drawn = draw(jax.random.key(0), np.where(batch["objects"], batch["class_ids"], -1), np.ones(CLASSES), CLASSES)
    (same, same_metrics), same_gradients = loss_of(layer, features, others, batch | {"drawn": drawn})
    assert float(metrics["positives"]) > 3
    for name, value in {"loss": whole, **metrics}.items():
        assert float({"loss": same, **same_metrics}[name]) == pytest.approx(float(value), rel=1e-6), name
    for name, value in gradients.items():
        np.testing.assert_allclose(same_gradients[name], value, rtol=1e-5, atol=1e-7)


def test_classes_that_are_not_drawn_cost_nothing():
    """The sum of the drawn columns of the whole loss; the other columns of the layer have no gradient."""
    features, layer, others, batch = example()
    drawn = np.array([0, 2, 3, 5, 11, 17], np.int32)
    (loss, metrics), gradients = loss_of(layer, features, others, batch | {"drawn": drawn})
    elsewhere = np.setdiff1d(np.arange(CLASSES), drawn)
    assert not np.asarray(gradients["kernel"])[:, elsewhere].any() and np.asarray(gradients["kernel"])[:, drawn].all()
    unjudged = batch["judged"].copy()
    unjudged[:, elsewhere] = False  # none of them is of an object
    (same, _), same_gradients = loss_of(layer, features, others, batch | {"judged": unjudged}, all_of_them=True)
    assert float(loss) == pytest.approx(float(same), rel=1e-6)
    np.testing.assert_allclose(gradients["kernel"], same_gradients["kernel"], rtol=1e-5, atol=1e-7)


def test_frequencies_are_counted_without_pictures(monkeypatch):
    boxes = np.zeros((6, 4), np.float32)
    columns = BoxColumns(
        4, np.array([0, 0, 0, 2, 3, 3]), boxes, np.array([1, 1, 4, 1, 0, 4]), np.zeros(6, bool), np.zeros(6)
    )
    names = tuple("abcdef")
    source = FileBoxSource(
        "set", "", ["a", "b", "c", "d"], range(4), np.ones((4, 2)), columns, names, range(6), {}, Problems()
    )
    expected = [1, 2, 0, 0, 2, 0]
    assert pictures_by_class(source).tolist() == expected
    assert pictures_by_class(Subset(source, np.array([1]), "part")).tolist() == expected  # of the whole

    class Records:
        name = "records"

        def __len__(self):
            return 20

        def sample(self, count):
            fields = {"boxes": boxes[:2], "key": "k"}
            return [fields | {"class_ids": [1, 1]}, fields | {"class_ids": [4, 1]}][:count]

    assert pictures_by_class(RecordBoxSource(Records(), names, {})).tolist() == [0, 20, 0, 0, 10, 0]


def test_a_step_draws_only_from_a_large_vocabulary():
    batch = {
        "class_ids": np.array([[3, 17], [3, 0]], np.int32),
        "objects": np.array([[True, True], [True, False]]),
    }
    small = ClassSampler(None, CLASSES, CLASSES)
    assert small.per_step == CLASSES and small.draw(jax.random.key(0), batch) == (batch, {})
    large = ClassSampler(None, CLASSES, 8)
    drawn, metrics = large.draw(jax.random.key(0), batch)
    assert large.per_step == 8 and {3, 17} <= set(drawn["drawn"].tolist()) and float(metrics["objects_not_drawn"]) == 0
    _, metrics = ClassSampler(None, CLASSES, 1).draw(jax.random.key(0), batch)
    assert float(metrics["objects_not_drawn"]) in (1, 2)
    with pytest.raises(UserError, match="sampled_classes=0 must be at least 1"):
        ClassSampler(None, CLASSES, 0)
