"""Recall and precision of near-duplicate detection, one line per kind of change, over real photographs.

    python -m florence_jax.curation.dedup.perturb             # scikit-image's and scikit-learn's photographs
    python -m florence_jax.curation.dedup.perturb --images=DIR --out=table.json

Photographs are the originals, and tiles of them where they are few; every change is applied to each of them and saved
as JPEG (quality 95 where the change says nothing else). Recall is the share of changed pictures found as duplicates of
their original by the rule of the pipeline: hashes of some pair of views, not both probes, within k, their 256 bits
within 44, and colours and contents alike (views.py). False pairs are those of different originals, changed or not,
under the same rule, and precision is the share of pairs found that are not false. Changes that are not found
(off-centre crops, rotations, caption bars) stay in the table, with their failures.
"""

import argparse
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from florence_jax.command_line import enter, exit_code
from florence_jax.curation.dedup.clusters import MIN_DETAIL
from florence_jax.curation.dedup.join import DEFAULT_JOIN
from florence_jax.curation.dedup.views import Views
from florence_jax.curation.ingest.hashing import bit_distance, measure
from florence_jax.data.sources.picture_files import list_pictures
from florence_jax.errors import UserError
from florence_jax.files import with_home, write_text

MAX_SIDE = 500  # pixels of an original, about the size of a web picture
TILES = (1, 2, 3)  # an original, its quarters and its ninths
MIN_TILE = 96  # pixels of a tile's shorter side
# Of the bundled pictures; drawings, scans of text, and the other eye's view of motorcycle_left are left out.
PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "coins", "motorcycle_left", "rocket", "china", "flower")
TEXTURES = (
    "brick",
    "cell",
    "grass",
    "gravel",
    "hubble_deep_field",
    "ihc",
    "moon",
    "retina",
)  # hard: few low frequencies
DISTANCES = (4, 6)
BLOCK = 1024  # views compared with all others at a time


