"""Classes: which number a record's label has, and the names that prompts are made of.

Class-name files have one class a line, in the order of the class numbers: 'LABEL = NAME | SYNONYM', or 'NAME' alone
where the data set's own label is fit for a prompt; lines that start with '#' are comments. LABEL is what the data has
(a sub-folder's name, TFDS's label); the names go into the prompts, the first one into tables.
"""

import importlib.resources
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from florence_jax.data.captions import normalise_caption
from florence_jax.data.ops.registry import key_of
from florence_jax.data.prompts import TEMPLATE_SETS, class_prompts, template_set
from florence_jax.data.records import BadRecord, Record, Source, Subset
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.labelled import LABELLED_READERS, Labelled, NearestVehicle, open_labelled
from florence_jax.errors import UserError

# What a data set is scored by, where that is not the share of right answers (CLIP, Radford et al. 2021, table 9).
METRICS = {
    "caltech101": "mean_per_class",
    "fgvc_aircraft": "mean_per_class",
    "oxford_flowers102": "mean_per_class",
    "oxford_iiit_pet": "mean_per_class",
    "voc2007": "voc_map",
    "hateful_memes": "roc_auc",
}
# Image ops of evaluation, where nothing may be cut off (ELEVATER).
EVAL_OPS = {"kitti": "decode|resize_exact({res})"}
# Fields that hold several labels of one image, and those that count: VOC's images with only hard examples of a class
# are neither right nor wrong for it.
MULTI_FIELD, CERTAIN_FIELD = "labels", "labels_no_difficult"
UNSURE = -1
TFDS_DEFAULTS = {"voc": "voc/2007"}  # what TFDS takes where a data set's name stands alone
EMOJI_FIELD = "group"  # the classes of the embedded set: 8 groups of names


class ClassNames(NamedTuple):
    """A class-name file.

    Attributes:
      labels: K labels as the data has them, by class number.
      names: K tuples of one or more names, all of them for prompts; the first is shown to people.
      dataset: name of the shipped file, '' for one of the user's.
    """

    labels: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    dataset: str = ""


def shipped_class_names() -> list[str]:
    """Names of the data sets whose class names come with the project."""
    folder = importlib.resources.files("florence_jax.data") / "class_names"
    return sorted(file.name.removesuffix(".txt") for file in folder.iterdir() if file.name.endswith(".txt"))


def load_class_names(spec: str) -> ClassNames:
    """Reads a shipped class-name file by data set name ('food101', 'voc/2007'), or a file of the user's by path.

    Raises:
      UserError: for neither, an unreadable file, an empty line's name, or the same label twice.
    """
    shipped = spec.replace("/", "")
    if shipped in shipped_class_names():
        text = (importlib.resources.files("florence_jax.data") / "class_names" / f"{shipped}.txt").read_text("utf-8")
        return ClassNames(*_parse(text, spec), shipped)
    try:
        text = epath.Path(spec).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"class names {spec!r}: cannot read it as a UTF-8 file with one name a line ({error}), and it is none of "
            f"the shipped sets: {', '.join(shipped_class_names())}"
        ) from error
    return ClassNames(*_parse(text, spec))


def _parse(text: str, where: str) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    labels, names = [], []
    for number, line in enumerate(text.rstrip("\n").splitlines(), 1):
        if not line.strip():
            # No warning: florence_jax.predict turns these off.
            print(f"class names {where} line {number} is empty: it names no class", flush=True)
        if not line.strip() or line.startswith("#"):
            continue
        label, equals, rest = line.partition(" = ")
        found = tuple(name.strip() for name in (rest if equals else label).split(" | "))
        if not label.strip() or not all(found):
            raise UserError(f"class names {where} line {number}: write LABEL = NAME | SYNONYM, or NAME alone")
        labels.append(label.strip())
        names.append(found)
    if not labels:
        raise UserError(f"class names {where}: the file names no class")
    _by_plain(labels, f"class names {where}")
    return tuple(labels), tuple(names)


def dataset_name(spec: str) -> str:
    """The name in the tables of a source: 'tfds:voc/2007:test' -> 'voc2007', 'eurosat:DIR' -> 'eurosat'; else ''.

    A configuration that has no tables of its own is known by its data set: 'tfds:sun397/standard-part1-120k:test'; a
    data set without a configuration by the one that TFDS takes: 'tfds:voc:test'.
    """
    if match := re.fullmatch(r"tfds:([^:]+):.+", spec):
        given = TFDS_DEFAULTS.get(match[1], match[1])
        whole, name = given.replace("/", ""), given.partition("/")[0]
        return name if whole not in shipped_class_names() and name in shipped_class_names() else whole
    kind, colon, _ = spec.partition(":")
    if kind == "digits":
        return "mnist"
    return kind if colon and kind in shipped_class_names() else ""


def _plain(label: str) -> str:
    """Labels that differ in case, or in '_', '-', '/' and spaces only, are the same."""
    return re.sub(r"[\s_/-]+", " ", normalise_caption(label)).strip()


