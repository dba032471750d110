"""A raw sample of about 1,700 pairs with planted faults, made from the embedded emoji; the answer to each is known.

    python -m florence_jax.curation.sample DIR

The pictures are drawings, not web photographs: the sample shows that each rule works, not how often one fires.

    DIR/web/*.parquet            image bytes, url, licence and response headers in columns
    DIR/crawl/*.tar              WebDataset as img2dataset writes it
    DIR/folder/captions.csv      image files with a table
    DIR/records/*.array_record   msgpack records
    DIR/benchmark/               pictures of a benchmark that must not be trained on
    DIR/blocked_hashes.txt       sha256 of pictures that must be quarantined
    DIR/truth.json               {source: {key: fault}}; '' where there is none
"""

import argparse
import csv
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from florence_jax.command_line import enter, exit_code
from florence_jax.data.sources.array_record import write_array_record
from florence_jax.data.sources.catalog import open_source
from florence_jax.files import with_home, write_bytes, write_file, write_json
from florence_jax.pictures import upright_rgb

Row = dict[str, Any]
SOURCES = ("web", "crawl", "folder", "records")
GOOD = 1100  # pairs without a fault
BENCHMARK = 24  # pictures of the benchmark
FREQUENT_CAPTION = "an icon from our collection"
LICENCE = "CC-BY-4.0"
BLOCKED_DOMAIN = "blocked.example"
PLACE = "in the window of our little shop by the river"
OPT_OUTS = ("X-Robots-Tag: noai", "X-Robots-Tag: max-image-preview: large, noai")
FOREIGN = (
    "ein kleines Haus am Rande des Waldes mit einem Garten",
    "la maison est grande et le jardin est plein de fleurs",
    "el perro corre por la playa con una pelota roja",
    "новая красная машина стоит на улице возле дома",
)


def _encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _open(row: Row) -> Image.Image:
    return upright_rgb(row["image"])


def _resized(row: Row, factor: float) -> bytes:
    image = _open(row)
    return _encode(image.resize([round(side * factor) for side in image.size], Image.Resampling.BICUBIC))


def _bomb(_: Row) -> bytes:
    """A PNG whose header states 60,000 x 60,000 pixels."""
    data = bytearray(_encode(Image.new("L", (8, 8))))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def _animated(row: Row) -> bytes:
    image = _open(row)
    return _encode(image, "GIF", save_all=True, append_images=[ImageOps.mirror(image)], duration=100)


def _rotated(row: Row) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encode(_open(row).rotate(90), "JPEG", exif=exif, quality=95)


def _alpha(row: Row) -> bytes:
    image = _open(row)
    image.putalpha(ImageOps.invert(image.convert("L")).point(lambda v: 255 if v > 8 else 0))
    return _encode(image)


