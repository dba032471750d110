"""The variants table, the functional seam and the FLOP count."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from florence_jax.errors import UserError
from florence_jax.models.base import Model
from florence_jax.models.florence import TwoTowers, build, parameter_count, tower_inputs
from florence_jax.models.resize import resize_bias_tables, resize_position_embedding
from florence_jax.models.sizes import VARIANTS
from florence_jax.params.rules import path_string

SMALL = dict(depths=(2, 2), image_width=16, heads=(2, 4), text_width=32, vocab_size=50, text_length=8, projection=12)


def small_batch(batch=3, res=32):
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.normal(size=(batch, res, res, 3)), jnp.float32),
        "text": jnp.asarray(rng.integers(1, 50, (batch, 8)), jnp.int32),
    }


@pytest.mark.parametrize("variant,millions", [("T", 29.46), ("S", 50.78), ("B", 90.19), ("L", 202.75)])
def test_image_parameters(variant, millions):
    np.testing.assert_allclose(parameter_count(variant)["image"], millions * 1e6, rtol=1e-3)


def test_huge_has_the_papers_size():
    counts = parameter_count("H")
    np.testing.assert_allclose(counts["image"], 637e6, rtol=0.005)
    np.testing.assert_allclose(counts["text"], 256e6, rtol=0.01)
    assert counts["image_projection"] == 2048 * 1024 and counts["logit_scale"] == 1
    assert counts["total"] == sum(value for name, value in counts.items() if name != "total")


def test_unicl_text_tower_size():
    """63.17M as published, with one position fewer: 12 blocks of 12 W^2 + 13 W, two tables and a LayerNorm."""
    count = parameter_count("T")["text"]
    assert count == 12 * (12 * 512**2 + 13 * 512) + (49408 + 76 + 2) * 512
    np.testing.assert_allclose(count, 63.17e6, rtol=1e-3)


def test_flops_of_known_models():
    np.testing.assert_allclose(build("H").flops["image"] / 2e9, 87.5, rtol=0.005)
    np.testing.assert_allclose(build("H", res=384).flops["image"] / 2e9, 261.5, rtol=0.005)


@pytest.mark.parametrize("mode,res,window", [("classification", 32, 4), ("detection", 36, 4)])
def test_flops_match_the_compiler(mode, res, window):
    sizes = dict(image_width=64, res=res, window=window, size_mode=mode, text_layers=3, scan=False)
    model = build("ti", **SMALL | sizes)
    params = jax.eval_shape(model.init, jax.random.key(0))
    for tower in ("image", "text"):
        batch = {tower: small_batch(1, res)[tower]}
        counted = model.flops[tower]
        compiled = jax.jit(model.apply).lower(params, batch).cost_analysis()["flops"]
        # The compiler also counts element-wise work, and leaves out convolution taps that fall on padding.
        assert 0.95 * counted < compiled < 1.25 * counted, (tower, counted, compiled)


@pytest.fixture(scope="module")
def encoded():
    """Parameters of the small model, and its outputs on the small batch."""
    model = build("ti", **SMALL)
    params = jax.jit(model.init)(jax.random.key(0))
    return params, jax.jit(model.apply)(params, small_batch())


def test_parameters_of_equal_models_are_traced_once(monkeypatch):
    """They are those that Flax draws."""
    traced, bare = [], TwoTowers.__call__
    monkeypatch.setattr(TwoTowers, "__call__", lambda *args: traced.append(1) or bare(*args))
    key, sizes = jax.random.key(3), SMALL | dict(depths=(2,), heads=(2,), image_width=8, text_layers=1)
    drawn = [jax.jit(build("ti", **sizes).init)(key) for _ in range(2)]
    assert len(traced) == 1
    module, inputs = TwoTowers(build("ti", **sizes).config), tower_inputs(build("ti", **sizes).config)
    batch = {name: jnp.zeros(spec.shape, spec.dtype) for name, spec in inputs.items()}
    plain = jax.jit(module.init)({"params": key}, batch)["params"]
    for tree in drawn:
        jax.tree.map(np.testing.assert_array_equal, tree, plain)


def test_outputs_and_params(encoded):
    params, outputs = encoded
    assert set(params) == {"image", "text", "image_projection", "text_projection", "logit_scale"}
    assert all(type(node) is dict for node in (params, params["image"], params["text"]["layer0"]))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    shapes = {name: value.shape for name, value in outputs.items()}
    assert shapes == {
        "logit_scale": (),
        "image/stage0": (3, 8, 8, 16),
        "image/stage1": (3, 4, 4, 32),
        "image/tokens": (3, 16, 32),
        "image/pooled": (3, 32),
        "image/embedding": (3, 12),
        "text/tokens": (3, 8, 32),
        "text/pooled": (3, 32),
        "text/embedding": (3, 12),
    }
    np.testing.assert_allclose(outputs["logit_scale"], 1 / 0.07, rtol=1e-6)
    np.testing.assert_allclose(params["logit_scale"], np.log(1 / 0.07), rtol=1e-6)
    for tower in ("image", "text"):
        np.testing.assert_allclose(jnp.linalg.norm(outputs[f"{tower}/embedding"], axis=1), 1, rtol=1e-5)
        cosine = outputs[f"{tower}/pooled"] @ params[f"{tower}_projection"]["kernel"]
        cosine /= jnp.linalg.norm(cosine, axis=1, keepdims=True)
        np.testing.assert_allclose(outputs[f"{tower}/embedding"], cosine, atol=1e-5)


def test_one_tower_needs_only_its_input():
    model = build("ti", **SMALL)
    params = jax.eval_shape(model.init, jax.random.key(0))
    params = {name: params[name] for name in ("text", "text_projection")}
    outputs = jax.eval_shape(model.apply, params, {"text": small_batch()["text"]})
    assert set(outputs) == {"text/tokens", "text/pooled", "text/embedding"}


class Double(nn.Module):
    @nn.compact
    def __call__(self, batch, train=False):
        return {"double": batch["x"] * self.param("w", nn.initializers.constant(2.0), ())}


@pytest.mark.parametrize(
    "batch,message",
    [
        ({"y": jnp.zeros(3)}, "the batch lacks x"),
        ({"x": jnp.zeros(3), "z": jnp.zeros(3), "a": jnp.zeros(3)}, "unknown input a, z: this model takes x, y"),
        ({"x": jnp.zeros((3, 1))}, r"x is float32\[3, 1\]: this model takes float32\[1\]"),
        ({"x": jnp.zeros(3, jnp.uint8)}, "x is uint8"),
    ],
)
def test_a_batch_that_is_not_the_models(batch, message):
    spec = jax.ShapeDtypeStruct((1,), jnp.float32)
    model = Model(Double(), None, {"x": spec, "y": spec}, optional=("y",))
    params = model.init(jax.random.key(0))
    np.testing.assert_array_equal(model.apply(params, {"x": jnp.ones(3, jnp.bfloat16)})["double"], 2)
    with pytest.raises(UserError, match=message):
        model.apply(params, batch)


class Detector(TwoTowers):
    """Two towers and a head on top."""

    def setup(self):
        super().setup()
        self.detector = nn.Dense(3)

    def __call__(self, batch, train=False):
        outputs = super().__call__(batch, train)
        return outputs | ({"logits": self.detector(outputs["image/tokens"])} if "image" in batch else {})


def test_an_adapter_lies_beside_the_towers():
    towers = build("ti", **SMALL)
    inputs = tower_inputs(towers.config)
    model = Model(Detector(towers.config), towers.config, inputs, tuple(inputs.keys() - {"image"}), towers.flops)
    params = jax.eval_shape(model.init, jax.random.key(0))
    own = jax.eval_shape(towers.init, jax.random.key(0))
    assert params.keys() - own.keys() == {"detector"} and {name: params[name] for name in own} == own
    batch = {"image": small_batch()["image"]}
    alone = {name: params[name] for name in ("image", "detector")}
    assert jax.eval_shape(model.apply, alone, batch)["logits"].shape == (3, 16, 3)
    with pytest.raises(UserError, match="lacks image"):
        model.apply(params, {"text": small_batch()["text"]})
    with pytest.raises(UserError, match="the weights hold no text tower"):
        jax.eval_shape(model.apply, alone, small_batch())


def test_adapt():
    adapt = build("ti", **SMALL).adapt
    rng = np.random.default_rng(0)
    table = rng.normal(size=(3, 49, 2)).astype(np.float32)
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    name = "image/stage1_pairs/plain/attention/relative_position_bias_table"
    want = [resize_bias_tables({"relative_position_bias_table": one}, 3) for one in table]
    want = np.stack([tree["relative_position_bias_table"] for tree in want])
    np.testing.assert_allclose(adapt(name, table, shape(3, 25, 2)), want, atol=1e-6)
    np.testing.assert_array_equal(adapt(name, table, shape(3, 49, 2)), table)
    for other in (shape(3, 25, 4), shape(3, 24, 2), shape(25, 2)):
        assert adapt(name, table, other) is None
    rows = rng.normal(size=(10, 4)).astype(np.float32)
    path = "image/position_embedding"
    np.testing.assert_array_equal(adapt(path, rows, shape(26, 4)), resize_position_embedding(rows, 5))
    assert adapt(path, rows[:8], shape(26, 4)) is None


def test_adapt_grows_tables():
    adapt = build("ti", **SMALL).adapt
    saved, fresh = np.ones((3, 2), np.float32), jnp.arange(10.0).reshape(5, 2)
    for path in ("text/token_embedding", "text/position_embedding"):
        np.testing.assert_array_equal(adapt(path, saved, fresh), [[1, 1], [1, 1], [1, 1], [6, 7], [8, 9]])
        assert adapt(path, saved, jax.eval_shape(lambda: fresh)) is None  # no values for the new rows
        assert adapt(path, np.asarray(fresh), jnp.asarray(saved)) is None
    np.testing.assert_array_equal(adapt("head/weight", saved.T, fresh.T)[1], [1, 1, 1, 7, 9])
    np.testing.assert_array_equal(adapt("head/bias", np.ones(1), fresh[:2, 1]), [1, 3])
    assert adapt("text/layer0/mlp/fc1/kernel", saved, fresh) is None
    assert adapt("head/weight", saved, fresh) is None  # another width is no other class


def test_an_image_tower_alone(encoded):
    params, outputs = encoded
    alone = jax.jit(build("ti", **SMALL).apply)({"image": params["image"]}, {"image": small_batch()["image"]})
    assert set(alone) == {"image/stage0", "image/stage1", "image/tokens", "image/pooled"}
    np.testing.assert_allclose(alone["image/pooled"], outputs["image/pooled"], atol=1e-5)


def test_detection_outputs(encoded):
    """Parameters of classification are enough but for the stages' own norms; the embeddings are theirs."""
    classifier, _ = encoded
    model = build("ti", **SMALL | dict(size_mode="detection", out_stages=(1,)))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert set(shapes["image"]) - set(classifier["image"]) == {"norm1"} and set(shapes) == set(classifier)
    assert build("ti", **SMALL).inputs.keys() == model.inputs.keys() - {"image_valid"}
    batch = {"image": small_batch(2, 40)["image"][:, :36], "image_valid": jnp.array([[36, 40], [20, 33]])}
    outputs = jax.eval_shape(model.apply, shapes, batch)
    assert outputs["image/stage0"].shape == (2, 9, 10, 16) and outputs["image/norm1"].shape == (2, 5, 5, 32)
    assert outputs["image/embedding"].shape == (2, 12) and outputs["image/valid1"].shape == (2, 2)
    assert outputs["image/tokens"].shape == (2, 25, 32) and "image/norm0" not in outputs
    with pytest.raises(UserError, match="image_valid without image"):
        model.apply(classifier, {"image_valid": batch["image_valid"]})


