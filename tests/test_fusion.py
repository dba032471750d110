"""The fusion: METER's equations, who sees whom, dropout by example, one image for many texts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import bert_layer_shapes, bert_params, fill, random_params
from jax.sharding import NamedSharding, PartitionSpec

from florence_jax.errors import UserError
from florence_jax.losses.language import answer_loss, masked_word_loss, match_loss
from florence_jax.models.cross_attention import CoAttention, CoAttentionLayer, key_bias
from florence_jax.models.dropout import drop_examples
from florence_jax.models.fusion import (
    HEADS,
    FusionConfig,
    build_fusion,
    image_token_count,
    images_of_texts,
    rank_as_match,
)
from florence_jax.models.sizes import resolve_config
from florence_jax.params.sharding import make_mesh
from florence_jax.tools.import_torch.roberta import BERT_LAYER

TOWERS = resolve_config(
    "ti", res=32, image_width=8, depths=(2, 2), heads=(1, 1), window=4, text_width=16, text_layers=1, text_heads=2,
    text_length=10, vocab_size=33, projection=8,
)  # fmt: skip
KEY = jax.random.key(0)
ROWS, TOKENS, LENGTH = 8, 4, 8


@functools.cache
def fusion(**options):
    sizes = dict(layers=3, width=16, head_width=8, token_types=3, heads=HEADS, answers=5)
    return build_fusion(TOWERS, "ti", **sizes | options)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(fusion().init, KEY)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.2, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def batch():
    """Eight texts with an image each, as tokens, so that no image tower is compiled."""
    rng = np.random.default_rng(1)
    return {
        "image_tokens": jnp.asarray(rng.standard_normal((ROWS, TOKENS, 16)), jnp.float32),
        "image_index": jnp.arange(ROWS, dtype=jnp.int32),
        "text": jnp.asarray(rng.integers(1, 32, (ROWS, LENGTH)), jnp.int32),
        "text_length": jnp.asarray(rng.integers(3, 7, ROWS), jnp.int32),
        "places": jnp.asarray(rng.integers(0, 3, (ROWS, 2)), jnp.int32),
        "example": jnp.arange(7, 7 + ROWS, dtype=jnp.int32),
    }


@functools.partial(jax.jit, static_argnames="train")
def run(params, batch, train=False):
    return fusion().apply(params, batch, train, {"dropout": KEY} if train else None)


def test_fresh_answers_are_each_as_probable_as_one_of_them():
    module = fusion(heads=("vqa",), layers=1)
    bias = module.init(KEY)["fusion"]["vqa"]["output"]["bias"]
    np.testing.assert_allclose(jax.nn.sigmoid(bias), np.full(5, 1 / 5), rtol=1e-6)


def losses(params, batch):
    """Sum of three losses of a batch in training."""
    out = fusion().apply(params, batch, True, {"dropout": KEY})
    targets = jnp.where(jnp.arange(2)[None] < batch["example"][:, None] % 3, 5, -1)
    labels = jnp.stack([batch["example"] % 5, jnp.full_like(batch["example"], -1)], 1)
    parts = (
        masked_word_loss(out["mlm_logits"], targets),
        match_loss(out["itm_logits"], batch["example"] % 2),
        answer_loss(out["answer_logits"], labels, jnp.full(labels.shape, 0.6)),
    )
    return sum(part.mean for part in parts)


def gradients(params, batch):
    """The loss, and its gradients of the parameters and of the image tokens."""
    tokens = batch["image_tokens"]
    return jax.value_and_grad(lambda p, t: losses(p, batch | {"image_tokens": t}), argnums=(0, 1))(params, tokens)


compiled_gradients = jax.jit(gradients)


def assert_same(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(float(jnp.abs(b).max()), 1e-6))


@pytest.mark.parametrize("dtype,tolerance", [("float64", 1e-7), ("float32", 1e-5)])
def test_golden_layer(dtype, tolerance):
    """METER's cross layer, of width 8 with 2 heads, as text layer and as image layer; LayerNorm is in float32."""
    layer = fill(bert_layer_shapes(8), 0.3)
    state = {f"{stream}.{name}": value for stream in ("text", "image") for name, value in layer.items()}
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), bert_params(state, BERT_LAYER))
        text = jnp.asarray(np.cos(0.11 * np.arange(24)).reshape(1, 3, 8), dtype)
        image = jnp.asarray(np.sin(0.07 * np.arange(40)).reshape(1, 5, 8), dtype)
        module = CoAttentionLayer(heads=2, mlp_ratio=2, dtype=jnp.dtype(dtype))
        golden = jax.jit(module.apply)
        found = golden({"params": params}, (text, image), 0, key_bias(jnp.array([2]), 3), None)
        (fused, seen), look = jax.tree.map(np.asarray, found)
    expected = [0.89519529, 0.13694867, 0.51398954, -0.69208949, 0.14003062, -1.58077953, -0.23939025, -1.96365497]
    np.testing.assert_allclose(fused[0, 0], expected, atol=tolerance)
    expected = [0.34887123, -0.73723301, 0.35151632, -1.34837037, 0.63106525, -1.55037618, 1.35024978, -0.66169643]
    np.testing.assert_allclose(seen[0, 0], expected, atol=tolerance)
    np.testing.assert_allclose([fused.sum(), seen.sum()], [-8.40362598, -11.82290508], atol=10 * tolerance)
    np.testing.assert_allclose(look.sum(1), 1, atol=1e-5)


