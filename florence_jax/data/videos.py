"""Videos to frames: those with given numbers, RGB, upright, whatever the container and codec.

Frame n is the n-th in the order in which frames are shown, from 0. What a file says of how many it has is not believed:
its packets are counted, which decodes nothing. To read frames, the decoder starts at the key frame before them and
frames are told by their time stamps; the pixels are those of decoding from the start of the file. Animated WebP, PNG
and GIF are read by Pillow, all else by PyAV (FFmpeg).
"""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from florence_jax.data.records import BadRecord, picture_bytes
from florence_jax.data.video_base import MAX_FRAME_PIXELS, Video, shorter, too_large
from florence_jax.data.video_containers import ContainerVideo
from florence_jax.pictures import is_heif, to_rgb, trouble_of

# First bytes of pictures that FFmpeg would take for videos of one frame.
STILL_PICTURES = {b"\xff\xd8": "JPEG", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}


@contextlib.contextmanager
def open_video(data: bytes | str | os.PathLike | np.ndarray, key: str = "") -> Iterator[Video]:
    """Opens a video to read frames of it.

    Args:
      data: encoded, or the path or URL of a file, or frames, uint8 (T, H, W, 3).
      key: of the record, for messages.

    Raises:
      BadRecord: for what is no video, has no frames, or too many pixels.
      UserError: without PyAV, where it is needed.
    """
    if isinstance(data, np.ndarray):
        yield ArrayVideo(data, key)
        return
    if not isinstance(data, (bytes, str, os.PathLike)):
        raise BadRecord(key or "video", f"its video is {type(data).__name__}, neither bytes nor a path")
    given: bytes | str = data if isinstance(data, bytes) else os.fspath(data)
    key = key or (given if isinstance(given, str) else "video")
    if isinstance(given, str) and "://" in given:
        given = picture_bytes(given, key)
    prefix = _prefix(given, key)
    if _is_animation(prefix):
        with _open_animation(given, key) as animation:
            yield animation
        return
    if still := _still_picture(prefix):
        raise BadRecord(key, f"it is a still picture ({still}), not a video")
    with contextlib.closing(ContainerVideo(given, key)) as video:
        yield video


def read_frames(
    data: bytes | str | os.PathLike | np.ndarray, numbers: Sequence[int] | np.ndarray, key: str = ""
) -> np.ndarray:
    """The frames of a video with these numbers, uint8 (T, H, W, 3); see `open_video` and `Video.read`."""
    with open_video(data, key) as video:
        return video.read(numbers)


def _still_picture(prefix: bytes) -> str:
    """The kind of a picture that does not move; '' for all else."""
    if is_heif(prefix):
        return "HEIC"
    if prefix[4:12] == b"ftypavif":
        return "AVIF"
    return next((name for start, name in STILL_PICTURES.items() if prefix.startswith(start)), "")


def _prefix(data: bytes | str, key: str) -> bytes:
    try:
        if isinstance(data, bytes):
            prefix = data[:64]
        else:
            with open(data, "rb") as file:
                prefix = file.read(64)
    except (OSError, ValueError) as error:
        raise BadRecord(key, f"cannot read the file: {getattr(error, 'strerror', '') or error}") from error
    if not prefix:
        raise BadRecord(key, "the file is empty")
    return prefix


class ArrayVideo(Video):
    """Frames in memory, uint8 (T, H, W, 3). Raises BadRecord for another array."""

    def __init__(self, frames: np.ndarray, key: str = ""):
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
            raise BadRecord(key or "video", f"its video is {frames.dtype} {frames.shape}, not uint8 (T, H, W, 3)")
        self._frames, self.count, self.size = frames, len(frames), frames.shape[1:3]

    def times(self) -> np.ndarray:
        """See `Video`; as if there were 25 a second."""
        return np.arange(self.count) / 25

    def read(self, numbers: Sequence[int] | np.ndarray, short: int | None = None) -> np.ndarray:
        """See `Video`."""
        frames = self._frames[self.checked(numbers)]
        size = shorter(self.size, short)
        return frames if size == self.size else np.stack([_resized(Image.fromarray(frame), size) for frame in frames])


# -- animated pictures ------------------------------------------------------------------------------------------------


def _is_animation(prefix: bytes) -> bool:
    """Whether Pillow is to read it."""
    return prefix.startswith((b"GIF8", b"\x89PNG")) or (prefix[:4] == b"RIFF" and prefix[8:12] == b"WEBP")


@contextlib.contextmanager
def _open_animation(data: bytes | str, key: str) -> Iterator["AnimatedPicture"]:
    try:
        image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
    except Exception as error:  # PIL's decoders raise a dozen unrelated types on corrupt data
        raise BadRecord(key, f"corrupt animation ({trouble_of(error)})") from error
    with image:
        yield AnimatedPicture(image, key)


class AnimatedPicture(Video):
    """An animated WebP, PNG or GIF; transparent parts are on white. Raises BadRecord for a still picture, too."""

    def __init__(self, image: Image.Image, key: str):
        self._image, self._key, self.size = image, key, (image.height, image.width)
        if image.width * image.height > MAX_FRAME_PIXELS:
            raise too_large(key, image.width, image.height)
        try:
            self.count = getattr(image, "n_frames", 1)
        except Exception as error:  # as above
            raise BadRecord(key, f"corrupt animation ({trouble_of(error)})") from error
        if self.count < 2 and image.format != "GIF":
            raise BadRecord(key, f"it is a still picture ({image.format}), not a video")
        self.codec = str(image.format)

    def times(self) -> np.ndarray:
        """See `Video`; as if all frames were shown as long as the first."""
        self._image.seek(0)
        self._image.load()  # WebP says only then how long a frame is shown
        return np.arange(self.count) * ((self._image.info.get("duration") or 100) / 1000)

    def read(self, numbers: Sequence[int] | np.ndarray, short: int | None = None) -> np.ndarray:
        """See `Video`."""
        numbers = self.checked(numbers)
        size = shorter(self.size, short)
        out = np.empty((len(numbers), *size, 3), np.uint8)
        last: np.ndarray | None = None
        for number in np.unique(numbers).tolist():
            try:
                self._image.seek(number)
                last = _resized(to_rgb(self._image.copy()), size)
            except Exception as error:  # as above
                if last is None:
                    raise BadRecord(self._key, f"corrupt animation ({trouble_of(error)})") from error
            out[numbers == number] = last
        return out


def _resized(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    if (image.width, image.height) == (width, height):
        return np.asarray(image)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
