"""Deterministic weights shared with the reference implementations, and their conversion to our parameter layout.

The golden numbers in the tests were printed by the public reference modules (float64) whose parameters had been set
by `fill`; sums over many outputs are compared relative to the sum of magnitudes.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from florence_jax.tools.import_torch.names import gather, rename_all

NORM_WEIGHT = re.compile(r"(norm|ln_|LayerNorm|bn).*weight$")


def fill(shapes: dict[str, tuple[int, ...]], amplitude: float) -> dict[str, np.ndarray]:
    """Weights in PyTorch layout: tensor i of the sorted names, element j = a * sin(.37 (j + 1) + i); norms get 1 +."""
    params = {}
    for i, name in enumerate(sorted(shapes)):
        size = int(np.prod(shapes[name]))
        values = amplitude * np.sin(0.37 * (np.arange(size) + 1) + i)
        params[name] = (values + bool(NORM_WEIGHT.search(name))).reshape(shapes[name])
    return params


def cosx(*shape: int) -> np.ndarray:
    """float32 cos(.11 n) of the flat index n."""
    return np.cos(0.11 * np.arange(np.prod(shape))).reshape(shape).astype(np.float32)


def sinx(step: float, *shape: int) -> np.ndarray:
    """float32 sin(step * n) of the flat index n."""
    return np.sin(step * np.arange(np.prod(shape))).reshape(shape).astype(np.float32)


def random_params(module, *inputs, scale: float = 0.1) -> dict:
    """Normal parameters of a module's shapes, drawn without compiling its initialisers."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype), shapes)


def convert(torch_params: dict[str, np.ndarray], renames: tuple[tuple[str, str], ...] = ()) -> dict:
    """PyTorch names and layouts to a nested dict: (out, in, ...) -> (..., in, out), weight -> kernel or scale.

    `renames` are (regex, replacement) pairs applied in turn to the dotted name.
    """
    tree: dict = {}
    for name, value in torch_params.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name.endswith("weight"):
            name = name.removesuffix("weight") + ("scale" if value.ndim == 1 else "kernel")
            value = value.transpose(*range(2, value.ndim), *(1, 0)[2 - min(value.ndim, 2) :])
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value.astype(np.float32)
    return tree


