"""The detector on the towers: its outputs, what padding does to them, its parameters and options."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from florence_jax.errors import UserError
from florence_jax.models.anchors import level_shapes
from florence_jax.models.detector import (
    DETECTORS,
    DetectorConfig,
    DyHeadDetector,
    build_detector,
    detector_flops,
    resolve_detector,
)
from florence_jax.models.sizes import resolve_config
from florence_jax.params.rules import path_string
from florence_jax.params.sharding import make_mesh, param_shardings

TOWER = resolve_config("ti", image_width=16, window=4, res=64)
OWN = (100, 90)  # height and width of a picture in pixels
ENTRIES = ("image", "detector")


def build(**options):
    return build_detector(TOWER, "tiny", 3, **dict(width=16, blocks=2) | options)


def parameter_shapes(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return {name: shapes[name] for name in ENTRIES}


@pytest.fixture(scope="module")
def params():
    """Random ones, of which no part does nothing."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        scale = 0.01 if "box_deltas" in path_string(path) else 0.2
        values = rng.normal(0, scale, leaf.shape) + path_string(path).endswith("scale")
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, parameter_shapes(build()))


def picture(seed, height, width):
    return np.random.default_rng(seed).normal(0, 1, (height, width, 3)).astype(np.float32)


def run(model, params, size, *batches):
    """Of each picture of each batch, at the corner of a canvas of nines: level by level (rows, columns, 8).

    That is scores of three classes, boxes clipped to the picture, and whether the position is inside.
    """

    @jax.jit
    def found(params, batch):
        out = model.apply(params, batch)
        scores = jax.nn.sigmoid(out["detector/logits"]) * jax.nn.sigmoid(out["detector/centerness"])[..., None]
        return scores, out["detector/boxes"], out["detector/inside"], out["detector/levels"]

    shapes, answers = level_shapes(*size), []
    for pictures in batches:
        canvases = np.full((len(pictures), *size, 3), 9, np.float32)
        for canvas, image in zip(canvases, pictures, strict=True):
            canvas[: len(image), : image.shape[1]] = image
        valid = np.array([image.shape[:2] for image in pictures], np.int32)
        scores, boxes, inside, counts = map(np.asarray, found(params, {"image": canvases, "image_valid": valid}))
        boxes = np.clip(boxes, 0, valid[:, None, [1, 0, 1, 0]])
        levels = np.split(np.concatenate([scores, boxes, inside[..., None]], -1), np.cumsum(counts)[:-1], axis=1)
        answers += [[a[i].reshape(*n, -1) for a, n in zip(levels, shapes, strict=True)] for i in range(len(pictures))]
    return answers


def own(levels):
    """Without the positions of padding, which are at the bottom and right."""
    found = []
    for level in levels:
        rows, columns = level[..., -1].any(1).sum(), level[..., -1].any(0).sum()
        found.append(level[:rows, :columns])
        assert found[-1][..., -1].all() and level[..., -1].sum() == rows * columns
    return found


def largest_differences(got, want):
    """Of scores, and of boxes in pixels, at the positions of `want`."""
    gaps = [np.abs(a[: len(b), : b.shape[1]] - b).reshape(-1, b.shape[-1]) for a, b in zip(got, want, strict=True)]
    gaps = np.concatenate(gaps)
    return gaps[:, :3].max(), gaps[:, 3:7].max()


def test_padding_changes_nothing(params):
    """Alone, beside another picture, and in a larger batch."""
    small, full = picture(0, *OWN), picture(1, 128, 128)
    alone, _, beside, filling = map(own, run(build(), params, (128, 128), [small, small], [small, full]))
    assert [level.shape[:2] for level in alone] == [(13, 11), (7, 6), (4, 3), (2, 2), (1, 1)]
    larger = list(map(own, run(build(), params, (128, 256), [small, full])))
    for got, want in ((beside, alone), (larger[0], alone), (larger[1], filling)):
        assert [level.shape for level in got] == [level.shape for level in want]
        assert max(largest_differences(got, want)) < 1e-4
    # The published way: all positions are inside, and the same picture in a larger batch has other scores and boxes. In
    # a batch that it fills both ways are the same.
    published = run(build(padding="published"), params, (128, 256), [small, full])
    assert all(level[..., -1].all() for levels in published for level in levels)
    scores, pixels = largest_differences(published[1], filling)
    assert scores > 0.05 and pixels > 0.5, (scores, pixels)


def test_outputs_and_flops():
    """Shapes and types of a rectangle in bfloat16; the FLOPs grow with the pixels."""
    model = build_detector(dataclasses.replace(TOWER, dtype="bfloat16"), "tiny", 4)
    batch = {
        "image": jax.ShapeDtypeStruct((2, 128, 256, 3), jnp.float32),
        "image_valid": jax.ShapeDtypeStruct((2, 2), jnp.int32),
    }
    out = jax.eval_shape(model.apply, parameter_shapes(model), batch)
    got = {name[9:]: (leaf.shape, leaf.dtype.name) for name, leaf in out.items() if name.startswith("detector/")}
    count = sum(height * width for height, width in level_shapes(128, 256))
    assert got == {
        "features": ((2, count, 64), "bfloat16"),
        "logits": ((2, count, 4), "float32"),
        "centerness": ((2, count), "float32"),
        "deltas": ((2, count, 4), "float32"),
        "boxes": ((2, count, 4), "float32"),
        "inside": ((2, count), "bool"),
        "anchors": ((count, 4), "float32"),
        "levels": ((5,), "int32"),
    }
    assert out["image/norm1"].dtype == jnp.bfloat16
    square, double = (detector_flops(model.config, DETECTORS["tiny"], 4, 128, width) for width in (128, 256))
    assert square == model.flops
    assert double["detector"] == 2 * square["detector"]


