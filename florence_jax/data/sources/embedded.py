"""The embedded emoji set; `florence_jax/data/emoji/README.md` says what is in it."""

import importlib.resources

from florence_jax.data.sources.array_record import ArrayRecordSource
from florence_jax.errors import UserError

EMOJI_SPLITS = ("train", "new_style", "new_names")


def open_emoji(spec: str) -> ArrayRecordSource:
    """Opens 'emoji:SPLIT'. Raises UserError for a split that is not of `EMOJI_SPLITS`."""
    split = spec.removeprefix("emoji:")
    if split not in EMOJI_SPLITS:
        raise UserError(f"data source {spec!r}: the embedded set has {', '.join('emoji:' + s for s in EMOJI_SPLITS)}")
    return ArrayRecordSource(
        [str(importlib.resources.files("florence_jax.data") / f"emoji/{split}.array_record")], spec
    )