def test_shapes():
    batch = {
        "image": jnp.zeros((2, 32, 32, 3)), "text": jnp.zeros((4, 8), jnp.int32), "text_length": jnp.full(4, 3),
        "places": jnp.zeros((4, 3), jnp.int32), "image2_index": jnp.zeros(4, jnp.int32),
    }  # fmt: skip
    params = jax.eval_shape(fusion().init, KEY)
    out = jax.eval_shape(fusion().apply, params, batch)
    assert {name: out[name].shape for name in out if "/" not in name and name != "logit_scale"} == {
        "image_tokens": (2, 16, 16), "text_tokens": (4, 8, 16), "fused_text": (4, 8, 16), "fused_image": (4, 16, 16),
        "pooled": (4, 32), "attention": (4, 16), "itm_logits": (4, 2), "mlm_logits": (4, 3, 33),
        "answer_logits": (4, 5), "nlvr2_logits": (4, 2), "snli_ve_logits": (4, 3), "rank_logits": (4, 1),
    }  # fmt: skip
    alone = jax.eval_shape(fusion().apply, params, {"image": batch["image"]})
    assert alone["image_tokens"].shape == (2, 16, 16) and "pooled" not in alone
    assert {"image", "text", "fusion"} < params.keys()
    assert [image_token_count(resolve_config("B", res=res)) for res in (384, 576)] == [144, 324]


def test_a_vit_gives_its_class_token_first():
    towers = resolve_config(
        "ViT-B-32", res=64, image_width=16, depths=(1,), heads=(2,), text_width=16, text_layers=1, text_heads=2,
        text_length=8, vocab_size=33, projection=8,
    )  # fmt: skip
    model = build_fusion(towers, "ti", layers=1, width=16, head_width=8)
    params = jax.eval_shape(model.init, KEY)
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), params)
    inputs = {"image": jnp.ones((1, 64, 64, 3)), "text": jnp.ones((1, 3), jnp.int32)}
    out = jax.jit(model.apply)(params, inputs)
    assert out["image_tokens"].shape == (1, image_token_count(towers), 16) == (1, 5, 16)
    np.testing.assert_array_equal(out["image_tokens"][:, 0], out["image/pooled"])
    of_class = out["fused_image"][:, 0] @ params["fusion"]["image_pooler"]["kernel"]
    np.testing.assert_allclose(out["pooled"][:, 16:], jnp.tanh(of_class + 0.1), rtol=1e-5)


def test_padding_changes_nothing(params, batch):
    want = run(params, batch)
    real = jnp.arange(LENGTH)[None] < batch["text_length"][:, None]
    longer = jnp.concatenate([jnp.where(real, batch["text"], 0), jnp.full((ROWS, 2), 3, jnp.int32)], axis=1)
    got = run(params, batch | {"text": longer})
    for name in ("pooled", "fused_image", "attention", "mlm_logits", "answer_logits"):
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)  # processors add longer rows in another order
    words = [jnp.where(real[..., None], out["fused_text"][:, :LENGTH], 0) for out in (got, want)]
    np.testing.assert_allclose(*words, atol=1e-5)
    shorter = run(params, batch | {"text_length": batch["text_length"] - 1})
    assert jnp.abs(shorter["fused_image"] - want["fused_image"]).max() > 1e-3