# fault -> (how many, what becomes of the picture)
IMAGE_FAULTS: dict[str, tuple[int, Callable[[Row], bytes]]] = {
    "truncated": (20, lambda row: _encode(_open(row), "JPEG")[:-600]),
    "corrupt": (10, lambda row: row["image"][:20] + bytes(200)),
    "unsupported": (10, lambda row: b"<!doctype html><title>404 not found</title>"),
    "missing": (6, lambda row: b""),
    "too_many_pixels": (4, _bomb),
    "animated": (6, _animated),
    "small": (40, lambda row: _encode(_open(row).resize((20, 20)))),
    "narrow": (12, lambda row: _encode(_open(row).resize((200, 40)))),
}
# Unusual, but good.
IMAGE_FORMS: dict[str, tuple[int, Callable[[Row], bytes]]] = {
    "cmyk": (8, lambda row: _encode(_open(row).convert("CMYK"), "JPEG", quality=92)),
    "alpha": (8, _alpha),
    "orientation": (8, _rotated),
}
COPIES: dict[str, tuple[int, Callable[[Row], bytes]]] = {
    "exact_copy": (40, lambda row: row["image"]),
    "jpeg_copy": (25, lambda row: _encode(_open(row), "JPEG", quality=60)),
    "resized_copy": (25, lambda row: _resized(row, 1.5)),
    "flipped_copy": (15, lambda row: _encode(ImageOps.mirror(_open(row)))),
}
CAPTION_FAULTS: dict[str, tuple[int, Callable[[Row, int], str]]] = {
    "empty": (8, lambda row, i: ("", " ", "&nbsp;")[i % 3]),
    "short": (8, lambda row, i: "a"),
    "long": (6, lambda row, i: " ".join(f"{row['caption']} number {n}" for n in range(300))),
    "file_name": (10, lambda row, i: f"IMG_{2000 + i}.jpg"),
    "url": (10, lambda row, i: f"https://shop.example/item/{i}"),
    "boilerplate": (10, lambda row, i: ("click to enlarge", "image not available", "add to cart")[i % 3]),
    "repetition": (10, lambda row, i: "sale " * (12 + i)),
    "language": (12, lambda row, i: FOREIGN[i % len(FOREIGN)]),
    "mail": (6, lambda row, i: f"{row['caption']} {PLACE}, mail jane.doe{i}@mail.example"),
    "phone": (
        6,
        lambda row, i: f"{row['caption']} {PLACE}, call +49 30 9018{20 + i} 110",
    ),
    "card": (
        4,
        lambda row, i: f"{row['caption']} {PLACE}, card 4111 1111 1111 1111",
    ),
}
FIELD_FAULTS: dict[str, tuple[int, Callable[[int], Row]]] = {
    "licence": (12, lambda i: {"licence": "all rights reserved"}),
    "robots": (
        12,
        lambda i: {"headers": [OPT_OUTS[i % 2]]},
    ),
    "tdm": (6, lambda i: {"headers": ["tdm-reservation: 1"]}),
    "domain": (10, lambda i: {"url": f"https://img{i}.{BLOCKED_DOMAIN}/{i}.png"}),
}
FREQUENT = 60  # pairs with FREQUENT_CAPTION
HASH_LIST = 5
BENCHMARK_COPIES = 20


def build_sample(folder: str, seed: int = 0) -> dict[str, dict[str, str]]:
    """Writes the sample; the same bytes for the same seed. `truth.json` is written last.

    Args:
      folder: where to; created.
      seed: of the choice and order of the pairs.

    Returns:
      The content of truth.json: for each source the planted fault of each key.
    """
    rng = np.random.default_rng([2111, seed])
    pool = _pool(rng)
    rows = _make_rows(pool)
    blocked = [hashlib.sha256(row["image"]).hexdigest() for row in rows if row["fault"] == "hash_list"]
    rows += _benchmark(folder)
    rows = [rows[i] for i in rng.permutation(len(rows))]
    write_bytes(f"{folder}/blocked_hashes.txt", "".join(f"{digest}\n" for digest in sorted(blocked)).encode())
    for number, row in enumerate(rows):
        row["key"] = f"{number:05d}"
        row.setdefault("url", f"https://site{number % 40}.example/{number:05d}.img")
    truth = {}
    for number, (name, write) in enumerate(zip(SOURCES, SAMPLE_WRITERS, strict=True)):
        part = rows[number :: len(SOURCES)]
        keys = write(f"{folder}/{name}", part)
        truth[name] = {key: row["fault"] for key, row in zip(keys, part, strict=True)}
    write_json(f"{folder}/truth.json", truth)
    return truth


def _pool(rng: np.random.Generator) -> list[Row]:
    source = open_source("emoji:train")
    records = source.__getitems__(rng.permutation(len(source)).tolist())
    fields = ("image", "caption", "keywords", "group")
    return [{name: record[name] for name in fields} | {"licence": LICENCE, "headers": []} for record in records]


def _make_rows(pool: list[Row]) -> list[Row]:
    good = pool[:GOOD]
    rest = iter(pool[GOOD:])
    rows = [row | {"fault": ""} for row in good]
    for fault, (count, change) in (IMAGE_FAULTS | IMAGE_FORMS).items():
        for _ in range(count):
            row = next(rest)
            rows.append(row | {"image": change(row), "fault": fault})
    originals = iter(good)
    for fault, (count, change) in COPIES.items():
        for _ in range(count):
            row = next(originals)
            rows.append(row | {"image": change(row), "caption": f"{row['caption']} picture", "fault": fault})
    for fault, (count, write) in CAPTION_FAULTS.items():
        for i in range(count):
            row = next(rest)
            rows.append(row | {"caption": write(row, i), "fault": fault})
    for fault, (count, fields) in FIELD_FAULTS.items():
        rows += [next(rest) | fields(i) | {"fault": fault} for i in range(count)]
    rows += [next(rest) | {"caption": FREQUENT_CAPTION, "fault": "frequent"} for _ in range(FREQUENT)]
    return rows + [next(rest) | {"fault": "hash_list"} for _ in range(HASH_LIST)]


