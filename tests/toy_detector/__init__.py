"""An adapter to copy: a toy detector on a frozen image tower, in new files and three lines of registration.

In florence_jax/ each file of it would lie in a room of its own:

    model.py      models/        the head beside the towers, its table of sizes
    loss.py       losses/        loss of the cells of a map
    ops.py        data/ops/      boxes of a record, as many as a batch has room for
    source.py     data/sources/  drawn pictures with boxes
    detector.py   tasks/         head and tower of a folder, for training and for use
    task.py       tasks/         model, loss and data joined for the loop
    evaluator.py  evaluators/    numbers, a chart, pictures, a file
    answerer.py   inference/     for florence_jax.predict
    config.py     configs/       named as the task: configs/toy_detection.py

`python -m toy_detector` is `florence_jax.main` with them registered.
"""

import importlib


def register() -> None:
    """The one-line registrations. In florence_jax/ each is a line of the table that it names."""
    from florence_jax.data.sources.catalog import KINDS
    from florence_jax.tasks import TASKS, Registered
    from toy_detector.source import ToyShapes
    from toy_detector.task import ToyDetection

    TASKS["toy_detection"] = Registered({"": ToyDetection}, "toy_detector.answerer:ToyAnswerer")
    KINDS["toy"] = ToyShapes
    importlib.import_module("toy_detector.ops")  # data.ops.parse.MODULES: importing a module registers its ops