def test_words_are_told_as_from_all_logits(params, batch):
    """The plain form: the head on every token, of which the places are taken."""
    out, head = run(params, batch), jax.tree.map(np.asarray, params["fusion"]["mlm"])
    hidden = np.asarray(out["fused_text"]) @ head["hidden"]["kernel"] + head["hidden"]["bias"]
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / 2**0.5))
    hidden = (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(hidden.var(-1, keepdims=True) + 1e-12)
    logits = (hidden * head["norm"]["scale"] + head["norm"]["bias"]) @ head["kernel"] + head["bias"]
    want = np.take_along_axis(logits, np.asarray(batch["places"])[..., None], axis=1)
    np.testing.assert_allclose(out["mlm_logits"], want, atol=1e-4)


def test_dropout_is_of_the_example(params, batch):
    """In another order, or in half a batch, an example draws the same; in another step, or as another, it does not."""
    want = run(params, batch, train=True)
    order = jnp.array([5, 2, 0, 7, 1, 6, 3, 4])
    turned = {name: value[order] for name, value in batch.items() if name != "image_tokens"}
    got = run(params, batch | turned, train=True)
    half = {name: value[:4] for name, value in batch.items()}
    first = run(params, half, train=True)
    for name in ("pooled", "mlm_logits", "answer_logits"):
        np.testing.assert_allclose(got[name], want[name][order], atol=1e-6)
        np.testing.assert_allclose(first[name], want[name][:4], atol=1e-6)
    other = run(params, batch | {"example": batch["example"] + 1}, train=True)
    assert (jnp.abs(other["pooled"] - want["pooled"]).max(1) > 1e-3).all()


def test_dropout_draws():
    @jax.jit
    def draw(ones):
        drop = drop_examples(KEY, jnp.arange(4), 0.1)
        draws = [drop.layer(jnp.uint32(i)).at(j)(ones) for i, j in ((0, 0), (0, 1), (1, 0))]
        copies = drop.copies(2)(jnp.repeat(ones, 2, axis=0))
        return draws, drop(ones), jax.grad(lambda x: drop(x).sum())(ones), copies

    draws, own, gradient, copies = jax.tree.map(np.asarray, draw(jnp.ones((4, 50, 400))))
    for draw in draws:
        np.testing.assert_allclose((draw == 0).mean((1, 2)), 0.1, atol=5 * (0.09 / 20000) ** 0.5)
        np.testing.assert_array_equal(draw[draw > 0], np.float32(1 / 0.9))
    # Of any two draws, of examples or of places, as many are zero in both as by chance.
    rows = np.stack([np.asarray(draw == 0).reshape(4, -1) for draw in draws]).reshape(12, -1).astype(np.float64)
    together = (rows @ rows.T)[np.triu_indices(12, 1)] / rows.shape[1]
    np.testing.assert_allclose(together, 0.01, atol=5 * (0.0099 / 20000) ** 0.5)
    np.testing.assert_array_equal(gradient, own)
    np.testing.assert_array_equal(copies[::2], own)
    np.testing.assert_allclose((copies[::2] != copies[1::2]).mean(), 0.18, atol=0.01)


def test_shared_images_equal_rows_of_their_own(params, batch):
    """Loss and gradients; those of an image are the sums of those of its rows."""
    index = jnp.array([0, 1, 1, 0, 3, 3, 3, 6], jnp.int32)
    shared = compiled_gradients(params, batch | {"image_index": index})
    own = compiled_gradients(params, batch | {"image_tokens": batch["image_tokens"][index]})
    summed = jax.ops.segment_sum(own[1][1], index, ROWS)
    assert_same(shared, (own[0], (own[1][0], summed)))
    beside = images_of_texts(jnp.arange(3), None, 6)
    np.testing.assert_array_equal(beside, [0, 0, 1, 1, 2, 2])


def test_eight_devices_equal_one(params, batch):
    want = compiled_gradients(params, batch)
    mesh = make_mesh(4, 2)
    placed = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
    whole = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        assert_same(jax.jit(gradients)(whole, placed), want)


def test_two_images(params, batch):
    """NLVR2's classifier reads two passes, whose images have token types of their own."""
    second = jnp.roll(batch["image_index"], 1)
    pair = batch | {"image2_index": second}
    both = run(params, pair)
    want = run(params, batch)
    np.testing.assert_allclose(both["answer_logits"], want["answer_logits"], atol=1e-6)
    types = params["fusion"]["token_types"]
    turned = params | {"fusion": params["fusion"] | {"token_types": types[jnp.array([0, 2, 2])]}}
    pooled = jnp.concatenate([want["pooled"], run(turned, batch | {"image_index": second})["pooled"]], axis=1)
    head = jax.tree.map(np.asarray, params["fusion"]["nlvr2"])
    hidden = np.asarray(pooled) @ head["hidden"]["kernel"] + head["hidden"]["bias"]
    hidden = (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(hidden.var(-1, keepdims=True) + 1e-5)
    hidden = hidden * head["norm"]["scale"] + head["norm"]["bias"]
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / 2**0.5))
    np.testing.assert_allclose(
        both["nlvr2_logits"], hidden @ head["output"]["kernel"] + head["output"]["bias"], atol=1e-4
    )


