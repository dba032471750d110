"""A searchable index of images or videos: embed a folder once, then look for them by text or by picture.

    python -m florence_jax.tools.index embed --init=runs/pretrain/checkpoints --images=my_pictures --out=my_index
    python -m florence_jax.tools.index query --index=my_index --text="a red car" --text="two dogs" --html=found.html
    python -m florence_jax.tools.index query --index=my_index --image=like_this.jpg --k=20
    python -m florence_jax.tools.index embed --init=runs/pretrain/checkpoints --videos=my_clips --out=my_index

--images is a folder, whose image files are taken at any depth, or a data source of the project (emoji:train,
ArrayRecord files, tfds:NAME:SPLIT); --videos a folder of videos or one, each of which is the mean of the vectors of 8
frames or, with --tower=video, what the video tower says of as many as it was trained on. The index is a folder:
index.json (which weights, which images), embeddings.npy (N, D) of unit vectors, keys.json (N names). The images stay
where they are; the page of results holds small copies.
"""

import argparse
import json
import shutil
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from florence_jax.command_line import enter, exit_code
from florence_jax.data.records import BadRecord, ListSource, Record, record_thumbnail, summary_of
from florence_jax.data.sources.catalog import is_picture_folder, open_pictures, open_source
from florence_jax.data.sources.folder import FolderSource
from florence_jax.data.sources.video import open_clips
from florence_jax.data.sources.video_source import VideoSource
from florence_jax.errors import UserError
from florence_jax.evaluators.video import moving_picture
from florence_jax.files import with_home
from florence_jax.inference.florence import Florence
from florence_jax.page import GridCell, matches_html, write_page
from florence_jax.pictures import thumbnail
from florence_jax.tasks.video_tower import LOOKED_BY

INDEX_FILE, EMBEDDINGS_FILE, KEYS_FILE = "index.json", "embeddings.npy", "keys.json"
ROWS = 65536  # searched at once
VECTOR_DTYPES = ("float32", "float16")
# Its embedding is kept, to notice an index that is searched with other weights than it was made with.
MARK = "a photo"
MARK_TOLERANCE = 1e-2
UNREAD_SAID = 20  # files named on the terminal


class Index(NamedTuple):
    """An index on disk. `embeddings` is memory-mapped, (N, D); `keys` are N names; `info` is index.json."""

    embeddings: np.ndarray
    keys: list[str]
    info: dict[str, Any]


