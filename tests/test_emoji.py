"""The embedded emoji set: what is in it, what its splits do not share, and that its tool rebuilds it."""

import collections
import dataclasses
import functools
import io
import json
import pathlib

import msgpack
import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image

from florence_jax.data.sources.array_record import write_array_record
from florence_jax.tools import build_emoji

FOLDER = pathlib.Path(build_emoji.__file__).parents[1] / "data" / "emoji"
COUNTS = {"train": 2806, "new_style": 1414, "new_names": 217}
FIELDS = {"key", "image", "caption", "keywords", "group", "subgroup", "style", "family"}


@functools.cache
def load(split):
    reader = array_record_module.ArrayRecordReader(str(FOLDER / f"{split}.array_record"))
    records = [msgpack.unpackb(payload) for payload in reader.read_all()]
    assert "group_size:1," in reader.writer_options_string() + ","
    return records


@functools.cache
def pictures(split):
    return np.stack([build_emoji.decode(record["image"]) for record in load(split)])


def values(split, field):
    return {record[field] for record in load(split)}


@dataclasses.dataclass(frozen=True)
class Distances:
    """All pairs of two splits: Hamming distance of the hashes, and mean difference of the thumbnails."""

    bits: np.ndarray
    colour: np.ndarray


@functools.cache
def distances(a, b):
    (hash_a, thumb_a), (hash_b, thumb_b) = (build_emoji.picture_features(pictures(s)) for s in (a, b))
    bits = np.bitwise_count(hash_a[:, None] ^ hash_b[None]).sum(-1, dtype=np.int32)
    colour = np.full(bits.shape, 255.0)
    for i, j in np.argwhere(bits <= 2 * build_emoji.HASH_THRESHOLD):
        colour[i, j] = np.abs(thumb_a[i] - thumb_b[j]).mean() / 16
    return Distances(bits, colour)


@pytest.mark.parametrize("split", COUNTS)
def test_counts_and_fields(split):
    records = load(split)
    assert len(records) == COUNTS[split]
    assert len(values(split, "key")) == len(records)
    for record in records:
        assert set(record) == FIELDS
        assert record["caption"].strip() and record["subgroup"] and record["family"]
        assert record["keywords"] and all(word.strip() for word in record["keywords"])
        assert record["key"].split("/")[0] == record["style"]
    assert values(split, "group") == set(build_emoji.GROUPS.values())
    assert len(build_emoji.GROUPS) == 8


def test_styles_and_names_of_each_split():
    assert collections.Counter(r["style"] for r in load("train")) == {"noto": 1419, "fluent": 1387}
    assert values("new_style", "style") == values("new_names", "style") == {"twemoji"}
    assert len(values("train", "caption") | values("new_names", "caption")) == 1636
    left_out = values("train", "caption") - values("new_style", "caption")
    assert values("new_style", "caption") < values("train", "caption") and len(left_out) == 5


def test_no_name_or_family_of_new_names_is_in_train():
    for known in ("train", "new_style"):
        for field in ("caption", "family", "key", "image"):
            assert not values(known, field) & values("new_names", field)
    assert all(build_emoji.is_held_out(family) for family in values("new_names", "family"))
    assert not any(build_emoji.is_held_out(family) for family in values("train", "family"))


def test_a_name_has_one_family_group_and_subgroup():
    facts = collections.defaultdict(set)
    for split in COUNTS:
        for r in load(split):
            facts[r["caption"]].add((r["family"], r["group"], r["subgroup"], tuple(r["keywords"])))
    assert all(len(found) == 1 for found in facts.values())


@pytest.mark.parametrize("split", ["new_style", "new_names"])
def test_no_picture_of_a_held_out_split_is_nearly_in_train(split):
    d = distances(split, "train")
    near = (d.bits <= build_emoji.HASH_THRESHOLD) & (d.colour <= build_emoji.COLOUR_THRESHOLD)
    assert d.bits.shape == (COUNTS[split], COUNTS["train"])
    assert not near.any(), [(load(split)[i]["key"], load("train")[j]["key"]) for i, j in np.argwhere(near)]


def test_new_names_keeps_a_margin_to_train():
    """The nearest pair is well beyond the thresholds, so the split does not hang on their exact values."""
    d = distances("new_names", "train")
    assert not ((d.bits <= 26) & (d.colour <= 14)).any()


def test_new_names_shares_no_picture_with_new_style():
    d = distances("new_names", "new_style")
    assert not ((d.bits <= build_emoji.HASH_THRESHOLD) & (d.colour <= build_emoji.COLOUR_THRESHOLD)).any()


