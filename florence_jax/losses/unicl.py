"""The UniCL loss: contrastive learning where identical captions are positives of each other.

Florence's equations 1-3 (arXiv 2111.11432) in the mean form of UniCL's Algorithm 1: the sum over the batch becomes a
mean and the two directions are averaged, which changes the paper's loss by the constant 2B only.

For a batch of B triples (image, text, label), unit vectors u_i and v_j, logits l_ij = s u_i.v_j and positives
P_ij = [y_i = y_j]:

    L_i2t = mean_i ( logsumexp_j l_ij - 1/|P_i| sum_j P_ij l_ij )          L_t2i: the same over columns
    L     = (L_i2t + L_t2i) / 2

With all labels distinct this is CLIP's loss; with constant logits it is ln B whatever the labels; its infimum is
mean_i ln|P_i|, reported as `floor`.
"""

import jax
import jax.numpy as jnp


def unicl_reference(
    image: jax.Array, text: jax.Array, labels: jax.Array, scale: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """The definition, as soft-target cross entropies of the logits and of their transpose.

    Args and shapes as in `unicl`. Returns the two float32 scalars (L_i2t, L_t2i).
    """
    logits = scale * jnp.matmul(image, text.T, precision="highest")
    positives = (labels[:, None] == labels[None, :]).astype(jnp.float32)
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
      labels: (B,) integers; equal labels mark pairs that are positives of each other (the dense id of the normalised
        caption before any prompt template, or a class id).
      scale: scalar multiplier of the cosine similarities, the exponential of the learned logit scale.

    Returns:
      (loss, metrics): the float32 scalar L, and float32 scalars `i2t`, `t2i` (the two directions), `floor` (the
      lowest value these labels allow), `i2t_accuracy` and `t2i_accuracy` (share of rows, of columns, whose largest
      logit is a positive).

    Raises:
      ValueError: if shapes disagree.
    """
    if image.shape != text.shape or image.ndim != 2 or labels.shape != image.shape[:1]:
        raise ValueError(
            f"unicl needs image (B, D), text (B, D), labels (B,); got {image.shape}, {text.shape}, {labels.shape}"
        )
    image, text = image.astype(jnp.float32), text.astype(jnp.float32)
    # 'highest': on TPU the default would round the features to bf16, an error of 0.4 in a logit of 100.
    logits = scale * jnp.matmul(image, text.T, precision="highest")
    positives = labels[:, None] == labels[None, :]
    count = positives.sum(axis=1).astype(jnp.float32)
    aligned = (jnp.where(positives, logits, 0.0).sum(axis=1) / count).mean()
    i2t = jax.nn.logsumexp(logits, axis=1).mean() - aligned
    t2i = jax.nn.logsumexp(logits, axis=0).mean() - aligned
    loss = (i2t + t2i) / 2
    metrics = {
        "i2t": i2t,
        "t2i": t2i,
        "floor": jnp.log(count).mean(),
        "i2t_accuracy": (labels[logits.argmax(axis=1)] == labels).astype(jnp.float32).mean(),
        "t2i_accuracy": (labels[logits.argmax(axis=0)] == labels).astype(jnp.float32).mean(),
    }
    return loss, metrics
