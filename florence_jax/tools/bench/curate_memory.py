"""`bench curate_memory`: peak memory of the main process of curation, by the number of raw pairs.

Three kinds of processes, as on Flink, Spark or Dataflow: the main process, which is measured; a runner, here Beam's
local job server, which holds the shuffles; and its worker. Each size gets a new main process, which runs on synthetic
files of a run the phases whose result has something for every pair:
  `components`  edges to components in rounds, and by one worker; the cluster of every row written;
  `audit`       the table joined with the decision log, counts and examples, and the lists of uids;
  `embeddings`  k-means of a sample, and the nearest of 64 centres for every pair.
The other phases (measuring, the near-duplicate join, the stages, the output) are pipelines over whole parts or shards
of the same kind and are not run: of those, the main process reads a few facts for each part or shard.
  `sizes`  for each: `base_mb`, the peak of the main process after a pipeline over three numbers; `peak_mb`, after each
           phase; `seconds`; `runner_mb`, the peak of the job server;
  `bytes_per_row`  growth of the peak from the smallest to the largest size.
With --runner=direct they run as with `--runner=DirectRunner --workers=2`, where the main process is the runner too.
Peaks are VmHWM of /proc (Linux).
"""

import argparse
import contextlib
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from florence_jax.curation.dedup.phase import write_clusters
from florence_jax.curation.dedup.rounds import split_edges
from florence_jax.curation.ingest.phase import MAX_PARTS
from florence_jax.curation.main import beam_options, quiet
from florence_jax.curation.output.audit import count_log
from florence_jax.curation.output.funnel import COLUMNS
from florence_jax.curation.output.shards import shard_count
from florence_jax.curation.run import run_pipeline
from florence_jax.curation.scores.clusters import cluster_embeddings
from florence_jax.curation.table import DECISIONS, SCORES, save_array, write_table
from florence_jax.errors import UserError
from florence_jax.tools.bench import timing

