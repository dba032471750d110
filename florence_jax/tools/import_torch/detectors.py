"""What the families of detectors have in common: a Swin with the norms of its maps, and a Dynamic Head.

Canonical names of the tower are Swin's, those of the head our own: `detector.pyramid.lateral3.weight`,
`detector.block0.coarser.norm.bias`, ...
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from florence_jax.data.classes import load_class_names
from florence_jax.errors import UserError
from florence_jax.models.base import Model
from florence_jax.models.detector import DETECTORS, DetectorConfig, build_detector, resolve_detector
from florence_jax.models.sizes import ModelConfig, resolve_config
from florence_jax.tasks.detector import DETECTOR, Options
from florence_jax.tools.import_torch.family import DROPPED, Family, Shapes, Told, nearest_variant
from florence_jax.tools.import_torch.names import Renames, rename_all
from florence_jax.tools.import_torch.swin import SWIN_RULES, swin_sizes

BUCKET_STEP = 128  # pixels
KNOWN_SETS = {80: "coco", 365: "objects365"}  # by the number of their classes
# COCO's numbers of its 80 classes: eleven of 1 to 90 are unused.
COCO_IDS = tuple(sorted({*range(1, 91)} - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))
LAST_NORM = "the image tower's last norm, which no detector has: factor 1, bias 0"
OTHER_MAP = "the norm of a map that the pyramid does not read"


@dataclasses.dataclass(frozen=True)
class DetectorSizes:
    """A detector of a file.

    Attributes:
      tower: its image tower. variant: of `models.detector.DETECTORS`. overrides: fields of its sizes that differ.
      classes: their names.
      short, longest: sides in pixels of the pictures that its publishers test on: the shorter is `short`, unless the
        longer would be more than `longest`.
    """

    tower: ModelConfig
    variant: str
    overrides: Mapping[str, Any]
    classes: tuple[str, ...]
    short: int
    longest: int


@dataclasses.dataclass(frozen=True)
class DetectorFamily(Family):
    """Checkpoints of detectors.

    Attributes:
      head: fields of `DetectorConfig` that follow from the code that the weights were trained with.
      options: of `tasks.detector.Options`, likewise.
    """

    head: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def configure(self, sizes: Mapping[str, Any]) -> DetectorSizes:
        """See `Family`. `sizes` has fields of the tower, of `DetectorConfig`, and of `DetectorSizes`."""
        of_head = {field.name for field in dataclasses.fields(DetectorConfig)}
        own = ("count", "classes", "short", "longest")
        given = dict(self.head) | {name: value for name, value in sizes.items() if name in of_head}
        tower = {name: value for name, value in sizes.items() if name not in (*of_head, *own)}
        variant = min(DETECTORS, key=lambda name: len(_changes(name, given)))
        return DetectorSizes(
            nearest_variant(resolve_config(self.base, **tower)),
            variant,
            _changes(variant, given),
            _class_names(sizes.get("classes"), sizes["count"]),
            sizes["short"],
            sizes["longest"],
        )

    def parts(
        self, config: DetectorSizes, entries: Sequence[str], evaluation: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """See `Family`: the image tower, and the detector as a run of configs/detect.py describes it."""
        towers = super().parts(config.tower, [name for name in entries if name != DETECTOR], evaluation)
        return towers | {
            DETECTOR: {
                "variant": config.variant,
                "overrides": config.overrides,
                "classes": list(config.classes),
                "options": Options(**self.options)._asdict(),
                "entries": [DETECTOR],
                "sizes": buckets_for(config.short, config.longest),
                "eval_ops": f"decode|resize_short({config.short}, {config.longest})|pad_image({{height}}, {{width}})",
                "category_ids": _category_ids(config.classes),
            }
        }

    def unrolled(self, config: DetectorSizes) -> Model[ModelConfig]:
        """See `Family`."""
        tower = dataclasses.replace(config.tower, scan=False)
        return build_detector(tower, config.variant, len(config.classes), **config.overrides)


def naming_by(rules: Renames) -> Callable[[Collection[str]], Callable[[str], str]]:
    """`Family.naming` of files whose names follow the same rules whatever is in them."""
    return lambda names: functools.partial(rename_all, rules=rules)


def detector_family(
    name: str,
    about: str,
    naming: Callable[[Collection[str]], Callable[[str], str]],
    anchors: tuple[str, ...],
    sides: tuple[int, int],
    dropped: str = "(?!)",
    **options: Any,
) -> DetectorFamily:
    """A family of detectors on Swin.

    Args:
      name, about, naming, anchors: see `Family`.
      sides: shorter and longest side of the pictures that its publishers test on.
      dropped: pattern of canonical names that are left out, besides those of all families.
      **options: further fields of `DetectorFamily`; `absent` and `left_out` go before those of all detectors.
    """
    more = {name: options.pop(name, ()) for name in ("absent", "left_out")}
    sizes: Callable[[Shapes], dict[str, Any]] = options.pop("sizes", lambda found: {})
    return DetectorFamily(
        name=name,
        about=about,
        base="Swin-T",
        naming=naming,
        rules={"image": SWIN_RULES, DETECTOR: ()},
        sizes=lambda found: _sizes(found) | dict(zip(("short", "longest"), sides, strict=True)) | sizes(found),
        resolution=_no_resolution,
        resize=lambda params, config, target: params,
        anchors=anchors,
        told=_nothing_told,
        evaluation=lambda config, names: {},
        entries=("image", DETECTOR),
        task="detect",
        dropped=f"{DROPPED}|{dropped}",
        left_out=(*more["left_out"], (r"image\.norm0\..*", OTHER_MAP)),
        absent=(*more["absent"], ("image/norm/scale", 1.0, LAST_NORM), ("image/norm/bias", 0.0, LAST_NORM)),
        **options,
    )


def block_renames(prefix: str, names: Mapping[str, str]) -> Renames:
    """Names of the parts of a block whose own name, `detector.blockN.`, stands there already.

    Args:
      prefix: what stands before N, as a pattern. names: patterns of the parts, and ours.
    """
    return tuple((rf"^({prefix}\d+)\.{theirs}\.(?=\w)", rf"\1.{ours}.") for theirs, ours in names.items())


def buckets_for(short: int, longest: int, step: int = BUCKET_STEP) -> list[list[int]]:
    """(height, width) of buckets, multiples of `step`, for pictures of these sides; each picture fits into the bucket
    that is nearest to it in aspect ratio."""
    side = -(-short // step) * step
    while short * math.sqrt(1 + step / side) > side:  # of a picture halfway between two buckets
        side += step
    longer = range(side, max(side, -(-longest // step) * step) + 1, step)
    return [*([side, other] for other in longer), *([other, side] for other in longer if other > side)]


def _sizes(found: Shapes) -> dict[str, Any]:
    """Fields of the tower and of the head that the shapes show."""
    return swin_sizes(found) | {
        "width": found.vote(r"detector\.block\d+\.offset\.weight", lambda s: s[1], 4),
        "blocks": found.count(r"detector\.block(\d+)\..*"),
        "count": found.vote(r"detector\.class_logits\.bias", lambda s: s[0], 1),
    }


def _changes(variant: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that make `given` of the row `variant`; raises `UserError` for a choice that there is not."""
    row = resolve_detector(variant)
    resolve_detector(variant, **given)
    return {name: value for name, value in given.items() if value != getattr(row, name)}


def _class_names(given: Any, count: int) -> tuple[str, ...]:
    if given is None and count not in KNOWN_SETS:
        raise UserError(
            f"the file does not name its {count} classes: add --set classes=FILE with {count} names, one a line"
        )
    spec = KNOWN_SETS[count] if given is None else given
    names = tuple(one[0] for one in load_class_names(spec).names) if isinstance(spec, str) else tuple(map(str, spec))
    if len(names) != count:
        raise UserError(f"the file tells {count} classes apart, --set classes={given} names {len(names)}")
    if len(set(names)) < count:
        raise UserError(f"--set classes={given}: a name is there twice")
    return names


def _category_ids(classes: Sequence[str]) -> list[int]:
    coco = [one[0] for one in load_class_names("coco").names]
    return list(COCO_IDS) if list(classes) == coco else list(range(1, len(classes) + 1))


def _no_resolution(config: Any, res: int | None, window: int | None) -> dict[str, Any]:
    if res is not None or window is not None:
        raise UserError(
            "--res and --window are for towers alone: a detector takes pictures of any size; --set short=600 and "
            "--set longest=1000 say how large they are made"
        )
    return {}


def _nothing_told(file: Path, names: Collection[str]) -> Told:
    return Told()
