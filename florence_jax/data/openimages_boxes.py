"""OpenImages as a set to train on: boxes, groups, and the classes that people looked for in each picture."""

import os

import numpy as np

from florence_jax.data.annotations import SourceSpec, read_openimages
from florence_jax.data.box_classes import Hierarchy
from florence_jax.data.box_problems import Problems
from florence_jax.data.box_table import BoxTable


def read_openimages_boxes(path: str, problems: Problems) -> BoxTable:
    """Reads `<split>-annotations-bbox.csv` and the files beside it, see `annotations.read_openimages`.

    Where people verified that a class is not there, it and all below it in the hierarchy are negative. A class that has
    boxes has all of them, unless one below it has boxes too: then those are not repeated for the class above.

    Raises:
      UserError: as `read_openimages`.
    """
    found = read_openimages(SourceSpec("openimages", path, ""))
    names = [category.name for category in found.categories]
    numbers = {name: k for k, name in enumerate(names)}
    hierarchy = Hierarchy([[numbers[name] for name in each.parents if name in numbers] for each in found.categories])
    for reason, count in found.skipped.items():
        problems.add("unknown_category" if reason == "unknown_category" else "unlisted_label", path, count=count)
    boxed = np.unique(np.stack([found.box_image, found.box_category]), axis=1)
    below = hierarchy.below(*found.negative)
    files = found.files
    return BoxTable(
        name=path,
        files=files,
        image_ids=[os.path.splitext(name)[0] for name in files],
        sizes=found.sizes,
        class_names=names,
        category_ids=[category.id for category in found.categories],
        box_image=found.box_image,
        box_class=found.box_category,
        boxes=found.boxes,
        crowd=found.crowd,
        group_of=found.group_of,
        areas=np.full(len(found.boxes), np.nan, np.float32),
        places=np.arange(len(found.boxes), dtype=np.int32),
        place="box {}",
        problems=problems,
        numbered=True,
        relative=True,
        exhaustive=False,
        negative=(np.concatenate([found.negative[0], below[0]]), np.concatenate([found.negative[1], below[1]])),
        not_exhaustive=hierarchy.above(*boxed),
    )
