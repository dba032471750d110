"""Phases of a run alone: what workers raise, and the index of benchmarks."""

import io
import subprocess
import sys
import textwrap

import apache_beam as beam
import numpy as np
import pytest
from curation_tools import ONE_PROCESS, picture, small_config
from PIL import Image

from florence_jax.curation.dedup.components import union_find
from florence_jax.curation.dedup.phase import build_benchmarks
from florence_jax.curation.dedup.rounds import edge_paths
from florence_jax.curation.dedup.stage import benchmark_index
from florence_jax.curation.ingest.hashing import measure
from florence_jax.curation.run import Run
from florence_jax.curation.table import load_array, read_table
from florence_jax.tools.bench import curate_memory


def full_disk(element):
    raise OSError(28, "No space left on device")


def fault(element):
    try:
        full_disk(element)
    except OSError:
        return {}[element]


def test_a_full_disk_in_a_worker_is_an_oserror_and_a_fault_of_the_program_is_not(tmp_path):
    run = Run(small_config("p=x"), str(tmp_path), ONE_PROCESS)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device$"):
        run.beam(lambda root: root | beam.Create([1]) | beam.Map(full_disk))
    with pytest.raises(Exception, match="KeyError") as caught:
        run.beam(lambda root: root | beam.Create([1]) | beam.Map(fault))
    assert not isinstance(caught.value, OSError)


def test_without_scores_of_pictures_there_is_no_jax():
    """Neither in the main process nor in a worker, which loads the modules of its functions."""
    modules = ["driver", "ingest.phase", "dedup.phase", "stages", "output.phase", "output.audit", "scores.clusters"]
    code = "import sys\n" + "".join(f"import florence_jax.curation.{name}\n" for name in [*modules, "main"])
    code += "print([name for name in ('jax', 'orbax', 'sklearn') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_without_beam_the_command_can_say_so():
    code = "import sys\nsys.modules['apache_beam'] = None\nimport florence_jax.curation.main"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_worker_processes_say_only_what_goes_wrong():
    code = """
        import logging
        logging.disable(logging.WARNING)
        import apache_beam as beam
        logging.disable(logging.NOTSET)
        from florence_jax.curation.main import beam_options
        from florence_jax.curation.run import run_pipeline

        def work(number):
            import logging, sys
            logging.getLogger("florence_jax").warning("not heard")
            print("heard", number, sys.argv[0].rpartition("/")[2], file=sys.stderr)
        run_pipeline(lambda root: root | beam.Create([7]) | beam.Map(work), beam_options("DirectRunner", 2, ""))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "heard 7 worker.py\n")


def test_animated_benchmark_pictures_follow_the_rules_of_measuring(tmp_path):
    (tmp_path / "bench").mkdir()
    frames = [Image.open(io.BytesIO(picture(i))) for i in range(2)]
    (tmp_path / "bench" / "still.png").write_bytes(picture(5))
    frames[0].save(tmp_path / "bench" / "a.gif", save_all=True, append_images=frames[1:])
    known = []
    for animated in (False, True):
        changes = {"measure": {"animated": animated}, "decontamination": {"benchmarks": {"b": str(tmp_path / "bench")}}}
        run = Run(small_config("p=x", **changes), str(tmp_path / "w"), ONE_PROCESS)
        found = measure(picture(0), run.rules.measure.limits)
        known.append(benchmark_index(build_benchmarks(run)).query([found], 0.0))
    assert known[0] == [None] and known[1][0]["benchmark"] == "b"


def test_the_memory_benchmark_runs_the_phases(tmp_path, monkeypatch):
    """On made-up files of 3,000 pairs; the clusters are those of union-find, the uids those of the log."""
    monkeypatch.setattr(curate_memory, "CHAIN", 8)
    folder, rows = str(tmp_path), 3000
    curate_memory.make_run(folder, rows)
    figures = curate_memory.measure_phases(folder, rows, ONE_PROCESS)
    assert list(figures["peak_mb"]) == ["components", "audit", "embeddings"]
    peaks = [figures["base_mb"], *figures["peak_mb"].values()]
    assert min(peaks) > 10  # megabytes
    labels = union_find(np.concatenate([load_array(path) for path in edge_paths(f"{folder}/clusters/edges")]), rows)
    alone = np.bincount(labels, minlength=rows)[labels] == 1
    parts = [read_table(f"{folder}/clusters/part-{i:05d}.parquet")["cluster"].to_numpy() for i in range(4)]
    assert (np.concatenate(parts) == np.where(alone, -1, labels)).all() and 500 < alone.sum() < rows - 500
    logs = [read_table(f"{folder}/decisions/log-{i:05d}.parquet") for i in range(4)]
    kept = [
        uid
        for log in logs
        for uid, stage in zip(*log.select(["uid", "stage"]).to_pydict().values(), strict=True)
        if stage == "output"
    ]
    assert (tmp_path / "output/uids/uids-00000-of-00001.txt").read_text().split() == kept
    found = [read_table(f"{folder}/scores/clustered/part-{i:05d}.parquet")["embedding_cluster"] for i in range(4)]
    assert sum(map(len, found)) == rows and set(np.concatenate(found)) == set(range(curate_memory.CENTRES))
