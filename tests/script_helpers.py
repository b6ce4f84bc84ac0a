"""Running the scripts as a user does, and small images to run them on."""

import contextlib
import io
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch.distributed as dist
from PIL import Image

from improved_diffusion.logs import logger
from improved_diffusion.utils.stop_signals import SIGNALS

ROOT = Path(__file__).resolve().parents[1]
STUBS = Path(__file__).resolve().parent / "stubs"
SCRIPTS = ROOT / "scripts"
TIMEOUT = 150
MARK = "SCRIPT_TEST_RUN"  # set to something unique in all processes of one run
_running = []  # the processes that this test has started

# A model that trains in milliseconds.
TINY = [
    "--num_channels", "32", "--num_res_blocks", "1", "--num_heads", "1", "--channel_mult", "1,1",
    "--attention_resolutions", "4", "--diffusion_steps", "20", "--noise_schedule", "cosine", "--learn_sigma", "True",
    "--num_workers", "0",
]  # fmt: skip
TINY_IMAGE = ["--image_size", "8", *TINY]
TINY_SUPER_RES = ["--large_size", "16", "--small_size", "8", *TINY]


@dataclass
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str
    seconds: float

    def succeed(self):
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self


def environment(**variables):
    """The environment without what a launcher, or the user of these tests, may have set."""
    foreign = re.compile(
        r"(RANK|WORLD_SIZE|MASTER_.*|LOCAL_.*|GROUP_.*|ROLE_.*|TORCHELASTIC_.*|OMPI_.*|PMI_.*|PMIX_.*|HYDI_.*|MPI_.*"
        r"|SLURM_.*|OPENAI_.*|DIFFUSION_.*)$"
    )
    env = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}"
    return {
        **env,
        "PATH": programs,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **variables,
    }


def without_mpi4py(env, how="forbidden"):
    """The environment with an mpi4py that ends the program when it is imported, or that is `missing`."""
    return {**env, "PYTHONPATH": f"{STUBS / f'mpi4py_{how}'}{os.pathsep}{env['PYTHONPATH']}"}


def command(launcher, ranks, script, args):
    """(argv, environment) of a script of ours, or any other by its full path. Only mpiexec may import mpi4py."""
    words = [str(SCRIPTS / f"{script}.py" if isinstance(script, str) else script), *map(str, args)]
    env = environment()
    if launcher == "mpiexec":
        mpiexec = shutil.which("mpiexec", path=env["PATH"])
        assert mpiexec, "these tests need mpiexec: pip install mpich mpi4py"
        return [mpiexec, "-n", str(ranks), sys.executable, *words], env
    env = without_mpi4py(env)
    if launcher == "torchrun":
        # --standalone takes a free port, so that two of these can run on one host.
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        return [sys.executable, *run, *words], env
    return [sys.executable, *words], env


def without_figures(env):
    """The environment in which nothing is drawn by matplotlib."""
    return {**env, "PYTHONPATH": f"{STUBS / 'no_figures'}{os.pathsep}{env['PYTHONPATH']}"}


def start(launcher, ranks, script, *args, cwd, env=None, prefix=(), figures=False):
    """The started process of `command`, its output in pipes and in a process group of its own.

    :param prefix: a program and its arguments that runs the rest of its command line.
    :param figures: whether it may draw with matplotlib, which takes seconds.
    """
    argv, own = command(launcher, ranks, script, args)
    own = own if figures else without_figures(own)
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [*prefix, *argv], cwd=cwd, env={**own, **(env or {}), MARK: mark}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    process.mark = mark
    _running.append(process)
    return process


def end_all():
    """End what a test that failed has left running."""
    while _running:
        process = _running.pop()
        if process.poll() is None:
            _kill(process)
            process.communicate()


