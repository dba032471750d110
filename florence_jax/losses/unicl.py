"""The UniCL loss: contrastive learning where identical captions are positives of each other.

Florence's equations 1-3 (arXiv 2111.11432) in the mean form of UniCL's Algorithm 1: the sum over the batch becomes a
mean and the two directions are averaged, which changes the paper's loss by the constant 2B only.

For a batch of B triples (image, text, label), unit vectors u_i and v_j, logits l_ij = s u_i.v_j and positives
P_ij = [y_i = y_j], y being one whole number (a class) or several (the halves of the 64-bit hash of a caption):

    L_i2t = mean_i ( logsumexp_j l_ij - 1/|P_i| sum_j P_ij l_ij )          L_t2i: the same over columns
    L     = (L_i2t + L_t2i) / 2

With all labels distinct this is CLIP's loss; with constant logits it is ln B whatever the labels; its infimum is
mean_i ln|P_i|, reported as `floor`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def unicl_reference(
    image: jax.Array, text: jax.Array, labels: jax.Array, scale: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """The definition, as soft-target cross entropies of the logits and of their transpose.

    Args and shapes as in `unicl`. Returns the two float32 scalars (L_i2t, L_t2i).
    """
    logits = scale * jnp.matmul(image, text.T, precision="highest")
    positives = (labels[:, None] == labels[None, :]).all(axis=-1).astype(jnp.float32)
    targets = positives / positives.sum(axis=1, keepdims=True)
    i2t = -(targets * jax.nn.log_softmax(logits, axis=1)).sum(axis=1).mean()
    t2i = -(targets * jax.nn.log_softmax(logits.T, axis=1)).sum(axis=1).mean()
    return i2t, t2i


def unicl(
    image: jax.Array, text: jax.Array, labels: jax.Array, scale: jax.Array | float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """UniCL loss of a batch; the same values as `unicl_reference`, from one logit matrix and two reductions.

    Because P is symmetric, sum_ij P_ij l_ij / |P_i| is the same number in both directions: it is computed once, and
    no normalised copy of the targets or of the log-probabilities is made.

    Args:
      image: (B, D) unit image embeddings.
      text: (B, D) unit text embeddings.
      labels: integers (B, W); pairs with equal labels are positives of each other. Of captions it is the hash before
        any prompt template, W = 2 (`data.captions.caption_label`, with the odds of two captions sharing one); of
        classes the class number, W = 1.
      scale: scalar multiplier of the cosine similarities, the exponential of the learned logit scale.

    Returns:
      (loss, metrics): the float32 scalar L, and float32 scalars `i2t`, `t2i` (the two directions), `floor` (the
      lowest value these labels allow), `i2t_accuracy` and `t2i_accuracy` (share of rows, of columns, whose largest
      logit is a positive).

    Raises:
      ValueError: if shapes disagree.
    """
    if image.shape != text.shape or image.ndim != 2 or labels.ndim != 2 or len(labels) != len(image):
        raise ValueError(
            f"unicl needs image (B, D), text (B, D), labels (B, W); got {image.shape}, {text.shape}, {labels.shape}"
        )
    image, text = image.astype(jnp.float32), text.astype(jnp.float32)
    # 'highest': on TPU the default would round the features to bf16, an error of 0.4 in a logit of 100.
    logits = scale * jnp.matmul(image, text.T, precision="highest")
    positives = _equal(labels, labels)
    count = positives.sum(axis=1).astype(jnp.float32)
    aligned = (jnp.where(positives, logits, 0.0).sum(axis=1) / count).mean()
    i2t = jax.nn.logsumexp(logits, axis=1).mean() - aligned
    t2i = jax.nn.logsumexp(logits, axis=0).mean() - aligned
    loss = (i2t + t2i) / 2
    metrics = {
        "i2t": i2t,
        "t2i": t2i,
        "floor": jnp.log(count).mean(),
        "i2t_accuracy": (labels[logits.argmax(axis=1)] == labels).all(axis=1).astype(jnp.float32).mean(),
        "t2i_accuracy": (labels[logits.argmax(axis=0)] == labels).all(axis=1).astype(jnp.float32).mean(),
    }
    return loss, metrics


def _equal(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """bool (N, M) of labels (N, W) and (M, W): word by word, so that no (N, M, W) array is made."""
    words = (rows[:, None, w] == columns[None, :, w] for w in range(rows.shape[1]))
    return functools.reduce(jnp.logical_and, words)


def unicl_sharded(
    image: jax.Array, text: jax.Array, labels: jax.Array, scale: jax.Array | float, axes: Sequence[str]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`unicl` of a batch split over devices: same values, metrics and gradients, B^2 / devices of memory on each.

    Each device gathers the texts and labels and computes the logits of its own images once, for both directions: the
    log-sum-exp of a row is local, that of a column a reduction of two numbers per column over the devices. Gradients
    flow through the gather (its transpose is a reduce-scatter), so that they equal those of the global loss on every
    device. Works on the mesh in context (`jax.set_mesh` or `jax.sharding.use_abstract_mesh`).

    Args:
      image, text, labels, scale: global arrays, as in `unicl`; B must divide by the number of devices.
      axes: mesh axes that the batch is split over.

    Returns:
      (loss, metrics) as `unicl`.
    """
    axes, batch = tuple(axes), PartitionSpec(tuple(axes))
    local = jax.shard_map(
        functools.partial(_local_rows, axes=axes, size=image.shape[0]),
        in_specs=(batch, batch, batch, PartitionSpec()),
        out_specs=PartitionSpec(),
        axis_names=set(axes),
    )
    return local(image, text, labels, jnp.asarray(scale, jnp.float32))


def _local_rows(
    image: jax.Array, text: jax.Array, labels: jax.Array, scale: jax.Array, *, axes: tuple[str, ...], size: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One device's part of `unicl_sharded`: image, text (b, D) and labels (b, W) are its own of `size` examples."""

    def mean(rows: jax.Array) -> jax.Array:
        return jax.lax.psum(rows.astype(jnp.float32).sum(), axes) / size

    text = jax.lax.all_gather(text.astype(jnp.float32), axes, tiled=True)
    all_labels = jax.lax.all_gather(labels, axes, tiled=True)
    logits = scale * jnp.matmul(image.astype(jnp.float32), text.T, precision="highest")
    positives = _equal(labels, all_labels)
    count = positives.sum(axis=1).astype(jnp.float32)
    aligned = mean(jnp.where(positives, logits, 0.0).sum(axis=1) / count)
    i2t = mean(jax.nn.logsumexp(logits, axis=1)) - aligned
    # The maximum only keeps exp() in range and cancels in the value: no gradient belongs to it.
    highest = jax.lax.stop_gradient(logits.max(axis=0))
    top = jax.lax.pmax(highest, axes)
    total = jax.lax.psum_scatter(jnp.exp(logits - top[None]).sum(axis=0), axes, tiled=True)
    t2i = mean(jnp.log(total)) + top.mean() - aligned
    # Ties go to the lowest row of the whole batch, as in argmax.
    row = jax.lax.axis_index(axes) * len(labels) + logits.argmax(axis=0)
    best = jax.lax.pmin(jnp.where(highest == top, row, size), axes)
    metrics = {
        "i2t": i2t,
        "t2i": t2i,
        "floor": mean(jnp.log(count)),
        "i2t_accuracy": mean((all_labels[logits.argmax(axis=1)] == labels).all(axis=1)),
        "t2i_accuracy": jax.lax.pmean((all_labels[best] == all_labels).all(axis=1).astype(jnp.float32).mean(), axes),
    }
    return (i2t + t2i) / 2, metrics