def test_near_duplicates_finds_planted_copies_and_nothing_else():
    originals = pictures("new_names")[:60]
    copies = []
    for picture in originals:
        out = io.BytesIO()
        Image.fromarray(picture).resize((56, 56)).resize((64, 64)).save(out, "JPEG", quality=60)
        copies.append(build_emoji.decode(out.getvalue()))
    pairs = build_emoji.near_duplicates(*(build_emoji.picture_features(p) for p in (copies, originals)))
    assert all(i == j for i, j in pairs)
    assert len(pairs) >= 45


@pytest.mark.parametrize(
    ("split", "pair"),
    [("train", ("outbox tray", "inbox tray")), ("new_style", ("man frowning", "man pouting"))],
)
def test_near_duplicates_within_a_split_are_of_one_family(split, pair):
    """Two names drawn alike, though their names say nothing of it, are found, and therefore one family."""
    features, records = build_emoji.picture_features(pictures(split)), load(split)
    pairs = [(i, j) for i, j in build_emoji.near_duplicates(features, features) if i < j]
    names = {frozenset((records[i]["caption"], records[j]["caption"])) for i, j in pairs}
    assert frozenset(pair) in names
    assert all(records[i]["family"] == records[j]["family"] for i, j in pairs)


def test_families_do_not_collapse():
    sizes = collections.Counter({r["caption"]: r["family"] for s in COUNTS for r in load(s)}.values())
    assert len(sizes) == 1197
    assert sizes.most_common(2) == [("family", 30), ("clock face", 24)]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("man health worker", "health worker"),
        ("woman: bald", "person: bald"),
        ("mermaid", "merman"),
        ("person walking: facing right", "man walking"),
        ("one o’clock", "twelve-thirty"),
        ("keycap: 1", "keycap: #"),
        ("new moon", "waning gibbous moon"),
        ("white medium-small square", "red square"),
        ("light blue heart", "red heart"),
        ("small orange diamond", "large blue diamond"),
        ("up-right arrow", "left arrow curving right"),
        ("family: man, woman, boy", "family"),
        ("green book", "orange book"),
        ("oncoming bus", "bus"),
    ],
)
def test_variants_are_one_family(a, b):
    assert build_emoji.family_name(a) == build_emoji.family_name(b)


@pytest.mark.parametrize(("a", "b"), [("Aries", "Leo"), ("moon cake", "new moon"), ("BACK arrow", "up arrow")])
def test_different_concepts_are_different_families(a, b):
    assert build_emoji.family_name(a) != build_emoji.family_name(b)


@pytest.mark.parametrize("split", COUNTS)
def test_pictures_are_webp_of_64_pixels_on_white(split):
    for record in load(split):
        image = Image.open(io.BytesIO(record["image"]))
        assert (image.format, image.size, image.mode) == ("WEBP", (64, 64), "RGB")
    corners = pictures(split)[:, [0, 0, -1, -1], [0, -1, 0, -1]]  # some symbols fill the square
    assert (corners >= 250).all(axis=-1).mean() > 0.75
    assert pictures(split).std(axis=(1, 2, 3)).min() > 1  # nothing is blank


def test_encode_picture_composes_on_white_and_keeps_the_aspect():
    out = io.BytesIO()
    Image.new("RGBA", (256, 512), (255, 0, 0, 255)).save(out, "PNG")
    picture = build_emoji.decode(build_emoji.encode_picture(out.getvalue())).astype(int)
    assert picture.shape == (64, 64, 3)
    assert (picture[:, :12] > 240).all() and (picture[:, -12:] > 240).all()
    assert (picture[:, 20:44, 0] > 230).all() and (picture[:, 20:44, 1:] < 25).all()


def test_size_of_what_is_shipped():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.array_record*")) <= 6_000_000


@pytest.mark.parametrize("split", COUNTS)
def test_side_files_are_those_of_the_records(split, tmp_path):
    write_array_record(str(tmp_path / "a"), load(split))
    for end in ("", ".meta"):
        assert (tmp_path / f"a{end}").read_bytes() == (FOLDER / f"{split}.array_record{end}").read_bytes()


def test_licences_and_notice():
    texts = {path.name: path.read_text() for path in (FOLDER / "licenses").iterdir()}
    for name, phrase in {
        "LICENSE-noto-Apache-2.0.txt": "Apache License",
        "LICENSE-fluent-MIT.txt": "Copyright (c) Microsoft Corporation",
        "LICENSE-twemoji-CC-BY-4.0.txt": "Creative Commons Attribution 4.0 International Public License",
        "LICENSE-emojibase-MIT.txt": "Miles Johnson",
        "LICENSE-cldr-Unicode-3.0.txt": "UNICODE LICENSE V3",
        "LICENSE-emoji-datasource-MIT.txt": "Cal Henderson",
    }.items():
        assert phrase in texts[name]
        assert name in texts["NOTICE.txt"]
    assert "https://creativecommons.org/licenses/by/4.0/" in texts["NOTICE.txt"]


