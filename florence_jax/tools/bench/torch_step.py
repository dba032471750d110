"""A training step of a PyTorch tower, timed as ours is."""

from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch


class Tower(Protocol):
    """`weights`: parameters by dotted name; `device`: where they are; (B, 3, H, H) -> pooled features (B, C)."""

    weights: "dict[str, torch.Tensor]"
    device: str

    def __call__(self, images: "torch.Tensor") -> "torch.Tensor":
        """Encodes normalised float images."""


class TorchStep:
    """Forward, backward and AdamW update of the tower under a mean-square loss; calling it returns the loss.

    The optimizer is PyTorch's fused AdamW, its fastest on a CPU, with the decay on the same matrices as ours.
    """

    def __init__(
        self,
        tower: Tower,
        images: np.ndarray,
        target: np.ndarray,
        *,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        bfloat16: bool = False,
    ):
        """`images` is (B, H, H, 3) as ours take them, `target` (B, C); `bfloat16` runs under autocast."""
        import torch

        self.tower, self._bfloat16 = tower, bfloat16
        # A permuted view would make PyTorch convolve in channels-last: copy to its usual NCHW.
        self.images = torch.tensor(images, device=tower.device).permute(0, 3, 1, 2).contiguous()
        self.target = torch.tensor(target, device=tower.device)
        matrices = [w for name, w in tower.weights.items() if w.ndim > 1 and name.endswith(".weight")]
        others = [w for name, w in tower.weights.items() if w.ndim == 1 or not name.endswith(".weight")]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=learning_rate, betas=betas, eps=1e-8, weight_decay=weight_decay, fused=True
        )

    def __call__(self) -> float:
        """One step."""
        import torch

        with torch.autocast(self.tower.device, torch.bfloat16, enabled=self._bfloat16):
            loss = (self.tower(self.images).float() - self.target).square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()
