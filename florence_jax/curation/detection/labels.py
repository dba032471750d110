"""One label space by text for detection sets that name their classes differently.

As in UniCL, the label is the text: categories with the same normalised name are one class. A name may also be changed
by a rule (`RULES`, or the user's table), and a category joins another set's class if that is named among its synonyms
and the two classes have no set in common. What was merged, why, and what was kept apart is written as a table.
"""

import collections
import csv
import io
from collections.abc import Iterable, Sequence

import numpy as np

from florence_jax.data.annotations import FORMATS, Annotations, Category, csv_columns
from florence_jax.data.captions import normalise_caption
from florence_jax.errors import UserError

# (set, its category by name or id, the text of the class). First: one name, two things.
RULES = (
    ("coco", "mouse", "computer mouse"),
    ("objects365", "Mouse", "computer mouse"),
    ("lvis", "mouse_(computer_equipment)", "computer mouse"),
    ("imagenet", "n03793489", "computer mouse"),
    ("imagenet", "n02330245", "mouse (animal)"),
    ("openimages", "Mouse", "mouse (animal)"),
    ("objects365", "Crane", "crane (machine)"),
    ("imagenet", "n02012849", "crane (bird)"),
    ("imagenet", "n03126707", "crane (machine)"),
    # Then: one thing, two names.
    ("coco", "hair drier", "hair dryer"),
    ("coco", "donut", "doughnut"),
    ("objects365", "Donut", "doughnut"),
    ("coco", "keyboard", "computer keyboard"),
    ("objects365", "Keyboard", "computer keyboard"),
    ("coco", "remote", "remote control"),
    ("objects365", "Remote", "remote control"),
    ("coco", "tv", "television"),
    ("lvis", "television_set", "television"),
    ("coco", "cell phone", "mobile phone"),
    ("objects365", "Cell Phone", "mobile phone"),
    ("lvis", "cellular_telephone", "mobile phone"),
    ("coco", "skis", "ski"),
    ("coco", "microwave", "microwave oven"),
    ("objects365", "Microwave", "microwave oven"),
    ("lvis", "laptop_computer", "laptop"),
    ("lvis", "sofa", "couch"),
    ("lvis", "necktie", "tie"),
    ("lvis", "fireplug", "fire hydrant"),
    ("lvis", "wineglass", "wine glass"),
    ("lvis", "car_(automobile)", "car"),
    ("lvis", "bus_(vehicle)", "bus"),
    ("lvis", "train_(railroad_vehicle)", "train"),
    ("lvis", "orange_(fruit)", "orange"),
    ("openimages", "Flying disc", "frisbee"),
    ("openimages", "Cattle", "cow"),
    ("openimages", "Kitchen & dining room table", "dining table"),
    ("objects365", "Dinning Table", "dining table"),
    ("objects365", "Table Teniis paddle", "table tennis racket"),
)
LabelRule = tuple[str, str, str]
_Member = tuple[str, Category]  # a set (of FORMATS) and its category


def class_text(name: str) -> str:
    """The text of a class: the normalised name with spaces for underscores. Qualifiers as in 'bat_(animal)' stay."""
    return normalise_caption(name.replace("_", " "))


def read_rules(path: str) -> list[LabelRule]:
    """The user's rules: a CSV with the columns source, category (name or id) and text.

    Raises:
      UserError: for a missing column, an unknown source or an empty text.
    """
    rules = []
    for line, (kind, category, text) in csv_columns(path, ("source", "category", "text")):
        if kind not in FORMATS or not category or not class_text(text):
            raise UserError(f"{path} line {line}: needs a source ({', '.join(FORMATS)}), a category and a text")
        rules.append((kind, category, text))
    return rules


