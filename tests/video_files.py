"""Tiny videos for tests, encoded here."""

import base64
import io

import numpy as np

SIDES = (32, 48)  # height, width
# `moving_frames(11)` in H.265, groups of 5 whose first frames need the group before (x265 aborts now and then in PyAV).
OPEN_H265 = base64.b64decode(
    "GkXfo6NChoEBQveBAULygQRC84EIQoKIbWF0cm9za2FCh4EEQoWBAhhTgGcBAAAAAAAFGxFNm3TAv4TfMf9CTbuLU6uEFUmpZlOsgaFNu4tTq4"
    "QWVK5rU6yB8U27jFOrhBJUw2dTrIIBx027jFOrhBxTu2tTrIIE2uwBAAAAAAAAUwAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAFUmpZsu/hGcGIVQq17GDD0JATYCNTGF2ZjYyLjEyLjEwMl"
    "dBjUxhdmY2Mi4xMi4xMDJzpJDx/wvTE6ey5PCp3c/iELwERImIQJEwAAAAAAAWVK5rQNC/hBYNL2uuAQAAAAAAAMHXgQFzxYiEKslSUpN+P5yB"
    "ACK1nIN1bmSIgQCGkFZfTVBFR0gvSVNPL0hFVkODgQEj44OEBfXhAOCKsIEwuoEgVLKBBFXugQDsAQAAAAAAAAIAAGOi6wEBYAAAAJAAAAAAAB"
    "7wAPz9+PgAAA8DIAABABhAAQwB//8BYAAAAwCQAAADAAADAB6VlAkhAAEAJ0IBAQFgAAADAJAAAAMAAAMAHqBiCFllZbkyuaAgAAADACAAAAMB"
    "QSIAAQAGRAHBc9CJElTDZ96/hJHLIflzc6BjwIBnyJpFo4dFTkNPREVSRIeNTGF2ZjYyLjEyLjEwMnNzsmPAi2PFiIQqyVJSk34/Z8ihRaOIRF"
    "VSQVRJT05Eh5MwMDowMDowMS4xMDAwMDAwMDAAH0O2dUKqv4SfXxsU54EAo8CBAACAAAAAOCgBrxGA+gdUP+VZ9uSB4sy6qXzcnQOZfIpCMFbQ"
    "b85/oOst5ATKsYEiLIIToLpV+RWQgsLOKyuAo+eBASwAAAAAXwIB0BlfhDGIQKKdqcQHkNYJRnh81O3u3HbQS4iOV1xXHSmpTgP7vfDApTm4AD"
    "IISUO0fa8Gulvfy8oVlCB0fGP/iXXq2o0CnSl4KHJc0WJYu2I5EtxThGzGufE1tTSgo6KBAMgAAAAAGgIB4ESX4YpA1a8UlVFlO6/i5fpwxK31"
    "6NmAo5qBAGQAAAAAEgAB4CT/+ixm1+WV5mij9B6zFKPhgQH0gAAAAFkqAawUSknMgKZ1wonDbRvoFCWZfDZbu2troP+ksoR+LKeWQK2nbnso8x"
    "gkdXrB/oC3mNYGuLLalH3EOTNG9Dru1TK98Cb2J6IVk7BGheLBtB1Dmf6U5Jh4FKOlgQGQAAAAAB0QAeCCL1/cYzD1HCaMScIQCcw5EAN+5TND"
    "J0fIjKOmgQMgAAAAAB4CAdBBX4QxiEDhWvNDUdEbioUY3Df/L3KSQTGmY0qjvIECvAAAAAA0AgHg5JfhikD9c8nsLP+MTZzImXIl44awVq4kRg"
    "vs6uSeUOWrBGL6PHE10DcWHYiY6jR6aqO9gQJYAAAAADUAAeDE//osZvcf//4cP/8DE0gQ56j1oCZ1c9/yxW0oAWvVqJFzY/4ZVAiS3H8t8c/o"
    "DYB8QKPVgQPogAAAAE0qAawoSknIgPppD64th1qbkiemep8QALBdjyo1t99TJ/Ojv63JfOHiIkECZB7qC43Bmb9IJW6MifqdqgJTWFHTOS5qRG"
    "bObTJuAGZ0nqOugQOEAAAAACYQAeEiL1/cYzDkyzQIUsIeiVCkKi0nd0FXpg/lfF+U7AAaQIkVwBxTu2u8v4TwWEyQu4+zgQC3iveBAfGCAirw"
    "gQm7kLOCAfS3iveBAfGCAirwgfS7kbOCA+i3i/eBAfGCAirwggIj"
)


def moving_frames(count, size=SIDES, seed=0):
    """uint8 (count, H, W, 3): a bright square that moves over a ramp; every frame another."""
    height, width = size
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 120, width)[None, :, None] + rng.integers(0, 60, (1, 1, 3))
    frames = np.repeat(np.broadcast_to(ramp, (height, width, 3)).astype(np.uint8)[None], count, 0)
    for i in range(count):
        x, y = (i * 3) % (width - 8), (i * 2) % (height - 8)
        frames[i, y : y + 8, x : x + 8] = (255, 40 + 5 * i % 200, 20)
    return frames


def encode(
    frames,
    container="mp4",
    codec="libx264",
    *,
    pix_fmt="yuv420p",
    gop=5,
    rate=10,
    options=None,
    stamps=None,
    rotation=None,
    audio=False,
):
    """The bytes of a file with these frames; `stamps`: when each is shown, in 1 / rate seconds."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pix_fmt
        stream.codec_context.gop_size, stream.codec_context.thread_count = gop, 1
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if audio:
            sound = output.add_stream("aac", rate=8000, layout="mono")
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(pixels), format="rgb24" if pixels.shape[-1] == 3 else "rgba"
            )
            frame.pts = i if stamps is None else stamps[i]
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if audio:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 8000
            output.mux(sound.encode(silence))
            output.mux(sound.encode(None))
    return file.getvalue()


def decoded(data):
    """All frames from the start, uint8 (N, H, W, 3), by a bare loop."""
    import av

    with av.open(io.BytesIO(data)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def remuxed(data, container, change):
    """The file with other packets: `change(number, bytes)` gives those of each, None to leave it out."""
    import av

    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as given, av.open(file, "w", format=container) as output:
        source = given.streams.video[0]
        stream = output.add_stream_from_template(source)
        for number, packet in enumerate(packet for packet in given.demux(source) if packet.size):
            if (content := change(number, bytes(packet))) is not None:
                made = av.Packet(content)
                made.pts, made.dts, made.time_base = packet.pts, packet.dts, packet.time_base
                made.stream, made.is_keyframe = stream, packet.is_keyframe
                output.mux(made)
    return file.getvalue()
