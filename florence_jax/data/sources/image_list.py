"""The pictures that a file of COCO's kind lists, by its ids: what a detector looks at for a server, or as a teacher."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from florence_jax.data.annotations import CocoColumns, SourceSpec, file_paths
from florence_jax.data.records import BaseSource, Record, evenly, picture_bytes
from florence_jax.data.sources.picture_files import shown
from florence_jax.errors import UserError


class ListedColumns(CocoColumns):
    """The pictures and classes of a file; it may have no classes, and its boxes are not looked at."""

    needed = ("images",)

    def take_box(self, item: dict) -> None:
        """Passes over an item of "annotations"."""

    def without(self, section: str, found: Sequence[str]) -> str:
        """See `CocoColumns`."""
        there = f"it has {', '.join(found)}" if found else "it is empty"
        return (
            f"{self.spec.annotations} has no {section!r}, {there}: a list of pictures has 'images' (id, file_name, ...)"
        )


class ImageList(BaseSource):
    """The pictures of a list.

    A record has "key", the file's name in the list, "image_id", "image", and "width" and "height" as the list states.

    Args:
      spec: 'images:FILE.json:IMAGES', COCO's image info (image_info_test-dev2017.json): "images" with id, file_name,
        width and height, and perhaps "categories".

    Attributes:
      image_ids: N. sizes: int32 (N, 2), stated width and height.
      class_names, category_ids: of the list; () where it names no classes.
      summary: what was found.

    Raises:
      UserError: for a file that is no such list, or a folder without its pictures.
    """

    def __init__(self, spec: str):
        parts = re.split(r":(?!//)", spec.partition(":")[2])
        if len(parts) != 2 or not all(parts):
            raise UserError(f"data source {spec!r}: write images:FILE.json:IMAGES")
        file, folder = parts
        if not epath.Path(file).exists() or epath.Path(file).is_dir():
            raise UserError(f"data source {spec}: there is no file {file}")
        source = SourceSpec("coco", file, folder)
        columns = ListedColumns(source)
        columns.read()
        self.name, self._keys = spec, columns.files
        try:
            self._paths = file_paths(source, columns.files)
        except UserError as error:
            raise UserError(
                f"data source {spec}: the first pictures of the list are not in {folder}, such as {columns.files[0]!r}"
            ) from error
        self.image_ids: list[Any] = list(columns.image_ids)
        self.sizes = np.array(columns.sizes, np.int32).reshape(-1, 2)
        try:
            self.class_names = tuple(str(item["name"]) for item in columns.categories)
            self.category_ids = tuple(int(item["id"]) for item in columns.categories)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}: 'categories' needs an id and a name each ({error!r})") from error
        says = f"{shown(spec)}: {len(self):,} pictures listed, {len(self.class_names):,} classes"
        self.summary: dict[str, Any] = {"folder": folder, "pictures": len(self), "says": says}

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Record:
        return self._described(index) | {"image": picture_bytes(self._paths[index], self._keys[index])}

    def _described(self, index: int) -> Record:
        width, height = self.sizes[index].tolist()
        return {"key": self._keys[index], "image_id": self.image_ids[index], "width": width, "height": height}

    def metadata(self) -> Iterator[Record]:
        """All records in order; no picture is touched."""
        return map(self._described, range(len(self)))

    def sample(self, count: int) -> list[Record]:
        """See `records.sample_of`; no picture is touched."""
        return [self._described(i) for i in evenly(len(self), count).tolist()]

    def list_json(self, names: Sequence[str], ids: Sequence[Any]) -> bytes:
        """The list with these classes, a file of the same form: what `curation.detection` takes as --imagenet."""
        images = [
            {"id": number, "file_name": key, "width": width, "height": height}
            for number, key, (width, height) in zip(self.image_ids, self._keys, self.sizes.tolist(), strict=True)
        ]
        categories = [{"id": number, "name": name} for number, name in zip(ids, names, strict=True)]
        return json.dumps({"images": images, "categories": categories}).encode()