def write_index(out: str, model: Florence, images: str, dtype: str = "float32", tower: str = "") -> Index:
    """Embeds all readable images and writes the folder `out`, which appears only when it is complete.

    With a `tower` of `Florence.embed_videos`, `images` names videos.

    Raises:
      UserError: if `out` exists or cannot be written, or for what reading the images raises.
    """
    if Path(out).exists():
        raise UserError(f"--out={out} exists already: choose another folder, or remove it")
    videos = bool(tower)
    source = open_clips(images) if videos else open_pictures(images)
    told = f"{source.name}: {len(source):,} {'videos' if videos else 'pictures'}"
    print(summary_of(source).get("says", told), flush=True)
    found = model.embed_video_source(source, tower=tower) if videos else model.embed_source(source)
    keys = [row["key"] for row in source.metadata()]
    if len(keys) != len(source):  # unreadable records have no key
        keys = [str(i) for i in range(len(source))]
    folder = model.encoder.description.folder
    info = {
        "init": folder if "://" in folder else str(Path(folder).absolute()),
        "tokenizer": model.encoder.tokenizer_spec,
        "images": str(Path(images).absolute()) if Path(images).exists() else images,
        "videos": videos,
        "rows": found["index"].tolist(),
        "unread": [keys[i] for i in np.setdiff1d(np.arange(len(source)), found["index"])],
        "mark": model.embed_texts([MARK])[0].tolist() if model.encoder.can_embed_text else None,
    }
    partial = Path(f"{out}.{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)
        np.save(partial / EMBEDDINGS_FILE, found["embedding"].astype(dtype))
        (partial / KEYS_FILE).write_text(json.dumps([keys[i] for i in found["index"]]) + "\n")
        (partial / INDEX_FILE).write_text(json.dumps(info) + "\n")
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write --out={out}: {error}; choose a writable folder with space") from error
    return open_index(out)


def open_index(folder: str) -> Index:
    """Opens an index; raises `UserError` for a folder that is not one."""
    path = Path(folder)
    try:
        info = json.loads((path / INDEX_FILE).read_text())
        keys = json.loads((path / KEYS_FILE).read_text())
        embeddings = np.load(path / EMBEDDINGS_FILE, mmap_mode="r")
        if len(keys) != len(embeddings) or len(keys) != len(info["rows"]):
            raise ValueError(f"{len(keys)} keys, {len(embeddings)} embeddings")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--index={folder} is not an index ({error}): make one with index embed") from error
    return Index(embeddings, keys, info)


def check_weights(index: Index, model: Florence) -> None:
    """Raises `UserError` if the weights are not those that the index was made with, as far as it can tell."""
    encoder = model.encoder
    config = encoder.model.config
    projected = "image_projection" in encoder.description.entries
    width = config.projection if projected else config.image_width * 2 ** (len(config.depths) - 1)
    if index.embeddings.shape[1] != width:
        raise UserError(f"the index has vectors of {index.embeddings.shape[1]} numbers, the weights give {width}")
    mark = index.info.get("mark")
    if mark and encoder.can_embed_text:
        off = np.abs(model.embed_texts([MARK])[0] - np.asarray(mark)).max()
        if off > MARK_TOLERANCE:
            raise UserError(
                f"the weights at {encoder.description.folder} are not those the index was made with: make the "
                "index again, or give the right ones with --init"
            )


def search(embeddings: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` nearest rows of each query by cosine, best first; ties in the order of the index.

    Args:
      embeddings: (N, D) unit vectors, may be memory-mapped: 65,536 rows are read at a time.
      queries: float32 (Q, D) unit vectors.
      k: at least 1; cut to N.

    Returns:
      int (Q, k) rows and float32 (Q, k) cosines.
    """
    k = min(k, len(embeddings))
    rows = np.empty((len(queries), 0), np.int64)
    cosines = np.empty((len(queries), 0), np.float32)
    for start in range(0, len(embeddings), ROWS):
        block = np.asarray(embeddings[start : start + ROWS], np.float32)
        cosines = np.concatenate([cosines, queries @ block.T], axis=1)
        new = np.broadcast_to(np.arange(start, start + len(block)), (len(queries), len(block)))
        rows = np.concatenate([rows, new], axis=1)
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        rows, cosines = np.take_along_axis(rows, best, 1), np.take_along_axis(cosines, best, 1)
    return rows, cosines


class Shown(NamedTuple):
    """What a page shows of an image: a thumbnail, '' if it is no longer where it was; caption and link, '' for none."""

    picture: str
    caption: str = ""
    link: str = ""


def shown_images(index: Index) -> Callable[[int], Shown]:
    """What is shown of each row of the index, as the images are now."""
    images, rows = index.info["images"], index.info["rows"]
    if index.info.get("videos"):
        folder = images if Path(images).is_dir() else str(Path(images).parent)
        clips = VideoSource(images, folder, [{"key": key} for key in index.keys])
        return lambda i: Shown(moving_picture(clips, i), "", link_of(folder, index.keys[i]))
    if is_picture_folder(images):  # by name: files may have come and gone
        files, captions = (
            FolderSource(images, [{"key": key, "caption": ""} for key in index.keys]),
            folder_captions(images),
        )

        def show_file(i: int) -> Shown:
            picture, key = record_thumbnail(files, i), index.keys[i]
            return Shown(picture, captions.get(key, ""), link_of(images, key) if picture else "")

        return show_file
    source = open_source(images)

    def show_record(i: int) -> Shown:
        try:
            record = source[rows[i]] if rows[i] < len(source) else {}
        except BadRecord:
            record = {}
        if index.keys[i] not in (record.get("key"), str(rows[i])) or not record:  # its number, see `write_index`
            return Shown("")
        return Shown(thumbnail(record["image"]), caption_of(record))

    return show_record


def folder_captions(folder: str) -> dict[str, str]:
    """The caption of each picture of a folder by its key; {} where it has none."""
    try:
        return {row["key"]: caption_of(row) for row in open_source(folder).metadata()}
    except UserError:
        return {}  # a folder of pictures and nothing else, which is fine here


def caption_of(record: Record) -> str:
    """Its caption, or all of them in lines."""
    captions = record.get("captions") or record.get("caption") or ""
    return captions if isinstance(captions, str) else "\n".join(map(str, captions))


def link_of(folder: str, key: str) -> str:
    """Address of a picture of a folder."""
    return key if "://" in key else Path(folder, key).absolute().as_uri()


def results_html(index: Index, queries: Sequence[GridCell], rows: np.ndarray, cosines: np.ndarray) -> str:
    """A line of pictures for each query, with captions, names and cosines; the pictures link to their files."""
    show = shown_images(index)
    lines = []
    for query, found, values in zip(queries, rows, cosines, strict=True):
        cells = []
        for i, value in zip(found, values, strict=True):
            picture, caption, link = show(i)
            cells.append(GridCell(caption, picture or None, False, f"{index.keys[i]} ({value:.3f})", link))
        lines.append((query, cells))
    plural = "videos" if index.info.get("videos") else "images"
    return matches_html(f"nearest of {len(index.keys)} {plural}", lines, judged=False)


def _embed(args: argparse.Namespace) -> None:
    if args.tower and not args.videos:
        raise UserError(f"--tower={args.tower} is for --videos")
    model = Florence(args.init, tokenizer=args.tokenizer, batch_size=args.batch_size)
    tower = (args.tower or "image") if args.videos else ""
    index = write_index(args.out, model, args.videos or args.images, args.dtype, tower)
    unread = index.info["unread"]
    for key in unread[:UNREAD_SAID]:
        print(f"not read: {key}", file=sys.stderr)
    print(
        f"{len(index.keys)} {'videos' if args.videos else 'images'} in {args.out}, "
        f"{index.embeddings.nbytes / 1e6:.1f} MB of vectors; {len(unread)} not "
        f"read{f', listed in {INDEX_FILE}' if unread else ''}"
    )


def _query(args: argparse.Namespace) -> None:
    if not args.text and not args.image:
        raise UserError("give what to look for with --text or --image")
    if args.k < 1:
        raise UserError(f"--k={args.k} must be at least 1")
    index = open_index(args.index)
    model = Florence(args.init or index.info["init"], tokenizer=args.tokenizer or index.info["tokenizer"])
    check_weights(index, model)
    queries, vectors = [], []
    if args.text:
        queries += [GridCell(text, None, True) for text in args.text]
        vectors.append(model.embed_texts(args.text))
    if args.image:
        source = ListSource("--image", [str(Path(file).absolute()) for file in args.image])
        for i, file in enumerate(args.image):
            queries.append(GridCell(Path(file).name, record_thumbnail(source, i) or None, True, "", link_of("", file)))
        vectors.append(model.embed_source(source, on_corrupt="error", quiet=True)["embedding"])
    rows, cosines = search(index.embeddings, np.concatenate(vectors), args.k)
    for query, found, values in zip(queries, rows, cosines, strict=True):
        print(query.text)
        for i, value in zip(found, values, strict=True):
            print(f"  {value:.3f}  {index.keys[i]}")
    if args.html:
        title = f"florence_jax index: {args.index}"
        try:
            write_page(Path(args.html), title, results_html(index, queries, rows, cosines))
        except OSError as error:
            raise UserError(f"cannot write --html={args.html}: {error}") from error
        print(f"pictures in {args.html}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    embed = commands.add_parser("embed", help="make an index of images")
    embed.add_argument("--init", default="runs/pretrain/checkpoints", help="weights: a run's or an imported folder")
    what = embed.add_mutually_exclusive_group(required=True)
    what.add_argument("--images", default="", help="folder or data source")
    what.add_argument("--videos", default="", help="folder of videos, or one")
    embed.add_argument("--tower", choices=LOOKED_BY, help="of --videos; default: image, the mean over frames")
    embed.add_argument("--out", required=True, help="new folder")
    embed.add_argument("--dtype", choices=VECTOR_DTYPES, default="float32", help="of the vectors on disk")
    embed.add_argument("--batch-size", type=int, default=256)
    query = commands.add_parser("query", help="look for images")
    query.add_argument("--index", required=True)
    query.add_argument("--init", default="", help="weights; default: where they were when the index was made")
    query.add_argument("--text", action="append", help="what to look for; may be repeated")
    query.add_argument("--image", action="append", help="picture to look for the like of; may be repeated")
    query.add_argument("--k", type=int, default=10, help="answers to each query")
    query.add_argument("--html", default="", help="also write a page with the pictures")
    for command in (embed, query):
        command.add_argument("--tokenizer", default="", help="default: the one that the weights were trained with")
    logging.set_verbosity(logging.ERROR)  # Orbax reports every phase of a restore

    def work() -> None:
        args = parser.parse_args(with_home(argv))
        _embed(args) if args.command == "embed" else _query(args)

    return exit_code(work)


if __name__ == "__main__":
    enter(main)