def block_shapes(channels: int, heads: int, window: int, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """PyTorch shapes of one Swin block."""
    c = channels
    shapes = {
        "attn.proj.bias": (c,), "attn.proj.weight": (c, c), "attn.qkv.bias": (3 * c,), "attn.qkv.weight": (3 * c, c),
        "attn.relative_position_bias_table": ((2 * window - 1) ** 2, heads), "mlp.fc1.bias": (4 * c,),
        "mlp.fc1.weight": (4 * c, c), "mlp.fc2.bias": (c,), "mlp.fc2.weight": (c, 4 * c), "norm1.bias": (c,),
        "norm1.weight": (c,), "norm2.bias": (c,), "norm2.weight": (c,),
    }  # fmt: skip
    return {prefix + name: shape for name, shape in shapes.items()}


def embed_shapes(prefix: str, kernel: int, channels: int, features: int) -> dict[str, tuple[int, ...]]:
    """PyTorch shapes of one convolutional embedding."""
    shapes = {"norm.bias": (features,), "norm.weight": (features,), "proj.bias": (features,)}
    shapes["proj.weight"] = (features, channels, kernel, kernel)
    return {prefix + name: shape for name, shape in shapes.items()}


def coswin_params(window: int, *, output_norm: str) -> dict:
    """Our parameters of the golden CoSwin: C = 8, depths (2, 2), heads (2, 4); `output_norm` is 'norm' or 'norm1'."""
    shapes = {"norm1.bias": (16,), "norm1.weight": (16,)}
    shapes |= embed_shapes("patch_embed.", 7, 3, 8) | embed_shapes("layers.0.downsample.", 3, 8, 16)
    for i, (channels, heads) in enumerate(((8, 2), (16, 4))):
        for j in range(2):
            shapes |= block_shapes(channels, heads, window, f"layers.{i}.blocks.{j}.")
    renames = (
        (r"^norm1\.", output_norm + "."),
        (r"^patch_embed\.", "stage0_embed."),
        (r"^layers\.0\.downsample\.", "stage1_embed."),
        (r"_embed\.proj\.", "_embed."),
        (r"^layers\.(\d)\.blocks\.0\.", r"stage\1_pair0.plain."),
        (r"^layers\.(\d)\.blocks\.1\.", r"stage\1_pair0.shifted."),
        (r"\.attn\.", ".attention."),
    )
    return convert(fill(shapes, 0.2), renames)


def swin_shapes() -> dict[str, tuple[int, ...]]:
    """PyTorch shapes of the golden Swin: patch 4, C = 8, depths (2, 2), heads (2, 4), window 4."""
    shapes = {"norm.bias": (16,), "norm.weight": (16,)} | embed_shapes("patch_embed.", 4, 3, 8)
    merging = {"norm.bias": (32,), "norm.weight": (32,), "reduction.weight": (16, 32)}
    shapes |= {f"layers.0.downsample.{name}": shape for name, shape in merging.items()}
    for i, (channels, heads) in enumerate(((8, 2), (16, 4))):
        for j in range(2):
            shapes |= block_shapes(channels, heads, 4, f"layers.{i}.blocks.{j}.")
    return shapes


def transformer_shapes(width: int, layers: int, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """PyTorch shapes of the blocks of CLIP's transformer."""
    w = width
    block = {
        "attn.in_proj_bias": (3 * w,), "attn.in_proj_weight": (3 * w, w), "attn.out_proj.bias": (w,),
        "attn.out_proj.weight": (w, w), "ln_1.bias": (w,), "ln_1.weight": (w,), "ln_2.bias": (w,), "ln_2.weight": (w,),
        "mlp.c_fc.bias": (4 * w,), "mlp.c_fc.weight": (4 * w, w), "mlp.c_proj.bias": (w,),
        "mlp.c_proj.weight": (w, 4 * w),
    }  # fmt: skip
    return {f"{prefix}resblocks.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}


def text_shapes() -> dict[str, tuple[int, ...]]:
    """PyTorch shapes of the golden text tower: W = 8, 2 heads, 2 layers, vocabulary 20, length 6."""
    shapes = {"ln_final.bias": (8,), "ln_final.weight": (8,), "positional_embedding": (6, 8)}
    return shapes | {"token_embedding.weight": (20, 8)} | transformer_shapes(8, 2)


def clip_shapes() -> dict[str, tuple[int, ...]]:
    """A CLIP in OpenAI's names: ViT of width 16, 3 layers, 2 heads, patch 8 at 24 px; the golden text tower; D = 6."""
    shapes = {
        "ln_final.bias": (8,), "ln_final.weight": (8,), "logit_scale": (), "positional_embedding": (6, 8),
        "text_projection": (8, 6), "token_embedding.weight": (20, 8), "visual.class_embedding": (16,),
        "visual.conv1.weight": (16, 3, 8, 8), "visual.ln_post.bias": (16,), "visual.ln_post.weight": (16,),
        "visual.ln_pre.bias": (16,), "visual.ln_pre.weight": (16,), "visual.positional_embedding": (10, 16),
        "visual.proj": (16, 6),
    }  # fmt: skip
    return shapes | transformer_shapes(8, 2, "transformer.") | transformer_shapes(16, 3, "visual.transformer.")


def text_params() -> dict:
    """Our parameters of the golden text tower."""
    filled = fill(text_shapes(), 0.3)
    tables = {"token_embedding": filled.pop("token_embedding.weight")}
    tables["position_embedding"] = filled.pop("positional_embedding")
    renames = (
        (r"^ln_final\.", "norm."),
        (r"^resblocks\.(\d)\.", r"layer\1."),
        (r"\.ln_(\d)\.", r".norm\1."),
        (r"\.attn\.in_proj_", ".qkv."),
        (r"\.attn\.out_proj\.", ".proj."),
        (r"\.c_fc\.", ".fc1."),
        (r"\.c_proj\.", ".fc2."),
    )
    return convert(filled, renames) | {name: table.astype(np.float32) for name, table in tables.items()}


def bert_layer_shapes(width: int, cross: bool = True) -> dict[str, tuple[int, ...]]:
    """PyTorch shapes of a layer of transformers' BERT with an MLP of twice the width, METER's where it has `cross`."""
    w = width
    parts = ("attention", "crossattention")
    names = {f"{part}.self.{name}": (w, w) for part in parts for name in ("query", "key", "value")}
    names |= {f"{part}.output.dense": (w, w) for part in parts}
    names |= {"intermediate.dense": (2 * w, w), "output.dense": (w, 2 * w)}
    names |= {f"{part}output.LayerNorm": (w,) for part in ("attention.", "crossattention.", "")}
    shapes = {f"{name}.weight": shape for name, shape in names.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in names.items()}
    return {name: shape for name, shape in shapes.items() if cross or not name.startswith("cross")}


def bert_params(state: dict[str, np.ndarray], renames) -> dict:
    """Our parameters of tensors in transformers' names, by the renames of the import, whose '#' joins parts."""
    params: dict = {}
    for name, tensor in gather(state, lambda name: rename_all(name, renames)).items():
        *path, leaf = name.split(".")
        value, node = np.asarray(tensor.array), params
        assert not tensor.clash
        for part in path:
            node = node.setdefault(part, {})
        matrix = leaf == "weight" and value.ndim == 2
        node["kernel" if matrix else "scale" if leaf == "weight" else leaf] = value.T if matrix else value
    return params
