"""Speed, measured: `python -m benchmarks`, or `make bench`.

    python -m benchmarks                            (everything, in about 10 minutes)
    python -m benchmarks training --seconds 200     (one group)
    python -m benchmarks peak training --workloads 'cifar10-*' --ways 'bf16*,diffusers*'
    python -m benchmarks --quick                    (tiny networks: does everything work?)

Each group measures ways to do one thing in turns (A B C A B C ...), ours and others', and gives medians. `speed` is
relative to the first row of each table. Writes FOLDER/speed_DEVICE.json after each table; groups in it that are not
measured again stay.
"""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
from pathlib import Path

# The groups in their order, each with its share of the time.
GROUPS = {
    "peak": 1.0, "training": 8.0, "network": 2.0, "norms": 0.5, "sampling": 2.0, "bound": 1.0, "averages": 0.5,
    "overhead": 1.0, "launches": 0.1, "metrics": 1.5, "loading": 1.0, "saving": 0.5, "startup": 1.0,
}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--seconds", type=float, default=600.0, help="for all groups together (default: 600)")
    parser.add_argument("--quick", action="store_true", help="tiny networks and two rounds, whatever the time")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="cpu: hide the GPU")
    parser.add_argument("--workloads", default="", help="patterns of networks, comma-separated, such as 'cifar10-*'")
    parser.add_argument("--ways", default="", help="patterns of ways, comma-separated; the baseline is always measured")
    parser.add_argument("--profile", default="", help="patterns of ways to profile, written to FOLDER/profile_DEVICE.*")
    parser.add_argument(
        "--out",
        default=str(Path(__file__).parent / "results"),
        help="folder of the result files (default: benchmarks/results)",
    )
    args = parser.parse_args(argv)
    unknown = [name for name in args.groups if name not in GROUPS]
    if unknown:
        parser.error(f"there is no group {unknown[0]!r}: choose from {', '.join(GROUPS)}")
    args.groups = args.groups or list(GROUPS)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts the memory, is not to log

    from benchmarks.speed.context import Context
    from benchmarks.speed.kernels import Profiles
    from benchmarks.speed.machine import device_name, file_name
    from benchmarks.speed.report import Report
    from benchmarks.speed.ways import Clock
    from improved_diffusion import distributed
    from improved_diffusion.logs import logger

    distributed.setup_dist()
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    device = file_name(device_name())
    report, profiles = Report(folder / f"speed_{device}.json"), Profiles(folder / f"profile_{device}")
    clock = Clock(float("inf") if args.quick else args.seconds)
    patterns = [[each for each in text.split(",") if each] for text in (args.workloads, args.ways, args.profile)]
    with tempfile.TemporaryDirectory() as scratch, logger.scoped_configure(dir=scratch, format_strs=["log"]):
        for number, name in enumerate(args.groups):
            share = GROUPS[name] / sum(GROUPS[each] for each in args.groups[number:])
            context = Context(report, clock.part(share), args.quick, *patterns, profiles)
            importlib.import_module(f"benchmarks.speed.{name}").run(context)
    print(f"\nwrote {report.path}")


if __name__ == "__main__":
    main()
