"""Groups of pictures as one HTML file that needs no other."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

SIDE = 160  # pixels of a thumbnail's longer side
STYLE = """body{font:14px/1.4 system-ui,sans-serif;margin:2em;background:#fff;color:#222}
section{border-top:1px solid #ccc;padding:.6em 0}h2{font-size:1em;margin:.2em 0 .6em}
div{display:flex;flex-wrap:wrap;gap:12px}figure{margin:0;width:160px;font-size:11px;overflow-wrap:anywhere}
img{max-width:160px;max-height:160px;display:block;background:#eee}
figcaption{margin-top:6px}.first img{outline:3px solid #2a7}"""


def thumbnail(data: bytes) -> str:
    """An encoded picture as a data URL of a small JPEG, on white; '' if it cannot be read."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (SIDE, SIDE))
            image = image.convert("RGBA")
    except Exception:  # Pillow's readers raise a dozen unrelated types: the sheet shows the name alone
        return ""
    image.thumbnail((SIDE, SIDE))
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    canvas.paste(image, mask=image.getchannel("A"))
    file = io.BytesIO()
    canvas.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def render(title: str, note: str, groups: Iterable[tuple[str, Sequence[tuple[str, str]]]]) -> str:
    """The page.

    Args:
      title, note: plain text. groups: (heading, [(thumbnail URL or '', caption), ...]); the first picture is marked.
    """
    parts = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"]
    parts.append(f"<h1>{html.escape(title)}</h1><p>{html.escape(note)}</p>")
    for heading, pictures in groups:
        parts.append(f"<section><h2>{html.escape(heading)}</h2><div>")
        for i, (url, caption) in enumerate(pictures):
            image = f'<img src="{url}" alt="">' if url else ""
            mark = " class=first" if not i else ""
            parts.append(f"<figure{mark}>{image}<figcaption>{html.escape(caption)}</figcaption></figure>")
        parts.append("</div></section>")
    return "\n".join(parts) + "\n"
