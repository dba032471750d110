"""Public sets of videos as their authors publish them: Kinetics, Something-Something v2, UCF-101, HMDB-51, MSR-VTT.

Their lists name videos that one has to get oneself, and some are gone: those are left out, counted and said.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from florence_jax.data.records import Record, Source
from florence_jax.data.sources.animated_emoji import open_animated_emoji
from florence_jax.data.sources.motions import MOTION_KIND, MotionVideos
from florence_jax.data.sources.video_source import VideoSource, listed_videos, videos_by_stem
from florence_jax.errors import UserError
from florence_jax.files import table_rows

SSV2_LABELS = ("something-something-v2-labels.json", "labels.json")  # beside the list
HMDB_PARTS = {"train": "1", "test": "2"}  # what its files say of each video


def _parts(spec: str, usage: str, least: int, most: int) -> list[str]:
    """What is between the colons behind the kind; raises UserError."""
    parts = re.split(r":(?!//)", spec.partition(":")[2])
    if not least <= len(parts) <= most or not all(parts):
        raise UserError(f"data source {spec!r}: write {usage}")
    return parts


def _json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _text_lines(path: str | Path) -> list[str]:
    try:
        return [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def open_kinetics(spec: str) -> VideoSource:
    """Opens 'kinetics:FILE.csv:VIDEOS[:SPLIT]', a table with label, youtube_id, time_start, time_end, split.

    A video is VIDEOS/.../ID_000012_000022.mp4, or ID.mp4: whether that one is cut out already is seen when it is read,
    the record's "clip" says which part is meant. SPLIT: only rows with this split.
    """
    path, folder, *split = _parts(spec, "kinetics:FILE.csv:VIDEOS", 2, 3)
    files = videos_by_stem(folder)

    def rows() -> Iterator[tuple[str, str | None, Record]]:
        for line, _, row in table_rows(path):
            if split and row.get("split") != split[0]:
                continue
            try:
                name, label = row["youtube_id"], row["label"]
                start, stop = (int(float(row[column])) for column in ("time_start", "time_end"))
            except KeyError as error:
                known = ", ".join(row)
                raise UserError(f"{path} has no column {error}, only: {known}; test lists have no labels") from error
            except ValueError as error:
                raise UserError(f"{path} line {line}: time_start and time_end must be numbers: {error}") from error
            whole = f"{name}_{start:06}_{stop:06}"
            if whole in files:
                yield whole, files[whole], {"caption": label.strip('"')}
            else:
                yield whole, files.get(name), {"caption": label.strip('"'), "clip": (start, stop)}

    return listed_videos(spec, folder, rows())


def open_ssv2(spec: str) -> VideoSource:
    """Opens 'ssv2:FILE.json:VIDEOS[:LABELS.json]', Something-Something v2: a list of id, label, template.

    The class is the template without brackets; its number, where the file of labels is named or lies beside the list,
    is the one that file says. "description" is the label, with the things that are seen.
    """
    path, folder, *labels = _parts(spec, "ssv2:FILE.json:VIDEOS, or ssv2:FILE.json:VIDEOS:LABELS.json", 2, 3)
    beside = (os.path.join(os.path.dirname(path), name) for name in SSV2_LABELS)
    known = next((name for name in (*labels, *beside) if os.path.isfile(name) or name in labels), "")
    numbers: dict[str, int] = {}
    if known:
        try:
            numbers = {name: int(number) for name, number in _json(known).items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{known} must be an object of class names and their numbers: {error}") from error
        if sorted(numbers.values()) != list(range(len(numbers))):
            raise UserError(f"{known}: the numbers of its {len(numbers)} classes are not 0 to {len(numbers) - 1}")
    files, items = videos_by_stem(folder), _json(path)

    def rows() -> Iterator[tuple[str, str | None, Record]]:
        for item in items:
            try:
                name, template = str(item["id"]), re.sub(r"[\[\]]", "", item["template"])
            except (KeyError, TypeError) as error:
                raise UserError(f"{path}: {item!r} has no {error}; test lists have no labels") from error
            if numbers and template not in numbers:
                raise UserError(f"{path}: video {name} is of the class {template!r}, which is not in {known}")
            number = {"class_id": numbers[template]} if numbers else {}
            yield name, files.get(name), number | {"caption": template, "description": item.get("label", template)}

    return listed_videos(spec, folder, rows(), sorted(numbers, key=numbers.__getitem__))


def open_ucf101(spec: str) -> VideoSource:
    """Opens 'ucf101:trainlist01.txt:VIDEOS': lines 'Class/v_Class_g01_c01.avi 1', the number may be missing."""
    path, folder = _parts(spec, "ucf101:FILE.txt:VIDEOS, such as ucf101:ucfTrainTestlist/testlist01.txt:UCF-101", 2, 2)
    files = videos_by_stem(folder)

    def rows() -> Iterator[tuple[str, str | None, Record]]:
        for line in _text_lines(path):
            label, slash, name = line.split()[0].partition("/")
            if not slash:
                raise UserError(f"{path}: {line!r} does not begin with Class/video.avi")
            words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)
            yield name, files.get(os.path.splitext(name)[0]), {"caption": words}

    return listed_videos(spec, folder, rows())


def open_hmdb51(spec: str) -> VideoSource:
    """Opens 'hmdb51:SPLITS:train1:VIDEOS': of the folder SPLITS the files CLASS_test_split1.txt, lines 'NAME.avi 1'.

    The number is 1 for training and 2 for testing; videos with 0 are in neither.
    """
    usage = "hmdb51:SPLITS:PART:VIDEOS, with PART train1, test1, train2, ..."
    splits, part, folder = _parts(spec, usage, 3, 3)
    match = re.fullmatch(r"(train|test)([123])", part)
    if not match:
        raise UserError(f"data source {spec!r}: write {usage}")
    ending, wanted = f"_test_split{match[2]}.txt", HMDB_PARTS[match[1]]
    lists = sorted(Path(splits).glob(f"*{ending}"))
    if not lists:
        raise UserError(f"data source {spec}: no files CLASS{ending} in {splits}")
    files = videos_by_stem(folder)

    def rows() -> Iterator[tuple[str, str | None, Record]]:
        for path in lists:
            label = path.name.removesuffix(ending).replace("_", " ")
            for line in _text_lines(path):
                name, _, number = line.rpartition(" ")
                if number == wanted:
                    yield name, files.get(os.path.splitext(name)[0]), {"caption": label}

    return listed_videos(spec, folder, rows())


def open_msrvtt(spec: str) -> VideoSource:
    """Opens 'msrvtt:MSRVTT_data.json:PART:VIDEOS', videos with sentences.

    PART is a table with a column video_id, of which the videos are taken: with a column sentence, as in the 1K-A test
    list, each has that one; else, as in the list of 9,000 for training, those of the json file. Or a split of the json
    file: train, validate, test.
    """
    path, part, folder = _parts(spec, "msrvtt:MSRVTT_data.json:TEST.csv:VIDEOS", 3, 3)
    files, content = videos_by_stem(folder), _json(path)
    try:
        splits = {video["video_id"]: video["split"] for video in content["videos"]}
        sentences: dict[str, list[str]] = {}
        for item in content["sentences"]:
            sentences.setdefault(item["video_id"], []).append(item["caption"].strip())
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} needs 'videos' (video_id, split) and 'sentences' (video_id, caption): {error!r}"
        ) from error
    if os.path.isfile(part):
        own: dict[str, list[str]] = {}
        for line, _, row in table_rows(part):
            if "video_id" not in row:
                raise UserError(f"{part} line {line}: no column video_id, only: {', '.join(row)}")
            own.setdefault(row["video_id"], []).extend(filter(None, [row.get("sentence", "").strip()]))
        chosen = {name: found or sentences.get(name, []) for name, found in own.items()}
    else:
        chosen = {name: sentences.get(name, []) for name, split in splits.items() if split == part}
        if not chosen:
            known = ", ".join(sorted(set(splits.values())))
            raise UserError(f"data source {spec}: {part} is neither a file nor a split of {path} ({known})")

    def rows() -> Iterator[tuple[str, str | None, Record]]:
        for name, found in chosen.items():
            if not found:
                raise UserError(f"data source {spec}: {name} has no sentence")
            yield name, files.get(name), {"caption": found[0], "captions": _distinct(found)}

    return listed_videos(spec, folder, rows())


def _distinct(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(texts))


VIDEO_KINDS: dict[str, Callable[[str], Source]] = {
    "kinetics": open_kinetics,
    "ssv2": open_ssv2,
    "ucf101": open_ucf101,
    "hmdb51": open_hmdb51,
    "msrvtt": open_msrvtt,
    "animated_emoji": open_animated_emoji,
    MOTION_KIND: MotionVideos,
}
