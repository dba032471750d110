"""Phases of a run alone: what workers raise, and the index of benchmarks."""

import io

import apache_beam as beam
import pytest
from curation_tools import ONE_PROCESS, picture, small_config
from PIL import Image

from florence_jax.curation.dedup.phase import build_benchmarks
from florence_jax.curation.dedup.stage import benchmark_index
from florence_jax.curation.ingest.hashing import measure
from florence_jax.curation.run import Run


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
