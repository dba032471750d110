"""The smallest real run of configs/pretrain.py: one stage, one text layer, a slice of the embedded pairs."""

from configs.pretrain import get_config
from florence_jax.data.sources.array_record import write_array_record
from florence_jax.data.sources.catalog import open_source
from florence_jax.train import loop

TINY_MODEL = {"image_width": 8, "depths": (2,), "text_width": 16, "text_layers": 1, "text_heads": 2, "projection": 16}
TINY_FLAGS = [
    "--config=configs/pretrain.py:runlocal",
    "--config.total_steps=8",
    "--config.checkpoint.every=2",
    "--config.log.every=1",
    "--config.optim.warmup_steps=2",
    "--config.optim.ema_decay=0.5",
    "--config.batch_size=16",
    "--config.eval.batch_size=64",
    *(f"--config.model.overrides.{name}={value}" for name, value in TINY_MODEL.items()),
]


def tiny_pairs(path, count=48):
    """Writes `count` embedded pairs as one ArrayRecord file in the folder `path`; returns the folder's name."""
    path.mkdir(parents=True, exist_ok=True)
    source = open_source("emoji:train")
    write_array_record(str(path / "pairs.array_record"), [source[i] for i in range(count)])
    return str(path)


def tiny_config(data, **changes):
    """The same run as `TINY_FLAGS`, on the pairs of folder `data`, which are also its held-out set."""
    config = get_config("runlocal")
    config.model.overrides.update(TINY_MODEL)
    config.total_steps, config.batch_size, config.eval.batch_size = 8, 16, 64
    config.checkpoint.every, config.log.every, config.optim.warmup_steps = 2, 1, 2
    config.optim.ema_decay = 0.5
    config.data.train = config.eval.source = data
    config.update_from_flattened_dict(changes)
    return config.lock()


def at_step(monkeypatch, at, action):
    """Calls `action` before the batch of step `at` is made."""
    original = loop.open_stream

    class Stream:
        def __init__(self, config, task, data, start_step):
            self.inner, self.step = original(config, task, data, start_step), start_step

        def __next__(self):
            self.step += 1
            if self.step == at:
                action()
            return next(self.inner)

        @property
        def processor_seconds(self):
            return self.inner.processor_seconds

        def close(self):
            self.inner.close()

    monkeypatch.setattr(loop, "open_stream", Stream)
