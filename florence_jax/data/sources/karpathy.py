"""Karpathy's split files of Flickr30k and COCO: captions and the split of every image, in one JSON file.

`dataset_flickr30k.json`, `dataset_coco.json` (Karpathy and Fei-Fei 2015): {"images": [{"filename", "split",
"sentences": [{"raw"}, ...][, "filepath"]}, ...]}. COCO's images lie in the sub-folder "filepath", such as 'val2014'.
"""

import json
import re
from typing import Any

from etils import epath

from florence_jax.data.sources.folder import FolderSource
from florence_jax.errors import UserError

PREFIX = "karpathy:"


def open_karpathy(spec: str) -> FolderSource:
    """Opens 'karpathy:FILE.json:SPLIT' or 'karpathy:FILE.json:SPLIT@FOLDER' (default: the folder of the file).

    Several splits are joined by '+', as in 'train+restval', which is COCO's usual training set.

    Returns:
      Records with "key" (file below FOLDER), "captions" (list of str, all sentences in order) and "caption", the first.

    Raises:
      UserError: for a malformed name, an unreadable file, a split it does not have, or an image without sentences.
    """
    match = re.fullmatch(rf"{PREFIX}(.+\.json):([\w+]+)(?:@(.+))?", spec)
    if not match:
        raise UserError(f"data source {spec!r}: write karpathy:FILE.json:SPLIT@IMAGES, such as karpathy:d.json:test")
    path, splits = epath.Path(match[1]), match[2].split("+")
    try:
        images = json.loads(path.read_text())["images"]
        rows = [_row(image) for image in images if image["split"] in splits]
        known = sorted({image["split"] for image in images})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"data source {spec}: {path} is not a readable Karpathy split file ({error!r})") from error
    if missing := [split for split in splits if split not in known]:
        raise UserError(f"data source {spec}: no split {missing[0]!r}; the file has {', '.join(known)}")
    if empty := [row["key"] for row in rows if not row["captions"]]:
        raise UserError(f"data source {spec}: {empty[0]} has no sentence")
    return FolderSource(match[3] or str(path.parent), rows)


def _row(image: dict[str, Any]) -> dict[str, Any]:
    captions = [sentence["raw"].strip() for sentence in image["sentences"]]
    captions = [caption for caption in captions if caption]
    folder = image.get("filepath", "")
    key = f"{folder}/{image['filename']}" if folder else image["filename"]
    return {"key": key, "caption": captions[0] if captions else "", "captions": captions}
