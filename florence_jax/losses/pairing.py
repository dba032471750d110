"""Texts with pictures that are theirs and pictures that are not, for a model to tell apart: which row gets which.

Half of the texts keep their picture. Three ways to find the other half's: another record of the data (op 'other' of
the input pipeline; `with_others` says where its pictures are), another picture of the batch drawn uniformly, or drawn
by how well it fits the text (hard negatives, Li et al. 2021, ALBEF). In a batch no other picture needs to be encoded.
"""

import jax
import jax.numpy as jnp

from florence_jax.errors import UserError


def with_others(match: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the pictures are of a batch whose op 'other' gave `match`: each distinct picture is encoded once.

    For a step: `rows, index = with_others(match)`; pictures are `concatenate([image, other_image[rows]])`, and text i
    is put beside number `index[i]` of them.

    Args:
      match: integers (B,), exactly floor(B/2) of them 1, the others 0: a global batch.

    Returns:
      rows: int32 (B - floor(B/2),), the rows that do not match, ascending; index: int32 (B,).
    """
    size = match.shape[0]
    matches = match > 0
    rows = jnp.argsort(matches, stable=True)[: size - size // 2].astype(jnp.int32)
    place = size + jnp.cumsum(~matches, dtype=jnp.int32) - 1
    return rows, jnp.where(matches, jnp.arange(size, dtype=jnp.int32), place)


def pair_in_batch(
    key: jax.Array,
    label: jax.Array,
    caption_labels: jax.Array | None = None,
    similarity: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Pictures of the batch for its texts: exactly floor(B/2) texts keep their own, drawn anew for each key.

    The others get a picture of another row, none of whose captions is the text: uniformly, or with `similarity` in
    proportion to its exponential. A text for which the batch has no such picture keeps its own before others do; where
    more than half of the texts have none, all of these keep their own, and more than floor(B/2) match.

    The same for any number of devices and hosts, given the same global arrays. Memory is B^2 numbers.

    Args:
      key: of the step.
      label: integers (B, 2), of the texts, see `data.captions.caption_label`.
      caption_labels: integers (B, C, 2), of all captions of each row's picture (op 'caption_labels'), its own text
        among them; None where each picture has one caption.
      similarity: (B texts, B pictures), such as the logits of two towers; no gradient goes through it.

    Returns:
      image_index: int32 (B,), the row whose picture a text is put beside; match: int32 (B,), 1 where it is its own.

    Raises:
      UserError: for a batch of one.
    """
    size = label.shape[0]
    if size < 2:
        raise UserError("a batch of one has no picture that is not its text's: set config.batch_size to 2 or more")
    captions = label[:, None] if caption_labels is None else caption_labels
    theirs = (label[:, None, None] == captions[None]).all(-1).any(-1)  # (texts, pictures)
    other = ~theirs & ~jnp.eye(size, dtype=bool)
    of_match, of_other = jax.random.split(key)
    score = jax.random.gumbel(of_other, (size, size))
    if similarity is not None:
        score += jax.lax.stop_gradient(similarity).astype(jnp.float32)
    chosen = jnp.where(other, score, -jnp.inf).argmax(1)
    possible = other.any(1)
    order = jnp.where(possible, jax.random.uniform(of_match, (size,)), -1.0)
    rank = order.argsort().argsort()
    match = (rank < size // 2) | ~possible
    index = jnp.where(match, jnp.arange(size), chosen)
    return index.astype(jnp.int32), match.astype(jnp.int32)


def next_other(label: jax.Array, usable: jax.Array, group: int) -> tuple[jax.Array, jax.Array]:
    """For a held-out set: beside each text the picture of the next row within its group whose text is another.

    Nothing is drawn, and what stands beside a text does not depend on the size of the batch, a multiple of the group.

    Args:
      label: integers (B, 2), of the texts. usable: bool (B,), rows that are no padding. group: rows of one.

    Returns:
      int32 (B,), the row of the other picture, a row's own where there is none; bool (B,), whether there is one.
    """
    rows = jnp.arange(len(label), dtype=jnp.int32)
    same = rows[:, None] // group == rows[None] // group
    other = (label[:, None] != label[None]).any(-1) & same & usable[None] & usable[:, None]
    distance = jnp.where(other, (rows[None] - rows[:, None]) % group, group)
    return jnp.where(other.any(1), distance.argmin(1), rows).astype(jnp.int32), other.any(1)
