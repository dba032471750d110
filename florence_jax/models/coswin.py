"""CoSwin: Swin Transformer blocks with CvT's convolutional token embeddings (Florence, section 2.2).

Blocks follow Liu et al., "Swin Transformer" (arXiv 2103.14030); embeddings follow Wu et al., "CvT" (arXiv
2103.15808): a strided, overlapping convolution with explicit symmetric padding, then LayerNorm. Plain Swin, with its
own patch embedding and patch merging, is the option `embedding='patch'`. Maps are NHWC.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from florence_jax.errors import UserError
from florence_jax.models.layers import (
    NORMAL,
    Dense,
    Dtype,
    LayerNorm,
    Mlp,
    add_bias,
    attention,
    attention_core,
    constrain,
    convolve,
    remat_module,
    scale_branch,
    split_heads,
    survival,
)

SIZE_MODES = ("classification", "detection")
EMBEDDINGS = ("conv", "patch")
STAGE_CONV = ((7, 4, 2), (3, 2, 1))  # kernel, stride, padding of the first and of the later embeddings
MASKED = -100.0  # Swin's additive mask value: finite, so that a softmax row never becomes NaN


def relative_position_index(height: int, width: int) -> np.ndarray:
    """Row of the bias table for each (query, key) pair of a window: int32 (height * width, height * width).

    With tokens row-major, entry (p, q) = (yp - yq + height - 1) * (2 * width - 1) + (xp - xq + width - 1).
    """
    y, x = np.divmod(np.arange(height * width, dtype=np.int32), np.int32(width))
    return (y[:, None] - y[None] + height - 1) * (2 * width - 1) + (x[:, None] - x[None] + width - 1)


def window_regions(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """Region id of every token of the rolled grid, window by window: int32 (windows, window**2).

    Each axis has the bands [0, n - window), [n - window, n - shift), [n - shift, n); tokens of one window attend to
    each other only inside one region, because rolling put pixels from opposite borders side by side.
    """

    def band(n: int) -> np.ndarray:
        i = np.arange(n, dtype=np.int32)
        return (i >= n - window).astype(np.int32) + (i >= n - shift)

    grid = 3 * band(height)[:, None] + band(width)[None]
    return _partition(grid[None, :, :, None], window)[0, :, :, 0]


def shift_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """Additive mask of the shifted block, 0 inside a region and -100 across: float32 (windows, tokens, tokens)."""
    regions = window_regions(height, width, window, shift)
    return np.where(regions[:, :, None] == regions[:, None], 0, MASKED).astype(np.float32)


def _partition(x: jax.Array | np.ndarray, window: int) -> jax.Array | np.ndarray:
    """(B, H, W, C) -> (B, windows, window**2, C), windows row-major; the batch axis stays apart for sharding."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, window * window, channels)


