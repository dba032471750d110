"""The ViT image tower against OpenCLIP's numbers and a numpy reference, and its options against their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import clip_shapes, fill, random_params, sinx

from florence_jax.errors import UserError
from florence_jax.models.florence import build, parameter_count
from florence_jax.models.resize import resize_position_embedding
from florence_jax.models.vit import ViT
from florence_jax.tools.import_torch.convert import convert
from florence_jax.tools.import_torch.families import FAMILIES

IMAGE = sinx(0.013, 1, 3, 24, 24).transpose(0, 2, 3, 1)
IDS = jnp.array([[18, 5, 7, 19, 0, 0], [18, 3, 19, 19, 19, 19]])


def load(activation="quick_gelu"):
    options = dict(activation=activation, heads=(2,), text_heads=2)
    config, params, dropped, *_ = convert(fill(clip_shapes(), 0.2), FAMILIES["clip"], options=options)
    assert not dropped
    return build(config.variant, **{name: config[name] for name in config if name != "variant"}), jax.tree.map(
        np.asarray, params
    )


def numpy_vit(image, activation):
    """The tower in float64 from the PyTorch layouts: patch states (9, 16), all states after the last LayerNorm."""
    weights = {name.removeprefix("visual."): value for name, value in fill(clip_shapes(), 0.2).items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attend(x, name):
        qkv = x @ weights[f"{name}.in_proj_weight"].T + weights[f"{name}.in_proj_bias"]
        q, k, v = qkv.reshape(10, 3, 2, 8).transpose(1, 2, 0, 3)
        weight = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(8))
        out = (weight / weight.sum(-1, keepdims=True)) @ v
        return (
            out.swapaxes(0, 1).reshape(10, 16) @ weights[f"{name}.out_proj.weight"].T + weights[f"{name}.out_proj.bias"]
        )

    patches = image.reshape(3, 8, 3, 8, 3).transpose(0, 2, 4, 1, 3).reshape(9, 192)  # channels slowest, as in OIHW
    x = np.concatenate([weights["class_embedding"][None], patches @ weights["conv1.weight"].reshape(16, 192).T])
    x = norm(x + weights["positional_embedding"], "ln_pre")
    for i in range(3):
        block = f"transformer.resblocks.{i}."
        x = x + attend(norm(x, block + "ln_1"), block + "attn")
        hidden = norm(x, block + "ln_2") @ weights[block + "mlp.c_fc.weight"].T + weights[block + "mlp.c_fc.bias"]
        x = x + activation(hidden) @ weights[block + "mlp.c_proj.weight"].T + weights[block + "mlp.c_proj.bias"]
    return x[1:], norm(x, "ln_post")


ACTIVATIONS = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
}


@pytest.mark.parametrize(
    "activation,image,text",
    [
        (
            "quick_gelu",
            [0.11198417, 0.20999148, 0.27957742, 0.31132387, 0.3009341, 0.2498143],
            [
                [0.10443477, 0.09738629, 0.07715703, 0.04648492, 0.00952131, -0.02873098],
                [0.00984133, 0.02808212, 0.04252213, 0.05120697, 0.05296119, 0.04754736],
            ],
        ),
        (
            "gelu",
            [0.1116487, 0.20955864, 0.2791058, 0.3108773, 0.30057301, 0.24958758],
            [
                [0.10564408, 0.0983681, 0.07777846, 0.04666186, 0.00922981, -0.02945146],
                [0.01007373, 0.02828986, 0.04267709, 0.05128818, 0.05295766, 0.04745956],
            ],
        ),
    ],
)
def test_golden(activation, image, text):
    """open_clip 3.3's CLIP with these weights (quick and exact GELU): features after the projection."""
    model, params = load(activation)
    out = jax.jit(model.apply)(params, {"image": IMAGE, "text": IDS})
    kernels = {tower: params[f"{tower}_projection"]["kernel"] for tower in ("image", "text")}
    np.testing.assert_allclose(out["image/pooled"] @ kernels["image"], [image], atol=1e-5)
    np.testing.assert_allclose(out["text/pooled"] @ kernels["text"], text, atol=1e-5)
    np.testing.assert_allclose(out["image/embedding"], [image / np.linalg.norm(image)], atol=1e-5)
    np.testing.assert_allclose(out["logit_scale"], 1.1496477, rtol=1e-6)
    states, normed = numpy_vit(np.float64(IMAGE[0]), ACTIVATIONS[activation])
    np.testing.assert_allclose(out["image/stage0"].reshape(9, 16), states, atol=1e-5)
    np.testing.assert_allclose(out["image/pooled"][0], normed[0], atol=1e-5)
    np.testing.assert_allclose(out["image/tokens"][0], normed[1:], atol=1e-5)


