"""Videos that FFmpeg reads, by PyAV: packets counted, frames read from the key frame before them."""

import io
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from florence_jax.data.records import BadRecord, first_line
from florence_jax.data.video_base import MAX_FRAME_PIXELS, Video, shorter, too_large
from florence_jax.errors import require
from florence_jax.pictures import to_rgb

VIDEO_INSTALL = "reading videos needs PyAV: pip install '.[video]'"
# Larger files are not read to count their packets: their frames are told by time, at the file's average rate.
COUNTED_BYTES = 256 * 1024 * 1024
FEW_FRAMES = 8  # as many are decoded and thrown away rather than that the decoder starts anew
FEW_SECONDS = 2.0  # the same where frames are told by time
BACK_SECONDS = (0, 10, 60, 600)  # how far before such a frame a key frame is looked for; then the file's start
# What may be in a file: nothing that names other files, as playlists do.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,h264,hevc,m4v,ivf,obu,av1,mxf,dv,"
    "rm,nut,mjpeg,mp3,wav,flac,aac"
)
VP8_SHOWN = 0x10  # bit of a VP8 packet's first byte: the frame is shown


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


class ContainerVideo(Video):
    """A video that FFmpeg reads.

    Args:
      data: its bytes, or a local path.
      key: for messages.

    Raises:
      BadRecord: see `open_video`.
      UserError: without PyAV.
    """

    def __init__(self, data: bytes | str, key: str):
        require("av", VIDEO_INSTALL)
        self._data, self._key = data, key
        self._container: Any = None
        try:
            self._open()
            self._index = self._find_frames()
        except BaseException:
            self.close()
            raise
        self.count, self.stamped = len(self._index.stamps), self._index.kind != "order"

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
            what = getattr(error, "strerror", "") or first_line(error)
            raise BadRecord(self._key, f"it cannot be read as a video ({what}): is it whole?") from error
        streams = [s for s in self._container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            audio = " but sound" if self._container.streams.audio else ""
            raise BadRecord(self._key, f"it has no video stream{audio}")
        self._stream = streams[0]
        context = self._stream.codec_context
        if context is None:
            raise BadRecord(self._key, "there is no decoder for its video stream")
        if context.width * context.height > MAX_FRAME_PIXELS:
            raise too_large(self._key, context.width, context.height)
        context.thread_count = 1  # a worker process is one
        self.size = context.height, context.width
        self.codec, self.declared = context.name, self._stream.frames

    def times(self) -> np.ndarray:
        """See `Video`."""
        if self._index.kind == "order":
            rate = self._stream.average_rate or self._stream.guessed_rate or Fraction(25)
            return np.arange(self.count) / float(rate)
        return (self._index.stamps - self._index.stamps[0]) * float(self._stream.time_base)

    def read(self, numbers: Sequence[int] | np.ndarray, short: int | None = None) -> np.ndarray:
        """See `Video`."""
        numbers = self.checked(numbers)
        out = _Output(self._key, numbers, short)
        wanted, missed = np.unique(numbers), []
        for group in self._groups(wanted):
            missed += self._fill(out, group, self._packets_before(int(group[0])))
        if missed and self._index.kind == "stamps":
            # What decoding from the start does not give either is the frame before it.
            self._open()
            self._fill(out, np.array(missed), self._demux())
        return out.frames()

    def each(self, part: range, short: int | None = None) -> Iterator[np.ndarray]:
        """See `Video`; decoded in one go, what a damaged part does not show is left out."""
        stamps, kind = self._index.stamps, self._index.kind
        first, last = int(stamps[part.start]), int(stamps[part.stop - 1])
        for order, frame in enumerate(self._decoded(self._packets_before(part.start))):
            stamp = order if kind == "order" else frame.pts
            if stamp is not None and stamp > last:
                return
            if stamp is not None and stamp >= first:
                out = _Output(self._key, np.zeros(1, np.int64), short)
                out.put(0, frame)
                yield out.frames()[0]

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
            tries = [stamp - round(back / self._stream.time_base) for back in BACK_SECONDS]
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
    """The frames that are wanted, filled as they come.

    Args:
      key: for messages. numbers: of the frames. short: see `Video.read`.
    """

    def __init__(self, key: str, numbers: np.ndarray, short: int | None):
        self._key, self._numbers, self._short = key, numbers, short
        self._frames: np.ndarray | None = None
        self._size: tuple[int, int] | None = None
        self._filled = np.zeros(len(numbers), bool)

    def put(self, number: int, frame: Any) -> None:
        """Keeps an av.VideoFrame as the frame with a number."""
        if frame.width * frame.height > MAX_FRAME_PIXELS:
            raise too_large(self._key, frame.width, frame.height)
        if self._size is None:  # all are as the first, also where a stream changes its size
            self._size = shorter((frame.height, frame.width), self._short)
        image = _upright(_pixels(frame, self._size), _display_matrix(frame))
        if self._frames is None:
            self._frames = np.empty((len(self._numbers), *image.shape), np.uint8)
        rows = np.flatnonzero(self._numbers == number)
        self._frames[rows] = image
        self._filled[rows] = True

    def frames(self) -> np.ndarray:
        """Uint8 (T, H, W, 3), all of them. Raises BadRecord if there are none."""
        there = np.flatnonzero(self._filled)
        if self._frames is None:
            raise BadRecord(self._key, "none of its frames can be decoded")
        for row in np.flatnonzero(~self._filled):  # of a part of a damaged file without any: the nearest one
            nearest = np.argmin(np.abs(self._numbers[there] - self._numbers[row]))
            self._frames[row] = self._frames[there[nearest]]
        return self._frames


def _pixels(frame: Any, size: tuple[int, int]) -> np.ndarray:
    """An av.VideoFrame as it is stored, uint8 (height, width, 3), transparent parts on white."""
    height, width = size
    way = "BILINEAR" if (frame.height, frame.width) == size else "BICUBIC"  # of its colours; of all
    target = {"width": width, "height": height, "interpolation": way, "threads": 1}
    if any(part.is_alpha for part in frame.format.components):
        return np.asarray(to_rgb(Image.fromarray(frame.to_ndarray(format="rgba", **target))))
    return frame.to_ndarray(format="rgb24", **target)


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