def _unpartition(x: jax.Array, height: int, width: int, window: int) -> jax.Array:
    """Inverse of `_partition`: (B, windows, window**2, C) -> (B, H, W, C)."""
    batch, channels = x.shape[0], x.shape[-1]
    x = x.reshape(batch, height // window, width // window, window, window, channels)
    return x.swapaxes(2, 3).reshape(batch, height, width, channels)


def conv_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Side of a convolution's output map: floor((size + 2 * padding - kernel) / stride) + 1."""
    return (size + 2 * padding - kernel) // stride + 1


def embedded_size(size: int, stage: int, embedding: str = "conv") -> int:
    """Side of the map of `stage` from the side of its input (pixels for stage 0); see `CoSwin.embedding`."""
    if embedding == "patch":
        return -(-size // (2 if stage else 4))
    return conv_size(size, *STAGE_CONV[min(stage, 1)])


class ConvEmbed(nn.Module):
    """Convolutional token embedding: convolution with bias, then LayerNorm; (B, H, W, C) -> (B, h, w, features).

    `conv_size` gives h and w. Padding is explicit because XLA's 'SAME' pads a
    7x7 stride-4 kernel unevenly. Kernel and bias start as U(+-1/sqrt(fan_in)), PyTorch's default.
    """

    features: int
    kernel: int
    stride: int
    padding: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, h, w, features)."""
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)

        def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jax.random.uniform(key, shape, jnp.float32, -1, 1) * (self.kernel**2 * x.shape[-1]) ** -0.5

        kernel = self.param("kernel", uniform, shape).astype(self.dtype)
        bias = self.param("bias", uniform, (self.features,))
        x = constrain(add_bias(convolve(x, kernel, self.stride, self.padding), bias))
        return LayerNorm(dtype=self.dtype, name="norm")(x)


def pad_to_multiple(x: jax.Array, side: int) -> jax.Array:
    """(B, H, W, C) with zeros added at the bottom and right until H and W divide by `side`."""
    bottom, right = -x.shape[1] % side, -x.shape[2] % side
    return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0))) if bottom or right else x


class PatchMerging(nn.Module):
    """Swin's downsampling: 2x2 tokens side by side (4C), LayerNorm, linear to `features` without bias.

    The four are ordered (row, column) = (0, 0), (1, 0), (0, 1), (1, 1). An odd map is padded with zeros.
    """

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), features)."""
        x = pad_to_multiple(x, 2)
        x = jnp.concatenate([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], axis=-1)
        x = LayerNorm(dtype=self.dtype, name="norm")(x)
        reduction = nn.Dense(self.features, use_bias=False, dtype=self.dtype, kernel_init=NORMAL, name="reduction")
        return constrain(reduction(x))


class WindowAttention(nn.Module):
    """Multi-head attention inside windows with a learned relative position bias (Swin, equation 4).

    `x` is (B, windows, tokens, C) with tokens = height * width of `window`; `mask` is None or an additive float32
    array (windows, tokens, tokens). Returns (B, windows, tokens, C). `core` is `attention` or a form of it.
    """

    heads: int
    window: tuple[int, int]
    core: Callable[..., jax.Array] = attention
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """(B, windows, tokens, C) -> the same shape."""
        dense = functools.partial(Dense, dtype=self.dtype)
        q, k, v = split_heads(dense(3 * x.shape[-1], name="qkv")(x), self.heads)
        entries = (2 * self.window[0] - 1) * (2 * self.window[1] - 1)
        table = self.param("relative_position_bias_table", NORMAL, (entries, self.heads))
        bias = table.T[:, relative_position_index(*self.window)][None, None]  # (1, 1, heads, tokens, tokens)
        if mask is not None:
            bias = bias + mask[None, :, None]
        return dense(x.shape[-1], name="proj")(self.core(q, k, v, bias))


class SwinBlock(nn.Module):
    """One pre-norm Swin block on a map: (B, H, W, C) -> (B, H, W, C).

    A map that does not divide by `window` is padded with zeros at the bottom and right after the first LayerNorm
    and cropped after attention. Padded positions take part as keys, as in Swin's detectors, unless `mask_padding`.

    Attributes:
      heads: attention heads.
      window: side of the square window, in tokens.
      shift: rows and columns the map is rolled by before partitioning; 0 = plain windows.
      mlp_ratio: hidden width of the MLP over C.
      mask_padding: keep padded positions out of the softmax.
      core: `attention` or a form of it.
    """

    heads: int
    window: int
    shift: int = 0
    mlp_ratio: float = 4
    mask_padding: bool = False
    core: Callable[..., jax.Array] = attention
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, factors: jax.Array | None = None) -> jax.Array:
        """(B, H, W, C) -> the same shape; `factors` (2, B) are stochastic depth's, of the two branches, or None."""

        def branch(y: jax.Array, i: int) -> jax.Array:
            return y if factors is None else scale_branch(y, factors[i])

        norm = functools.partial(LayerNorm, dtype=self.dtype)
        x = x + branch(self._attend(norm(name="norm1")(x)), 0)
        mlp = Mlp(round(self.mlp_ratio * x.shape[-1]), "gelu", self.dtype, name="mlp")
        return x + branch(mlp(norm(name="norm2")(x)), 1)

    def _attend(self, x: jax.Array) -> jax.Array:
        height, width = x.shape[1:3]
        bottom, right = -height % self.window, -width % self.window
        x = jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0))) if bottom or right else x
        x = jnp.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        windows = _partition(x, self.window)
        attend = WindowAttention(self.heads, (self.window,) * 2, self.core, self.dtype, name="attention")
        windows = attend(windows, self._mask(height, width, bottom, right))
        x = _unpartition(windows, height + bottom, width + right, self.window)
        x = jnp.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x
        return x[:, :height, :width]

    def _mask(self, height: int, width: int, bottom: int, right: int) -> jax.Array | None:
        """Additive float32 mask (windows, tokens, tokens), or None."""
        # Compared in the graph from small per-token constants: spelled out, a large map's masks would be megabytes.
        blocked = None
        if self.shift:
            regions = jnp.asarray(window_regions(height + bottom, width + right, self.window, self.shift))
            blocked = regions[:, :, None] != regions[:, None]
        if self.mask_padding and (bottom or right):
            padded = np.pad(np.zeros((height, width), bool), ((0, bottom), (0, right)), constant_values=True)
            padded = np.roll(padded, (-self.shift, -self.shift), (0, 1))
            padded = jnp.asarray(_partition(padded[None, :, :, None], self.window)[0, :, :, 0])
            keys = jnp.broadcast_to(padded[:, None], (*padded.shape, self.window**2))
            blocked = keys if blocked is None else blocked | keys
        return None if blocked is None else jnp.where(blocked, jnp.float32(MASKED), jnp.float32(0))


