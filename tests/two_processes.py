"""One job of several processes on this machine, joined by JAX over the loopback; as a program, one of its processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]


def run_job(folder, count, commands, devices=1, timeout=600, program=__file__):
    """Runs `florence_jax.main` commands (lists of arguments) one after the other in `count` processes.

    Each process has `devices` simulated devices. Returns what each printed; fails where one of them failed. Another
    `program` calls `join` with the first four of its arguments, and takes the commands as it likes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [folder / f"process{i}.log" for i in range(count)]
    processes = []
    for i, log in enumerate(logs):
        with log.open("w") as file:
            arguments = [sys.executable, program, json.dumps([i, count, devices, port, commands])]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            processes.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=file, stderr=file))
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * count, "\n".join(log.read_text()[-4000:] for log in logs)
    return [log.read_text() for log in logs]


def join(index, count, devices, port):
    """Makes this process one of the job."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index)


def main(index, count, devices, port, commands):
    """One process."""
    join(index, count, devices, port)
    from tiny_images import run_main  # after joining: it must not touch the devices before

    for command in commands:
        assert run_main(*command) == 0


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