def test_a_detector_takes_what_a_classifier_learned():
    """All has its shape but the tables of a stage whose map was smaller than the window, which are resized."""

    def leaves(model):
        found = jax.tree_util.tree_leaves_with_path(jax.eval_shape(model.init, jax.random.key(0)))
        return {path_string(path): leaf for path, leaf in found}

    detector = build("ti", **SMALL, window=8, size_mode="detection")
    saved, wanted = leaves(build("ti", **SMALL, window=8)), leaves(detector)
    assert wanted.keys() - saved.keys() == {f"image/norm{i}/{name}" for i in (0, 1) for name in ("scale", "bias")}
    changed = {name for name, leaf in saved.items() if leaf.shape != wanted[name].shape}
    assert changed == {f"image/stage1_pair0/{b}/attention/relative_position_bias_table" for b in ("plain", "shifted")}
    for name in changed:
        assert detector.adapt(name, np.zeros(saved[name].shape), wanted[name]).shape == (225, 4)


def test_bfloat16_embeddings_are_float32_and_close(encoded):
    params, full = encoded
    low = jax.jit(build("ti", **SMALL, dtype="bfloat16").apply)(params, small_batch())
    assert low["image/stage1"].dtype == jnp.bfloat16
    for name in ("image/embedding", "text/embedding"):
        assert low[name].dtype == jnp.float32
        assert 0.995 < (full[name] * low[name]).sum(1).min() < 0.9999999