def test_readme_tells_the_truth():
    text = (FOLDER / "README.md").read_text()
    assert "not photographs" in text
    for split, count in COUNTS.items():
        shares = collections.Counter(record["group"] for record in load(split)).values()
        size = (FOLDER / f"{split}.array_record").stat().st_size
        row = next(line for line in text.splitlines() if line.startswith(f"| `{split}.array_record`"))
        families = len(values(split, "family"))
        for number in (f"{count:,}", f"{size:,}", f"{families:,}", f"{100 * max(shares) / count:.2f} %"):
            assert f" {number} |" in row
    assert len(values("train", "subgroup") | values("new_names", "subgroup")) == 95


def drawing(seed, size):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 4), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels, "RGBA").resize(size, Image.Resampling.NEAREST).save(out, "PNG")
    return out.getvalue()


def small_packages(count=40):
    """The four packages in miniature: `count` names, the third of which Fluent lacks."""
    points = [f"1f6{i:02x}" for i in range(count)]
    rows = [{"unified": p.upper(), "category": "Objects", "sort_order": i} for i, p in enumerate(points)]
    rows.append({"unified": "1F1E6", "category": "Flags", "sort_order": -1})
    entry = {"tags": ["thing"], "group": 7, "subgroup": 82}
    names = [{"hexcode": p.upper(), "label": f"thing {p}"} | entry for p in points]
    groups = {"groups": {"7": "objects"}, "subgroups": {"82": "other-object"}}
    return {
        "noto": {"package/emoji.json": json.dumps(rows).encode()}
        | {f"package/img/google/64/{p}.png": drawing(i, (64, 64)) for i, p in enumerate(points)},
        "twemoji": {f"package/img/twitter/64/{p}.png": drawing(1000 + i, (64, 64)) for i, p in enumerate(points)},
        "fluent": {
            f"package/assets/{p}-fe0f.webp": drawing(2000 + i, (256, 264)) for i, p in enumerate(points) if i != 2
        },
        "names": {
            "package/en/data.json": json.dumps(names).encode(),
            "package/meta/groups.json": json.dumps(groups).encode(),
        },
    }


def test_a_rebuild_gives_the_same_bytes_and_a_change_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_emoji, "read_packages", lambda folder: small_packages())
    splits = build_emoji.build_set(tmp_path, tmp_path / "a")
    assert sum(len(rows) for rows in splits.values()) == len(splits["train"]) + 40
    assert len(splits["train"]) == 2 * len(splits["new_style"]) - (not build_emoji.is_held_out("thing 1f602"))
    arguments = ["--npm", str(tmp_path), "--out", str(tmp_path / "a")]
    assert build_emoji.main([*arguments, "--check"]) == 0
    path = tmp_path / "a" / "train.array_record"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    capsys.readouterr()
    assert build_emoji.main([*arguments, "--check"]) == 1
    assert "train.array_record" in capsys.readouterr().err
    assert path.read_bytes() == data  # a check writes nothing
    assert build_emoji.main(arguments) == 0 and path.read_bytes() != data


def test_a_twemoji_copy_of_a_train_picture_is_left_out(monkeypatch):
    packages = small_packages()
    for path, data in packages["noto"].items():
        if path.endswith(".png"):
            packages["twemoji"][path.replace("google", "twitter")] = data
    records = build_emoji.read_records(packages)
    splits = build_emoji.split_records(records)
    assert not splits["new_style"] and splits["train"] and splits["new_names"]


def test_near_duplicates_join_families():
    packages = small_packages(6)
    copied = packages["fluent"]["package/assets/1f601-fe0f.webp"]
    packages["twemoji"]["package/img/twitter/64/1f604.png"] = copied
    records = build_emoji.read_records(packages)
    build_emoji.join_families(records)
    families = {record["caption"]: record["family"] for record in records}
    assert families["thing 1f604"] == families["thing 1f601"] == "thing 1f601"
    assert len(set(families.values())) == 5


def test_wrong_tarball_is_a_users_mistake(tmp_path, capsys):
    (tmp_path / build_emoji.PACKAGES["noto"][1]).write_bytes(b"not the package")
    assert build_emoji.main(["--npm", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "sha256" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_tarball_without_npm_is_a_users_mistake(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_emoji.shutil, "which", lambda name: None)
    assert build_emoji.main(["--npm", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "npm is not installed" in capsys.readouterr().err