def _benchmark(folder: str) -> list[Row]:
    """Writes the benchmark's pictures; returns copies of them, every second one at another size."""
    source = open_source("emoji:new_names")
    rows = []
    for i in range(BENCHMARK):
        record = source[i]
        write_bytes(f"{folder}/benchmark/{i:03d}.webp", record["image"])
        if i < BENCHMARK_COPIES:
            row = {"image": record["image"], "caption": record["caption"], "licence": LICENCE, "headers": []}
            row |= {"keywords": record["keywords"], "group": record["group"], "fault": "benchmark"}
            rows.append(row | {"image": _resized(row, 1.5)} if i % 2 else row)
    return rows


# -- the four kinds of input ------------------------------------------------------------------------------------------


def _write_parquet(folder: str, rows: Sequence[Row]) -> list[str]:
    for number, part in enumerate((rows[::2], rows[1::2])):
        columns = {name: [row[name] for row in part] for name in ("key", "caption", "url", "licence", "headers")}
        columns |= {name: [row[name] for row in part] for name in ("keywords", "group")}
        columns["image"] = [row["image"] or None for row in part]
        table = pa.table(columns)
        write_file(f"{folder}/{number:05d}.parquet", lambda path, t=table: pq.write_table(t, path, row_group_size=64))
    return [row["key"] for row in rows]


def _suffix(image: bytes) -> str:
    known = {b"RIFF": "webp", b"\x89PNG": "png", b"GIF8": "gif"}
    return known.get(image[:4], "jpg")


def _write_tars(folder: str, rows: Sequence[Row]) -> list[str]:
    def write(path: str, part: Sequence[Row]) -> None:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in part:
                fields = {name: row[name] for name in ("url", "licence", "headers", "keywords", "group")}
                members = {"txt": row["caption"].encode(), "json": json.dumps(fields | {"key": row["key"]}).encode()}
                if row["image"]:
                    members = {_suffix(row["image"]): row["image"]} | members
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{row['key']}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))

    for number, part in enumerate((rows[::2], rows[1::2])):
        write_file(f"{folder}/{number:05d}.tar", lambda path, p=part: write(path, p))
    return [f"{i % 2:05d}/{row['key']}" for i, row in enumerate(rows)]


def _write_folder(folder: str, rows: Sequence[Row]) -> list[str]:
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["file", "caption", "url", "licence", "headers", "group"])
    keys = [f"images/{row['key']}.{_suffix(row['image'])}" for row in rows]
    for key, row in zip(keys, rows, strict=True):
        if row["image"]:
            write_bytes(f"{folder}/{key}", row["image"])
        table.writerow([key, row["caption"], row["url"], row["licence"], json.dumps(row["headers"]), row["group"]])
    write_bytes(f"{folder}/captions.csv", text.getvalue().encode())
    return keys


def _write_records(folder: str, rows: Sequence[Row]) -> list[str]:
    os.makedirs(folder, exist_ok=True)
    write_array_record(
        f"{folder}/pairs.array_record", ({name: row[name] for name in row if name != "fault"} for row in rows)
    )
    return [row["key"] for row in rows]


SAMPLE_WRITERS = (_write_parquet, _write_tars, _write_folder, _write_records)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: DIR; returns the exit code (2 for a user's mistake)."""
    parser = argparse.ArgumentParser(
        prog="python -m florence_jax.curation.sample", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("dir", help="where the sample goes")
    parser.add_argument("--seed", type=int, default=0)

    def work() -> None:
        args = parser.parse_args(with_home(argv))
        truth = build_sample(args.dir, args.seed)
        print(f"{sum(map(len, truth.values()))} raw pairs in {args.dir}")

    return exit_code(work)


if __name__ == "__main__":
    enter(main)