def _kill(process):
    for pid in started_by(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def started_by(process, **variables):
    """The ids of a started process and all below it; with variables, of those that have them in their environment."""
    wanted = {f"{name}={value}".encode() for name, value in {MARK: process.mark, **variables}.items()}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
    return found


def wait(process, timeout=TIMEOUT):
    """What the process did. Nothing of it outlives this call."""
    started = time.monotonic()
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        _kill(process)
    return Finished(process.returncode, out, err, time.monotonic() - started)


def run(launcher, ranks, script, *args, cwd, env=None, timeout=TIMEOUT, **options):
    """Run a script under a launcher to its end."""
    if launcher == "srun":
        return srun(ranks, script, *args, cwd=cwd, timeout=timeout)
    return wait(start(launcher, ranks, script, *args, cwd=cwd, env=env, **options), timeout)


def python(script, *args, cwd, **options):
    """Run a script under plain python, where importing mpi4py ends it."""
    return run("python", 1, script, *args, cwd=cwd, **options)


def srun(ranks, script, *args, cwd, timeout=TIMEOUT):
    """Run a script as `srun --ntasks RANKS` would: by the environment variables that it sets. What rank 0 printed, with
    all ranks' errors and the largest exit code."""
    job = {"SLURM_JOB_ID": str(uuid.uuid4().int % 10**6), "SLURM_STEP_ID": "0", "SLURM_NTASKS": str(ranks)}
    step = {"SLURM_STEP_NUM_TASKS": str(ranks), "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2"}
    processes = [
        start("srun", ranks, script, *args, cwd=cwd,
              env={**job, **step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in range(ranks)
    ]  # fmt: skip
    results = [wait(process, timeout) for process in processes]
    return Finished(
        max(abs(r.code) for r in results),
        results[0].out,
        "".join(r.err for r in results),
        max(r.seconds for r in results),
    )


class _Exit(BaseException):
    pass


def call(script, *args, cwd, env=None):
    """Run a script of ours in this process: what `python` does without the seconds that importing torch takes.

    Not with --num_workers: a worker forked from a process with a past may fall over what that left.
    """
    out, err = io.StringIO(), io.StringIO()
    started = time.monotonic()

    def leave(code):
        raise _Exit(code)

    with (
        _chdir(cwd),
        _own_signals(),
        mock.patch.dict(os.environ, environment(**(env or {})), clear=True),
        mock.patch.object(sys, "argv", [f"{script}.py", *map(str, args)]),
        mock.patch.object(os, "_exit", leave),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
            code = 0
        except _Exit as exit:
            code = exit.args[0]
        except SystemExit as exit:
            code = exit.code or 0
        finally:
            logger.reset()
            if dist.is_initialized():
                dist.destroy_process_group()
    return Finished(code, out.getvalue(), err.getvalue(), time.monotonic() - started)


@contextlib.contextmanager
def _own_signals():
    """Put back the handlers of signals: a command that ends ignores them from then on."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _chdir(path):  # contextlib.chdir, which Python 3.10 lacks
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def write_images(folder, count, *, size=(20, 20), channels=3, classes=("cat", "dog"), seed=0):
    """Random images class_NN.png, of the classes in turn; size is (height, width). Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 256, (*size, channels), dtype=np.uint8)
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels, MODES[channels])
        image.save(folder / f"{classes[i % len(classes)]}_{i:02d}.png")
    return folder


def save_mask(path, array):
    """Write a mask, white where the array is 1; returns its path as a string."""
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8) * 255).save(path)
    return str(path)


def pixels(path):
    """uint8 [H, W, C] of an image file."""
    with Image.open(path) as image:
        array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def contents(folder):
    """Relative path -> bytes of every file below a folder, but for the log, to which every run appends."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != "log.txt"
    }


def wait_for(condition, what, process=None, seconds=TIMEOUT):
    """Wait until a condition holds; fail with the process's output where it ends before, or after too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            out, err = process.communicate()
            raise AssertionError(f"the process ended before {what}:\n{out}\n{err}")
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.02)


WITH_LIMITED_FILES = (
    "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2); "
    "os.execv(sys.argv[2], sys.argv[2:])"
)


def limited(file_size):
    return [sys.executable, "-c", WITH_LIMITED_FILES, str(file_size)]


def refused(result, *phrases, code=1):
    """The command ended with one line of an error, which says all of the phrases."""
    assert result.code == code, f"exit code {result.code}\n{result.out}\n{result.err}"
    assert "Traceback" not in result.out + result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    for phrase in map(str, phrases):
        assert phrase in result.err, f"{phrase!r} is not in {result.err!r}"


def cut(path):
    """Leave the first half of a file, as a broken copy does."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
