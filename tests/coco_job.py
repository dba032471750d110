"""One process of a job that scores a detector which answers what it is told; see `two_processes.run_job`."""

import json
import sys
from pathlib import Path

import jax
from two_processes import join


def main(index, count, devices, port, folder):
    """Writes results and the files of the evaluator, as this process has them, below a folder."""
    join(index, count, devices, port)
    from coco_tools import NAMES, OPS, DrawnBoxes, answers_like, detect, told

    from florence_jax.evaluators.coco import CocoEvaluator
    from florence_jax.params.sharding import make_mesh

    source = DrawnBoxes(unreadable=[5])
    evaluator = CocoEvaluator(source, OPS, (), detect, make_mesh(-1, 1), 4, NAMES, on_corrupt="skip")
    results = evaluator.run(told(source, answers_like(source, 0.08, false=2, wrong=0.2)))
    out = Path(folder) / str(jax.process_index())
    out.mkdir()
    (out / "result.json").write_text(json.dumps(results))
    for name, content in evaluator.files().items():
        (out / name).write_bytes(content)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