class SwinPair(nn.Module):
    """A plain block followed by a shifted one: the unit of Swin's depth, and of the scan over depth.

    Returns (map, None), the form `nn.scan` wants.
    """

    heads: int
    window: int
    shift: int
    mlp_ratio: float = 4
    mask_padding: bool = False
    core: Callable[..., jax.Array] = attention
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, factors: jax.Array | None) -> tuple[jax.Array, None]:
        """(B, H, W, C) -> the same shape, None; `factors` (2, 2, B): stochastic depth's by block, branch."""
        block = functools.partial(
            SwinBlock,
            heads=self.heads,
            window=self.window,
            mlp_ratio=self.mlp_ratio,
            mask_padding=self.mask_padding,
            core=self.core,
            dtype=self.dtype,
        )
        first, second = (None, None) if factors is None else factors
        x = block(shift=0, name="plain")(x, first)
        return block(shift=self.shift, name="shifted")(x, second), None


def stage_window(height: int, width: int, window: int, size_mode: str) -> tuple[int, int]:
    """Effective (window, shift) of a stage whose map is height x width.

    'classification' (Swin's classifier): a map no larger than the window is one window, without shift, and the map
    must divide by the window. 'detection' (Swin's detectors): neither shrinks nor cancels, any size is padded.

    Raises:
      UserError: in classification mode, a map that does not divide by the window.
    """
    if size_mode == "detection":
        return window, window // 2
    if min(height, width) <= window:
        window, shift = min(height, width), 0
    else:
        shift = window // 2
    if height % window or width % window:
        raise UserError(
            f"a {height}x{width} feature map does not divide by window={window}: choose an image size and window "
            "that divide at every stage, or size_mode='detection'"
        )
    return window, shift


