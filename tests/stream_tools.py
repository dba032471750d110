"""What tests of streams share: records made of numbers, a tokenizer of characters, batches compared."""

import collections
import io
import itertools
from pathlib import Path

import numpy as np
from PIL import Image

from florence_jax.data.pipeline import (
    TrainData,
    train_stream,
)
from florence_jax.data.records import BadRecord

OPS = (
    "decode|rrc(8)|flip|jitter(0.4, 0.4, 0.4)|caption(caption=2, tags=1)|label|prompt|tokenize|keep(image, text, label)"
)
NUMBER_OPS = "keep(number)"
ROOT = Path(__file__).parents[1]


class CharTokenizer:
    def __call__(self, text):
        return np.array([ord(c) for c in text.lower().ljust(12)[:12]], np.int32)

    def lengths(self, ids):
        return np.int32(len(ids))


CONTEXT = {"tokenizer": CharTokenizer(), "templates": ("the {}", "a {}!")}


class ListSource:
    """Records in memory; reads[i] counts how often record i was read."""

    def __init__(self, records, name="list"):
        self.records, self.name = records, name
        self.reads = collections.Counter()

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        (record,) = self.__getitems__([index])
        if isinstance(record, BadRecord):
            raise record
        return record

    def __getitems__(self, indices):
        assert all(0 <= i < len(self.records) for i in indices)
        self.reads.update(indices)
        return [self.records[i] for i in indices]

    def metadata(self):
        return ({k: v for k, v in r.items() if k != "image"} for r in self.records if not isinstance(r, BadRecord))


def picture(i):
    file = io.BytesIO()
    noise = np.random.default_rng(i).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def pairs(n, prefix="r"):
    return [
        {"key": f"{prefix}{i}", "image": picture(i), "caption": f"{prefix} name {i}", "tags": [f"tag{i % 3}", "any"]}
        for i in range(n)
    ]


def numbers(n, first=0, bad=()):
    """Sources of a plain number, to follow the order; some unusable."""
    rows = [{"key": f"n{i}", "number": i, "caption": "x"} for i in range(first, first + n)]
    return ListSource([BadRecord(r["key"], "broken") if i in bad else r for i, r in enumerate(rows)], f"numbers{first}")


def take(stream, n):
    with stream:
        return list(itertools.islice(stream, n))


def number_batches(sources, n, weights=None, **options):
    options = {"batch_size": 4, "seed": 3} | options
    return [batch["number"] for batch in take(train_stream(TrainData(sources, weights, NUMBER_OPS, {}), **options), n)]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name].dtype == y[name].dtype
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


def joined(parts):
    """Local batches of all processes -> global batches."""
    return [{name: np.concatenate([p[name] for p in step]) for name in step[0]} for step in zip(*parts, strict=True)]
