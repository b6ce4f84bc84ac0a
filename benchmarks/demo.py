"""The demo from its first command to its last: what it finds, and how long each command takes.

    make demo                                       (once: it installs what the demo needs)
    python benchmarks/demo.py

Runs `make demo` in a new folder. Prints the seconds of its commands, and writes them to benchmarks/results/demo.json,
with the results that README.md, datasets/README.md and docs/evaluation.md show.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

RESULT_FILE = Path(__file__).parent / "results" / "demo.json"
ROOT = Path(__file__).resolve().parents[1]
COMMAND = re.compile(r"\S*/bin/(?:python|improved-diffusion) ([^-]\S*)")  # as make shows it before it runs
RESULT = re.compile(
    r"(bits/dim|classifier's accuracy|samples classified|accuracy|FID|KID|inception score|precision|recall|density|"
    r"coverage|copy score)[^:]*: \S*\d"
)


def follow(output):
    """(the lines that are results, the seconds of each command), of make's output while it comes; it is shown too."""
    results, seconds, name, started = [], {}, "", 0.0
    for line in output:
        print(line, end="", flush=True)
        now = time.perf_counter()
        if found := COMMAND.match(line):
            name, started = found[1], now
        if name:
            seconds[name] = now - started
        if RESULT.match(line):
            results.append(line.rstrip("\n"))
    return results, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    machine = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    machine["date"] = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory() as folder:
        command = ["make", "demo", f"RUN={folder}/runs/digits", f"DIGITS={folder}/data/digits"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            results, seconds = follow(process.stdout)
    if process.returncode:
        raise SystemExit(f"make demo ended with code {process.returncode}")
    for name, value in seconds.items():
        print(f"{name}: {value:.0f} s")
    print(f"in all: {sum(seconds.values()) / 60:.1f} minutes on {machine['cores']} cores")
    RESULT_FILE.write_text(json.dumps({**machine, "results": results, "seconds": seconds}, indent=1) + "\n")
    print(f"wrote {RESULT_FILE}")


if __name__ == "__main__":
    main()
