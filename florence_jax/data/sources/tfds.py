"""Records of TensorFlow Datasets, read without TensorFlow."""

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from florence_jax.data.records import Record, RowSource, first_line
from florence_jax.data.sources.fields import distinct_captions, records_summary
from florence_jax.errors import UserError


class TfdsSource(RowSource):
    """A TFDS data set in ArrayRecord format, read without TensorFlow.

    The caption is the feature "caption", "text", "title" or "captions", else the name of the class "label" with spaces
    for underscores; the class number is the field "class_id". TFDS stores
    a record as one whole: `metadata` reads the pictures with it, though it decodes none.

    Args:
      data: random-access TFDS data source with the image left encoded.
      class_names: of the feature "label", or ().
      name: for messages and keys.
    """

    def __init__(self, data: Sequence[Record], class_names: Sequence[str], name: str):
        super().__init__(name, data)
        self.class_names = tuple(class_names)

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """What was found."""
        return records_summary(self)

    def _record(self, index: int, row: Record) -> Record:
        record = {name: _as_text(value) for name, value in row.items()}
        record["key"] = f"{self.name}[{index}]"
        if isinstance(record.get("label"), (int, np.integer)):
            record["class_id"] = int(record.pop("label"))
        if texts := distinct_captions(record):
            record = ({"captions": texts} if len(texts) > 1 else {}) | record | {"caption": texts[0]}
        elif 0 <= record.get("class_id", -1) < len(self.class_names):  # -1: without a class
            record["caption"] = self.class_names[record["class_id"]].replace("_", " ")
        return record


def open_tfds(spec: str) -> TfdsSource:
    """The source 'tfds:NAME:SPLIT'. Raises UserError."""
    # The name may have a version ('mnist:3.0.1'), the split a slice ('train[:10%]').
    match = re.fullmatch(r"tfds:(.+):([^:\[\]]+(?:\[[^\]]*\])?(?:\+.+)?)", spec)
    if not match:
        raise UserError(f"data source {spec!r}: write tfds:NAME:SPLIT, for example tfds:cifar10:train")
    import tensorflow_datasets as tfds  # a second that other sources need not wait for; it brings no TensorFlow

    name, split = match.groups()
    try:
        builder = tfds.builder(name)
        features = builder.info.features
        if "image" not in features:
            raise UserError(f"it has no feature 'image', only: {', '.join(features)}")
        data = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    except UserError as error:
        raise UserError(f"data source {spec}: {error}") from error
    except Exception as error:  # TFDS has a type of its own for each mistake
        raise UserError(
            f"data source {spec}: {first_line(error)}; prepare it with: tfds build {name} --file_format=array_record"
        ) from error
    names = getattr(features["label"], "names", None) if "label" in features else None
    return TfdsSource(data, names or (), spec)


def _as_text(value: Any) -> Any:
    """TFDS gives texts as bytes, arrays of bytes, or {"text": such an array}; everything else is left as it is."""
    if isinstance(value, dict) and "text" in value:
        value = value["text"]
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value  # an encoded image
