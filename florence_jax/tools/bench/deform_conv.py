"""The deformable convolution in its forms, forward and backward, and torchvision's; part of `bench detect`."""

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from florence_jax.models.deform_conv import deform_conv
from florence_jax.tools.bench import timing

CONV_FORMS = ("auto", "packed", "matrix", "naive")


class MapSize(NamedTuple):
    """What is convolved, with as many features as channels and offsets of two pixels' deviation."""

    batch: int
    channels: int
    height: int
    width: int


def measure_forms(maps: MapSize, rounds: int) -> dict[str, Any]:
    """Times forward and backward pass (all five gradients), in turns.

    Returns:
      `forms`: {form: {"ms": .., "temp_bytes": ..}}, the median and the compiler's working memory; `torchvision_ms`,
      None where it is not installed; `ratio`, `ratio_of_best`, `ratio_range`: torchvision's time over 'auto's;
      `naive_ratio`: that of the definition over it; `naive_temp_share`: its working memory over the definition's.
    """
    arrays = make_arrays(maps)
    contestants: dict[str, Callable[[], Any]] = {}
    forms: dict[str, dict[str, float]] = {}
    results = {}
    for form in CONV_FORMS:
        compiled = jax.jit(functools.partial(_forward_backward, form)).lower(*arrays).compile()
        contestants[form] = functools.partial(_wait, compiled, arrays)
        results[form] = compiled(*arrays)
        forms[form] = {"temp_bytes": int(compiled.memory_analysis().temp_size_in_bytes)}
    check(results["naive"], {form: results[form] for form in CONV_FORMS})
    rival = make_torchvision(arrays)
    if rival is not None:
        contestants["torchvision"] = rival
        check(results["naive"], {"torchvision": rival()})
    times = timing.interleaved(contestants, rounds)
    for form in CONV_FORMS:
        forms[form]["ms"] = timing.milliseconds(times[form])
    report: dict[str, Any] = {"forms": forms, "torchvision_ms": None, "ratio": None}
    if rival is not None:
        report |= {"torchvision_ms": timing.milliseconds(times["torchvision"])}
        report |= timing.ratio_report(times["auto"], times["torchvision"])
    return report | {
        "naive_ratio": timing.ratio_report(times["auto"], times["naive"])["ratio"],
        "naive_temp_share": timing.round_significant(forms["auto"]["temp_bytes"] / forms["naive"]["temp_bytes"], 3),
    }


def make_arrays(maps: MapSize) -> tuple[jax.Array, ...]:
    """Random x, offsets, mask, weight and bias as `deform_conv` takes them, and the gradient of its output."""
    rng = np.random.default_rng(0)
    batch, channels, *size = maps
    offsets = 2 * rng.standard_normal((batch, *size, 18))
    mask = 1 / (1 + np.exp(-rng.standard_normal((batch, *size, 9))))
    weight, bias = 0.1 * rng.standard_normal((3, 3, channels, channels)), rng.standard_normal(channels)
    x, gradient = rng.standard_normal((2, batch, *size, channels))
    return tuple(jnp.asarray(a, jnp.float32) for a in (x, offsets, mask, weight, bias, gradient))


def check(expected: Any, found: dict[str, Any]) -> None:
    """Raises `RuntimeError` unless all have the outputs and gradients of the definition."""
    for name, values in found.items():
        for a, b in zip(values, expected, strict=True):
            if not np.allclose(a, b, atol=1e-3 * np.abs(b).max()):
                raise RuntimeError(f"the deformable convolutions disagree: {name} is not the definition")


def make_torchvision(arrays: tuple[jax.Array, ...]) -> Callable[[], tuple[np.ndarray, ...]] | None:
    """torchvision's forward and backward pass of the same numbers: output and gradients in our order of axes.

    None, and the reason on stderr, where it cannot run here.
    """
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("torchvision")):
        print("no comparison: pip install torch torchvision", file=sys.stderr)
        return None
    if jax.default_backend() != "cpu":
        print("no comparison: it is for a CPU", file=sys.stderr)
        return None
    import torch
    from torchvision.ops import deform_conv2d

    torch.set_num_threads(timing.cpu_hardware()["cores"])  # XLA's CPU client uses as many
    x, offsets, mask, weight, bias, gradient = (torch.tensor(np.asarray(a)) for a in arrays)
    leaves = [a.permute(0, 3, 1, 2).contiguous().requires_grad_() for a in (x, offsets, mask)]
    leaves += [weight.permute(3, 2, 0, 1).contiguous().requires_grad_(), bias.requires_grad_()]
    gradient = gradient.permute(0, 3, 1, 2).contiguous()

    def run() -> tuple[np.ndarray, ...]:
        x, offsets, mask, weight, bias = leaves
        out = deform_conv2d(x, offsets, weight, bias, padding=1, mask=mask)
        back = torch.autograd.grad(out, leaves, gradient)
        channels_last = [a.detach().permute(0, 2, 3, 1).numpy() for a in (out, *back[:3])]
        return (*channels_last, back[3].permute(2, 3, 1, 0).numpy(), back[4].numpy())

    return run


def _forward_backward(form: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    *args, gradient = arrays
    out, transpose = jax.vjp(functools.partial(deform_conv, form=form), *args)
    return (out, *transpose(gradient))


def _wait(compiled: Callable[..., Any], arrays: tuple[jax.Array, ...]) -> None:
    jax.block_until_ready(compiled(*arrays))