def test_what_begins_as_another_part(params, batch):
    """The second image's token type as the first's; the score of a ranking as that of a match."""
    types = np.arange(8, dtype=np.float32).reshape(2, 4)
    grown = fusion().adapt("fusion/token_types", types, jax.ShapeDtypeStruct((3, 4), jnp.float32))
    np.testing.assert_array_equal(grown, types[[0, 1, 1]])
    out = run(params | {"fusion": rank_as_match(params["fusion"])}, batch)
    np.testing.assert_allclose(out["rank_logits"], out["itm_logits"][:, 1:], atol=1e-6)


@functools.cache
def stack_gradient(remat):
    """The compiled gradient of a stack of layers, and its parameters."""
    rng = np.random.default_rng(0)
    text = jnp.asarray(rng.standard_normal((8, 24, 16)), jnp.float32)
    image = jnp.asarray(rng.standard_normal((8, 40, 16)), jnp.float32)
    module = CoAttention(3, 4, 4, remat)
    params = random_params(module, text, image)

    def loss(params):
        drop = drop_examples(KEY, jnp.arange(8), 0.1)
        fused, seen, _ = module.apply({"params": params}, text, image, jnp.arange(8) + 3, drop)
        return (fused**3).sum() + (seen**3).sum()

    return jax.jit(jax.grad(loss)).lower(params).compile({"xla_backend_optimization_level": 0}), params


@pytest.mark.parametrize("remat", ["block", "dots", "attention"])
def test_recomputation_gives_the_same(remat):
    (plain, params), (rematerialised, _) = stack_gradient("none"), stack_gradient(remat)
    assert_same(rematerialised(params), plain(params))
    memory = [program.memory_analysis().temp_size_in_bytes for program in (rematerialised, plain)]
    assert memory[0] < 0.9 * memory[1]


def test_mistakes(params, batch):
    model = fusion()
    for options, message in (
        (dict(heads=("itm", "vqa", "words")), "words: choose of mlm, itm"),
        (dict(heads=("vqa",)), "number of answers"),
        (dict(heads=("nlvr2",)), "token_types=3"),
        (dict(width=100), "width=100 does not divide by head_width=64"),
        (dict(dropout=1.0), "dropout=1.0"),
    ):
        with pytest.raises(UserError, match=message):
            FusionConfig(**options)
    with pytest.raises(UserError, match="unknown fusion 'huge': choose one of ti, meter"):
        build_fusion(TOWERS, "huge")
    with pytest.raises(UserError, match="rngs={'dropout': key}"):
        jax.eval_shape(functools.partial(model.apply, train=True), params, batch)
    with pytest.raises(UserError, match="image or image_tokens, one of them"):
        jax.eval_shape(model.apply, params, {"text": batch["text"]})
    fewer = batch | {"image_tokens": batch["image_tokens"][:3]}
    with pytest.raises(UserError, match="8 texts and 3 images"):
        jax.eval_shape(model.apply, params, {name: fewer[name] for name in fewer if name != "image_index"})
