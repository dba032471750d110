"""Frames to encoded videos, by PyAV."""

import io
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from florence_jax.data.video_containers import VIDEO_INSTALL
from florence_jax.errors import UserError, require


class VideoFormat(NamedTuple):
    """How frames are encoded.

    Attributes:
      suffix: of the file's name.
      container, codec: by FFmpeg's names.
      pixels: FFmpeg's name of how colours are kept.
      options: of the encoder.
    """

    suffix: str
    container: str
    codec: str
    pixels: str
    options: dict[str, str]


VIDEO_FORMATS = {
    "h264": VideoFormat(".mp4", "mp4", "libx264", "yuv420p", {"preset": "veryfast", "crf": "18", "bf": "2"}),
    "vp9": VideoFormat(".webm", "webm", "libvpx-vp9", "yuv420p", {"deadline": "good", "cpu-used": "5", "crf": "24"}),
    "mpeg4": VideoFormat(".avi", "avi", "mpeg4", "yuv420p", {"qmin": "2", "qmax": "4"}),
    "mjpeg": VideoFormat(".avi", "avi", "mjpeg", "yuvj420p", {"qmin": "2", "qmax": "4"}),
    "ffv1": VideoFormat(".mkv", "matroska", "ffv1", "bgr0", {}),
}


# x264's code for AVX-512 now and then gives other bytes for the same small frames.
EXACT = {"libx264": {"x264-params": "no-asm=1"}}


def encode_video(
    frames: Iterable[np.ndarray],
    rate: Fraction | int = 25,
    kind: str = "h264",
    key_every: int = 12,
    exact: bool = False,
) -> bytes:
    """A video file of these frames.

    Args:
      frames: uint8 (H, W, 3) each, all of one size, at least one. Of odd sizes the last row or column is left out where
        the codec has colours for 2 x 2 pixels.
      rate: frames a second.
      kind: of `VIDEO_FORMATS`.
      key_every: frames from one that can be decoded alone to the next.
      exact: the same bytes for the same frames and the same PyAV, which takes longer where frames are large.

    Raises:
      UserError: without PyAV, or where it lacks the codec.
    """
    require("av", VIDEO_INSTALL)
    import av

    form = VIDEO_FORMATS[kind]
    options = form.options | {"flags": "+bitexact"} | (EXACT.get(form.codec, {}) if exact else {})
    file = io.BytesIO()
    try:
        with av.open(file, "w", format=form.container, options={"fflags": "+bitexact"}) as output:
            stream: Any = None
            for image in frames:
                if stream is None:
                    stream = output.add_stream(form.codec, rate=rate, options=options)
                    even = 2 if "420" in form.pixels else 1
                    height, width = (side // even * even for side in image.shape[:2])
                    stream.height, stream.width, stream.pix_fmt = height, width, form.pixels
                    stream.codec_context.gop_size, stream.codec_context.thread_count = key_every, 1
                cut = np.ascontiguousarray(image[:height, :width])
                output.mux(stream.encode(av.VideoFrame.from_ndarray(cut, format="rgb24")))
            output.mux(stream.encode(None))
    except (av.FFmpegError, av.codec.codec.UnknownCodecError) as error:
        raise UserError(f"cannot encode {kind} ({form.codec}) with this PyAV: {error}") from error
    return file.getvalue()
