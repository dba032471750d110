"""Gradient cache: contrastive batches larger than the activations that fit in memory (Gao et al., arXiv 2101.06983).

The loss sees a batch only through its embeddings. So the batch is encoded a micro-batch at a time and nothing but the
embeddings is kept; the loss and the gradient of every embedding come from the whole batch; then each micro-batch is
encoded again and its embeddings' gradients are taken back to the parameters. By the chain rule this is the gradient
of the whole batch, not an estimate, at the price of a second forward pass. The encoder must treat examples one by one
(no batch statistics) and draw the same random numbers both times.

Here it is a scan over micro-batches whose body is rematerialised, so `jax.grad` of any loss of its outputs does the
above; there is no second code path to keep equal to the first.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from florence_jax.errors import UserError

TOWERS = ("both", "image")


def encode_pairs(
    encode: Callable[[Any, Any], dict[str, jax.Array]],
    params: Mapping[str, Any],
    image: dict[str, jax.Array],
    text: dict[str, jax.Array],
    *,
    micro_batch: int,
    towers: str = "both",
    axes: Sequence[str] = (),
    replicated: Sequence[str] = (),
) -> dict[str, jax.Array]:
    """Both towers' outputs for a batch of pairs, with the gradient cache on both towers, on one, or off.

    Args:
      encode: `encode(params, inputs)` of the two-tower model, for inputs of either tower or of both.
      params: the model's parameters; the text tower's top-level names start with 'text'.
      image, text: inputs of the image tower and of the text tower, batch axis first.
      micro_batch: examples per device encoded together; 0 = the whole batch at once, without a cache.
      towers: 'both', or 'image': encode the texts, which need far less memory, at once.
      axes, replicated: see `encode_cached`.

    Raises:
      UserError: unknown `towers`, or a micro-batch that does not divide the batch of a device.
    """
    if towers not in TOWERS:
        raise UserError(f"grad_cache.towers={towers!r}: choose one of {', '.join(TOWERS)}")
    if not micro_batch:
        return encode(params, image | text)
    cached = functools.partial(encode_cached, encode, micro_batch=micro_batch, axes=axes, replicated=replicated)
    if towers == "both":
        return cached(params, image | text)
    # Without the text tower's parameters, so that the scan carries no gradients for them.
    image_params = {name: value for name, value in params.items() if not name.startswith("text")}
    return cached(image_params, image) | encode(params, text)


def encode_cached(
    encode: Callable[[Any, Any], Any],
    params: Any,
    inputs: Any,
    *,
    micro_batch: int,
    axes: Sequence[str] = (),
    replicated: Sequence[str] = (),
) -> Any:
    """`encode(params, inputs)`, whose gradient costs the activations of one micro-batch only.

    Over several devices each takes its micro-batches from its own part of the batch, so that no example moves. Over
    the `replicated` axes every device sums its gradients of all micro-batches before the one reduction.

    Args:
      encode: pure function of the parameters and of a batch of examples; random draws must follow the example, not its
        place in the micro-batch. Its outputs have one row per example.
      params: any tree of arrays; gradients are accumulated in its dtypes.
      inputs: tree of arrays whose first axis is the batch B.
      micro_batch: examples encoded together on each device.
      axes: axes, of the mesh in context, that the batch is split over.
      replicated: those of `axes` over which every device holds the same parameters.

    Returns:
      The outputs of `encode` for the whole batch, in its order.

    Raises:
      UserError: if `micro_batch` does not divide B / devices.
    """
    mesh, replicated = jax.sharding.get_abstract_mesh(), tuple(replicated)
    size = jax.tree.leaves(inputs)[0].shape[0]
    local = size // math.prod(mesh.shape[axis] for axis in axes)
    if micro_batch < 1 or local % micro_batch:
        raise UserError(
            f"grad_cache.micro_batch={micro_batch} must divide the {local} examples of a device (batch {size} over "
            f"{size // local} devices)"
        )
    rest = tuple(axis for axis in axes if axis not in replicated)

    def run(params: Any, inputs: Any) -> Any:
        if replicated:
            # Said before the scan: the transpose, the gradients' reduction, then comes once, after it.
            params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, replicated, to="varying"), params)
        return _scan(encode, params, inputs, micro_batch, rest, math.prod(mesh.shape[axis] for axis in rest))

    if not replicated:
        return run(params, inputs)
    batch = PartitionSpec(replicated)
    shards = jax.shard_map(run, in_specs=(PartitionSpec(), batch), out_specs=batch, axis_names=set(replicated))
    return shards(params, inputs)


def _scan(
    encode: Callable[[Any, Any], Any], params: Any, inputs: Any, micro_batch: int, axes: tuple[str, ...], shards: int
) -> Any:
    """The scan over micro-batches; the batch axis is split over `shards` devices along `axes` by the partitioner."""

    def place(x: jax.Array, *spec: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec)) if axes else x

    def split(x: jax.Array) -> jax.Array:
        """(B, ...) -> (micro-batches, shards * micro_batch, ...), the i-th made of the i-th of every device."""
        x = place(x.reshape(shards, -1, micro_batch, *x.shape[1:]), axes).swapaxes(0, 1)
        return place(x.reshape(x.shape[0], -1, *x.shape[3:]), None, axes)

    def join(x: jax.Array) -> jax.Array:
        """Inverse of `split`."""
        x = place(x.reshape(x.shape[0], shards, micro_batch, *x.shape[2:]), None, axes).swapaxes(0, 1)
        return place(x.reshape(-1, *x.shape[3:]), axes)

    # The scan itself keeps XLA from merging the two forward passes.
    body = jax.checkpoint(encode, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
    _, outputs = jax.lax.scan(lambda _, chunk: (None, body(params, chunk)), None, jax.tree.map(split, inputs))
    return jax.tree.map(join, outputs)
