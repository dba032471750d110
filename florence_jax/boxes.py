"""Areas and overlaps of boxes x1 y1 x2 y2, numpy or JAX: one arithmetic for losses, detections, data and scores."""

from typing import Any


def box_areas(boxes: Any) -> Any:
    """Areas of boxes (..., 4): (...); 0 for one that is turned inside out."""
    xp = boxes.__array_namespace__()
    sides = xp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return sides[..., 0] * sides[..., 1]


def iou(first: Any, second: Any) -> Any:
    """Intersection over union of boxes (..., 4), which are broadcast: (...), 0 for two without area.

    It is finite, and so are its gradients, whatever the sides of the boxes.
    """
    common, union = _common_and_union(first, second)
    return _ratio(common, union)


def giou(first: Any, second: Any) -> Any:
    """Generalised IoU (Rezatofighi et al. 2019) of boxes (..., 4), which are broadcast: (...), from -1 to 1.

    IoU less the share of their common hull that neither covers, which tells how far two boxes lie apart that do not
    overlap. It is finite, and so are its gradients, whatever the sides of the boxes.
    """
    xp = first.__array_namespace__()
    common, union = _common_and_union(first, second)
    low, high = xp.minimum(first[..., :2], second[..., :2]), xp.maximum(first[..., 2:], second[..., 2:])
    hull = box_areas(xp.concatenate([low, high], -1))
    return _ratio(common, union) - _ratio(hull - union, hull)


def _common_and_union(first: Any, second: Any) -> tuple[Any, Any]:
    xp = first.__array_namespace__()
    low, high = xp.maximum(first[..., :2], second[..., :2]), xp.minimum(first[..., 2:], second[..., 2:])
    common = box_areas(xp.concatenate([low, high], -1))
    return common, box_areas(first) + box_areas(second) - common


def _ratio(part: Any, whole: Any) -> Any:
    """part / whole, 0 where the whole is 0."""
    xp = part.__array_namespace__()
    some = whole > 0
    return xp.where(some, part / xp.where(some, whole, 1), 0)
