"""A toy detector on a frozen image tower; weights of a pretraining are the start.

    PYTHONPATH=.:tests python -m toy_detector --config=tests/toy_detector/config.py --config.init=runs/pretrain

It was run at `runlocal` only, on 64 pictures. A preflight needs no weights: --config.init= --config.model.variant=NAME.
"""

from ml_collections import ConfigDict

from florence_jax.config_files import parse_arg
from florence_jax.train.defaults import common, model_overrides

SIZES = ((32, 48), (48, 32))  # (height, width) of the buckets


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration for an argument string: '' or 'runlocal'."""
    given = parse_arg(arg, runlocal=False)
    config = common("runs/toy_detector")
    config.task = "toy_detection"
    config.init = "runs/pretrain/checkpoints"
    config.model = {"variant": "", "overrides": model_overrides()}  # variant '': as config.init says
    config.model.overrides.size_mode = "detection"  # pictures of any size
    config.model.overrides.mask_padding = True
    config.detector = {"variant": "tiny", "sizes": SIZES, "most_boxes": 4}
    config.data.train, config.data.test = "toy:train:512", "toy:test:64"
    fit = f"resize_long({max(SIZES[0])}, {min(SIZES[0])})|pad_image({{height}}, {{width}})"
    config.data.train_ops = f"decode|flip(0.5)|{fit}"
    config.data.eval_ops = f"decode|{fit}"
    config.text = {"tokenizer": ""}
    config.batch_size, config.total_steps = 32, 400
    config.optim.learning_rate = 1e-2
    config.eval.every = 100
    if given.runlocal:
        config.data.workers, config.batch_size, config.total_steps = 0, 16, 24
        config.eval.every, config.eval.batch_size, config.log.every = 12, 16, 1
        config.workdir += "_runlocal"
    return config
