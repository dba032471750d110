"""Animated drawings with names: npm's @lobehub/fluent-emoji-anim-1 (Microsoft Fluent, MIT), named as the embedded set.

    npm pack @lobehub/fluent-emoji-anim-1 && tar xzf lobehub-fluent-emoji-anim-1-*.tgz      # the folder package/

182 of its drawings move and have a name in the embedded set, 166 of them one that pretraining on the set sees.
"""

from pathlib import Path

from florence_jax.data.sources.embedded import EMOJI_SPLITS, open_emoji
from florence_jax.data.sources.video_source import VideoSource, list_videos
from florence_jax.errors import UserError

WEBP_FLAGS, WEBP_MOVES = 20, 2  # the byte of an extended WebP's header that has flags, and the one of animations


def open_animated_emoji(spec: str) -> VideoSource:
    """Opens 'animated_emoji:FOLDER': "caption" is the name, "group" one of 8, "seen" whether training has the name.

    Args:
      spec: as above; the files are animated WebP called by code points, such as 1f426.webp or 1f44b-fe0f.webp.

    Raises:
      UserError: for a folder without such files.
    """
    folder = spec.partition(":")[2]
    if not Path(folder).is_dir():
        raise UserError(f"data source {spec!r}: write animated_emoji:FOLDER, the unpacked npm package")
    known = {
        record["key"].partition("/")[2]: record | {"seen": int(split != "new_names")}
        for split in EMOJI_SPLITS
        for record in open_emoji(f"emoji:{split}").metadata()
    }
    rows, still, nameless = [], 0, 0
    for name in list_videos(folder).pictures:
        points = [point for point in Path(name).stem.split("-") if point != "fe0f"]
        record = known.get("-".join(points))
        if record is None:
            nameless += 1
        elif _moves(Path(folder) / name):
            rows.append({"key": name} | {field: record[field] for field in ("caption", "group", "seen")})
        else:
            still += 1
    if not rows:
        raise UserError(f"data source {spec}: no animated WebP called by code points of the embedded set in {folder}")
    says = f"{spec}: {len(rows):,} animated drawings with a name in the embedded set; left out: "
    says += f"{nameless:,} without one, {still:,} that do not move"
    return VideoSource(spec, folder, rows, {"videos": len(rows), "says": says})


def _moves(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(WEBP_FLAGS + 1)
    return head[12:16] == b"VP8X" and bool(head[WEBP_FLAGS] & WEBP_MOVES)
