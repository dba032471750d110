"""timm's Swin under `torch.compile`: the yardstick of `bench step` on a GPU.

The same depths and widths as the variant of that letter; between stages it merges 2 x 2 patches where CoSwin has a
3 x 3 convolution, so that it has 4 % (T: 7 %) fewer parameters. Its weights are its own initialisation.

PyTorch and timm are imported when something here is used, and are no requirements of the project:
`pip install torch torchvision timm`.
"""

import importlib.util
from typing import TYPE_CHECKING

from florence_jax.errors import UserError
from florence_jax.tools.bench import torch_swin

if TYPE_CHECKING:
    import torch
NAMES = {
    "T": "swin_tiny_patch4_window7_224",
    "S": "swin_small_patch4_window7_224",
    "B": "swin_base_patch4_window7_224",
    "L": "swin_large_patch4_window7_224",
}


def available() -> bool:
    """Whether PyTorch and timm can be imported."""
    try:
        return torch_swin.available() and importlib.util.find_spec("timm") is not None
    except ValueError:  # sys.modules holds None: somebody has hidden it
        return False


class TimmTower:
    """timm's Swin as a function of tensors, for `torch_swin.TorchStep`: (B, 3, H, H) -> pooled features (B, C).

    Attributes:
      weights: its parameters by name.
      description: name and version, for a report.
    """

    def __init__(self, variant: str, res: int, window: int, device: str):
        """Raises `UserError` for a variant that timm has no Swin of."""
        import timm
        import torch

        if variant not in NAMES:
            raise UserError(f"timm has no Swin of the size of variant {variant}: choose one of {', '.join(NAMES)}")
        model = timm.create_model(NAMES[variant], num_classes=0, img_size=res, window_size=window, drop_path_rate=0.0)
        torch.set_float32_matmul_precision("high")  # XLA's default on a GPU as well
        self.device = device
        self.weights = dict(model.to(device).train().named_parameters())
        self.description = f"{NAMES[variant]}, timm {timm.__version__}, torch.compile"
        self._run = torch.compile(model)

    def __call__(self, images: "torch.Tensor") -> "torch.Tensor":
        """Encodes normalised float images."""
        return self._run(images)