ROWS_PER_PART = 16_384  # as two splits of 8,192 give
RECORDS_PER_SHARD = 4096
WIDTH = 8  # of the embeddings
CENTRES = 64
CHAIN = 128  # rows in a row, each a near-duplicate of the next
STATUS = Path("/proc/self/status")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench curate_memory`."""
    parser.add_argument("--rows", default="100000,1000000,10000000", help="raw pairs, increasing")
    parser.add_argument("--runner", default="job_server", choices=("job_server", "direct"))
    parser.add_argument("--folder", default=None, help="for the synthetic files, 90 bytes a pair; default: temporary")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures; see the module's docstring for the keys."""
    rows = [int(number) for number in args.rows.split(",")]
    if min(rows) < 1000:
        raise UserError("--rows must be at least 1000 each")
    if not STATUS.exists():
        raise UserError(f"bench curate_memory reads {STATUS}, which only Linux has")
    sizes = [measure_size(number, args.runner, args.folder) for number in rows]
    first, last = (max(size["peak_mb"].values()) for size in (sizes[0], sizes[-1]))
    growth = {"bytes_per_row": round((last - first) * 1e6 / (rows[-1] - rows[0]), 3)} if len(rows) > 1 else {}
    return {"runner": args.runner, "sizes": sizes, **growth} | timing.cpu_hardware()


def measure_size(rows: int, runner: str, folder: str | None) -> dict[str, Any]:
    """The figures of one size; its files are removed."""
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        in_new_process(make_run, workdir, rows)
        if runner == "direct":
            return {"rows": rows} | in_new_process(measure_phases, workdir, rows, beam_options("DirectRunner", 2, ""))
        with job_server(workdir) as (process, port):
            options = [
                "--runner=PortableRunner",
                f"--job_endpoint=localhost:{port}",
                "--environment_type=beam:env:harness_subprocess_python:v1",
                f"--environment_config={sys.executable} -m apache_beam.runners.worker.sdk_worker_main",
            ]
            figures = in_new_process(measure_phases, workdir, rows, options)
            return {"rows": rows, **figures, "runner_mb": peak_mb(process.pid)}


def in_new_process(function: Any, *args: Any) -> Any:
    """The function's result, from a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


@contextlib.contextmanager
def job_server(folder: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """Beam's local job server in a process of its own: (process, port)."""
    port = Path(folder, "port")
    command = [sys.executable, "-m", "apache_beam.runners.portability.local_job_service_main", "--port=0"]
    command += [f"--port_file={port}", f"--staging_dir={folder}/staging"]
    with open(f"{folder}/server.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while not port.exists():
            if process.poll() is not None:
                raise UserError(f"Beam's job server ended: {Path(folder, 'server.log').read_text()[-1000:]}")
            time.sleep(0.1)
        yield process, port.read_text().strip()
    finally:
        process.terminate()
        process.wait()


def peak_mb(process: int | str = "self") -> float:
    """The largest resident size that a process has had, in MB. (getrusage would count the process that started it.)"""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) * 1024 / 1e6, 1)
    raise UserError(f"/proc/{process}/status has no VmHWM")


def measure_phases(workdir: str, rows: int, options: Sequence[str]) -> dict[str, Any]:
    """Runs the phases in this process, the workers' work elsewhere; peaks after each."""
    quiet()
    parts = part_rows(rows)
    pipeline = functools.partial(run_pipeline, beam_args=options)
    pipeline(lambda root: root | beam.Create(range(3)) | beam.Reshuffle() | beam.Map(abs))
    base, peaks, began = peak_mb(), {}, time.monotonic()
    edges = f"{workdir}/clusters/edges"
    for in_memory in (False, True):
        write_clusters(edges, f"{workdir}/clusters", parts, in_memory, pipeline)
    peaks["components"] = peak_mb()
    facts = count_log(workdir, len(parts), shard_count(rows, RECORDS_PER_SHARD), 0, 6, pipeline)
    if sum(number for *_, number in facts["reasons"]) != rows:
        raise RuntimeError(f"{facts['reasons']} are not {rows} decisions")
    peaks["audit"] = peak_mb()
    cluster_embeddings(f"{workdir}/scores", len(parts), CENTRES, 0, pipeline)
    peaks["embeddings"] = peak_mb()
    return {"base_mb": base, "peak_mb": peaks, "seconds": round(time.monotonic() - began)}


def part_rows(rows: int) -> list[int]:
    """Rows of each part of the table."""
    count = min(MAX_PARTS, max(4, -(-rows // ROWS_PER_PART)))
    return [rows * (i + 1) // count - rows * i // count for i in range(count)]


# -- the files that the phases find -----------------------------------------------------------------------------------


def make_run(workdir: str, rows: int) -> None:
    """Table, decision log, scores with embeddings, and edges of a run, with made-up content."""
    rng = np.random.default_rng(0)
    parts = part_rows(rows)
    for number, count in enumerate(parts):
        uids = make_uids(rng, number, len(parts), count)
        write_table(f"{workdir}/table/part-{number:05d}.parquet", make_table(rng, uids, rows))
        write_table(f"{workdir}/decisions/log-{number:05d}.parquet", make_log(uids))
        vectors = pa.array(rng.normal(0, 1, count * WIDTH).astype(np.float32))
        vectors = pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * WIDTH), vectors)
        scores = {"uid": uids, "text_id": uids, "relevance": pa.repeat(np.float32(0.5), count), "embedding": vectors}
        write_table(f"{workdir}/scores/part-{number:05d}.parquet", pa.table(scores))
        write_table(f"{workdir}/scores/alive/part-{number:05d}.parquet", pa.table({"uid": uids}))
    ends = rng.integers(0, rows, (rows * 3 // 10, 2))  # small components
    chain = rng.choice(rows, CHAIN, replace=False)
    edges = np.sort(np.concatenate([ends, np.stack([chain[:-1], chain[1:]], axis=1)]), axis=1)
    for number, some in split_edges(edges, edges[:, 1] % len(parts)):
        save_array(f"{workdir}/clusters/edges/edges-{number:05d}.npy", some)


def make_uids(rng: np.random.Generator, number: int, parts: int, count: int) -> pa.Array:
    """Sorted uids of one of `parts` ranges."""
    first, end = (-(-(i << 32) // parts) for i in (number, number + 1))
    digits = rng.integers(0, 256, (count, 16), np.uint8)
    digits[:, :4] = rng.integers(first, end, count).astype(">u4").view(np.uint8).reshape(-1, 4)
    texts = np.sort(np.frombuffer(digits.tobytes().hex().encode(), "S32"))
    offsets = np.arange(count + 1, dtype=np.int32) * 32
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(texts.tobytes()))


def make_table(rng: np.random.Generator, uids: pa.Array, rows: int) -> pa.Table:
    """The columns of the table that the audit reads; one domain for fifty pairs on average."""
    hosts = pa.array(rng.integers(0, max(rows // 50, 1), len(uids))).cast(pa.string())
    texts = {
        "source": "web",
        "licence_id": "cc-by",
        "language": "en",
        "status": "ok",
        "caption": "a red cup on a table",
    }
    numbers = {"width": 640, "height": 480, "bytes": 50_000, "offset": 0, "size": 0, "listed": None}
    texts |= {"url": "https://a.example/x.jpg", "path": "x.tar"}
    columns = {
        name: pa.repeat(pa.scalar(value, SCORES.field(name).type), len(uids))
        for name, value in (texts | numbers).items()
    }
    columns |= {"uid": uids, "image_id": uids, "host": hosts}
    return pa.table({name: columns[name] for name in COLUMNS})


def make_log(uids: pa.Array) -> pa.Table:
    """Seven in ten kept, two near-duplicates of the first row, one dropped for its caption."""
    kind = pa.array(np.arange(len(uids)) % 10)
    reasons = {"stage": ("output", "near_duplicates", "text"), "reason": ("kept", "near_duplicate", "repetition")}
    reasons["value"] = ("0", uids[0].as_py(), "0.5")
    which = pa.array(np.searchsorted([7, 9], kind.to_numpy(), "right"))
    columns = {name: pa.array(values).take(which) for name, values in reasons.items()}
    empty = pa.repeat("", len(uids))
    columns |= {"uid": uids, "source": pa.repeat("web", len(uids)), "threshold": empty, "config": empty}
    columns["refused"] = pa.nulls(len(uids), DECISIONS.field("refused").type)
    return pa.table({name: columns[name] for name in DECISIONS.names}, schema=DECISIONS)
