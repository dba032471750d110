"""One run of curation: its configuration, its workdir, its phases, and the runner that executes them."""

import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import apache_beam as beam
from absl import logging
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions
from apache_beam.portability.api import beam_provision_api_pb2
from apache_beam.runners.portability.fn_api_runner import fn_runner
from apache_beam.runners.portability.portable_runner import JobServiceHandle
from apache_beam.transforms.environments import SubprocessSDKEnvironment

from florence_jax.curation.plan import CurationRules, make_all
from florence_jax.errors import UserError
from florence_jax.files import filesystem, read_json, write_json

# (in the error of Beam, what to do). Java runners need a job server: a jar that Beam downloads, or a running service.
RUNNER_TROUBLES = (
    ("Unexpected pipeline runner", ""),
    ("validations errors", "(write these options in --beam)"),
    ("apache_beam[gcp]", ""),
    (
        "job server jar",
        "Name the file with --beam='--flink_job_server_jar=FILE' (or --spark_job_server_jar), or a running job server "
        "with --runner=PortableRunner --beam='--job_endpoint=HOST:PORT'",
    ),
    (
        "Java must be installed",
        "Or name a running job server: --runner=PortableRunner --beam='--job_endpoint=HOST:PORT'",
    ),
    ("FutureTimeoutError", "no job server answers there; start it, or correct --beam='--job_endpoint=HOST:PORT'"),
)


class Run:
    """What the phases share.

    Args:
      config: as `configs/curate.py` lays it out, a plain dict.
      workdir: local folder or URL.
      beam_args: options for Beam; a runner of one's own among them.

    Raises:
      UserError: for what is wrong with the configuration.
    """

    def __init__(self, config: Mapping[str, Any], workdir: str, beam_args: Sequence[str] = ()):
        self.config, self.workdir = config, workdir.rstrip("/")
        self.rules: CurationRules = make_all(config)
        self._beam_args = list(beam_args)

    def beam(self, build: Callable[[beam.Pipeline], Any]) -> None:
        """Runs the pipeline that `build` adds to, as `run_pipeline` does."""
        run_pipeline(build, self._beam_args)

    def phase(
        self, name: str, digest: str, build: Callable[[str], Mapping[str, Any]], again: bool = False
    ) -> dict[str, Any]:
        """The manifest of a phase; `build` fills its folder anew unless it was finished for the same `digest`.

        `again`: it is filled anew in any case.
        """
        folder = f"{self.workdir}/{name}"
        manifest = read_json(f"{folder}/manifest.json")
        if manifest is not None and manifest["digest"] == digest and not again:
            logging.info("%s: there already", name)
            return manifest
        begun = read_json(f"{folder}/begun.json")
        if begun is None or begun["digest"] != digest or again:
            remove_folder(folder)
            write_json(f"{folder}/begun.json", {"digest": digest})
        logging.info("%s: working", name)
        manifest = {"digest": digest, **build(folder)}
        write_json(f"{folder}/manifest.json", manifest)
        return manifest


def run_pipeline(build: Callable[[beam.Pipeline], Any], beam_args: Sequence[str]) -> None:
    """Runs the pipeline that `build` adds to; a UserError or OSError in a worker is raised here as one.

    Args:
      build: gets the empty pipeline.
      beam_args: options for Beam.
    """
    options = PipelineOptions(list(beam_args))
    try:
        with beam.Pipeline(runner=_runner(options), options=options) as pipeline:
            build(pipeline)
    except UserError:
        raise
    except Exception as error:  # runners wrap what a worker raised in types of their own
        message = re.search(r"UserError: (.*?)(?: \[while running|\\n|\n|$)", str(error))
        if message:
            raise UserError(message[1]) from error
        if trouble := runner_trouble(error):
            raise UserError(f"--runner={options.view_as(StandardOptions).runner}: {trouble}") from error
        message = re.search(r"(?:OS|Permission)Error: (\[Errno [^\\\n]*?) \[while running", str(error))
        if message:
            raise OSError(message[1]) from error
        raise


def _runner(options: PipelineOptions) -> Any:
    """Beam's Python runner, told to pass the options on to its worker processes; any other is chosen by Beam.

    The worker processes are those of `curation.worker`.
    """
    if options.view_as(StandardOptions).runner != "FnApiRunner":
        return None
    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options())
    provision = beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded)
    environment, direct = None, options.view_as(DirectOptions)
    if direct.direct_running_mode == "multi_processing":
        command = f"{shlex.quote(sys.executable)} -m florence_jax.curation.worker"
        environment = SubprocessSDKEnvironment.from_command_string(command)
        direct.direct_running_mode = None  # else Beam takes its own program
    return fn_runner.FnApiRunner(environment, provision_info=fn_runner.ExtendedProvisionInfo(provision))


def runner_trouble(error: Exception) -> str:
    """What keeps a runner from starting, and the remedy; '' for any other error."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for sign, advice in RUNNER_TROUBLES:
        if sign in text:
            return f"{text.partition(': ')[2][:300]} {advice}".strip()
    return ""


def remove_folder(folder: str) -> None:
    """Removes a folder with what is in it, if it is there."""
    fs, inner = filesystem(folder)
    if fs.exists(inner):
        fs.rm(inner, recursive=True)


def part_paths(folder: str, count: int, name: str = "part") -> list[tuple[int, str]]:
    """(number, path) of the parts of a folder."""
    return [(number, f"{folder}/{name}-{number:05d}.parquet") for number in range(count)]
