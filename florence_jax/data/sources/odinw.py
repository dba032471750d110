"""The eleven sets of the paper's table 7, as GLIP's collection ODinW ("odinw") lays them out: read from disk."""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from etils import epath

from florence_jax.data.box_classes import match_classes
from florence_jax.data.box_problems import Problems
from florence_jax.data.box_table import BoxTable
from florence_jax.data.own_coco import read_own_coco
from florence_jax.errors import UserError

FORM = "odinw:FOLDER:SET[:PART[:glip]]"
ODINW_FILE = "annotations_without_background.json"
PARTS_OF = {
    "train": "train",
    "val": "valid",
    "test": "test",
    "minival": "mini_val",
}  # as GLIP calls them, their folders
SHOTS = re.compile(r"(train|val|minival)_(1|3|5|10)_(3|30|300)")  # GLIP's draws of few pictures: shots, seed
GLIP = "glip"


class OdinwSet(NamedTuple):
    """One of the sets.

    Attributes:
      folder: below that of the collection.
      names: of the classes, in the order of their ids.
      wordings: what GLIP asks for in place of some names.
      unused: classes before the first of these that the files list, and no box is of.
      reduced: whether it has the part minival, a smaller one than val.
      flat: whether all parts lie in one folder, with their names before that of the file.
    """

    folder: str
    names: tuple[str, ...]
    wordings: Mapping[str, str] = {}
    unused: int = 0
    reduced: bool = False
    flat: bool = False


CATS = "Abyssinian Bengal Birman Bombay British_Shorthair Egyptian_Mau Maine_Coon Persian Ragdoll Russian_Blue Siamese"
DOGS = (
    "american_bulldog american_pit_bull_terrier basset_hound beagle boxer chihuahua english_cocker_spaniel "
    "english_setter german_shorthaired great_pyrenees havanese japanese_chin keeshond leonberger miniature_pinscher "
    "newfoundland pomeranian pug saint_bernard samoyed scottish_terrier shiba_inu staffordshire_bull_terrier "
    "wheaten_terrier yorkshire_terrier"
)
PETS = (*(f"cat-{name}" for name in f"{CATS} Sphynx".split()), *(f"dog-{name}" for name in DOGS.split()))
PIECES = "bishop king knight pawn queen rook".split()
ODINW_SETS = {
    "Aquarium": OdinwSet(
        "Aquarium/Aquarium Combined.v2-raw-1024.coco",
        ("fish", "jellyfish", "penguin", "puffin", "shark", "starfish", "stingray"),
        {
            "penguin": "penguin, which is black and white",
            "puffin": "puffin with orange beaks",
            "stingray": "stingray which is flat and round",
        },
    ),
    "BCCD": OdinwSet("BCCD/BCCD.v3-raw.coco", ("Platelets", "RBC", "WBC")),
    "ChessPieces": OdinwSet(
        "ChessPieces/Chess Pieces.v23-raw.coco",
        tuple(f"{colour} {piece}" for colour in ("black", "white") for piece in PIECES),
        unused=1,
    ),
    "MaskWearing": OdinwSet("MaskWearing/raw", ("mask", "no-mask")),
    "OxfordPets": OdinwSet("OxfordPets/by-breed", PETS, reduced=True),
    "Packages": OdinwSet("Packages/Raw", ("package",), {"package": "there is a package on the porch"}),
    "pistols": OdinwSet("pistols/export", ("pistol",), flat=True),
    "PKLot": OdinwSet("PKLot/640", ("space-empty", "space-occupied"), reduced=True),
    "pothole": OdinwSet("pothole", ("pothole",), {"pothole": "there are some holes on the road"}),
    "thermalDogsAndPeople": OdinwSet("thermalDogsAndPeople", ("dog", "person")),
    "WildfireSmoke": OdinwSet("WildfireSmoke", ("smoke",)),
}


class OdinwPart(NamedTuple):
    """The annotations of a part of a set.

    Attributes:
      known: the set. path: of the file. images: folder of the pictures. glip: whether GLIP's wordings are asked for.
    """

    known: OdinwSet
    path: str
    images: str
    glip: bool