def _by_plain(labels: Sequence[str], where: str) -> dict[str, int]:
    """Place of each label by its plain form; raises UserError for two labels with the same one."""
    places: dict[str, int] = {}
    for i, label in enumerate(labels):
        if (first := places.setdefault(_plain(label), i)) != i:
            raise UserError(f"{where}: {labels[first]!r} and {label!r} are the same class; rename or remove one")
    return places


class ClassIndex:
    """Records to class numbers. Can be pickled.

    Attributes:
      names: K tuples of prompt names by class number.
      field: the record field with the label, '' to look: "class_id", then "labels", then "caption".
      multi: whether an image may have several classes.
      note: how labels and names were joined, for people; '' where there is nothing to say.
    """

    def __init__(
        self,
        names: Sequence[Sequence[str]],
        numbers: Mapping[str, int],
        field: str = "",
        multi: bool = False,
        note: str = "",
    ):
        self.names = tuple(tuple(found) for found in names)
        self.field, self.multi, self.note = field, multi, note
        self._numbers = dict(numbers)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def first_names(self) -> list[str]:
        """The first name of each class."""
        return [found[0] for found in self.names]

    def number(self, label: Any) -> int:
        """Class number of a label (text, or the number itself); raises `KeyError` for an unknown one."""
        if isinstance(label, (int, np.integer)) and not isinstance(label, bool):
            if not 0 <= label < len(self):
                raise KeyError(label)
            return int(label)
        return self._numbers[_plain(str(label))]

    def target(self, record: Mapping[str, Any]) -> np.ndarray:
        """int32 () class number; or, with several labels an image, int8 (K,): 1 there, 0 not, -1 not to be judged.

        Raises:
          BadRecord: for a record without a known class.
        """
        value = record.get(self.field) if self.field else _label_of(record)
        try:
            if not self.multi:
                return np.asarray(self.number(value), np.int32)
            target = np.zeros(len(self), np.int8)
            target[[self.number(label) for label in value]] = UNSURE if CERTAIN_FIELD in record else 1
            target[[self.number(label) for label in _several(record, CERTAIN_FIELD)]] = 1
            return target
        except (KeyError, TypeError) as error:
            raise BadRecord(key_of(record), f"its class {value!r} is none of the {len(self)} classes") from error


def _label_of(record: Mapping[str, Any]) -> Any:
    return next((record[name] for name in ("class_id", MULTI_FIELD, "caption") if record.get(name) is not None), None)


def _label_text(row: Record, field: str, source: Source) -> Any:
    """What a record says of its class; raises UserError where that would be one of several captions."""
    if not field and len(set(row.get("captions", ()))) > 1:
        raise UserError(
            f"{source.name}: its pictures have several captions each, which are no classes; name the field with the "
            "class: --config.label_field=FIELD"
        )
    return row.get(field or "caption")


def open_classes(source: Source, spec: str | ClassNames = "", field: str = "") -> ClassIndex:
    """The classes of a labelled source.

    Args:
      source: labelled by "class_id" (TFDS), "labels" (several an image) or "caption" (a sub-folder for each class).
      spec: class names: a shipped set, a file, `ClassNames`, or '' for the shipped names of a TFDS set, else the data's
        own labels.
      field: take the label from this field of the records; '' for the ones above ("group" of the embedded set).

    Names are joined to the data's labels by text (ignoring case, '_' and '-'); where no label is among the names and
    there are as many of either, in order: the first line names the first label of the sorted ones. Names without data
    remain as wrong answers to choose from.

    Raises:
      UserError: for a source without labels, or names that do not fit them.
    """
    own = tuple(getattr(source, "class_names", ()))
    if not spec and dataset_name(source.name) in shipped_class_names():
        spec = dataset_name(source.name)
    if not field and source.name.startswith("emoji:"):
        field = EMOJI_FIELD
    given = spec if isinstance(spec, ClassNames) else load_class_names(spec) if spec else None
    first = next(iter(source.metadata()), {})
    multi = not field and "class_id" not in first and first.get(MULTI_FIELD) is not None
    if not field and "class_id" in first:
        return _by_number(source, given, own)
    if multi:
        labels = _distinct(label for row in source.metadata() for label in _several(row))
        if labels and all(isinstance(label, (int, np.integer)) for label in labels):
            return ClassIndex(_by_number(source, given, own, labels).names, {}, multi=True)
    else:
        labels = _distinct(value for row in source.metadata() if (value := _label_text(row, field, source)))
    if not labels:
        raise UserError(f"{source.name}: no record has a class in its field {field or 'caption'!r}")
    labels = sorted(map(str, labels))
    places = _by_plain(labels, source.name)
    if given is None:
        return ClassIndex([(label,) for label in labels], places, field, multi)
    numbers, note = _join(labels, given, source.name, spec if isinstance(spec, str) else "of the weights")
    return ClassIndex(given.names, numbers, field, multi, note)


