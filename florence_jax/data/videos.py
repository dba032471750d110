"""Videos to frames: those with given numbers, RGB, upright, whatever the container and codec.

Frame n is the n-th in the order in which frames are shown, from 0. What a file says of how many it has is not believed:
its packets are counted, which decodes nothing. To read frames, the decoder starts at the key frame before them and
frames are told by their time stamps; the pixels are those of decoding from the start of the file. Animated WebP, PNG
and GIF are read by Pillow, all else by PyAV (FFmpeg).
"""

import abc
import contextlib
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from florence_jax.data.records import BadRecord, first_line, picture_bytes
from florence_jax.errors import require
from florence_jax.pictures import to_rgb, trouble_of

VIDEO_INSTALL = "reading videos needs PyAV: pip install '.[video]'"
MAX_FRAME_PIXELS = 4096 * 4096  # a frame of 8K would take 100 MB, a clip of 32 of them 3 GB
# Larger files are not read to count their packets: their frames are told by time, at the file's average rate.
COUNTED_BYTES = 256 * 1024 * 1024
FEW_FRAMES = 8  # as many are decoded and thrown away rather than that the decoder starts anew
FEW_SECONDS = 2.0  # the same where frames are told by time
# What may be in a file: nothing that names other files, as playlists do.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,h264,hevc,m4v,ivf,obu,av1,mxf,dv,"
    "rm,nut,mjpeg,mp3,wav,flac,aac"
)
STILL = {b"\xff\xd8": "JPEG", b"BM": "BMP", b"II": "TIFF", b"MM": "TIFF"}
VP8_SHOWN = 0x10  # bit of a VP8 packet's first byte: the frame is shown


