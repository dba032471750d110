"""Personal data: addresses and numbers in captions, faces in images."""

import io
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageFilter

from florence_jax.data.captions import normalise_caption
from florence_jax.pictures import open_picture, to_rgb

# (kind, start, end) in characters of the text.
Span = tuple[str, int, int]
# uint8 RGB (H, W, 3) -> float (N, 4) boxes (x0, y0, x1, y1) in pixels.
FaceDetector = Callable[[np.ndarray], np.ndarray]
_AT, _DOT = r"(?:@|\s?[(\[]at[)\]]\s?)", r"(?:\.|\s?[(\[]dot[)\]]\s?)"
_MAIL = re.compile(rf"(?<![\w.+-])[\w.+-]{{1,64}}{_AT}(?:[\w-]{{1,63}}{_DOT}){{1,6}}[a-z]{{2,24}}\b", re.I)
# Digits among which a card number may be; its date may follow: 4111 1111 1111 1111 12/25.
_DIGITS = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,}(?![\w-])")
_GROUP = re.compile(r"\d+")
CARD_DIGITS = 19  # at most
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"))
# E.164 with a plus or 00, or national groups of digits with a bracketed or separated area code.
_PHONE = re.compile(
    r"(?<![\w.+-])(?:(?:\+|00)\d(?:[ ./()-]{0,2}\d){6,14}|\(\d{2,5}\)[ .-]?\d(?:[ .-]?\d){4,9}"
    r"|0\d{1,4}[ ./-]\d(?:[ .-]?\d){4,9}|\d{3}[ .-]\d{3}[ .-]\d{4})(?![\w-])"
)
# Leading digits and lengths of the card networks in use (ISO/IEC 7812).
_NETWORK = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[68]\d)\d{11}|6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
)
_DATE = re.compile(r"(?:\d{4}[./ -]\d{1,2}[./ -]\d{1,2}|\d{1,2}[./ -]\d{1,2}[./ -]\d{4})")


def luhn(digits: str) -> bool:
    """Whether the check digit at the end of a card number is right (ISO/IEC 7812-1)."""
    doubled = (2 * int(d) if i % 2 else int(d) for i, d in enumerate(reversed(digits)))
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


def readable(caption: str) -> str:
    """A caption as `find_personal` searches it: normalised, as training will read it, with plain hyphens for dashes."""
    return normalise_caption(caption).translate(_DASHES)


def find_personal(text: str) -> list[Span]:
    """Mail addresses, card numbers (right network, length and check digit) and phone numbers, by position; no overlaps.

    Kinds: 'mail', 'card', 'phone'. A telephone number needs a country code, a bracketed or leading-zero area code, or
    the North American grouping: bare digits are more often a product number.

    Args:
      text: from `readable`.
    """
    spans: list[Span] = [("mail", *match.span()) for match in _MAIL.finditer(text)]
    if any(map(str.isdigit, text)):
        spans += [("card", *span) for span in _cards(text)]
        for match in _PHONE.finditer(text):
            if not _DATE.fullmatch(match[0]):
                spans.append(("phone", *match.span()))
    kept: list[Span] = []
    for span in sorted(spans, key=lambda s: (s[1], -s[2])):
        if not kept or span[1] >= kept[-1][2]:
            kept.append(span)
    return kept


def _cards(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of card numbers: runs of whole groups of digits, the longest from each group on."""
    for run in _DIGITS.finditer(text):
        groups, behind = list(_GROUP.finditer(text, *run.span())), 0
        for first, group in enumerate(groups):
            if group.start() < behind or (first and text[group.start() - 1] == "-"):
                continue
            digits = ""
            for last in groups[first : first + CARD_DIGITS]:
                digits += last[0]
                if _NETWORK.fullmatch(digits) and luhn(digits):
                    behind = last.end()
            if behind > group.start():
                yield group.start(), behind


def redact(caption: str) -> str:
    """`readable`, with each finding replaced by its kind in square brackets; the caption itself if there is none."""
    text = readable(caption)
    spans = find_personal(text)
    for kind, start, end in reversed(spans):
        text = f"{text[:start]}[{kind}]{text[end:]}"
    return text if spans else caption


def blur_boxes(image: np.ndarray, boxes: np.ndarray, margin: float = 0.1) -> np.ndarray:
    """A copy with each box blurred beyond recognition; pixels outside the boxes and their margins do not change.

    Args:
      image: uint8 (H, W, 3).
      boxes: (N, 4), x0, y0, x1, y1 in pixels; may reach outside the image.
      margin: by which a box is enlarged on each side, as a share of its longer side.

    Returns:
      uint8 (H, W, 3). The Gaussian's deviation is a tenth of the longer side of the box: about two cycles of detail
      across a face survive, far fewer than recognition needs.
    """
    blurred = image.copy()
    height, width = image.shape[:2]
    for x0, y0, x1, y1 in np.asarray(boxes, np.float64).reshape(-1, 4):
        side = max(x1 - x0, y1 - y0)
        if side <= 0:
            continue
        left, top = (int(np.clip(np.floor(v - margin * side), 0, n)) for v, n in ((x0, width), (y0, height)))
        right, bottom = (int(np.clip(np.ceil(v + margin * side), 0, n)) for v, n in ((x1, width), (y1, height)))
        if left < right and top < bottom:
            region = Image.fromarray(blurred[top:bottom, left:right])  # from the region alone: no colour leaks in
            radius = max(float(side) / 10, 2.0)
            blurred[top:bottom, left:right] = np.asarray(region.filter(ImageFilter.GaussianBlur(radius)))
    return blurred


def blur_faces(data: bytes, detector: FaceDetector, margin: float = 0.1) -> tuple[bytes, int]:
    """Blurs the faces of an encoded image.

    Args:
      data: an image that Pillow decodes; it has passed the validity stage.
      detector: any callable that finds faces in the upright RGB image.
      margin: as in `blur_boxes`.

    Returns:
      (encoded image, number of boxes); the bytes are the same ones if there is no face. JPEG stays JPEG (quality 95),
      anything else becomes PNG, its transparent parts white; metadata, which may hold a thumbnail of the face, is not
      copied.
    """
    with open_picture(data) as opened:
        kind = "JPEG" if opened.format == "JPEG" else "PNG"
        image = np.asarray(to_rgb(opened))
    boxes = np.asarray(detector(image), np.float64).reshape(-1, 4)
    if not len(boxes):
        return data, 0
    out = io.BytesIO()
    options = {"quality": 95} if kind == "JPEG" else {}
    Image.fromarray(blur_boxes(image, boxes, margin)).save(out, kind, **options)
    return out.getvalue(), len(boxes)


def personal_scores(caption: str) -> dict[str, int]:
    """Score columns: number of "mails", "cards" and "phones" in a caption."""
    kinds: Sequence[str] = [kind for kind, _, _ in find_personal(readable(caption))]
    return {f"{kind}s": kinds.count(kind) for kind in ("mail", "card", "phone")}