def odinw_part(spec: str, split: str = "") -> OdinwPart:
    """What 'odinw:FOLDER:SET[:PART[:glip]]' names.

    SET is a key of `ODINW_SETS`, PART train, val, test, of some sets minival, or a draw of few pictures that the
    collection has: train_5_3, 5 shots of seed 3. Without PART it is `split`, else test.

    Raises:
      UserError: for an unknown set or part, and a file that is not there.
    """
    folder, name, part, glip = _parsed(spec)
    known = ODINW_SETS[name]
    shots = SHOTS.fullmatch(part)
    whole = shots[1] if shots else part or ("train" if split == "train" else "test")
    if whole not in PARTS_OF or (whole == "minival" and not known.reduced):
        parts = [one for one in PARTS_OF if one != "minival" or known.reduced]
        raise UserError(f"data source {spec}: {name} has no part {whole!r}; parts: {', '.join(parts)}, train_5_3, ...")
    root = os.path.join(folder, known.folder)
    images = root if known.flat else os.path.join(root, PARTS_OF[whole])
    file = f"{whole}_{ODINW_FILE}" if known.flat else ODINW_FILE
    if shots:
        file = f"fewshot_{shots[1]}_shot{shots[2]}_seed{shots[3]}.json"
    path = os.path.join(images, file)
    if not epath.Path(path).exists():
        raise UserError(f"data source {spec}: there is no file {path}; lay out {folder} as GLIP's collection odinw is")
    return OdinwPart(known, path, images, glip)


def odinw_table(part: OdinwPart) -> BoxTable:
    """The boxes of a part of a set, with the names of GLIP's configurations, whatever the file calls the classes.

    Where GLIP's wordings are asked for, some classes are called by these.

    Raises:
      UserError: for a file with other classes.
    """
    table = read_own_coco(part.path, Problems())
    name_classes(table, part.known)
    if part.glip:
        table.class_names = [part.known.wordings.get(one, one) for one in table.class_names]
    return table


def _parsed(spec: str) -> tuple[str, str, str, bool]:
    """Folder, set, part ('' for none) and whether the wordings are GLIP's."""
    parts = re.split(r":(?!//)", spec.partition(":")[2])
    folder, name, part, wording = (*parts, "", "", "", "")[:4]
    names = {one.casefold(): one for one in ODINW_SETS}
    if not folder or len(parts) > 4 or name.casefold() not in names or wording not in ("", GLIP):
        raise UserError(f"data source {spec!r}: write {FORM}, SET one of {', '.join(ODINW_SETS)}")
    return folder, names[name.casefold()], part, bool(wording)


def odinw_parts(spec: str) -> frozenset[str]:
    """What a set without a part keeps apart, see `detection.box_parts`."""
    return frozenset() if _parsed(spec)[2] else frozenset(("train", "test"))


def name_classes(table: BoxTable, known: OdinwSet) -> None:
    """Gives the classes of a file, in the order of their ids, the set's names; leaves out the unused ones.

    Boxes of these are counted as of an unknown class.

    Raises:
      UserError: for another number of classes, or names of the set at other places.
    """
    order = sorted(range(len(table.category_ids)), key=table.category_ids.__getitem__)
    unused = known.unused if len(order) > len(known.names) else 0
    listed = [table.class_names[k] for k in order]
    if len(listed) != len(known.names) + unused:
        raise UserError(
            f"{table.name} has {len(listed)} classes, {', '.join(listed)[:200]}; the set has {len(known.names)}: "
            f"{', '.join(known.names)[:200]}"
        )
    places = match_classes(listed[unused:], known.names)
    if ((places >= 0) & (places != np.arange(len(places)))).any():
        raise UserError(f"{table.name}: its classes are in another order than the set's: {', '.join(listed)[:200]}")
    number = np.full(len(order), -1, np.int32)
    number[order[unused:]] = np.arange(len(known.names))
    box_class = number[table.box_class]
    table.add("unknown_category", box_class < 0)
    table.box_class = box_class
    table.keep_boxes(box_class >= 0)
    table.category_ids = [table.category_ids[k] for k in order[unused:]]
    table.class_names, table.frequencies = list(known.names), ()
