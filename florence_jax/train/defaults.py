"""What every training configuration starts from: the defaults of the training system."""

from collections.abc import Sequence
from typing import Any, get_origin, get_type_hints

from ml_collections import ConfigDict, config_dict

from florence_jax.models.detector import DetectorConfig
from florence_jax.models.fusion import FusionConfig
from florence_jax.models.sizes import ModelConfig
from florence_jax.models.video_coswin import VideoConfig


def model_overrides() -> ConfigDict:
    """A value for every size and option of a model, None (the variant's own) until set: `--config.model.overrides.x=`.

    The compute dtype is not among them: `config.precision` gives it.
    """
    return _placeholders(ModelConfig, ("variant", "dtype"))


def detector_overrides() -> ConfigDict:
    """The same of a detector: `--config.detector.overrides.x=`. Its compute dtype is that of the towers."""
    return _placeholders(DetectorConfig, ("dtype",))


def video_overrides() -> ConfigDict:
    """The same of a video tower: `--config.video.overrides.x=`."""
    return _placeholders(VideoConfig, ())


def fusion_overrides() -> ConfigDict:
    """The same of a fusion: `--config.fusion.overrides.x=`. Its heads and their answers are the task's."""
    return _placeholders(FusionConfig, ("heads", "answers", "vocabulary", "token_types"))


def _placeholders(sizes: type, without: Sequence[str]) -> ConfigDict:
    kinds = {name: kind for name, kind in get_type_hints(sizes).items() if name not in without}
    return ConfigDict({name: config_dict.placeholder(get_origin(kind) or kind) for name, kind in kinds.items()})


def optim_defaults() -> dict[str, Any]:
    """Of the optimizer, see `train.optim`."""
    return {
        "learning_rate": 5e-4,  # peak
        "schedule": "cosine",  # 'cosine' | 'linear' | 'steps', after the warm-up
        "final_fraction": 0.01,  # cosine and linear end at this fraction of learning_rate
        "step_at": (0.67, 0.92),  # steps: shares of total_steps after which the rate is multiplied ...
        "step_factor": 0.1,  # ... by this
        "warmup_steps": 0,
        "b1": 0.9,
        "b2": 0.98,
        "eps": 1e-8,
        "mu_dtype": "float32",  # or 'bfloat16': the first moment in half the memory
        "weight_decay": 0.1,
        "clip_norm": 1.0,  # 0: no clipping
        "ema_decay": 0.0,  # of the moving average, whose horizon is at most .36 of the run; 0: none
        "decay_rules": (),  # ((path pattern, bool), ...), first match wins, before the task's and the project's
        "lr_rules": (),  # ((path pattern, multiplier), ...) likewise; 0 freezes
    }


def common(workdir: str) -> ConfigDict:
    """Defaults of the training system; a config file fills in the task, the model and the data."""
    return ConfigDict(
        {
            "mode": "train",  # or 'eval': only evaluate the workdir's newest checkpoint; without one, `init`
            "workdir": workdir,  # --workdir overrides it
            "seed": 0,  # of the first parameters, the order of the data, their augmentations, held-out images
            "init": "",  # another run, or its checkpoints/ folder, to take the parameters from
            "init_optimizer": False,  # also its optimizer's moments; the learning-rate schedule starts anew either way
            "distributed": False,  # True on every host of a multi-host job
            "compilation_cache": "",  # folder where compiled programs are kept for the next start; '': none
            "precision": "float32",  # 'float32' | 'bfloat16' | 'bfloat16_products' | 'auto', see train/precision.py
            "data": {
                "train": "",  # what is trained on
                "test": "",  # held-out images with their classes
                "train_ops": "decode|rrc({res}, scale=(0.5, 1.0))",  # {res}: of the model
                "eval_ops": "decode|resize({res})|center_crop({res})",
                "workers": -1,  # processes that make batches; 0: threads of the trainer; -1: by the cores to spare
                "cache": False,  # keep pictures in memory as the ops before anything random leave them; up to 2 GiB
                "on_corrupt": "skip",  # or 'error'
            },
            "eval": {
                "every": 0,  # steps; 0: only at the end; -1: each epoch, where a run is counted in epochs
                "batch_size": 256,  # images or texts at once
                "source": "",  # held-out pairs: image-text retrieval on them
            },
            "mesh": {
                "data": -1,  # -1: all remaining devices
                "fsdp": 1,  # devices that parameters, gradients and optimizer state are split over
                "sharding_rules": (),  # ((path pattern, axis | 'largest' | 'replicate'), ...), before the task's
                "fsdp_across_slices": False,  # may fsdp reach over the slow network between TPU slices, GPU nodes
            },
            "optim": optim_defaults(),
            "checkpoint": {
                "every": 1000,  # steps; 0: only at the end
                "keep": 2,  # the newest ones
                "keep_every": 0,  # also every checkpoint whose step is a multiple of this; 0: none
                "directory": "",  # may be a bucket, such as gs://bucket/run; '': checkpoints/ in the workdir
            },
            "log": {"every": 50},  # steps
            "watchdog": {"seconds": 600.0},  # a step that takes longer is reported with all stacks; 0: never
            "profile": {"steps": ()},  # (first, last): a trace of these steps in profile/ of the workdir
            "hosts": {  # with distributed=True
                "start_timeout": 300.0,  # seconds to wait for all processes at the start
                "lost_after": 60.0,  # seconds without a sign of life from one, after which all end
                "port": 0,  # where process 0 listens for signs of life; 0: the coordinator's + 100
            },
        }
    )