def test_published_sizes():
    """The parameters of the head of Dynamic Head's paper, counted by hand."""
    shapes = parameter_shapes(build_detector(TOWER, "dyhead", 80))["detector"]
    counts = {name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for name, tree in shapes.items()}
    c = 256
    assert counts["pyramid"] == (32 + 64 + 128 + 3) * c + 5 * (9 * c + 1) * c
    dcn, offset, dyrelu = (9 * c + 1) * c + 2 * c, (9 * c + 1) * 27, (c + 1) * 64 + 65 * 4 * c
    assert counts["blocks"] == 6 * (3 * dcn + offset + c + 1 + dyrelu)
    assert counts["class_logits"] + counts["box_deltas"] + counts["centerness"] == 257 * 85
    assert counts["scales"] == 5


def test_initial_values_and_places():
    """Offsets start at zero, classes at a prior of .01; over eight devices every large parameter is split."""
    model = build(width=32)
    params = jax.jit(lambda key: model.init(key)["detector"])(jax.random.key(0))
    assert not params["blocks"]["offset"]["kernel"].any()
    np.testing.assert_allclose(jax.nn.sigmoid(params["class_logits"]["bias"]), 0.01, rtol=1e-5)
    for kernel, gain in (
        (params["blocks"]["same"]["kernel"], 1),
        (params["pyramid"]["lateral5"]["kernel"], 3),
        (params["pyramid"]["p6"]["kernel"], 3),
    ):
        fan_in = math.prod(kernel.shape[-4:-1]) if kernel.ndim > 3 else kernel.shape[0]
        bound = (gain / fan_in) ** 0.5
        assert 0.95 * bound < jnp.abs(kernel).max() <= bound
    places = param_shardings({"detector": params}, make_mesh(1, 8))
    for path, place in jax.tree_util.tree_leaves_with_path(places):
        split = any(place.spec)
        assert split == path_string(path).endswith("kernel"), path_string(path)


def test_recomputation():
    """What the backward pass of the blocks keeps, under each policy; nothing is compiled."""
    maps = [jax.ShapeDtypeStruct((1, n, n, 8), jnp.float32) for n in (16, 8, 4)]
    valids, size = [jax.ShapeDtypeStruct((1, 2), jnp.int32)] * 3, (128, 128)
    plain = DyHeadDetector(DetectorConfig(16, 2), 3)
    params = jax.eval_shape(lambda *inputs: plain.init(jax.random.key(0), *inputs, size), maps, valids)

    def kept(remat):
        def pull(params, maps, valids):
            head = plain.clone(remat=remat)
            return jax.vjp(lambda params: head.apply(params, maps, valids, size)["logits"], params)[1]

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(pull, params, maps, valids)))

    none, dots, block = map(kept, ("none", "dots", "block"))
    assert block < 0.75 * dots < 0.5 * none, (none, dots, block)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(coarse="nearest"), "detector coarse='nearest': choose one of upfirst, flat, topleft"),
        (dict(padding="zero"), "detector padding='zero': choose one of masked, published"),
        (dict(multiple=100), "detector multiple=100: choose one of 32, 64, 128"),
        (dict(width=40), "detector width=40: must be a multiple of 16"),
        (dict(blocks=0), "detector blocks=0: must be a whole number above 0"),
        (dict(depth=1), "unknown detector option depth: known are width, blocks, coarse, padding, multiple"),
    ],
)
def test_options(options, message):
    with pytest.raises(UserError, match=message):
        resolve_detector("tiny", **options)


def test_mistakes():
    assert resolve_detector("glip_l", width=None, multiple=128) == dataclasses.replace(
        DETECTORS["glip_l"], multiple=128
    )
    with pytest.raises(UserError, match="unknown detector 'huge': choose one of tiny, dyhead, glip_l"):
        resolve_detector("huge")
    with pytest.raises(UserError, match="four stages: image_tower='vit' of variant ViT-B-32 has 1"):
        build_detector(resolve_config("ViT-B-32"), "tiny", 3)
    with pytest.raises(UserError, match="four stages"):
        build_detector(resolve_config("ti", depths=(2, 2), res=64), "tiny", 3)
    with pytest.raises(UserError, match="a detector of 0 classes"):
        build_detector(TOWER, "tiny", 0)
    batch = {"image": jnp.zeros((1, 128, 96, 3)), "image_valid": jnp.zeros((1, 2), jnp.int32)}
    with pytest.raises(UserError, match="a batch of 128x96 pixels: .* multiples of 128"):
        build().apply({}, batch)