def check_stages(width: int, depths: Sequence[int], heads: Sequence[int]) -> None:
    """Checks that the stages fit together.

    Raises:
      UserError: an odd depth, a stage without its number of heads, or heads that do not divide the channels.
    """
    if any(depth % 2 or depth < 2 for depth in depths):
        raise UserError(f"depths={depths}: every stage needs an even number of blocks, at least 2")
    if len(heads) != len(depths):
        raise UserError(f"heads={heads} and depths={depths} must have one entry per stage")
    for i, count in enumerate(heads):
        if width * 2**i % count:
            raise UserError(f"heads={heads}: {count} heads do not divide the {width * 2**i} channels of stage {i}")


class CoSwin(nn.Module):
    """The image tower.

    Attributes:
      width: channels C of the first stage; stage i has C * 2**i.
      depths: blocks per stage, all even (a block and its shifted partner).
      heads: attention heads per stage.
      window: side of the attention window, in tokens.
      embedding: 'conv' (Florence: overlapping convolutions of CvT) or 'patch' (Swin: 4x4 patches, then patch merging;
        sizes that do not divide are padded with zeros at the bottom and right, as in Swin's detectors).
      mlp_ratio: hidden width of the MLPs over the channels.
      drop_path: stochastic depth rate of the last block; it grows linearly from 0 at the first block.
      size_mode: 'classification' (fixed sizes, final LayerNorm + average pooling) or 'detection' (any size, one
        LayerNorm `norm{i}` per stage in `out_stages`, no pooling).
      mask_padding: detection mode only; keep padded positions out of attention (default: they take part, as in the
        published detectors).
      out_stages: detection mode only; the stages that get a `norm{i}`.
      remat: one of `layers.REMATS`; the unit is a pair of blocks.
      scan: scan over the pairs of a stage that has several (parameters stacked on axis 0 under `pairs`); otherwise,
        and for a single pair, plain modules `pair0`, `pair1`, ...
      dtype: compute dtype; parameters are float32.
    """

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    embedding: str = "conv"
    mlp_ratio: float = 4
    drop_path: float = 0.0
    size_mode: str = "classification"
    mask_padding: bool = False
    out_stages: tuple[int, ...] = (0, 1, 2, 3)
    remat: str = "none"
    scan: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, image: jax.Array, train: bool = False, examples: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Encodes images.

        Args:
          image: float (B, H, W, 3), normalised.
          train: apply stochastic depth; needs rng 'drop_path' if `drop_path` > 0.
          examples: int32 (B,), ids by which images draw their stochastic depth; default: positions in the batch.

        Returns:
          'stage{i}': (B, h, w, C_i), each stage's map before any output norm; in classification mode 'pooled'
          float32 (B, C_last); in detection mode 'norm{i}' (B, h, w, C_i) for the stages in `out_stages`.

        Raises:
          UserError: odd depths, unknown size mode or embedding, or sizes that do not fit the windows.
        """
        check_stages(self.width, self.depths, self.heads)
        if self.size_mode not in SIZE_MODES:
            raise UserError(f"size_mode={self.size_mode!r}: choose one of {', '.join(SIZE_MODES)}")
        if self.embedding not in EMBEDDINGS:
            raise UserError(f"embedding={self.embedding!r}: choose one of {', '.join(EMBEDDINGS)}")
        factors = None
        if train and self.drop_path > 0:
            rates = np.linspace(0, self.drop_path, sum(self.depths), dtype=np.float32)
            examples = jnp.arange(len(image)) if examples is None else examples
            factors = survival(self.make_rng("drop_path"), rates, examples).reshape(-1, 2, 2, len(image))
        outputs, x = {}, image.astype(self.dtype)
        for i, depth in enumerate(self.depths):
            start = sum(self.depths[:i]) // 2
            x = self._embed(i, x)
            x = self._stage(i, x, None if factors is None else factors[start : start + depth // 2])
            outputs[f"stage{i}"] = x
        if self.size_mode == "detection":
            for i in self.out_stages:
                outputs[f"norm{i}"] = LayerNorm(dtype=self.dtype, name=f"norm{i}")(outputs[f"stage{i}"])
        else:
            outputs["pooled"] = LayerNorm(name="norm")(x).mean((1, 2))
        return outputs

    def _embed(self, stage: int, x: jax.Array) -> jax.Array:
        features, name = self.width * 2**stage, f"stage{stage}_embed"
        if self.embedding == "conv":
            return ConvEmbed(features, *STAGE_CONV[min(stage, 1)], self.dtype, name=name)(x)
        if stage:
            return PatchMerging(features, self.dtype, name=name)(x)
        return ConvEmbed(features, 4, 4, 0, self.dtype, name=name)(pad_to_multiple(x, 4))

    def _stage(self, stage: int, x: jax.Array, factors: jax.Array | None) -> jax.Array:
        pairs = self.depths[stage] // 2
        window, shift = stage_window(x.shape[1], x.shape[2], self.window, self.size_mode)
        scanned = self.scan and pairs > 1
        pair = remat_module(SwinPair, self.remat, scanned=scanned)
        arguments = dict(
            heads=self.heads[stage],
            window=window,
            shift=shift,
            mlp_ratio=self.mlp_ratio,
            mask_padding=self.mask_padding,
            core=attention_core(self.remat),
            dtype=self.dtype,
        )
        if scanned:
            pair = nn.scan(pair, variable_axes={"params": 0}, split_rngs={"params": True}, length=pairs)
            return pair(**arguments, name=f"stage{stage}_pairs")(x, factors)[0]
        for j in range(pairs):
            x = pair(**arguments, name=f"stage{stage}_pair{j}")(x, None if factors is None else factors[j])[0]
        return x


def bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Weights of 1-D bicubic interpolation, float64 (size_out, size_in), as PyTorch with align_corners=False.

    Keys' kernel with a = -0.75 and clamped borders, no antialiasing; `jax.image.resize(..., 'cubic')` uses
    a = -0.5 and renormalises the borders, so it does not reproduce resized Swin checkpoints.
    """
    a = -0.75
    weights = np.zeros((size_out, size_in))
    for i in range(size_out):
        x = (i + 0.5) * size_in / size_out - 0.5
        for tap in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            d = abs(x - tap)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            weights[i, min(max(tap, 0), size_in - 1)] += near if d <= 1 else far
    return weights


