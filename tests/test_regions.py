"""Crops of regions and the scores of their classes, against short references."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from florence_jax.boxes import iou
from florence_jax.models.regions import crop_regions, name_boxes, widen_boxes

RNG = np.random.default_rng(0)


def test_crops_are_the_resized_parts():
    images = RNG.uniform(0, 255, (2, 40, 56, 3)).astype(np.float32)
    boxes = np.array([[[0, 0, 56, 40], [8, 4, 24, 20], [-8, 10, 24, 42]]] * 2, np.float32)  # all, larger, beyond
    valid = np.array([[40, 56]] * 2)
    found = np.asarray(crop_regions(jnp.asarray(images), jnp.asarray(boxes), 16, jnp.asarray(valid)))
    assert found.shape == (2, 3, 16, 16, 3)
    for image, crops in zip(images, found, strict=True):
        for box, crop in zip(boxes[0], crops, strict=True):
            scale = 16 / (box[2:] - box[:2])[::-1]
            expected = jax.image.scale_and_translate(
                image, (16, 16, 3), (0, 1), scale, -box[:2][::-1] * scale, "cubic", antialias=True
            )
            np.testing.assert_allclose(crop, expected, atol=0.05)
    whole = Image.fromarray(images[0].astype(np.uint8))
    pillow = np.asarray(whole.resize((16, 16), Image.Resampling.BICUBIC, box=(8, 4, 24, 20)), np.float32)
    np.testing.assert_allclose(found[0, 1].clip(0, 255), pillow, atol=2)
    assert not found[:, 2, :, :3].any() and found[:, 2, 2:4, 4:].all()  # beyond the picture nothing


def test_a_picture_is_cut_the_same_in_a_larger_batch():
    image = RNG.normal(size=(1, 24, 40, 3)).astype(np.float32)
    padded = np.pad(image, ((0, 0), (0, 40), (0, 24), (0, 0)), constant_values=7)
    boxes, valid = jnp.array([[[10.0, 3.0, 45.0, 30.0]]]), jnp.array([[24, 40]])
    alone, together = (np.asarray(crop_regions(jnp.asarray(x), boxes, 8, valid)) for x in (image, padded))
    np.testing.assert_allclose(alone, together, atol=1e-5)


def test_what_is_cut_out():
    boxes = jnp.array([[10.0, 20.0, 30.0, 60.0], [5.0, 5.0, 5.0, 5.0]])
    np.testing.assert_allclose(widen_boxes(boxes, 0.25, False)[0], [5, 10, 35, 70])
    np.testing.assert_allclose(widen_boxes(boxes, 0.25, True)[0], [-10, 10, 50, 70])
    np.testing.assert_allclose(widen_boxes(boxes, 0.0, True)[1], [4.5, 4.5, 5.5, 5.5])


def named_slowly(boxes, objectness, logits, g, background, most_overlap):
    """Of one picture, pair by pair: [(score, label, box)], best first."""
    with_background = np.concatenate([logits, np.full((len(logits), 1), background)], 1)
    odds = np.exp(with_background - with_background.max(1, keepdims=True))
    probability = odds / odds.sum(1, keepdims=True)
    pairs = [
        (objectness[r] ** (1 - g) * probability[r, k] ** g, k, tuple(boxes[r]))
        for r in range(len(boxes))
        for k in range(logits.shape[1])
        if objectness[r] > 0
    ]
    kept = []
    for pair in sorted(pairs, key=lambda pair: -pair[0]):
        same = [other for other in kept if other[1] == pair[1]]
        if all(iou(np.array(pair[2]), np.array(other[2])) <= most_overlap for other in same):
            kept.append(pair)
    return kept


def test_scores_join_objectness_and_class():
    low = RNG.uniform(0, 40, (2, 12, 2))
    boxes = np.concatenate([low, low + RNG.uniform(10, 30, (2, 12, 2))], -1).astype(np.float32)
    objectness = RNG.uniform(0, 1, (2, 12)).astype(np.float32)
    objectness[:, 9:] = 0  # no proposals
    logits = RNG.normal(0, 3, (2, 12, 3)).astype(np.float32)
    for g in (0.3, 1.0):
        found = name_boxes(*map(jnp.asarray, (boxes, objectness, logits)), g, 0.5, 0.5, 40)
        for row in range(2):
            expected = named_slowly(boxes[row], objectness[row], logits[row].astype(np.float64), g, 0.5, 0.5)
            count = len(expected)
            np.testing.assert_allclose(found["scores"][row, :count], [pair[0] for pair in expected], rtol=1e-4)
            assert found["labels"][row, :count].tolist() == [pair[1] for pair in expected]
            assert not found["scores"][row, count:].any() and (found["labels"][row, count:] == -1).all()


def test_nothing_proposed_is_nothing_found():
    none = jnp.zeros((1, 4))
    logits = jnp.full((1, 4, 2), -jnp.inf).at[..., 0].set(2.0)
    found = name_boxes(jnp.zeros((1, 4, 4)), none, logits, 0.5, most=5)
    assert not found["scores"].any() and not np.isnan(found["boxes"]).any() and (found["labels"] == -1).all()
    some = name_boxes(jnp.ones((1, 4, 4)), none.at[0, 2].set(0.9), logits, 0.0, most=5)
    assert np.isfinite(some["scores"]).all() and some["labels"][0].tolist() == [0, -1, -1, -1, -1]  # the other is none