def test_scan_remat_and_bfloat16():
    sizes = dict(width=16, layers=3, heads=2, patch_size=8, res=24)
    unrolled = ViT(**sizes, scan=False)
    params = random_params(unrolled, IMAGE, scale=0.3)
    stacked = dict(params)
    stacked["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[stacked.pop(f"layer{i}") for i in range(3)])
    want = jax.jit(unrolled.apply)({"params": params}, IMAGE)["pooled"]
    got = jax.jit(ViT(**sizes, remat="block").apply)({"params": stacked}, IMAGE)["pooled"]
    np.testing.assert_allclose(got, want, atol=1e-5)
    low = jax.eval_shape(ViT(**sizes, dtype=jnp.bfloat16).apply, {"params": stacked}, IMAGE)
    assert (low["stage0"].dtype, low["pooled"].dtype) == (jnp.bfloat16, jnp.float32)


def test_initialisation():
    params = jax.jit(ViT(64, 0, 1, 8, 64).init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    np.testing.assert_allclose(params["position_embedding"].std(), 64**-0.5, rtol=0.05)
    assert 0.9 * 192**-0.5 < jnp.abs(params["patch_embed"]["kernel"]).max() <= 192**-0.5
    assert "bias" not in params["patch_embed"]


def test_position_embeddings():
    rows = np.concatenate([[[7.0, 7]], np.stack([np.repeat(np.arange(13.0), 13), np.ones(169)], 1)])
    resized = resize_position_embedding(rows, 23)
    grid = resized[1:].reshape(23, 23, 2)
    np.testing.assert_array_equal(resized[0], 7)
    np.testing.assert_allclose(grid[:4, 5, 0], [-0.0801, 0.2550, 0.9065, 1.4783], atol=1e-4)  # of PyTorch, antialiased
    np.testing.assert_allclose(grid[1, :, 0], grid[1, 0, 0], atol=1e-6)  # rows of the map vary, columns do not
    np.testing.assert_allclose(grid[..., 1], 1, atol=1e-6)
    np.testing.assert_allclose(resize_position_embedding(rows, 13), rows, atol=1e-6)
    smaller = resize_position_embedding(rows, 5)[1:].reshape(5, 5, 2)
    np.testing.assert_allclose(smaller[:, 2, 0], [0.8585, 3.3464, 6, 8.6536, 11.1415], atol=1e-4)
    with pytest.raises(UserError, match="square"):
        resize_position_embedding(rows[:-1], 4)


@pytest.mark.parametrize(
    "variant,image,total,gmacs",
    [
        ("ViT-B-32", 87_849_216 - 768 * 512, 151_277_313, 4.41),
        ("ViT-B-16", 86_192_640 - 768 * 512, 149_620_737, 17.58),
        ("ViT-L-14", 303_966_208 - 1024 * 768, 427_616_513, 81.08),
        ("ViT-L-14-336", 304_293_888 - 1024 * 768, 427_944_193, 191.1),
    ],
)
def test_published_sizes(variant, image, total, gmacs):
    """Parameters and multiply-adds as OpenCLIP's model profile has them; its image tower includes the projection."""
    counts = parameter_count(variant)
    assert (counts["image"], counts["total"]) == (image, total)
    np.testing.assert_allclose(build(variant).flops["image"] / 2e9, gmacs, rtol=0.02)


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(patch_size=15), "patch_size=15"),
        (dict(patch_size=0), "patch_size=0"),
        (dict(depths=(2, 2)), "one stage"),
        (dict(heads=(5,)), "heads"),
        (dict(drop_path=0.1), "stochastic depth"),
        (dict(size_mode="detection"), "detection"),
        (dict(image_tower="cnn"), "coswin, vit"),
        (dict(image_activation="relu"), "image_activation"),
        (dict(image_std=(1, 1)), "image_std"),
    ],
)
def test_user_errors(options, message):
    with pytest.raises(UserError, match=message):
        build("ViT-B-32", **options)


def test_other_image_size_is_a_user_error():
    model, params = load()
    with pytest.raises(UserError, match="res=24"):
        jax.eval_shape(model.apply, params, {"image": jnp.zeros((1, 32, 32, 3))})
