"""The tab that draws samples."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from ..config import GuidanceConfig, SampleConfig, SamplerConfig, UserError
from ..config.run import RunConfig
from ..config.settings import ImageSampling
from ..sampling.images import Images
from ..service.engine import Request
from ..utils.text import counted
from .controls import control, help_of
from .drawing import Update, draw, explain, status_line, warn
from .facts import facts, known_facts
from .picker import AT_ONCE, Picker
from .pictures import Downloads, captions_of, grid_html
from .reproduce import sample_command, sample_python
from .state import AppState

MOST = 64  # images of one request
SAMPLER, STEPS = "dpmpp_2m", 20  # good images within seconds; the command's default takes every step
_ADVANCED = (
    "timestep_grid", "ddim_eta", "dynamic_threshold", "clip_denoised", "precision", "guidance_rescale",
    "guidance_interval",
)  # fmt: skip
_GUIDANCE = {f.name for f in fields(GuidanceConfig)}
_CLASSES, _SCALE = help_of(SampleConfig, "classes"), help_of(GuidanceConfig, "guidance_scale")
EMPTY = '<div class="empty">Choose a class and press <b>Draw</b>: the images appear here.</div>'


@dataclass(frozen=True)
class Drawn:
    """The images of a request, and how to draw them again."""

    images: Images
    request: Any
    path: str
    downloads: Downloads

    def command(self, chosen: int | None = None) -> str:
        """The command line: of all images, or of the one at a position."""
        return sample_command(self.path, *self._asked(), numbers=self._numbers(chosen))

    def python(self, chosen: int | None = None) -> str:
        """The Python: of all images, or of the one at a position."""
        return sample_python(self.path, *self._asked(), numbers=self._numbers(chosen))

    def _asked(self) -> tuple[int, int, tuple[Any, ...], Mapping[str, Any]]:
        r = self.request
        return r.n, r.seed, r.classes, r.options

    def _numbers(self, chosen: int | None) -> tuple[int, ...]:
        numbers = range(len(self.images)) if self.images.numbers is None else self.images.numbers
        return () if chosen is None else (int(numbers[chosen]),)


class SampleTab:
    """The tab's controls, and what they do.

    :param drawn: a gr.State of Drawn, what the user has drawn last; None before.
    :param chosen: a gr.State of the position of the selected image in it.
    """

    def __init__(self, app_state: AppState, picker: Picker):
        self.app_state = app_state
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self._build_request()
            with gr.Column(scale=3, min_width=300):
                self._build_result()
        self.drawn, self.chosen, self.job = gr.State(), gr.State(), gr.State()
        self._connect(picker)

    def _build_request(self) -> None:
        """What to draw."""
        self.classes = gr.Dropdown([], label="Classes", info=_CLASSES, multiselect=True, elem_id="classes")
        with gr.Row(elem_classes="snug"):
            self.n = control(
                SampleConfig, "num_samples", value=4, maximum=MOST, info=f"images to make, 1 to {MOST}",
                elem_id="num-samples", min_width=90,
            )  # fmt: skip
            self.seed = control(RunConfig, "seed", elem_id="seed", min_width=90)
            self.dice = gr.Button("New seed", size="sm", min_width=90, elem_id="dice")
        self.sampler = control(SamplerConfig, "sampler", value=SAMPLER, elem_id="sampler")
        self.steps = control(SamplerConfig, "steps", value=STEPS, elem_id="steps")
        self.cost_line = gr.HTML(status_line(""), elem_id="cost")
        self.guidance = control(GuidanceConfig, "guidance_scale", maximum=20, step=0.1, elem_id="guidance")
        with gr.Accordion("More options", open=False):
            self.others = [control(_group(name), name, elem_id=name.replace("_", "-")) for name in _ADVANCED]

    def _build_result(self) -> None:
        """What was drawn."""
        with gr.Row(elem_classes="snug"):
            self.go = gr.Button("Draw", variant="primary", scale=3, elem_id="draw")
            self.cancel = gr.Button(
                "Cancel", variant="stop", scale=1, min_width=90, interactive=False, elem_id="cancel"
            )  # fmt: skip
        self.status = gr.HTML(status_line(""), elem_id="status")
        self.preview = gr.HTML(EMPTY, elem_id="preview")
        self.gallery = gr.Gallery(
            label="Images", show_label=False, visible=False, columns=4, height="auto", object_fit="contain", format="png", interactive=False,
            elem_id="gallery", elem_classes="pixels", buttons=["fullscreen"],
        )  # fmt: skip
        with gr.Row(elem_classes="snug"):
            self.files = [
                gr.DownloadButton(text, interactive=False, size="sm", min_width=80, elem_id=name)
                for name, text in (("png", "PNG"), ("zip", "ZIP of all"), ("npz", "NPZ of all"))
            ]
        with gr.Accordion("Draw these again, byte for byte", open=False, elem_id="again"):
            code: dict[str, Any] = {"lines": 1, "interactive": False, "buttons": ["copy"]}
            self.codes = [
                gr.Code(label="As a command", language="shell", elem_id="as-command", **code),
                gr.Code(label="As Python", language="python", elem_id="as-python", **code),
            ]

    def _connect(self, picker: Picker) -> None:
        steps = [self.sampler, self.steps, self.guidance, *self.others]
        asked = [picker.model, picker.average, self.classes, self.n, self.seed, *steps]
        buttons = [self.go, self.cancel]
        shown = [self.status, self.job, *buttons, self.preview, self.gallery, self.drawn, self.chosen]
        self.go.click(self.draw, asked, [*shown, *self.files, *self.codes], **AT_ONCE)
        self.cancel.click(_cancel, self.job, **AT_ONCE)
        self.dice.click(_new_seed, None, self.seed, **AT_ONCE)
        self.gallery.select(_select, self.drawn, [self.chosen, self.files[0], *self.codes], **AT_ONCE)
        picker.on_change(self.fit, [self.classes, self.guidance, self.go])
        priced = [picker.model, picker.average, self.n, *steps]
        gr.on([each.change for each in priced], self.cost, priced, self.cost_line, **AT_ONCE)
        picker.loaded.then(self.cost, priced, self.cost_line, **AT_ONCE)

    async def draw(
        self, request: gr.Request, model: str | None, average: str, classes: Any, n: Any, seed: Any, *steps: Any
    ) -> AsyncIterator[Any]:
        """Draw, and show the images as they come."""
        try:
            if model is None:
                raise UserError("there is no model yet: train one in the Train tab, or upload the weights of one")
            known = facts(self.app_state, model, average)
            asked = _request(model, average, classes, n, seed, _options(steps))
        except UserError as error:
            yield _ended(Update(warn(error)))
            return
        async for update in draw(self.app_state, asked, request.session_hash or ""):
            if update.result is not None:
                downloads = Downloads(update.result, self.app_state.work_dir)
                yield _finished(update, Drawn(update.result, asked, known.path, downloads))
            elif update.over:
                yield _ended(update)
            else:
                yield _running(update, asked.n)

    def fit(self, model: str | None) -> tuple[Any, ...]:
        """The controls for a model: what it cannot do is switched off, and says why."""
        known = known_facts(self.app_state, model)
        if known is None:
            return gr.Dropdown(choices=[], value=[]), gr.skip(), gr.Button("Draw", interactive=False)
        names, why = list(known.classes), known.why_no_guidance
        classes = gr.Dropdown(
            choices=names, value=[], interactive=bool(names), info=_CLASSES if names else "This model has no classes."
        )
        guidance = gr.Number(interactive=False, value=1, info=why) if why else gr.Number(interactive=True, info=_SCALE)
        can = known.info.kind == "image"
        return (
            classes,
            guidance,
            gr.Button("Draw" if can else "This model enlarges images: see Upscale", interactive=can),
        )

    def cost(self, model: str | None, average: str, n: Any, *steps: Any) -> str:
        """What the steps cost, or what is wrong with them."""
        if model is None:
            return status_line("")
        options = _options(steps)
        try:
            found = facts(self.app_state, model, average).sampler(ImageSampling, options)
        except UserError as error:
            return status_line(explain(error)[1], bad=True)
        each = found.evaluations * (2 if "guidance_scale" in options else 1)
        text = f"{counted(found.steps, 'step')}: {counted(each, 'evaluation')} of the network for each image"
        return status_line(text + (f", {each * int(n):,} in all" if n and n > 1 else ""))


def _group(name: str) -> Any:
    return GuidanceConfig if name in _GUIDANCE else SamplerConfig


def _options(values: Sequence[Any]) -> dict[str, Any]:
    """The options that differ from the command's defaults, by name, so that commands stay short."""
    known = ImageSampling.options()
    given = zip(("sampler", "steps", "guidance_scale", *_ADVANCED), values)
    return {name: value for name, value in given if value is not None and value != known[name].default}


