"""Using the page's tabs without a browser: their functions are called as Gradio calls them."""

import asyncio
import contextlib
import io
import os
import shlex
from unittest import mock

import gradio as gr

from improved_diffusion.cli import main
from improved_diffusion.web.edit import EditTab
from improved_diffusion.web.picker import Picker
from improved_diffusion.web.result import Drawn
from improved_diffusion.web.sample import _ADVANCED, SampleTab
from improved_diffusion.web.upscale import UpscaleTab


class Place:
    """The tabs of a page."""

    def __init__(self, app_state):
        self.app_state = app_state
        in_loop(self._build)

    def _build(self):
        app_state = self.app_state
        with gr.Blocks(analytics_enabled=False) as page:
            self.picker = Picker(app_state, page)
            self.sample = SampleTab(app_state, self.picker)
            self.edit = EditTab(app_state, self.picker, self.sample.result)
            self.upscale = UpscaleTab(app_state, self.picker, self.sample.result)
        self.page = page

    def draw(self, model="digits", classes=("3",), n=2, seed=0, sampler="dpmpp_2m", steps=4, guidance=1, **others):
        """What the Sample tab shows, step by step."""
        values = [others.get(name) for name in _ADVANCED]
        return run(self.sample.draw(ASKING, model, "", list(classes), n, seed, sampler, steps, guidance, *values))


ASKING = mock.Mock(session_hash="somebody")


def in_loop(build):
    """What `build` gives; Gradio makes event loops, and never closes them, where it finds none that runs."""

    async def call():
        return build()

    return asyncio.get_event_loop().run_until_complete(call())


def run(handler):
    """All values that a handler yields; each is a tuple of the outputs."""

    async def collect():
        return [values async for values in handler]

    with mock.patch("gradio.Warning"):  # shown by the browser of a request, of which there is none
        return asyncio.get_event_loop().run_until_complete(collect())


def drawn_of(steps):
    """What was drawn at the end."""
    (found,) = [value for value in steps[-1] if isinstance(value, Drawn)]
    return found


def status_of(values):
    """The line on the state."""
    return values[0]


def run_command(text, cwd):
    """Run command lines, as a shell does, in this process."""
    for line in text.replace("\\\n", " ").split("&&\n"):
        words = shlex.split(line)
        assert words[0] == "improved-diffusion"
        with inside(cwd), contextlib.redirect_stdout(io.StringIO()):
            main.dispatch(words[1:])


def run_python(text, cwd):
    """Run a program in this process."""
    with inside(cwd), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(text, "shown.py", "exec"), {})


@contextlib.contextmanager
def inside(path):
    """Another current folder."""
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def png_files(folder):
    """{name: bytes} of the PNGs in a folder of samples."""
    return {path.name: path.read_bytes() for path in sorted((folder / "samples").glob("*.png"))}