def test_config_is_frozen_and_json():
    config = build("B", res=384, drop_path=0.5, depths=[2, 2, 4, 2]).config
    assert config["window"] == 12 and config.heads == (4, 8, 16, 32) and config.depths == (2, 2, 4, 2)
    assert json.loads(json.dumps(dict(config)))["dtype"] == "float32"
    assert hash(config) == hash(build("B", res=384, drop_path=0.5, depths=(2, 2, 4, 2)).config)
    with pytest.raises(AttributeError):
        config.res = 224
    assert build("ti", res=48).config.window == 6 and build("ti").config.window == 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_resolves(variant):
    assert build(variant).config.variant == variant


@pytest.mark.parametrize(
    "variant,options,message",
    [
        ("XL", {}, "unknown variant 'XL': choose one of ti, T, S, B, L, H"),
        ("ti", dict(widht=3), "unknown model option widht: known are res, projection"),
        ("ti", dict(dtype="int8"), "dtype"),
        ("ti", dict(dtype="half-ish"), "dtype"),
        ("ti", dict(dtype=16), "dtype=16: choose one of float32"),
        ("ti", dict(remat="all"), "remat"),
        ("ti", dict(text_pooling="cls"), "text_pooling"),
        ("ti", dict(drop_path=1.0), "drop_path"),
        ("ti", dict(heads=(3, 2, 4, 8)), "heads"),
        ("ti", dict(heads=(1, 2)), "heads"),
        ("ti", dict(depths=(2, 2, 3, 2)), "depths"),
        ("ti", dict(res=40, window=4), "res=40"),
        ("T", dict(res=200), "res=200"),
        ("ti", dict(text_heads=3), "text_heads"),
        ("ti", dict(heads=16), r"heads=16: must be whole numbers, such as \(2, 2, 6, 2\)"),
        ("ti", dict(depths=[2, 2.0, 2, 2]), "depths"),
        ("ti", dict(depths=()), r"depths=\(\): must be above 0"),
        ("ti", dict(image_mean=0.5), "image_mean=0.5: must be numbers"),
        ("ti", dict(text_heads="abc"), "text_heads='abc': must be a whole number"),
        ("ti", dict(text_heads=True), "text_heads=True: must be a whole number"),
        ("ti", dict(mlp_ratio="4"), "mlp_ratio='4': must be a number"),
        ("ti", dict(text_causal="false"), "text_causal='false': must be True or False"),
        ("ti", dict(remat=1), "remat=1: must be a word"),
        ("ti", dict(res="abc"), "res='abc'"),
        ("ti", dict(res=0), "res=0: must be above 0"),
        ("ti", dict(res=2), "res=2: no token is left"),
        ("ti", dict(window=0), "window=0: must be above 0"),
        ("ti", dict(window=0, size_mode="detection"), "window=0: must be above 0"),
        ("ti", dict(text_heads=0), "text_heads=0: must be above 0"),
        ("ti", dict(heads=(1, 2, 0, 4)), "heads"),
        ("ViT-B-32", dict(heads=(0,)), "heads"),
        ("ti", dict(logit_scale_init=0), "logit_scale_init"),
    ],
)
def test_user_errors(variant, options, message):
    with pytest.raises(UserError, match=message):
        build(variant, **options)


def test_numbers_of_numpy_and_types_of_jax_are_welcome():
    options = dict(res=np.int64(64), heads=np.array([1, 2, 4, 8]), drop_path=np.float32(0.1), dtype=jnp.bfloat16)
    config = build("ti", **options).config
    assert (config.res, config.heads, config.dtype) == (64, (1, 2, 4, 8), "bfloat16")


def test_missing_drop_path_key():
    model = build("ti", **SMALL, drop_path=0.1)
    batch = small_batch()
    with pytest.raises(UserError, match="rngs"):
        jax.eval_shape(lambda: model.apply(model.init(jax.random.key(0)), batch, train=True))
