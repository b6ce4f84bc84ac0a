"""Ways of a training step in processes of their own, so that none works with memory that another has left."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from typing import Any

from .machine import NoMemory, PeakMemory
from .ways import Way
from .workloads import Workload, workload_named


def apart(way: Way, workload: Workload) -> Way:
    """The way in a process of its own, in which this module is the program."""
    return dataclasses.replace(way, make=lambda: Elsewhere(workload.name, way.name), memory=False)


class Elsewhere:
    """The call of a way that is prepared in a new process, and has been called once there. Raises RuntimeError for what
    fails in it."""

    def __init__(self, workload: str, way: str):
        command = [sys.executable, "-m", "benchmarks.speed.apart", workload, way]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.peak: int | None = self._answer()["peak"]

    def __call__(self) -> None:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = json.loads(line) if line else {"error": "the process ended"}
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def __del__(self) -> None:
        self.process.communicate()  # the end of its input ends it


def main(workload: str, way: str) -> None:
    """Prepare the way, and call it for each line of the input; answers are lines of JSON."""
    from improved_diffusion import distributed
    from improved_diffusion.logs import logger

    from .training import way_named

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    answers, sys.stdout = sys.stdout, sys.stderr
    distributed.setup_dist()
    with tempfile.TemporaryDirectory() as scratch, logger.scoped_configure(dir=scratch, format_strs=["log"]):
        try:
            chosen = way_named(workload_named(workload), way)
            memory: Any = PeakMemory() if chosen.memory else NoMemory()
            call = memory(chosen.make)
            memory(call)
            answer(peak=memory.read())
            for _ in sys.stdin:
                call()
                answer()
        except Exception as error:  # of whatever kind: the other ways go on
            answer(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