class Video(abc.ABC):
    """An opened video.

    Attributes:
      count: of frames, at least 1.
    """

    count: int

    @abc.abstractmethod
    def times(self) -> np.ndarray:
        """Float64 (count,): when each frame is shown, in seconds after the first."""

    @abc.abstractmethod
    def read(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """The frames with these numbers, in this order, uint8 (T, H, W, 3); a number may be there several times.

        A frame that cannot be decoded is the last before it that can.

        Raises:
          BadRecord: if no frame can be decoded.
        """

    def checked(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Int64 (T,). Raises ValueError unless all are frames of the video."""
        found = np.asarray(numbers, np.int64)
        if found.ndim != 1 or not len(found) or found.min() < 0 or found.max() >= self.count:
            raise ValueError(f"frames {numbers} of a video with {self.count}")
        return found


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
    if still := next((name for start, name in STILL.items() if prefix.startswith(start)), ""):
        raise BadRecord(key, f"it is a still picture ({still}), not a video")
    with _open_container(given, key) as video:
        yield video


def read_frames(
    data: bytes | str | os.PathLike | np.ndarray, numbers: Sequence[int] | np.ndarray, key: str = ""
) -> np.ndarray:
    """The frames of a video with these numbers; see `open_video` and `Video.read`."""
    with open_video(data, key) as video:
        return video.read(numbers)


def _prefix(data: bytes | str, key: str) -> bytes:
    try:
        if isinstance(data, bytes):
            prefix = data[:32]
        else:
            with open(data, "rb") as file:
                prefix = file.read(32)
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
        self._frames, self.count = frames, len(frames)

    def times(self) -> np.ndarray:
        """See `Video`; as if there were 25 a second."""
        return np.arange(self.count) / 25

    def read(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `Video`."""
        return self._frames[self.checked(numbers)]


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
        self._image, self._key = image, key
        if image.width * image.height > MAX_FRAME_PIXELS:
            raise _too_large(key, image.width, image.height)
        try:
            self.count = getattr(image, "n_frames", 1)
        except Exception as error:  # as above
            raise BadRecord(key, f"corrupt animation ({trouble_of(error)})") from error
        if self.count < 2 and image.format != "GIF":
            raise BadRecord(key, f"it is a still picture ({image.format}), not a video")

    def times(self) -> np.ndarray:
        """See `Video`; as if all frames were shown as long as the first."""
        return np.arange(self.count) * ((self._image.info.get("duration") or 100) / 1000)

    def read(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `Video`."""
        numbers = self.checked(numbers)
        out = np.empty((len(numbers), self._image.height, self._image.width, 3), np.uint8)
        last: np.ndarray | None = None
        for number in np.unique(numbers).tolist():
            try:
                self._image.seek(number)
                last = np.asarray(to_rgb(self._image.copy()))
            except Exception as error:  # as above
                if last is None:
                    raise BadRecord(self._key, f"corrupt animation ({trouble_of(error)})") from error
            out[numbers == number] = last
        return out


def _too_large(key: str, width: int, height: int) -> BadRecord:
    return BadRecord(
        key, f"its frames have {width} x {height} pixels, more than {MAX_FRAME_PIXELS:,}: make them smaller"
    )


# -- containers -------------------------------------------------------------------------------------------------------


class _Index(NamedTuple):
    """Where the frames of a container are.

    Attributes:
      stamps: int64 (N,), ascending: what tells each frame.
      keys: int64 (K, 2): presentation and decoding stamps of the packets that decoding can start at, ascending.
      kind: 'stamps': a frame is told by its own time stamp. 'order': by its place in the order of decoding, as there
        are no stamps or the same ones several times. 'time': the frame that is shown at the stamp.
    """

    stamps: np.ndarray
    keys: np.ndarray
    kind: str


@contextlib.contextmanager
def _open_container(data: bytes | str, key: str) -> Iterator["ContainerVideo"]:
    require("av", VIDEO_INSTALL)
    video = ContainerVideo(data, key)
    try:
        yield video
    finally:
        video.close()


class ContainerVideo(Video):
    """A video that FFmpeg reads.

    Args:
      data: its bytes, or a local path.
      key: for messages.

    Raises:
      BadRecord: see `open_video`.
    """

    def __init__(self, data: bytes | str, key: str):
        self._data, self._key = data, key
        self._container: Any = None
        try:
            self._open()
            self._index = self._find_frames()
        except BaseException:
            self.close()
            raise
        self.count = len(self._index.stamps)

    def close(self) -> None:
        """Lets go of the file."""
        if self._container is not None:
            self._container.close()

    def _open(self) -> None:
        """Opens the container, or opens it anew, at its start."""
        import av

        self.close()
        # 'file:' so that no part of a name is taken for a protocol.
        file = io.BytesIO(self._data) if isinstance(self._data, bytes) else f"file:{self._data}"
        try:
            self._container = av.open(file, options={"format_whitelist": CONTAINERS}, metadata_errors="replace")
        except (av.FFmpegError, ValueError) as error:
            raise BadRecord(self._key, f"it cannot be read as a video ({first_line(error)})") from error
        streams = [s for s in self._container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            audio = " but sound" if self._container.streams.audio else ""
            raise BadRecord(self._key, f"it has no video stream{audio}")
        self._stream = streams[0]
        context = self._stream.codec_context
        if context is None:
            raise BadRecord(self._key, "there is no decoder for its video stream")
        if context.width * context.height > MAX_FRAME_PIXELS:
            raise _too_large(self._key, context.width, context.height)
        context.thread_count = 1  # one a worker process

    def times(self) -> np.ndarray:
        """See `Video`."""
        if self._index.kind == "order":
            rate = self._stream.average_rate or self._stream.guessed_rate or Fraction(25)
            return np.arange(self.count) / float(rate)
        return (self._index.stamps - self._index.stamps[0]) * float(self._stream.time_base)

    def read(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `Video`."""
        numbers = self.checked(numbers)
        out = _Output(self._key, numbers)
        wanted, missed = np.unique(numbers), []
        for group in self._groups(wanted):
            missed += self._fill(out, group, self._packets_before(int(group[0])))
        if missed and self._index.kind == "stamps":
            # What decoding from the start does not give either is the frame before it.
            self._open()
            self._fill(out, np.array(missed), self._demux())
        return out.frames()

    def _groups(self, wanted: np.ndarray) -> list[np.ndarray]:
        """The numbers, ascending, cut where the decoder is to start anew."""
        stamps, keys, kind = self._index
        if kind == "order":
            return [wanted]
        if kind == "time":
            far = np.diff(stamps[wanted]) * float(self._stream.time_base) > FEW_SECONDS
        else:
            place = np.searchsorted(keys[:, 0], stamps[wanted], side="right") - 1
            start = np.searchsorted(stamps, keys[np.maximum(place, 0), 0]) if len(keys) else place
            far = (np.diff(place) > 0) & (start[1:] - wanted[:-1] > FEW_FRAMES)
        return np.split(wanted, np.flatnonzero(far) + 1)

    def _fill(self, out: "_Output", wanted: np.ndarray, packets: Iterator[Any]) -> list[int]:
        """Decodes until these frames are there; returns the numbers for which there was only a frame before."""
        stamps, kind = self._index.stamps, self._index.kind
        waiting, missed, last = wanted.tolist(), [], None
        waiting.reverse()
        for order, frame in enumerate(self._decoded(packets)):
            stamp = order if kind == "order" else frame.pts
            if stamp is None:
                continue
            while waiting and stamp > stamps[waiting[-1]]:
                missed.append(waiting.pop())
                out.put(missed[-1], frame if last is None else last)
            if waiting and stamp == stamps[waiting[-1]]:
                out.put(waiting.pop(), frame)
            if not waiting:
                return missed
            last = frame
        for number in reversed(waiting):
            if last is not None:
                out.put(number, last)
        return missed + waiting[::-1]

    # -- packets --

    def _demux(self) -> Iterator[Any]:
        """The packets from where the container is; where they break off, None, to empty the decoder."""
        import av

        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.FFmpegError:  # cut off
                yield None
                return
            yield packet

    def _decoded(self, packets: Iterator[Any]) -> Iterator[Any]:
        """The frames of packets; damaged packets give none."""
        import av

        for packet in packets:
            try:
                frames = self._stream.decode(None) if packet is None else packet.decode()
            except av.FFmpegError:
                continue
            yield from frames

    def _packets_before(self, number: int) -> Iterator[Any]:
        """The packets from the key frame before a frame on."""
        stamps, keys, kind = self._index
        stamp = int(stamps[number])
        if kind == "order":
            self._open()
            return self._demux()
        if kind == "time":
            tries = [stamp]
        else:
            place = int(np.searchsorted(keys[:, 0], stamp, side="right")) - 1
            tries = keys[place].tolist() if place >= 0 else []
        for start in tries:  # some containers search by one kind of stamp, some by the other
            packets = self._seek(start, stamp)
            if packets is not None:
                return packets
        self._open()
        return self._demux()

    def _seek(self, start: int, stamp: int) -> Iterator[Any] | None:
        """Packets from a key frame on, at `start` or before; None if it comes after the frame that is wanted."""
        import av

        try:
            self._container.seek(start, stream=self._stream)
        except av.FFmpegError:
            return None
        packets = self._demux()
        first = next((p for p in packets if p is not None and p.is_keyframe and p.pts is not None), None)
        return None if first is None or first.pts > stamp else itertools.chain([first], packets)

    def _find_frames(self) -> _Index:
        """The index, from the packets, which are counted and not decoded."""
        stream = self._stream
        if self._container.size > COUNTED_BYTES and (index := self._by_time()) is not None:
            return index
        hides = stream.codec_context.name == "vp8"
        stamps: list[int | None] = []
        keys = []
        for packet in self._demux():
            # Nothing to be shown: a frame said again, cut off by an edit list, or only there for others.
            if packet is None or not packet.size or packet.is_discard or (hides and not _vp8_shown(packet)):
                continue
            stamps.append(packet.pts)
            if packet.is_keyframe and packet.pts is not None:
                keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        if not stamps:
            raise BadRecord(self._key, "its video stream has no frames")
        if None in stamps or len(set(stamps)) < len(stamps):
            return _Index(np.arange(len(stamps)), np.zeros((0, 2), np.int64), "order")
        return _Index(np.sort(np.array(stamps, np.int64)), np.array(sorted(keys), np.int64).reshape(-1, 2), "stamps")

    def _by_time(self) -> _Index | None:
        """The index of a long file, at its average rate; None if it does not say how long it is."""
        stream = self._stream
        rate = stream.average_rate or stream.guessed_rate
        if stream.duration is not None:
            seconds = stream.duration * stream.time_base
        else:
            seconds = Fraction(self._container.duration or 0, 1_000_000)
        if not rate or seconds <= 0:
            return None
        step = 1 / (rate * stream.time_base)
        count = max(1, round(seconds * rate))
        stamps = (stream.start_time or 0) + (np.arange(count) + 0.5) * float(step)
        return _Index(stamps.astype(np.int64), np.zeros((0, 2), np.int64), "time")


def _vp8_shown(packet: Any) -> bool:
    return bool(memoryview(packet)[0] & VP8_SHOWN)


class _Output:
    """The frames that are wanted, filled as they come."""

    def __init__(self, key: str, numbers: np.ndarray):
        self._key, self._numbers = key, numbers
        self._frames: np.ndarray | None = None
        self._filled = np.zeros(len(numbers), bool)

    def put(self, number: int, frame: Any) -> None:
        """Keeps an av.VideoFrame as the frame with a number."""
        rows = np.flatnonzero(self._numbers == number)
        if self._frames is None:
            image = _pixels(frame, self._key)
            self._frames = np.empty((len(self._numbers), *image.shape), np.uint8)
        else:
            _, height, width, _ = self._frames.shape
            image = _pixels(frame, self._key, (height, width))
        self._frames[rows] = image
        self._filled[rows] = True

    def frames(self) -> np.ndarray:
        """Uint8 (T, H, W, 3), all of them. Raises BadRecord if there are none."""
        if self._frames is None:
            raise BadRecord(self._key, "none of its frames can be decoded")
        for row in np.flatnonzero(~self._filled):  # a part of a damaged file without any frame: the nearest one
            there = np.flatnonzero(self._filled)
            nearest = np.argmin(np.abs(self._numbers[there] - self._numbers[row]))
            self._frames[row] = self._frames[there[nearest]]
        return self._frames


def _pixels(frame: Any, key: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """An av.VideoFrame, uint8 (H, W, 3), upright, transparent parts on white; of `size` where a stream changes it."""
    if frame.width * frame.height > MAX_FRAME_PIXELS:
        raise _too_large(key, frame.width, frame.height)
    matrix = _display_matrix(frame)
    if any(part.is_alpha for part in frame.format.components):
        image = np.asarray(to_rgb(Image.fromarray(frame.to_ndarray(format="rgba"))))
    else:
        image = frame.to_ndarray(format="rgb24")
    image = _upright(image, matrix)
    if size is not None and image.shape[:2] != size:
        height, width = size
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    return image


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """-1, 0 or 1 each: (x', y') = (a x + c y, b x + d y) is where a pixel is shown, but for a shift."""
    from av.sidedata.sidedata import Type

    found = frame.side_data.get(Type.DISPLAYMATRIX)
    if found is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.sign(np.round(np.frombuffer(bytes(found), np.int32)[:5] / 65536)).astype(int).tolist()
    return a, b, c, d


def _upright(image: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Turned by quarters and mirrored as the matrix says; turns in between are left as they are."""
    a, b, c, d = matrix
    if a and d and not b and not c:
        return image[::d, ::a]
    if b and c and not a and not d:
        return image.swapaxes(0, 1)[::b, ::c]
    return image
