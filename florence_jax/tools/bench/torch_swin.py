"""CoSwin's image tower in plain eager PyTorch: the yardstick of `bench step` and of the parity test.

Written from the Swin and CvT papers (arXiv 2103.14030, 2103.15808) the way their PyTorch code runs it, sharing nothing
with `models/coswin.py` but the parameters: NCHW convolutions, windows folded into the batch, a bias table gathered by
index, an additive mask for shifted windows, explicit softmax. Classification mode, square images, no stochastic depth.

PyTorch is imported when something here is used, and is no requirement of the project: `pip install torch`.
"""

import importlib.util
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from florence_jax.models.sizes import ModelConfig

if TYPE_CHECKING:
    import torch


def available() -> bool:
    """Whether PyTorch can be imported."""
    try:
        return importlib.util.find_spec("torch") is not None
    except ValueError:  # sys.modules holds None: somebody has hidden it
        return False


def state_dict(params: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Our image tower's parameters under dotted names in PyTorch's layouts, float32.

    (in, out) -> (out, in), HWIO -> OIHW; 'kernel' and 'scale' -> 'weight'; a scanned `stage2_pairs` with its leading
    axis becomes `stage2_pair0`, `stage2_pair1`, ...
    """
    state: dict[str, np.ndarray] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            inner = state_dict(value, f"{name}.")
            if name.endswith("_pairs"):
                depth = len(next(iter(inner.values())))
                inner = {
                    path.replace("_pairs.", f"_pair{j}.", 1): leaf[j]
                    for path, leaf in inner.items()
                    for j in range(depth)
                }
            state |= {prefix + path: leaf for path, leaf in inner.items()}
        else:
            renamed = {"kernel": "weight", "scale": "weight"}.get(name, name)
            state[prefix + renamed] = np.asarray(value, np.float32)
    return state if prefix else {name: _to_torch_layout(name, value) for name, value in state.items()}


def _to_torch_layout(name: str, value: np.ndarray) -> np.ndarray:
    if name.endswith(".weight") and value.ndim > 1:
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    return np.ascontiguousarray(value)


class TorchCoSwin:
    """The tower as a function of tensors: `tower(images)`, (B, 3, H, H) -> pooled features (B, C)."""

    def __init__(self, params: Mapping[str, Any], config: ModelConfig, device: str = "cpu"):
        """Copies `params` (our tree of the image tower) into leaf tensors `self.weights`."""
        import torch

        self.config, self.device = config, device
        self.weights = {
            name: torch.tensor(value, device=device).requires_grad_() for name, value in state_dict(params).items()
        }
        self._constants: dict[tuple, torch.Tensor] = {}

    def __call__(self, images: "torch.Tensor") -> "torch.Tensor":
        """Encodes normalised float images."""
        import torch.nn.functional as F

        x = images
        for i, depth in enumerate(self.config.depths):
            name, stride, padding = f"stage{i}_embed", *((2, 1) if i else (4, 2))
            w = self.weights
            x = F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, padding)
            side = x.shape[-1]
            x = self._norm(x.flatten(2).transpose(1, 2), f"{name}.norm")
            for j in range(depth):
                block = f"stage{i}_pair{j // 2}.{('plain', 'shifted')[j % 2]}"
                x = self._block(x, block, self.config.heads[i], side, shifted=bool(j % 2))
            if i + 1 < len(self.config.depths):
                x = x.transpose(1, 2).reshape(len(x), -1, side, side)
        return self._norm(x, "norm").mean(1)

    def _norm(self, x: "torch.Tensor", name: str) -> "torch.Tensor":
        import torch.nn.functional as F

        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-5)

    def _linear(self, x: "torch.Tensor", name: str) -> "torch.Tensor":
        import torch.nn.functional as F

        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _block(self, x: "torch.Tensor", name: str, heads: int, side: int, shifted: bool) -> "torch.Tensor":
        """One Swin block on (B, side * side, C)."""
        import torch
        import torch.nn.functional as F

        batch, _, channels = x.shape
        window = min(self.config.window, side)
        shift = window // 2 if shifted and window < side else 0
        y = self._norm(x, f"{name}.norm1").view(batch, side, side, channels)
        y = torch.roll(y, (-shift, -shift), (1, 2)) if shift else y
        y = self._attend(_windows(y, window), f"{name}.attention", heads, side, window, shift)
        y = y.view(batch, side // window, side // window, window, window, channels)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(batch, side, side, channels)
        y = torch.roll(y, (shift, shift), (1, 2)) if shift else y
        x = x + y.reshape(batch, side * side, channels)
        hidden = F.gelu(self._linear(self._norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        return x + self._linear(hidden, f"{name}.mlp.fc2")

    def _attend(self, x: "torch.Tensor", name: str, heads: int, side: int, window: int, shift: int) -> "torch.Tensor":
        """Window attention (Swin, equation 4) on (B * windows, tokens, C)."""
        folded, tokens, channels = x.shape
        qkv = self._linear(x, f"{name}.qkv").view(folded, tokens, 3, heads, channels // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        logits = (q * (channels // heads) ** -0.5) @ k.transpose(-2, -1)
        table = self.weights[f"{name}.relative_position_bias_table"]
        index = self._constant(position_index, window)
        logits = logits + table[index.flatten()].view(tokens, tokens, heads).permute(2, 0, 1)[None]
        if shift:
            mask = self._constant(additive_mask, side, window, shift)
            logits = logits.view(-1, len(mask), heads, tokens, tokens) + mask[None, :, None]
            logits = logits.view(folded, heads, tokens, tokens)
        y = (logits.softmax(-1) @ v).transpose(1, 2).reshape(folded, tokens, channels)
        return self._linear(y, f"{name}.proj")

    def _constant(self, make: Any, *sizes: int) -> "torch.Tensor":
        key = (make, *sizes)
        if key not in self._constants:
            self._constants[key] = make(*sizes).to(self.device)
        return self._constants[key]


def _windows(x: "torch.Tensor", window: int) -> "torch.Tensor":
    """(B, H, W, C) -> (B * windows, window * window, C)."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // window, window, width // window, window, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, channels)


def position_index(window: int) -> "torch.Tensor":
    """Row of the bias table for each pair of tokens of a square window: int64 (window**2, window**2)."""
    import torch

    positions = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
    rows, columns = positions[:, :, None] - positions[:, None] + window - 1
    return rows * (2 * window - 1) + columns


def additive_mask(side: int, window: int, shift: int) -> "torch.Tensor":
    """0 between tokens of one region of the rolled map, -100 across: float32 (windows, tokens, tokens)."""
    import torch

    regions = torch.zeros(1, side, side, 1)
    bands = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for region, (rows, columns) in enumerate(itertools.product(bands, bands)):
        regions[:, rows, columns] = region
    regions = _windows(regions, window)[..., 0]
    return torch.where(regions[:, None] == regions[:, :, None], 0.0, -100.0)
