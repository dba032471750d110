"""Video Swin's classifiers of actions, in the naming of its authors (mmaction2) or of torchvision.

Canonical names are those of Swin below `video.`, and `video_head.weight`, `video_head.bias`.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from florence_jax.data.classes import load_class_names
from florence_jax.errors import UserError
from florence_jax.models.sizes import ModelConfig, resolve_config
from florence_jax.models.video_coswin import VIDEO, VideoModel, build_video, resolve_video
from florence_jax.params.rules import path_string
from florence_jax.tasks.linear_head import feature_width
from florence_jax.tasks.video_tower import VIDEO_HEAD
from florence_jax.tools.import_torch.family import Family, Shapes, Told, evaluation, nearest_variant
from florence_jax.tools.import_torch.names import Renames, rename
from florence_jax.tools.import_torch.swin import SWIN_RULES, swin_sizes

# Of a test, as its authors make it.
SAMPLING = {"interval": 2, "clips": 4, "crops": 3}
FRAMES = 32
_OWN = ("window_frames", "tube", "classes", "count")  # of sizes, what is not of the image tower


@dataclasses.dataclass(frozen=True)
class VideoSizes:
    """A classifier of a file: `tower`, the sizes that it shares with an image tower, fields of `VideoConfig`, names."""

    tower: ModelConfig
    overrides: Mapping[str, Any]
    classes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class VideoFamily(Family):
    """Checkpoints of Video Swin."""

    def configure(self, sizes: Mapping[str, Any]) -> VideoSizes:
        """See `Family`."""
        tower = {name: value for name, value in sizes.items() if name not in _OWN}
        overrides = {name: sizes[name] for name in ("tube", "window_frames")}
        overrides |= {"frames": FRAMES, "mask_padding": False}  # as published: padding takes part
        classes = _class_names(sizes.get("classes"), sizes["count"])
        return VideoSizes(nearest_variant(resolve_config(self.base, **tower)), overrides, classes)

    def parts(
        self, config: VideoSizes, entries: Sequence[str], evaluation: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """See `Family`: no towers for pictures and texts, and those of a run of configs/video.py."""
        video = {"overrides": dict(config.overrides), "sampling": SAMPLING, "entries": [VIDEO]}
        towers = super().parts(config.tower, [], evaluation)
        return towers | {VIDEO: video, VIDEO_HEAD: {"entries": [VIDEO_HEAD]}}

    def classes(self, config: VideoSizes) -> Sequence[str]:
        """See `Family`."""
        return config.classes

    def unrolled(self, config: VideoSizes) -> VideoModel:
        """See `Family`."""
        tower = dataclasses.replace(config.tower, scan=False)
        return build_video(tower, resolve_video(tower, **config.overrides))

    def targets(self, config: VideoSizes) -> dict[str, tuple[int, ...]]:
        """See `Family`."""
        shapes = jax.eval_shape(self.unrolled(config).init_video, jax.random.key(0))
        leaves = jax.tree_util.tree_leaves_with_path(shapes)
        tower = {f"{VIDEO}/{path_string(path)}": leaf.shape for path, leaf in leaves}
        count = len(config.classes)
        head = {f"{VIDEO_HEAD}/weight": (feature_width(config.tower), count), f"{VIDEO_HEAD}/bias": (count,)}
        return tower | head


def _class_names(given: Any, count: int) -> tuple[str, ...]:
    """Those of `--set classes=FILE`, else numbers."""
    if given is None:
        return tuple(f"class {number}" for number in range(count))
    names = tuple(one[0] for one in load_class_names(str(given)).names)
    if len(names) != count:
        raise UserError(f"the file tells {count} classes apart, --set classes={given} names {len(names)}")
    return names


def _sizes(found: Shapes) -> dict[str, Any]:
    """Fields of `VideoSizes`: a table's rows are (2 time - 1) times the square of 2 side - 1, the largest there is."""
    table = rf"{VIDEO}\.layers\.(\d+)\.blocks\.\d+\.attn\.relative_position_bias_table"
    stages = found.count(rf"{VIDEO}\.layers\.(\d+)\.blocks\..*")
    rows = [found.vote(table.replace(r"(\d+)", str(i)), lambda shape: shape[0], 2) for i in range(stages)]
    sides = [max(side for side in range(1, 64, 2) if row % side**2 == 0) for row in rows]
    flat = {name.replace(f"{VIDEO}.", "image.", 1): shape for name, shape in found.items()}
    flat = {
        name: (sides[int(name.split(".")[2])] ** 2, shape[1]) if name.endswith("bias_table") else shape
        for name, shape in flat.items()
    }
    return swin_sizes(Shapes(flat, "videoswin")) | {
        "window_frames": tuple((row // side**2 + 1) // 2 for row, side in zip(rows, sides, strict=True)),
        "tube": found.vote(rf"{VIDEO}\.patch_embed\.proj\.weight", lambda shape: shape[2], 5),
        "count": found.vote(rf"{VIDEO_HEAD}\.bias", lambda shape: shape[0], 1),
    }


_MMACTION: Renames = (
    (r"backbone\.", f"{VIDEO}."),
    (r"cls_head\.fc_cls\.weight", f"{VIDEO_HEAD}.weight#T"),
    (r"cls_head\.fc_cls\.", f"{VIDEO_HEAD}."),
)


def _torchvision(name: str) -> str:
    """Stages and the downsamplings between them are counted together; so are the parts of an MLP."""
    name = name.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")
    if match := re.match(r"features\.(\d+)\.", name):
        stage, between = divmod(int(match[1]), 2)
        rest = name[match.end() :]
        return f"{VIDEO}.layers.{stage}.{'downsample' if between else 'blocks'}.{rest}"
    if name.startswith("head."):
        return name.replace("head.", f"{VIDEO_HEAD}.", 1) + ("#T" if name.endswith("weight") else "")
    return f"{VIDEO}.{name}"


def _no_resolution(config: Any, res: int | None, window: int | None) -> dict[str, Any]:
    if res is not None or window is not None:
        raise UserError("--res and --window: leave them out; --config.model.overrides.res=N makes it another later")
    return {}


def _family(name: str, about: str, naming: Callable[[str], str], anchor: str) -> VideoFamily:
    def naming_of(names: Collection[str]) -> Callable[[str], str]:
        del names
        return naming

    def told(file: Path, names: Collection[str]) -> Told:
        del file, names
        return Told()

    return VideoFamily(
        name=name,
        about=about,
        base="Swin-T",
        naming=naming_of,
        rules={VIDEO: SWIN_RULES, VIDEO_HEAD: ()},
        sizes=_sizes,
        resolution=_no_resolution,
        resize=lambda params, config, target: params,
        anchors=(anchor,),
        told=told,
        evaluation=lambda config, names: evaluation(interpolation="bilinear"),
        remarks=lambda found: ["only videos: the file has no towers for pictures and texts"],
        task="video",
    )


VIDEO_SWIN = _family(
    "videoswin",
    "Video Swin's classifiers of actions in the naming of its authors (mmaction2)",
    lambda name: rename(name, _MMACTION),
    r"backbone\.patch_embed\.proj\.weight",
)
SWIN3D = _family(
    "swin3d",
    "Video Swin's classifiers of actions in torchvision's naming (swin3d_t, swin3d_s, swin3d_b)",
    _torchvision,
    r"patch_embed\.proj\.weight",
)
