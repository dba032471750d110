"""Tiny videos for tests, encoded here."""

import io

import numpy as np

SIDES = (32, 48)  # height, width


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
