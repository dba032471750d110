"""Images with a class each: the four sets of the cross-domain few-shot benchmark, digits, emoji, folders.

The benchmark is Guo et al., A Broader Study of Cross-Domain Few-Shot Learning (arXiv 1912.07200): each set is read in
the layout that its publishers distribute, with the classes that the benchmark uses.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from florence_jax.data.records import ArraySource, BadRecord, Record, Source
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.folder import FolderSource, class_name, class_rows, open_class_folders
from florence_jax.data.sources.picture_files import list_pictures
from florence_jax.errors import UserError, require
from florence_jax.files import table_rows

ISIC_CSV = "ISIC2018_Task3_Training_GroundTruth.csv"
ISIC_IMAGES = "ISIC2018_Task3_Training_Input"
CHEST_CSV = "Data_Entry_2017.csv"
# Pneumonia and the rarer findings are left out, as are images with several findings or none.
CHEST_CLASSES = ("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumothorax")
VEHICLES = 3  # KITTI's types below: Car, Van, Truck
NEAREST_M = (8.0, 20.0, 999.0)  # bounds of the classes, in metres; a picture without a vehicle is beyond the last
DIGITS_TRAIN = 1000  # of 1,797; the set is in the order of its writers, so that others wrote the rest


class Labelled(NamedTuple):
    """A source and the class of each record.

    Attributes:
      source: of the images.
      labels: int32 (len(source),), numbers of classes; or int8 (len(source), K), several an image, as
        `classes.ClassIndex.target` gives them.
      names: of the classes.
    """

    source: Source
    labels: np.ndarray
    names: tuple[str, ...]


class NearestVehicle:
    """KITTI's pictures with "class_id", how far the nearest vehicle is: the task of VTAB (arXiv 1910.04867), ELEVATER.

    Args:
      source: TFDS's kitti, whose records have "objects": {"type" (n,), "location" (n, 3), metres from the camera}.
    """

    def __init__(self, source: Source):
        self.name, self.class_names = source.name, ()
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        return self._record(self._source[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Record | BadRecord]:
        rows = self._source.__getitems__(indices)
        return [row if isinstance(row, BadRecord) else self._record(row) for row in rows]

    def metadata(self) -> Iterator[Record]:
        """All records in order, without "image"."""
        return map(self._record, self._source.metadata())

    def _record(self, row: Record) -> Record:
        try:
            types, places = (np.asarray(row["objects"][name]) for name in ("type", "location"))
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.name}: a record has no objects with type and location ({error})") from error
        ahead = places.reshape(-1, 3)[types < VEHICLES, 2]
        nearest = min(ahead.tolist(), default=np.inf)
        return row | {"class_id": int(np.searchsorted(NEAREST_M, nearest))}


def open_labelled(spec: str) -> Labelled:
    """Opens a set by name.

    Args:
      spec: 'isic:DIR' | 'eurosat:DIR' | 'cropdisease:DIR' | 'chestx:DIR' (see the functions of these names); 'digits',
        'digits:train', 'digits:test' (scikit-learn's handwritten digits, 8 x 8); 'emoji:SPLIT' (classes: the 8 groups);
        or a folder with one sub-folder of images a class.

    Raises:
      UserError: if it does not exist or is not in that layout.
    """
    kind, _, rest = spec.partition(":")
    if kind in LABELLED_READERS and rest:
        return LABELLED_READERS[kind](epath.Path(rest))
    if kind == "digits":
        return digits(rest)
    if kind == "emoji":
        return by_field(open_source(spec), "group")
    if epath.Path(spec).is_dir():
        return class_folders(epath.Path(spec))
    known = ", ".join(f"{name}:DIR" for name in LABELLED_READERS)
    raise UserError(f"labelled set {spec!r} does not exist; use {known}, digits, emoji:SPLIT or a folder of classes")


def by_field(source: Source, field: str) -> Labelled:
    """Classes are the values of a text field of the records, in alphabetical order.

    Raises:
      UserError: if a record lacks the field or cannot be read.
    """
    values = [row.get(field) for row in source.metadata()]
    if len(values) != len(source) or not all(isinstance(value, str) for value in values):
        raise UserError(f"labelled set {source.name}: not every record has a text {field!r}")
    return _labelled(source, values)


def class_folders(folder: epath.Path) -> Labelled:
    """One sub-folder of images a class, in alphabetical order."""
    listing = list_pictures(folder)
    rows = class_rows(listing)
    if not rows:
        raise UserError(f"{folder} has no sub-folders with images, one for each class. Found: {listing.sentence()}")
    return _labelled(open_class_folders(listing, rows), [class_name(part) for _, part in rows])


def eurosat(folder: epath.Path) -> Labelled:
    """EuroSAT.zip unpacked: 10 folders of 64 x 64 JPEG files, inside `2750`."""
    return class_folders(_first_folder(folder, "2750", "EuroSAT/2750", "."))


def cropdisease(folder: epath.Path) -> Labelled:
    """Plant Disease of Kaggle: the benchmark draws from the 38 folders of `dataset/train`."""
    return class_folders(_first_folder(folder, "dataset/train", "train", "."))


def isic(folder: epath.Path) -> Labelled:
    """ISIC 2018, task 3: the csv file of one-hot diagnoses and the folder of the training images."""
    rows = _rows(_first_file(folder, f"ISIC2018_Task3_Training_GroundTruth/{ISIC_CSV}", ISIC_CSV), "image")
    classes = tuple(name for name in rows[0] if name != "image")
    try:
        hot = np.array([[float(row[name]) for name in classes] for row in rows])
    except (TypeError, ValueError) as error:
        raise UserError(f"{ISIC_CSV}: a diagnosis is not a number ({error})") from error
    if not hot.size or ((hot != 0).sum(1) != 1).any():
        raise UserError(f"{ISIC_CSV}: each image must have exactly one diagnosis that is not 0")
    images = _first_folder(folder, ISIC_IMAGES, f"{ISIC_IMAGES}/{ISIC_IMAGES}")
    labels = (hot != 0).argmax(1)
    records = [{"key": f"{row['image']}.jpg", "caption": classes[k]} for row, k in zip(rows, labels, strict=True)]
    return Labelled(FolderSource(str(images), records), labels.astype(np.int32), classes)


def chestx(folder: epath.Path) -> Labelled:
    """NIH ChestX-ray: images with exactly one finding, of 7; in `images`, or in `images_001/images`, ... as packed."""
    rows = _rows(_first_file(folder, CHEST_CSV), "Image Index", "Finding Labels")
    chosen = [row for row in rows if row["Finding Labels"] in CHEST_CLASSES]
    if not chosen:
        raise UserError(f"{folder / CHEST_CSV} has no image with exactly one of {', '.join(CHEST_CLASSES)}")
    where = {}
    for part in sorted(path for path in folder.glob("images*") if path.is_dir()):  # not the archives beside them
        inner = part / "images" if (part / "images").is_dir() else part
        where |= {file.name: f"{inner.relative_to(folder)}/{file.name}" for file in inner.iterdir()}
    missing = [row["Image Index"] for row in chosen if row["Image Index"] not in where]
    if missing:
        raise UserError(f"{folder}: {len(missing)} of {len(chosen)} images are missing, the first: {missing[0]}")
    records = [{"key": where[row["Image Index"]], "caption": row["Finding Labels"]} for row in chosen]
    labels = np.array([CHEST_CLASSES.index(row["Finding Labels"]) for row in chosen], np.int32)
    return Labelled(FolderSource(str(folder), records), labels, CHEST_CLASSES)


def digits(part: str = "") -> Labelled:
    """scikit-learn's `load_digits`, scaled to 0-255: all, or 'train' (the first 1,000), or 'test' (the other 797)."""
    require("sklearn", "the digits set needs scikit-learn: pip install '.[eval]'")
    from sklearn.datasets import load_digits

    parts = {"": slice(None), "train": slice(DIGITS_TRAIN), "test": slice(DIGITS_TRAIN, None)}
    if part not in parts:
        raise UserError(f"labelled set 'digits:{part}' does not exist; use digits, digits:train or digits:test")
    data = load_digits()
    images = np.round(data.images[parts[part]] * (255 / 16)).astype(np.uint8)
    labels = data.target[parts[part]].astype(np.int32)
    names = tuple(map(str, range(10)))
    return Labelled(
        ArraySource(f"digits:{part}" if part else "digits", images, [names[k] for k in labels]), labels, names
    )


LABELLED_READERS: dict[str, Callable[[epath.Path], Labelled]] = {
    "isic": isic,
    "eurosat": eurosat,
    "cropdisease": cropdisease,
    "chestx": chestx,
}


def _labelled(source: Source, values: Sequence[str]) -> Labelled:
    names, labels = np.unique(np.array(values), return_inverse=True)
    return Labelled(source, labels.astype(np.int32), tuple(map(str, names)))


def _first_folder(folder: epath.Path, *names: str) -> epath.Path:
    found = [folder / name for name in names if (folder / name).is_dir()]
    if not found:
        raise UserError(f"{folder} has no folder {names[0]}; unpack the set there")
    return found[0]


def _first_file(folder: epath.Path, *names: str) -> epath.Path:
    found = [folder / name for name in names if (folder / name).exists()]
    if not found:
        raise UserError(f"{folder} has no file {names[0]}; unpack the set there")
    return found[0]


def _rows(path: epath.Path, *columns: str) -> list[dict[str, str]]:
    rows = [row.fields for row in table_rows(path)]
    if not rows or any(name not in rows[0] for name in columns):
        raise UserError(f"{path} must have rows with the columns {', '.join(columns)}")
    return rows
