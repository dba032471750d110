"""RoIAlign: its definition by loops, torchvision where it is installed, padding, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from florence_jax.models.roi_align import roi_align

STRIDE = 8
SIZES = ((1, 1), (3, 2), (2, 7))
aligned = jax.jit(roi_align, static_argnums=(2, 3), static_argnames="samples")


def align_by_loops(x, boxes, stride, size, samples):
    """The definition, float64, a point after the other."""
    _, height, width, channels = x.shape
    found = np.zeros((*boxes.shape[:2], *size, channels))
    for b, r, i, j in np.ndindex(*boxes.shape[:2], *size):
        x1, y1, x2, y2 = boxes[b, r].astype(np.float64) / stride
        for u, v in np.ndindex(samples, samples):
            row = y1 - 0.5 + (y2 - y1) * (i + (u + 0.5) / samples) / size[0]
            column = x1 - 0.5 + (x2 - x1) * (j + (v + 0.5) / samples) / size[1]
            if not (-1 <= row <= height and -1 <= column <= width):
                continue
            row, column = np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)
            top, left = int(row), int(column)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            down, across = row - top, column - left
            upper = (1 - across) * x[b, top, left] + across * x[b, top, right]
            lower = (1 - across) * x[b, bottom, left] + across * x[b, bottom, right]
            found[b, r, i, j] += ((1 - down) * upper + down * lower) / samples**2
    return found


def example():
    """Maps (2, 6, 9, 4) and boxes (2, 12, 4): within, across the border, far outside, without area, of padding."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 9, 4)).astype(np.float32)
    corners = rng.uniform(-20, 90, (2, 12, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0, 60, (2, 12, 2))], -1).astype(np.float32)
    boxes[:, 0], boxes[:, 1], boxes[:, 2] = 0, (0, 0, 72, 48), (500, 500, 600, 600)
    boxes[:, 3, 2:] = boxes[:, 3, :2]
    return x, boxes


@pytest.mark.parametrize("size", SIZES)
def test_equals_the_definition(size):
    x, boxes = example()
    found = aligned(x, boxes, STRIDE, size, samples=2)
    assert found.shape == (2, 12, *size, 4) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, align_by_loops(x, boxes, STRIDE, size, 2), atol=2e-6)
    assert not np.asarray(found)[:, 2].any()  # outside


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_equals_torchvision(size, samples):
    torch, torchvision = pytest.importorskip("torch"), pytest.importorskip("torchvision")
    x, boxes = example()
    maps, lists = torch.tensor(x).permute(0, 3, 1, 2), list(torch.tensor(boxes))
    expected = torchvision.ops.roi_align(maps, lists, size, 1 / STRIDE, samples, aligned=True)
    expected = expected.permute(0, 2, 3, 1).reshape(2, 12, *size, 4).numpy()
    np.testing.assert_allclose(aligned(x, boxes, STRIDE, size, samples=samples), expected, atol=1e-5)


def test_what_lies_beyond_a_picture_is_not_read():
    x, boxes = example()
    small, own = x[:, :4, :5], jnp.array([[4, 5]] * 2)
    padded = np.full_like(x, 1e4)
    padded[:, :4, :5] = small
    found = aligned(padded, boxes, STRIDE, (3, 2), valid=own)
    np.testing.assert_allclose(found, align_by_loops(small, boxes, STRIDE, (3, 2), 2), atol=2e-6)


def test_gradients_are_finite_and_bfloat16_stays():
    x, boxes = example()
    total = functools.partial(roi_align, stride=STRIDE, size=(3, 2))
    by_x, by_boxes = jax.jit(jax.grad(lambda x, boxes: jnp.square(total(x, boxes)).sum(), (0, 1)))(x, boxes)
    assert np.isfinite(by_x).all() and np.isfinite(by_boxes).all() and np.asarray(by_x).any()
    assert not np.asarray(by_boxes)[:, 2].any()
    assert jax.eval_shape(total, jnp.asarray(x, jnp.bfloat16), boxes).dtype == jnp.bfloat16