def _request(model: str, average: str, classes: Any, n: Any, seed: Any, options: Mapping[str, Any]) -> Request:
    """What the controls ask for. Raises UserError for a number that is missing or too large."""
    for name, value in (("num_samples", n), ("seed", seed)):
        if value is None:
            raise UserError(f"--{name} is empty: give a number")
    if not 1 <= n <= MOST:
        raise UserError(f"--num_samples {n}: the page draws 1 to {MOST} images at once")
    return Request(
        kind="sample", model=model, average=average, n=int(n), seed=int(seed), classes=tuple(classes or ()),
        options=options,
    )  # fmt: skip


# The values of the tab's outputs: status, job, the buttons, preview, gallery, drawn, chosen, files, codes


def _running(update: Update, n: int) -> tuple[Any, ...]:
    arrays: list[Any] = list(update.preview.array) if update.preview else []
    grid = gr.HTML(grid_html(arrays + [None] * (n - len(arrays))), visible=True)
    buttons = gr.Button(interactive=False), gr.Button(interactive=True)
    return update.status, update.job, *buttons, grid, gr.Gallery(visible=False), *[gr.skip()] * 7


def _ended(update: Update) -> tuple[Any, ...]:
    """Without images: what is there stays."""
    return update.status, None, gr.Button(interactive=True), gr.Button(interactive=False), *[gr.skip()] * 9


def _finished(update: Update, drawn: Drawn) -> tuple[Any, ...]:
    files = drawn.downloads
    pictures = list(zip(files.pngs, captions_of(drawn.images)))
    gallery = gr.Gallery(pictures, visible=True, selected_index=None)
    buttons = [gr.DownloadButton(value=path, interactive=True) for path in (files.pngs[0], files.zip, files.npz)]
    shown = update.status, None, gr.Button(interactive=True), gr.Button(interactive=False), gr.HTML(visible=False)
    return *shown, gallery, drawn, None, *buttons, drawn.command(), drawn.python()


def _cancel(job: Any) -> None:
    if job is not None:
        job.cancel()


def _new_seed() -> int:
    return secrets.randbelow(2**31)


def _select(drawn: Drawn | None, event: gr.SelectData) -> tuple[Any, ...]:
    """The selected image: to download, to draw again alone, and to edit."""
    if drawn is None:
        return None, gr.skip(), gr.skip(), gr.skip()
    i = int(event.index)
    return i, gr.DownloadButton(value=drawn.downloads.pngs[i]), drawn.command(i), drawn.python(i)