def resize_bias_tables(params: dict, window: int | Sequence[int]) -> dict:
    """Resizes every relative position bias table of CoSwin parameters to a new window.

    Needed when the window changes with the resolution (7 at 224 px -> 12 at 384 px); nothing else changes shape.
    Each head's column is a (2w-1) x (2w-1) image, resized by PyTorch's bicubic interpolation.

    Args:
      params: nested dict holding CoSwin's parameters, at any depth (also stacked on axis 0 by the scan).
      window: the new side of the window, one for all stages or one per stage. In classification mode a stage whose
        map is smaller than the window needs the side of its map.

    Returns:
      A new dict; tables are float32 numpy arrays, other leaves are the same objects.

    Raises:
      UserError: a table that is not square.
    """

    def resize(path: tuple, leaf: jax.Array) -> jax.Array | np.ndarray:
        names = [str(entry.key) for entry in path]
        if names[-1] != "relative_position_bias_table":
            return leaf
        new = window if isinstance(window, int) else window[int(next(n for n in names if n.startswith("stage"))[5])]
        table = np.asarray(leaf, np.float64)
        side = round(table.shape[-2] ** 0.5)
        if side * side != table.shape[-2]:
            raise UserError(f"bias table {'/'.join(names)} of shape {table.shape} is not of a square window")
        matrix = bicubic_matrix(side, 2 * new - 1)
        table = table.reshape(*table.shape[:-2], side, side, table.shape[-1])
        table = np.einsum("iy,jx,...yxh->...ijh", matrix, matrix, table)
        return table.reshape(*table.shape[:-3], -1, table.shape[-1]).astype(np.float32)

    return jax.tree_util.tree_map_with_path(resize, params)