def _several(record: Mapping[str, Any], field: str = MULTI_FIELD) -> Sequence[Any]:
    """The labels in a field of several, () where it is missing; raises UserError for a text, which has no parts."""
    value = record.get(field)
    if isinstance(value, str):
        raise UserError(f"record {key_of(record)!r}: {field!r} must be a list, not the text {value!r}")
    return () if value is None else value


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _by_number(source: Source, given: ClassNames | None, own: Sequence[str], numbers: Sequence[int] = ()) -> ClassIndex:
    """Classes of a source whose labels are numbers."""
    count = len(own) or max(numbers, default=-1) + 1
    if given is None and not own:
        raise UserError(f"{source.name}: its classes have numbers only; name them with --config.classes=FILE")
    if given is not None and own and len(given.labels) != count:
        raise UserError(f"{source.name} has {count} classes, the class names {len(given.labels)}: use its own names")
    names = given.names if given is not None else [(name.replace("_", " "),) for name in own]
    return ClassIndex(names, {})


def _join(labels: Sequence[str], given: ClassNames, source: str, spec: str) -> tuple[dict[str, int], str]:
    """{plain label: class number} for the data's sorted labels, and how they were joined."""
    known: dict[str, int] = {}
    for i, names in enumerate(given.names):
        for name in reversed(names):
            known.setdefault(_plain(name), i)
    known |= {_plain(label): i for i, label in enumerate(given.labels)}  # the data's own label decides
    lost = [label for label in labels if _plain(label) not in known]
    if not lost:
        return {_plain(label): known[_plain(label)] for label in labels}, ""
    if len(lost) == len(labels) == len(given.labels):
        pairs = ", ".join(f"{label} = {names[0]}" for label, names in zip(labels, given.names, strict=True))
        return {_plain(label): i for i, label in enumerate(labels)}, f"class names joined in order: {pairs}"
    raise UserError(
        f"{len(lost)} of the {len(labels)} classes of {source} are not in the class names {spec} "
        f"({len(given.labels)} classes): {', '.join(map(repr, lost[:8]))}. Name them there, as LABEL = NAME"
    )


def choose_templates(spec: str, dataset: str = "", trained: Sequence[str] = ()) -> tuple[str, ...]:
    """Prompt templates: a set's name, a file with one template a line, or '' for those of `dataset`, else the default.

    `trained`, where there are any, are those that the weights were fine-tuned with, which come before the default.

    Raises:
      UserError: for an unknown set or a file without templates.
    """
    if not spec:
        if dataset in TEMPLATE_SETS:
            return template_set(dataset)
        return tuple(trained) or template_set("default")
    if spec.replace("/", "") in TEMPLATE_SETS or not epath.Path(spec).exists():
        return template_set(spec)  # or says which sets there are
    lines = [line.strip() for line in epath.Path(spec).read_text().splitlines() if line.strip()]
    class_prompts("name", lines)  # raises for a template without its slot
    return tuple(lines)


def all_targets(source: Source, classes: ClassIndex) -> np.ndarray:
    """`classes.target` of every record, in order: int32 (N,), or int8 (N, K) for several classes an image.

    Raises:
      UserError: if a record cannot be read, or is of no known class.
    """
    records = list(source.metadata())
    if len(records) != len(source):
        raise UserError(f"{source.name}: {len(source) - len(records)} of {len(source)} records cannot be read")
    return np.stack([classes.target(record) for record in records])


def open_images(spec: str) -> Source:
    """Opens a labelled source: as `sources.open_source`, or one of `labelled.open_labelled`, such as 'eurosat:DIR'."""
    if spec.partition(":")[0] in (*LABELLED_READERS, "digits"):
        return open_labelled(spec).source
    source = open_source(spec)
    return NearestVehicle(source) if spec.startswith("tfds:") and dataset_name(spec) == "kitti" else source


def as_labelled(source: Source, classes: ClassIndex) -> Labelled:
    """A source with its class numbers side by side; raises as `all_targets`."""
    return Labelled(source, all_targets(source, classes), tuple(classes.first_names))


def hold_out(
    source: Source, classes: ClassIndex, share: float, seed: int, instead: str = "--config.data.test=DATA"
) -> tuple[Subset, Subset]:
    """Splits a labelled source by class: (the rest, a random `share` of each class, at least one image of two or more).

    `instead` is the option that makes it unnecessary, for messages.

    Raises:
      UserError: for a share outside (0, 1), records that cannot be read, or too few images to hold any out.
    """
    if not 0 < share < 1:
        raise UserError(f"config.holdout={share} must be above 0 and below 1, or give {instead}")
    targets = all_targets(source, classes)
    strata = targets.argmax(1) if classes.multi else targets
    rng, held = np.random.default_rng(seed), []
    for k in np.unique(strata):
        rows = rng.permutation(np.flatnonzero(strata == k))
        held.append(rows[: max(round(share * len(rows)), 1) if len(rows) > 1 else 0])
    chosen = np.sort(np.concatenate(held))
    if not len(chosen):
        raise UserError(f"{source.name}: no class has two images, so none can be held out; give {instead}")
    rest = np.setdiff1d(np.arange(len(source)), chosen)
    return Subset(source, rest, f"{source.name} (train)"), Subset(source, chosen, f"{source.name} (held out)")
