"""Rebuilds the embedded emoji data set, byte for byte, from four npm packages.

    python -m florence_jax.tools.build_emoji --npm=DIR          # rewrites florence_jax/data/emoji
    python -m florence_jax.tools.build_emoji --npm=DIR --check  # compares a rebuild with what is shipped

DIR holds the package tarballs as `npm pack` writes them; a missing one is fetched with `npm pack`, and every
one is checked against its sha256. The bytes depend on the WebP encoder: the shipped files were made on x86-64
Linux with `pip install Pillow==13.0.0 array_record==0.8.6 msgpack==1.2.4` (Pillow 13.0.0 has libwebp 1.6.0).

What is built: 1,636 Unicode emoji (no flags, components or skin tones) as drawn by Noto, Fluent and Twemoji,
64 pixels on white, with the CLDR short name as the caption. The drawings are art made by people, not
photographs. Three splits:

* `train`: Noto and Fluent drawings of about six sevenths of the names;
* `new_style`: Twemoji drawings of the names in `train`, without those nearly identical to a picture of it;
* `new_names`: Twemoji drawings of the other names.

Names are split by family: a concept with its variants (`family_name`), joined with every family that has a
nearly identical picture in any style (`near_duplicates`). So `train` and `new_names` share no name, family or
picture. Records are stored in the order of a digest of their keys: any slice of a file mixes the groups.
"""

import argparse
import hashlib
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence

import numpy as np
import PIL
from PIL import Image, features

from florence_jax.command_line import enter, exit_code
from florence_jax.data.sources.array_record import META, write_array_record
from florence_jax.errors import UserError
from florence_jax.files import with_home
from florence_jax.pictures import upright_rgb

