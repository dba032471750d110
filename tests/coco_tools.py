"""A small test set with boxes, and a detector that answers with what it is told, for tests of the scoring of boxes."""

import jax.numpy as jnp
import numpy as np

from florence_jax.data.ops.geometry import map_boxes
from florence_jax.data.pipeline import eval_stream
from florence_jax.data.records import BadRecord, BaseSource, without_payloads
from florence_jax.evaluators.coco_files import make_truth

SIDE = 64
OPS = f"decode|resize_long({SIDE})|pad_image({SIDE})"
NAMES = ("RBC", "WBC", "Platelets")


class DrawnBoxes(BaseSource):
    """Pictures of several sizes with one to five rectangles of three classes; every third has a crowd, one has none.

    Args:
      count: of pictures. unreadable: rows of pictures that cannot be read.
      changes: of records, by row. stated: what the metadata say instead, by row.
    """

    def __init__(self, count=9, unreadable=(), changes=None, stated=None, name="drawn"):
        self.name, self._count, self._unreadable, self._changes = name, count, set(unreadable), changes or {}
        self._stated = stated or {}
        self.class_names, self.category_ids = NAMES, (7, 2, 90)

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        if index in self._unreadable:
            raise BadRecord(f"picture {index}", "cut in the middle")
        return self._record(index)

    def metadata(self):
        return (without_payloads(self._record(i)) | self._stated.get(i, {}) for i in range(self._count))

    def sample(self, count):
        return list(self.metadata())[:count]

    def _record(self, index):
        rng = np.random.default_rng(index)
        width, height = int(rng.integers(60, 150)), int(rng.integers(60, 150))
        count = 0 if index == 4 else int(rng.integers(2, 6))
        low = rng.uniform(0, 0.6, (count, 2)) * (width, height)
        boxes = np.concatenate([low, low + rng.uniform(0.1, 0.4, (count, 2)) * (width, height)], 1)
        labels = rng.integers(0, 3, count)
        image = rng.integers(0, 60, (height, width, 3), np.uint8)
        for (x1, y1, x2, y2), label in zip(boxes.astype(int).tolist(), labels, strict=True):
            image[y1:y2, x1:x2, label] += 150
        record = {
            "key": f"picture {index}",
            "image_id": 100 - index,
            "image": image,
            "width": width,
            "height": height,
            "boxes": boxes.tolist(),
            "class_ids": labels.tolist(),
            "iscrowd": [index % 3 == 0 and i == 0 for i in range(count)],
            "is_group_of": [False] * count,
        } | self._changes.get(index, {})
        sides = np.diff(np.reshape(record["boxes"], (-1, 2, 2)), axis=1)
        return {"areas": sides.prod(-1).ravel()} | record


def truth_of(source):
    return make_truth(source.metadata(), source)


def told(source, answers, ops=OPS, buckets=()):
    """Parameters of `detect` that answer (boxes, scores, labels) of each picture of a source, in its own pixels."""
    room = max(len(scores) for _, scores, _ in answers) + 1
    rows = len(answers)
    out = {
        "boxes": np.zeros((rows, room, 4), np.float32),
        "scores": np.zeros((rows, room), np.float32),
        "labels": np.full((rows, room), -1, np.int32),
    }
    stream = eval_stream(
        source, f"{ops}|keep(image, warp)", {}, batch_size=4, buckets=buckets, host=["warp"], on_corrupt="skip"
    )
    with stream:
        for batch in stream:
            for place in np.flatnonzero(batch["mask"]).tolist():
                row = int(batch["index"][place])
                boxes, scores, labels = answers[row]
                count = len(scores)
                boxes = np.asarray(boxes, float).reshape(-1, 4)
                out["boxes"][row, :count] = map_boxes(boxes, batch["warp"][place][:2])
                out["scores"][row, :count], out["labels"][row, :count] = scores, labels
    return out


def detect(params, batch):
    """What `told` was told; see `CocoEvaluator`."""
    rows = jnp.maximum(batch["index"], 0)
    return {name: values[rows] for name, values in params.items()}


def answers_like(source, noise=0.0, seed=0, false=0, wrong=0.0):
    """The true boxes moved by a share of their size, some with another class, and some false ones, per picture."""
    rng, found = np.random.default_rng(seed), []
    for record in source.metadata():
        boxes = np.asarray(record["boxes"], float).reshape(-1, 4)
        labels = np.asarray(record["class_ids"], int).reshape(-1)
        sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        boxes = boxes + noise * rng.normal(size=boxes.shape) * sides
        boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], 1)
        labels = np.where(rng.random(len(labels)) < wrong, (labels + 1) % 3, labels)
        scores = rng.uniform(0.4, 1, len(labels))
        low = rng.uniform(0, 0.7, (false, 2))
        extra = np.concatenate([low, low + 0.2], 1) * np.tile([record["width"], record["height"]], 2)
        found.append(
            (
                np.concatenate([boxes, extra]),
                np.concatenate([scores, rng.uniform(0.06, 0.6, false)]),
                np.concatenate([labels, rng.integers(0, 3, false)]),
            )
        )
    return found