class LabelSpace:
    """The classes of several sources.

    Args:
      tables: the sources; their order does not matter.
      rules: as `RULES`; of two for the same category the last counts.

    Attributes:
      texts: of the classes, sorted: the class id is the index.
      kept_apart: (text, text, why) of classes that a synonym would have joined.
      unused_rules: those of `rules` whose set is there but not their category.
    """

    def __init__(self, tables: Sequence[Annotations], rules: Sequence[LabelRule] = RULES):
        self._named: dict[_Member, tuple[str, str]] = {}  # text and how it was found
        wanted = {(kind, category): text for kind, category, text in rules}
        used = set()
        for kind, category in sorted({(t.spec.kind, c) for t in tables for c in t.categories}, key=_order):
            self._named[kind, category] = (class_text(category.name), "name")
            keys = [(category.named_by or kind, category.name)]
            if not category.named_by:  # a teacher may number another set's classes anew
                keys.append((kind, category.id))
            for key in keys:
                if key in wanted:
                    self._named[kind, category] = (class_text(wanted[key]), "rule")
                    used.add(key)
            if not self._named[kind, category][0]:
                raise UserError(f"category {category.id} of {kind} has an empty name: give a rule for it")
        kinds = {table.spec.kind for table in tables}
        self.unused_rules = [rule for rule in rules if rule[0] in kinds and rule[:2] not in used]
        self.kept_apart: list[tuple[str, str, str]] = []
        self._join_synonyms()
        self.texts = sorted({text for text, _ in self._named.values()})
        self._ids = {text: number for number, text in enumerate(self.texts)}

    def _join_synonyms(self) -> None:
        """Merges classes along synonyms that name exactly one class, in the order of the sets' preference."""
        members = collections.defaultdict(list)
        for member, (text, _) in self._named.items():
            members[text].append(member)
        final = {text: text for text in members}  # after merging; followed to its end
        claims = collections.defaultdict(set)
        for (_, category), (text, _) in self._named.items():
            for synonym in map(class_text, category.synonyms):
                if synonym in members and synonym != text:
                    claims[synonym].add(text)
        for synonym, claimants in sorted(claims.items()):
            if len(claimants) > 1:
                self.kept_apart += [(synonym, text, "a synonym of several classes") for text in sorted(claimants)]
                continue
            a, b = (_end(final, text) for text in (synonym, *claimants))
            if a == b:
                continue
            shared = {kind for kind, _ in members[a]} & {kind for kind, _ in members[b]}
            if shared:
                self.kept_apart.append((synonym, *claimants, f"both are classes of {', '.join(sorted(shared))}"))
                continue
            keep, gone = sorted((a, b), key=lambda text: min(map(_order, members[text])))
            final[gone] = keep
            for member in members[gone]:
                self._named[member] = (keep, f"synonym {synonym!r}")
            members[keep] += members.pop(gone)

    def __len__(self) -> int:
        return len(self.texts)

    def ids(self, kind: str, categories: Iterable[Category]) -> np.ndarray:
        """int32: the class of each category of a set."""
        return np.array([self._ids[self._named[kind, category][0]] for category in categories], np.int32)

    def merge_table(self) -> list[dict[str, str | int]]:
        """A row for each category of each set, by class: class_id, text, source, category_id, category, how."""
        rows = [
            {
                "class_id": self._ids[text],
                "text": text,
                "source": kind,
                "category_id": category.id,
                "category": category.name,
                "how": how,
            }
            for (kind, category), (text, how) in self._named.items()
        ]
        return sorted(rows, key=lambda row: (row["class_id"], FORMATS.index(row["source"]), row["category_id"]))

    def classes(self) -> list[dict]:
        """For each class: id, text, names (all that the sets give it) and parents (texts of broader concepts)."""
        names, parents = collections.defaultdict(set), collections.defaultdict(set)
        # A parent that is itself a category of its set goes by its class's text.
        own = {(kind, category.name): text for (kind, category), (text, _) in self._named.items()}
        for (kind, category), (text, _) in self._named.items():
            names[text] |= {class_text(name) for name in (category.name, *category.synonyms)}
            parents[text] |= {own.get((kind, parent), class_text(parent)) for parent in category.parents}
        return [
            {"id": i, "text": text, "names": sorted(names[text] | {text}), "parents": sorted(parents[text] - {text})}
            for i, text in enumerate(self.texts)
        ]


def _order(member: _Member) -> tuple[int, str, str, str]:
    kind, category = member
    return FORMATS.index(kind), category.name, category.id, category.named_by


def _end(final: dict[str, str], text: str) -> str:
    while final[text] != text:
        text = final[text]
    return text


def csv_text(columns: Sequence[str], rows: Iterable[dict]) -> str:
    """CSV with a header; other keys of the rows are left out."""
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