def encode(image: Image.Image, quality: int = 95, kind: str = "JPEG") -> bytes:
    """The picture as bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, quality=quality)
    return file.getvalue()


def resize(factor: float) -> Callable[[Image.Image], Image.Image]:
    """Both sides times `factor`."""
    return lambda im: im.resize((round(im.width * factor), round(im.height * factor)), Image.Resampling.BICUBIC)


def crop(share: float, shift: float = 0.0) -> Callable[[Image.Image], Image.Image]:
    """Cuts `share` of each side away; off the centre by `shift` of the cut, towards the lower right."""

    def change(im: Image.Image) -> Image.Image:
        width, height = im.width * share, im.height * share
        left, top = width * (1 + shift) / 2, height * (1 + shift) / 2
        return im.crop((round(left), round(top), round(im.width - width + left), round(im.height - height + top)))

    return change


def noise(deviation: float) -> Callable[[Image.Image], Image.Image]:
    """Gaussian noise of that many grey levels."""

    def change(im: Image.Image) -> Image.Image:
        values = np.asarray(im, np.float64) + np.random.default_rng(0).normal(0, deviation, (im.height, im.width, 3))
        return Image.fromarray(values.clip(0, 255).astype(np.uint8))

    return change


def gamma(exponent: float) -> Callable[[Image.Image], Image.Image]:
    """Grey levels to a power."""
    return lambda im: im.point([round(255 * (i / 255) ** exponent) for i in range(256)] * 3)


def watermark(centre: bool) -> Callable[[Image.Image], Image.Image]:
    """Half-transparent white text, a third of the width, in the lower right corner or the centre."""

    def change(im: Image.Image) -> Image.Image:
        text = Image.new("L", (60, 12))
        ImageDraw.Draw(text).text((2, 0), "(c) sample", fill=150)
        width = im.width // 3
        text = text.resize((width, max(1, width // 5)), Image.Resampling.BILINEAR)
        place = (im.width - text.width, im.height - text.height)
        result = im.copy()
        result.paste((255, 255, 255), (place[0] // 2, place[1] // 2) if centre else place, text)
        return result

    return change


def border(share: float) -> Callable[[Image.Image], Image.Image]:
    """A white frame, `share` of the longer side wide."""
    return lambda im: ImageOps.expand(im, round(share * max(im.size)), (255, 255, 255))


def letterbox(im: Image.Image) -> Image.Image:
    """On black, as wide as high, with bars of at least an eighth."""
    side = round(max(im.width, im.height * 4 / 3, im.height))
    canvas = Image.new("RGB", (side, max(side, im.height)))
    canvas.paste(im, ((canvas.width - im.width) // 2, (canvas.height - im.height) // 2))
    return canvas


def caption_bar(im: Image.Image) -> Image.Image:
    """A white bar with text under the picture, 15 % of its height."""
    canvas = Image.new("RGB", (im.width, round(im.height * 1.15)), (255, 255, 255))
    canvas.paste(im, (0, 0))
    ImageDraw.Draw(canvas).text((im.width // 10, im.height + 4), "when the build is green again", fill=(0, 0, 0))
    return canvas


def fit(side: int) -> Callable[[Image.Image], Image.Image]:
    """The longer side becomes `side`."""
    return lambda im: ImageOps.contain(im, (side, side))


def chain(im: Image.Image) -> Image.Image:
    """Several changes on end: smaller, cropped by 2 %, brighter by 10 %."""
    return ImageEnhance.Brightness(crop(0.02)(fit(320)(im))).enhance(1.1)


PictureChange = tuple[str, Callable[[Image.Image], Image.Image], int, str]
SAME_PICTURE: Callable[[Image.Image], Image.Image] = lambda im: im  # noqa: E731
CHANGES: tuple[tuple[str, PictureChange], ...] = tuple(
    (group, (name, change, *(rest or (95, "JPEG"))))
    for group, name, change, *rest in (
        ("recompress", "JPEG 90", SAME_PICTURE, 90, "JPEG"),
        ("recompress", "JPEG 50", SAME_PICTURE, 50, "JPEG"),
        ("recompress", "JPEG 20", SAME_PICTURE, 20, "JPEG"),
        ("recompress", "WebP 50", SAME_PICTURE, 50, "WEBP"),
        ("recompress", "PNG", SAME_PICTURE, 95, "PNG"),
        ("resize", "resize 0.25", resize(0.25)),
        ("resize", "resize 0.5", resize(0.5)),
        ("resize", "resize 0.75", resize(0.75)),
        ("resize", "resize 1.5", resize(1.5)),
        ("resize", "fit 256, JPEG 80", fit(256), 80, "JPEG"),
        ("resize", "fit 128, JPEG 80", fit(128), 80, "JPEG"),
        ("resize", "squash to square", lambda im: im.resize((256, 256))),
        ("grey", "greyscale", lambda im: im.convert("L").convert("RGB")),
        ("blur", "blur, radius 2", lambda im: im.filter(ImageFilter.GaussianBlur(2))),
        ("noise", "noise 10", noise(10)),
        ("light", "contrast 0.7", lambda im: ImageEnhance.Contrast(im).enhance(0.7)),
        ("light", "sharpen", lambda im: im.filter(ImageFilter.SHARPEN)),
        ("light", "brightness 1.2", lambda im: ImageEnhance.Brightness(im).enhance(1.2)),
        ("light", "gamma 1.5", gamma(1.5)),
        ("watermark", "watermark, corner", watermark(False)),
        ("watermark", "watermark, centre", watermark(True)),
        ("crop 2 %", "centred crop 2 %", crop(0.02)),
        ("crop", "centred crop 5 %", crop(0.05)),
        ("crop", "centred crop 7 %", crop(0.07)),
        ("crop", "centred crop 10 %", crop(0.1)),
        ("crop", "centred crop 12.5 %", crop(0.125)),
        ("crop", "centred crop 17 %", crop(0.17)),
        ("crop", "centred crop 20 %", crop(0.2)),
        ("chain", "fit 320, crop 2 %, brightness 1.1, JPEG 60", chain, 60, "JPEG"),
        ("frame", "white border 5 %", border(0.05)),
        ("frame", "letterbox", letterbox),
        ("flip", "horizontal flip", ImageOps.mirror),
        ("unseen", "rotation 1 degree", lambda im: im.rotate(1, Image.Resampling.BICUBIC)),
        ("unseen", "rotation 5 degrees", lambda im: im.rotate(5, Image.Resampling.BICUBIC)),
        ("unseen", "rotation 90 degrees", lambda im: im.transpose(Image.Transpose.ROTATE_90)),
        ("unseen", "vertical flip", ImageOps.flip),
        ("unseen", "caption bar 15 %", caption_bar),
        ("unseen", "off-centre crop 5 %", crop(0.05, 1.0)),
        ("unseen", "off-centre crop 10 %", crop(0.1, 1.0)),
    )
)


def bundled_pictures() -> dict[str, list[Path]]:
    """Photographs, and textures and scientific pictures, in the wheels of scikit-image and scikit-learn.

    Raises:
      UserError: they are not installed.
    """
    try:
        import skimage.data
        import sklearn.datasets
    except ImportError as error:
        raise UserError(f"{error}: pip install scikit-image scikit-learn, or name a folder with --images") from error
    folders = [Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images"]
    paths = sorted(path for folder in folders for path in folder.iterdir() if path.suffix in (".png", ".jpg"))
    sets = {"photographs": PHOTOGRAPHS, "textures": TEXTURES}
    return {name: [path for path in paths if path.stem in stems] for name, stems in sets.items()}


def boxes(width: int, height: int, count: int) -> list[tuple[int, int, int, int]]:
    """(left, top, right, lower) of the `count` x `count` equal tiles of a picture; none if they are tiny."""
    wide, high = width // count, height // count
    if min(wide, high) < MIN_TILE:
        return []
    corners = [(i % count * wide, i // count * high) for i in range(count * count)]
    return [(left, top, left + wide, top + high) for left, top in corners]


def recall_table(originals: Sequence[Image.Image]) -> dict[str, Any]:
    """Applies every change to every original.

    Returns:
      `originals`, `low_detail` (left out: only equal files count as their duplicates); `changes`: a list of {`group`,
      `change`, `recall`: {k: share found}, `false_pairs`: {k: pairs with another original}, `precision`: {k: share of
      pairs found that are not false, 1 if there are none}}; `pairs`: how many pairs of different pictures were tried
      for each change; `distinct`: for k, false pairs among the originals themselves.
    """
    measured = [measure(encode(image, 95, "PNG")) for image in originals]
    detailed = [i for i, item in enumerate(measured) if item["detail"] >= MIN_DETAIL]
    images, measured = [originals[i] for i in detailed], [measured[i] for i in detailed]
    n = len(images)
    unequal = ~np.eye(n, dtype=bool)
    lines = []
    for group, (name, change, quality, kind) in CHANGES:
        changed = [measure(encode(change(image), quality, kind)) for image in images]
        hits = _found(measured, changed)
        recall = {k: float(np.diag(hit).mean()) for k, hit in hits.items()}
        false_pairs = {k: int((hit & unequal).sum()) for k, hit in hits.items()}
        precision = {k: 1 - false_pairs[k] / max(int(hit.sum()), 1) for k, hit in hits.items()}
        line = {"group": group, "change": name, "recall": recall, "precision": precision, "false_pairs": false_pairs}
        lines.append(line)
    distinct = {k: int((hit & unequal).sum() // 2) for k, hit in _found(measured, measured).items()}
    low = len(originals) - n
    return {"originals": n, "low_detail": low, "pairs": n * (n - 1), "distinct": distinct, "changes": lines}


def _found(left: Sequence[dict[str, Any]], right: Sequence[dict[str, Any]]) -> dict[int, np.ndarray]:
    """For each of DISTANCES, bool (n, n): which pictures of `left` and `right` are duplicates by the rule."""
    views, n = Views.of([*left, *right]), len(left)
    rows, others = (views.rows.take(part) for part in (views.rows.rid < n, views.rows.rid >= n))
    close = np.zeros((n, len(right)), bool)
    for start in range(0, len(rows), BLOCK):
        block = rows.take(np.arange(start, min(start + BLOCK, len(rows))))
        short = np.bitwise_count(block.h64[:, None] ^ others.h64)
        i, j = np.nonzero((short <= max(DISTANCES)) & ~(block.probe[:, None] & others.probe))
        near = bit_distance(block.h256[i], others.h256[j]) <= DEFAULT_JOIN.max_d256
        close[block.rid[i[near]], others.rid[j[near]] - n] = True
    pairs, hits = np.nonzero(close), {}
    for k in DISTANCES:
        hits[k] = np.zeros_like(close)
        join = dataclasses.replace(DEFAULT_JOIN, k=k)
        hits[k][pairs] = views.compare(pairs[0], pairs[1] + n, join).near
    return hits


def render(result: dict[str, Any]) -> str:
    """The table as text."""
    head = (
        f"{result['originals']} originals ({result['low_detail']} more with too little detail); a change is compared "
    )
    lines = [head + f"with {result['pairs']} pictures that it does not come from", ""]
    columns = [(name, k) for name in ("recall", "precision") for k in DISTANCES]
    lines.append(f"{'change':44}" + "".join(f"{f'{name} k={k}':>15}" for name, k in columns) + "   false pairs")
    for line in result["changes"]:
        shares = "".join(f"{line[name][k]:15.4f}" for name, k in columns)
        lines.append(f"{line['change']:44}{shares}   {' / '.join(str(line['false_pairs'][k]) for k in DISTANCES)}")
    lines.append(f"\nfalse pairs among the originals: {result['distinct']}")
    return "\n".join(lines)


def spread(paths: Sequence[Path], limit: int) -> list[Image.Image]:
    """At most `limit` originals, MAX_SIDE wide or high: the pictures or, if they are fewer, their tiles as well.

    Raises:
      UserError: a file that is no picture, or a damaged one.
    """
    sizes = [_opened(path, lambda image: image.size) for path in paths]
    chosen: list[tuple[int, tuple[int, int, int, int]]] = []
    for count in TILES:
        if len(chosen) < limit:
            chosen += [(i, box) for i, size in enumerate(sizes) for box in boxes(*size, count)]
    wanted: dict[int, list[tuple[int, int, int, int]]] = {}
    for place in np.unique(np.linspace(0, len(chosen) - 1, limit).astype(int)).tolist() if chosen else []:
        wanted.setdefault(chosen[place][0], []).append(chosen[place][1])
    originals = []
    for i, places in sorted(wanted.items()):  # a picture is decoded once, and held no longer than its tiles are cut
        image = _opened(paths[i], lambda image: image.convert("RGB"))
        for tile in map(image.crop, places):
            originals.append(ImageOps.contain(tile, (MAX_SIDE, MAX_SIDE)) if max(tile.size) > MAX_SIDE else tile)
    return originals


def _opened(path: Path, read: Callable[[Image.Image], Any]) -> Any:
    """What `read` makes of the picture in a file; UserError if it cannot."""
    try:
        with Image.open(path) as image:
            return read(image)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken files
        raise UserError(f"{path}: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; returns the exit code (2 for a user's mistake)."""
    parser = argparse.ArgumentParser(
        prog="python -m florence_jax.curation.dedup.perturb", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--images", help="folder of photographs, searched recursively (default: the bundled ones)")
    parser.add_argument(
        "--limit", type=int, default=400, help="originals of a set: pictures, and tiles of them if they are fewer"
    )
    parser.add_argument("--out", help="also write the tables as JSON")

    def work() -> None:
        args = parser.parse_args(with_home(argv))
        folder = args.images and Path(args.images)
        if folder and not folder.is_dir():
            raise UserError(f"--images={folder} is not a folder")
        named = folder and {"images": [folder / name for name in list_pictures(folder).pictures]}
        sets = {name: spread(paths, args.limit) for name, paths in (named or bundled_pictures()).items()}
        if args.limit < 1 or not all(sets.values()):
            raise UserError(f"no pictures: --images needs pictures of {MIN_TILE} pixels and more, --limit at least 1")
        result = {name: recall_table(originals) for name, originals in sets.items()}
        for name, part in result.items():
            print(f"{name}: {render(part)}\n")
        if args.out:
            write_text(args.out, json.dumps(result, indent=1))

    return exit_code(work)


if __name__ == "__main__":
    enter(main)
