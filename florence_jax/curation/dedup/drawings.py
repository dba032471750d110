"""Precision and recall of near-duplicates on drawings: the embedded emoji, and made playing cards and signs.

    python -m florence_jax.curation.dedup.drawings

The emoji are 4,437 drawings in three styles, all different; two of one name are counted as right (a few styles share
a drawing). Cards and signs are made here, each with copies: half as large, and as JPEG of quality 60; what is put
together is right where it was made from one drawing. Of each set are counted: `duplicates`, the pictures that do not
stay; `wrong` ones, whose representative is another drawing; `largest`, the members of the largest cluster; `recall`,
the share of copies that are together with a picture of their drawing (null for emoji, which have none). Once by chains
of pairs of near hashes, once by the clusters of the pipeline (clusters.py), which compare colours and contents as well
and do not chain.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from florence_jax.command_line import enter
from florence_jax.curation.dedup.clusters import cluster, representatives
from florence_jax.curation.dedup.components import union_find
from florence_jax.curation.dedup.perturb import encode, resize
from florence_jax.curation.ingest.hashing import measure
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.embedded import EMOJI_SPLITS
from florence_jax.pictures import WHITE

CARD_RED, CARD_BLACK = (200, 20, 30), (20, 20, 20)
SUITS = {"hearts": CARD_RED, "diamonds": CARD_RED, "clubs": CARD_BLACK, "spades": CARD_BLACK}
RANKS = ("A", *map(str, range(2, 11)), "J", "Q", "K")
SIGN_COLOURS = ((190, 30, 45), (30, 90, 180), (20, 130, 60), (60, 60, 60))
SIGNS = "ABCDEFGHKMNPRSTZ0123456789"
Drawings = list[tuple[str, bytes]]  # name of the drawing, an encoded picture of it


def card(rank: str, suit: str) -> Image.Image:
    """A playing card with its rank in two corners and as many signs of the suit."""
    image = Image.new("RGB", (200, 280), WHITE)
    draw, colour = ImageDraw.Draw(image), SUITS[suit]
    draw.rectangle((4, 4, 195, 275), outline=CARD_BLACK, width=3)
    for x, y in ((14, 10), (160, 240)):
        draw.text((x, y), rank, fill=colour, font=ImageFont.load_default(26))
    count = RANKS.index(rank) + 1 if rank not in "JQK" else 1
    size = 16 if count > 1 else 50
    for i in range(count):
        row, column = divmod(i, 3)
        places = min(3, count - 3 * row)
        x = 100 + 50 * (column - (places - 1) / 2)
        pip(draw, suit, x, 140 + 52 * (row - (-(-count // 3) - 1) / 2), size)
    return image


def pip(draw: ImageDraw.ImageDraw, suit: str, x: float, y: float, r: float) -> None:
    """The sign of a suit, 2 r wide and high."""
    colour = SUITS[suit]
    if suit == "diamonds":
        draw.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=colour)
    elif suit == "clubs":
        for a, b in ((0, -0.5), (-0.5, 0.2), (0.5, 0.2)):
            draw.ellipse((x + r * (a - 0.45), y + r * (b - 0.45), x + r * (a + 0.45), y + r * (b + 0.45)), fill=colour)
        draw.polygon([(x, y), (x - r / 2, y + r), (x + r / 2, y + r)], fill=colour)
    else:
        up = 1 if suit == "spades" else -1
        draw.ellipse((x - r, y - 0.55 * r + up * 0.2 * r, x, y + 0.45 * r + up * 0.2 * r), fill=colour)
        draw.ellipse((x, y - 0.55 * r + up * 0.2 * r, x + r, y + 0.45 * r + up * 0.2 * r), fill=colour)
        draw.polygon([(x - r, y + up * 0.1 * r), (x + r, y + up * 0.1 * r), (x, y - up * r)], fill=colour)
        if up == 1:
            draw.polygon([(x, y), (x - r / 2, y + r), (x + r / 2, y + r)], fill=colour)


def sign(text: str, colour: tuple[int, int, int]) -> Image.Image:
    """A round sign with a letter."""
    image = Image.new("RGB", (240, 240), WHITE)
    draw = ImageDraw.Draw(image)
    draw.ellipse((10, 10, 230, 230), fill=colour)
    draw.ellipse((35, 35, 205, 205), fill=WHITE)
    draw.text((120, 120), text, fill=colour, font=ImageFont.load_default(120), anchor="mm")
    return image


def with_copies(drawings: Mapping[str, Image.Image]) -> Drawings:
    """Each drawing as PNG, half as large, and as JPEG."""
    changes: Sequence[Callable[[Image.Image], bytes]] = (
        lambda image: encode(image, 95, "PNG"),
        lambda image: encode(resize(0.5)(image), 95, "PNG"),
        lambda image: encode(image, 60),
    )
    return [(name, change(image)) for name, image in drawings.items() for change in changes]


def drawing_sets() -> dict[str, Drawings]:
    """All sets by name."""
    sources = [open_source(f"emoji:{split}") for split in EMOJI_SPLITS]
    records = [source[i] for source in sources for i in range(len(source))]
    cards = {f"{rank} of {suit}": card(rank, suit) for rank in RANKS for suit in SUITS}
    signs = {f"{text} {i}": sign(text, colour) for text in SIGNS for i, colour in enumerate(SIGN_COLOURS)}
    return {
        "emoji": [(record["caption"], record["image"]) for record in records],
        "cards": with_copies(cards),
        "signs": with_copies(signs),
    }


def count_wrong(names: np.ndarray, labels: np.ndarray, copied: bool) -> dict[str, Any]:
    """The counts of the module's docstring for clusters `labels`, int64 (n,), of drawings of these names.

    `copied`: whether those of one name are copies.
    """
    best, size = representatives(labels, np.arange(len(labels)))
    others = np.flatnonzero(best != np.arange(len(best)))
    _, drawing = np.unique(names, return_inverse=True)
    _, place, together = np.unique(np.stack([drawing, labels]), axis=1, return_inverse=True, return_counts=True)
    together = together[place.ravel()] > 1
    return {
        "duplicates": len(others),
        "wrong": int((names[best[others]] != names[others]).sum()),
        "largest": int(size.max(initial=0)),
        "recall": round(float(together.mean()), 3) if copied else None,
    }


def run(sets: Mapping[str, Drawings]) -> dict[str, dict[str, Any]]:
    """The counts of each set, by chains of hashes and by the clusters of the pipeline."""
    result = {}
    for name, drawings in sets.items():
        measured = [measure(data) for _, data in drawings]
        names = np.array([drawing for drawing, _ in drawings])
        labels, edges, _ = cluster(measured, np.arange(len(measured)))
        chains = union_find(edges, len(measured))
        result[name] = {
            "pictures": len(drawings),
            "chains": count_wrong(names, chains, name != "emoji"),
            "clusters": count_wrong(names, labels, name != "emoji"),
        }
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the counts as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m florence_jax.curation.dedup.drawings", description=__doc__.partition("\n")[0]
    )
    parser.parse_args(argv)
    print(json.dumps(run(drawing_sets()), indent=1))
    return 0


if __name__ == "__main__":
    enter(main)
