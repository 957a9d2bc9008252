"""Launchers in processes of their own, on virtual devices, and two of them joined."""

import json
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def start(name, *arguments, devices=1):
    """A running launcher, with a number of virtual devices."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command_line = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *map(str, arguments)]
    return subprocess.Popen(command_line, cwd=ROOT, env=environment, text=True, **pipes)


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def joined(name, *arguments):
    """Two processes of four devices each."""
    place = f"--coordinator=localhost:{free_port()}"
    return [
        start(name, *arguments, place, "--num_processes=2", f"--process_id={index}", devices=4) for index in range(2)
    ]


def finished(*processes):
    """Standard output and error of each process, all of which succeeded."""
    ended = [process.communicate() for process in processes]
    for process, (_, stderr) in zip(processes, ended):
        assert process.returncode == 0, stderr[-3000:]
    return ended


def result(folder):
    return json.loads((folder / "result.json").read_text())


def values(figures):
    """The figures, without those of speed."""
    return {name: figure["value"] for name, figure in figures.items() if not figure["unit"].endswith("/s")}