PACKAGES = {
    "noto": (
        "emoji-datasource-google@16.0.0",
        "emoji-datasource-google-16.0.0.tgz",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "twemoji": (
        "emoji-datasource-twitter@16.0.0",
        "emoji-datasource-twitter-16.0.0.tgz",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
    "fluent": (
        "@lobehub/fluent-emoji-3d@1.1.0",
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    "names": (
        "emojibase-data@17.0.0",
        "emojibase-data-17.0.0.tgz",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
}
IMAGE_FOLDERS = {
    "noto": "package/img/google/64/",
    "twemoji": "package/img/twitter/64/",
    "fluent": "package/assets/",
}
STYLES = ("noto", "fluent", "twemoji")
GROUPS = {
    "smileys-emotion": "smileys & emotion",
    "people-body": "people & body",
    "animals-nature": "animals & nature",
    "food-drink": "food & drink",
    "travel-places": "travel & places",
    "activities": "activities",
    "objects": "objects",
    "symbols": "symbols",
}
BUILT_SPLITS = ("train", "new_style", "new_names")
SIZE = 64  # pixels, both sides
WEBP = {"quality": 82, "method": 6}
SPLIT_SALT = "florence_jax emoji families"  # chosen once, as a plain description
HELD_OUT = 7  # one family in seven is kept for new_names
HASH_THRESHOLD = 20  # bits of 256
COLOUR_THRESHOLD = 8.0  # mean absolute difference of two 16 x 16 RGB thumbnails, of 255
Features = tuple[np.ndarray, np.ndarray]  # hashes and thumbnails, see `picture_features`
THUMBNAIL = 16  # pixels, both sides
LUMA = np.array([299, 587, 114])  # Rec. 601 weights in thousandths: integers keep the hash exact everywhere
EDGE = 2  # grey levels: a smaller step between neighbours counts as flat

COLOURS = "red|pink|orange|yellow|green|light blue|blue|purple|brown|black|grey|white|hollow red"
SIZES = "large|medium-small|medium|small"
FAMILY_ALIASES = {
    "person with crown": "royalty",
    "prince": "royalty",
    "princess": "royalty",
    "merman": "merperson",
    "mermaid": "merperson",
    "santa claus": "claus",
    "mrs. claus": "claus",
    "mx claus": "claus",
    "breast-feeding": "feeding baby",
    "boy": "child",
    "girl": "child",
    "man": "person",
    "woman": "person",
    "old man": "old person",
    "old woman": "old person",
    "older person": "old person",
    "male sign": "gender sign",
    "female sign": "gender sign",
    "transgender symbol": "gender sign",
    "play button": "single arrow button",
    "reverse button": "single arrow button",
    "upwards button": "single arrow button",
    "downwards button": "single arrow button",
    "fast-forward button": "double arrow button",
    "fast reverse button": "double arrow button",
    "fast up button": "double arrow button",
    "fast down button": "double arrow button",
    "next track button": "track button",
    "last track button": "track button",
    "unlocked": "locked",
    "hourglass done": "hourglass",
    "hourglass not done": "hourglass",
    "chart decreasing": "chart increasing",
    "star": "medium star",
    "muted speaker": "speaker",
}
FAMILY_PATTERNS = (  # (pattern searched in the lower-case name, family); the first match wins
    (r"^keycap: ", "keycap"),
    (r"o’clock$|-thirty$", "clock face"),
    (r"(new|crescent|quarter|gibbous|full) moon( face)?$", "moon phase"),
    (r"^(1st|2nd|3rd) place medal$", "place medal"),
    (r"^family\b", "family"),
    (r"^kiss$|^kiss: ", "kiss"),
    (r"^couple with heart", "couple with heart"),
    (r"holding hands$", "holding hands"),
    (r"\(blood type\)$", "blood type button"),
    (r"^((up|down|left|right)-?)+ arrow\b", "direction arrow"),
    (r"^(right|left)wards hand$|^palm (up|down) hand$", "sideways hand"),
    (r"wards pushing hand$", "pushing hand"),
    (r"index pointing", "index pointing"),
    (r"^thumbs ", "thumbs"),
    (r"-facing fist$|^oncoming fist$|^raised fist$", "fist"),
    (r"^globe showing", "globe showing"),
    (r"^magnifying glass", "magnifying glass"),
    (r"^red triangle pointed", "red triangle"),
    (r"mailbox with", "mailbox"),
    (r"^speaker .* volume$", "speaker"),
    (r"(question|exclamation) mark$", "question or exclamation mark"),
    (rf"^({SIZES}) ({COLOURS}) diamond$", "coloured diamond"),
    (rf"^({COLOURS})( {SIZES.replace('|', '| ')})? square$", "coloured square"),
    (rf"^({COLOURS}) circle$", "coloured circle"),
    (rf"^({COLOURS}) heart$", "coloured heart"),
    (r"square button$", "square button"),
)


def read_packages(folder: pathlib.Path) -> dict[str, dict[str, bytes]]:
    """Reads the needed files of the four packages.

    Args:
        folder: where the tarballs are; a missing one is fetched into it with `npm pack`.

    Returns:
        For each of `PACKAGES`, its wanted files by path inside the tarball.

    Raises:
        UserError: a tarball has another sha256, or is missing and cannot be fetched.
    """
    contents = {}
    for name, (spec, filename, digest) in PACKAGES.items():
        path = folder / filename
        if not path.exists():
            _npm_pack(spec, folder)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise UserError(f"{path} is not the published {spec} (sha256 differs): delete it and run again")
        with tarfile.open(fileobj=io.BytesIO(data), mode="r|gz") as archive:
            contents[name] = {m.name: archive.extractfile(m).read() for m in archive if _wanted(name, m.name)}
    return contents


def _wanted(package: str, path: str) -> bool:
    folder = IMAGE_FOLDERS.get(package)
    if folder and path.startswith(folder):
        return path.endswith((".png", ".webp"))
    return path in ("package/emoji.json", "package/en/data.json", "package/meta/groups.json")


def _npm_pack(spec: str, folder: pathlib.Path) -> None:
    if shutil.which("npm") is None:
        raise UserError(f"{spec} is not in {folder} and npm is not installed: put its tarball there")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--silent", spec]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.split())[-200:]
        raise UserError(f"npm pack {spec} failed ({reason}): put its tarball into {folder}")


def code_points(name: str) -> str:
    """Returns the code points of a file name, lower case, without the variation selector FE0F."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def family_name(label: str) -> str:
    """Returns the concept that a CLDR short name is a variant of.

    Gender (man / woman / person), direction, colour and size of the same shape, clock faces, moon phases,
    keycaps and family compositions each map to one name; most names map to themselves.
    """
    name = label.lower().replace(": facing right", "")
    for pattern, family in FAMILY_PATTERNS:
        if re.search(pattern, name):
            return family
    if name in FAMILY_ALIASES:
        return FAMILY_ALIASES[name]
    name = re.sub(r"\b(man|woman|person|men|women|people)\b", "person", name)
    name = re.sub(r"^(person:? |oncoming )", "", name)
    return re.sub(rf"^({COLOURS}) (?=\w)", "", name)


def encode_picture(data: bytes) -> bytes:
    """Composes one drawing on white at 64 x 64 pixels (aspect kept, centred) and encodes it as lossy WebP."""
    drawing = Image.open(io.BytesIO(data)).convert("RGBA")
    scale = SIZE / max(drawing.size)
    size = tuple(max(1, round(side * scale)) for side in drawing.size)
    if size != drawing.size:
        drawing = drawing.resize(size, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 255))
    canvas.alpha_composite(drawing, ((SIZE - size[0]) // 2, (SIZE - size[1]) // 2))
    out = io.BytesIO()
    canvas.convert("RGB").save(out, "WEBP", **WEBP)
    return out.getvalue()


def read_records(packages: dict[str, dict[str, bytes]]) -> list[dict]:
    """Builds the records of all names and styles, in Unicode order, with `family` from the name alone."""
    table = json.loads(packages["noto"]["package/emoji.json"])
    groups = json.loads(packages["names"]["package/meta/groups.json"])
    entries = json.loads(packages["names"]["package/en/data.json"])
    names = {code_points(entry["hexcode"]): entry for entry in entries}
    files = {style: {} for style in STYLES}
    for style, folder in IMAGE_FOLDERS.items():
        for path in sorted(packages[style]):
            if path.startswith(folder):
                files[style].setdefault(code_points(pathlib.PurePosixPath(path).stem), packages[style][path])
    records = []
    for row in sorted(table, key=lambda row: row["sort_order"]):
        if row["category"] in ("Flags", "Component"):
            continue
        points = code_points(row["unified"])
        entry = names[points]
        for style in STYLES:
            if points in files[style]:
                record = {
                    "key": f"{style}/{points}",
                    "image": encode_picture(files[style][points]),
                    "caption": entry["label"],
                    "keywords": entry["tags"],
                    "group": GROUPS[groups["groups"][str(entry["group"])]],
                    "subgroup": groups["subgroups"][str(entry["subgroup"])],
                    "style": style,
                    "family": family_name(entry["label"]),
                }
                records.append(record)
    return records


def decode(image: bytes) -> np.ndarray:
    """Decodes an encoded picture to uint8 (64, 64, 3)."""
    return np.asarray(upright_rgb(image))


def picture_features(pictures: Sequence[np.ndarray]) -> Features:
    """Describes pictures for the near-duplicate test.

    Args:
        pictures: uint8 (64, 64, 3) each.

    Returns:
        Hashes, uint64 (N, 4): a 256-bit horizontal difference hash, one bit per thumbnail pixel, set where
        the pixel to the right (white beyond the border) is lighter by more than `EDGE`. Thumbnails, int32
        (N, 16, 16, 3): sums of RGB over 4 x 4 pixels.
    """
    block = SIZE // THUMBNAIL
    tiles = np.stack(pictures).reshape(-1, THUMBNAIL, block, THUMBNAIL, block, 3)
    thumbnails = tiles.sum((2, 4), dtype=np.int32)
    luma = thumbnails @ LUMA
    luma = np.pad(luma, ((0, 0), (0, 0), (0, 1)), constant_values=255 * block**2 * LUMA.sum())
    bits = np.diff(luma, axis=2) > EDGE * block**2 * LUMA.sum()
    return np.packbits(bits.reshape(len(bits), -1), axis=1).view(np.uint64), thumbnails


def near_duplicates(a: Features, b: Features) -> list[tuple[int, int]]:
    """Returns the pairs (index in a, index in b) of nearly identical pictures from their `picture_features`.

    Nearly identical: hashes at most `HASH_THRESHOLD` bits apart and thumbnails at most `COLOUR_THRESHOLD`
    apart. The hash sees outlines, the thumbnails see colour; flat symbols need both.
    """
    limit = COLOUR_THRESHOLD * (SIZE // THUMBNAIL) ** 2
    pairs = []
    for i, (code, thumbnail) in enumerate(zip(*a, strict=True)):
        near = np.nonzero(np.bitwise_count(b[0] ^ code).sum(1) <= HASH_THRESHOLD)[0]
        differences = np.abs(b[1][near] - thumbnail).mean((1, 2, 3))
        pairs.extend((i, int(j)) for j in near[differences <= limit])
    return pairs


def join_families(records: list[dict]) -> None:
    """Joins families with nearly identical pictures, in place; the first one in Unicode order gives the name.

    Args:
        records: in Unicode order, with the `family` of `family_name`.
    """
    order = {family: i for i, family in reversed([(i, r["family"]) for i, r in enumerate(records)])}
    parent = {family: family for family in order}

    def root(family: str) -> str:
        while parent[family] != family:
            family = parent[family]
        return family

    features = picture_features([decode(record["image"]) for record in records])
    for i, j in near_duplicates(features, features):
        first, second = sorted((root(records[i]["family"]), root(records[j]["family"])), key=order.get)
        parent[second] = first
    for record in records:
        record["family"] = root(record["family"])


def is_held_out(family: str) -> bool:
    """Returns whether a family belongs to `new_names`: one in seven, by the SHA-256 digest of its name."""
    digest = hashlib.sha256(f"{SPLIT_SALT}/{family}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT == 0


def split_records(records: list[dict]) -> dict[str, list[dict]]:
    """Distributes records over `BUILT_SPLITS` as the module says; Noto and Fluent of held-out names are unused."""
    splits = {name: [] for name in BUILT_SPLITS}
    for record in sorted(records, key=lambda record: hashlib.sha256(record["key"].encode()).digest()):
        held_out, unseen_style = is_held_out(record["family"]), record["style"] == "twemoji"
        if unseen_style:
            splits["new_names" if held_out else "new_style"].append(record)
        elif not held_out:
            splits["train"].append(record)
    train, style = (picture_features([decode(record["image"]) for record in splits[s]]) for s in ("train", "new_style"))
    known = {i for i, _ in near_duplicates(style, train)}
    splits["new_style"] = [record for i, record in enumerate(splits["new_style"]) if i not in known]
    return splits


def build_set(npm: pathlib.Path, out: pathlib.Path) -> dict[str, list[dict]]:
    """Builds the three files and their side files in `out` from the tarballs in `npm`; returns the records written.

    Raises:
        UserError: see `read_packages`.
    """
    records = read_records(read_packages(npm))
    join_families(records)
    splits = split_records(records)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        write_array_record(str(out / f"{name}.array_record"), rows)
    return splits


def changed_files(rebuilt: pathlib.Path, shipped: pathlib.Path) -> list[str]:
    """Returns the names of the data files that differ in any byte between two folders, or that one lacks."""
    changed = []
    for name in (f"{split}.array_record{suffix}" for split in BUILT_SPLITS for suffix in ("", META)):
        a, b = (folder / name for folder in (rebuilt, shipped))
        if not (a.exists() and b.exists() and a.read_bytes() == b.read_bytes()):
            changed.append(a.name)
    return changed


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status (1: `--check` found a difference, 2: a user's mistake)."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--npm", type=pathlib.Path, required=True, help="folder of the npm tarballs")
    default = pathlib.Path(__file__).parents[1] / "data" / "emoji"
    parser.add_argument("--out", type=pathlib.Path, default=default, help="folder of the data files")
    parser.add_argument("--check", action="store_true", help="compare a rebuild with the files in --out")

    def work() -> int:
        args = parser.parse_args(with_home(argv))
        with tempfile.TemporaryDirectory() as scratch:
            target = pathlib.Path(scratch) if args.check else args.out
            for name, rows in build_set(args.npm, target).items():
                size = (target / f"{name}.array_record").stat().st_size
                print(f"{name}: {len(rows)} records, {size} bytes")
            changed = changed_files(target, args.out)
        if changed:
            encoder = f"Pillow {PIL.__version__}, libwebp {features.version('webp')}"
            print(f"differ from {args.out}: {', '.join(changed)} (rebuilt with {encoder})", file=sys.stderr)
            return 1
        return 0

    return exit_code(work)


if __name__ == "__main__":
    enter(main)
