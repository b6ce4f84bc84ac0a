"""The tab that draws samples."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import gradio as gr

from ..config import GuidanceConfig, SampleConfig, SamplerConfig, UserError
from ..config.run import RunConfig
from ..config.settings import ImageSampling
from ..service.requests import Request
from ..utils.text import counted
from .controls import control, help_of, whole_number
from .drawing import explain, status_line
from .events import AT_ONCE
from .facts import Facts, facts, known_facts
from .picker import Picker, class_menu
from .reproduce import SampleRecipe
from .result import Order, Result, refused
from .state import AppState

MOST = 64  # images of one request
SAMPLER, STEPS = "dpmpp_2m_sde", 20  # good images within seconds, of a model that was trained briefly too
_ADVANCED = (
    "timestep_grid", "ddim_eta", "dynamic_threshold", "clip_denoised", "precision", "guidance_rescale",
    "guidance_interval",
)  # fmt: skip
_GUIDANCE = {f.name for f in fields(GuidanceConfig)}
_CLASSES, _SCALE = help_of(SampleConfig, "classes"), help_of(GuidanceConfig, "guidance_scale")


class SampleTab:
    """The tab's controls, and what they do.

    :param result: what the user has drawn, which other tabs may use.
    """

    def __init__(self, app_state: AppState, picker: Picker):
        self.app_state = app_state
        with gr.Column(elem_classes="work"):
            with gr.Column(elem_classes="ask"):
                self._build_request(picker.known)
            with gr.Column(elem_classes="got"):
                self.result = Result(app_state, "sample", "The images appear here.")
            with gr.Column(elem_classes="more"):
                self._build_options(picker.known)
        self._connect(picker)

    def _build_request(self, known: Facts | None) -> None:
        """What to draw."""
        self.classes = gr.Dropdown(label="Classes", multiselect=True, elem_id="classes", **class_menu(known, _CLASSES))
        with gr.Row(elem_classes="snug"):
            self.n = control(
                SampleConfig, "num_samples", value=4, maximum=MOST, info=f"images, 1 to {MOST}",
                elem_id="num-samples", min_width=90,
            )  # fmt: skip
            self.seed = control(RunConfig, "seed", elem_id="seed", min_width=90)
            self.dice = gr.Button("New seed", size="sm", min_width=90, elem_id="dice")
        self.go = gr.Button(variant="primary", elem_id="draw", **_button(known))

    def _build_options(self, known: Facts | None) -> None:
        """How to draw it."""
        self.sampler = control(SamplerConfig, "sampler", value=SAMPLER, elem_id="sampler")
        self.steps = control(SamplerConfig, "steps", value=STEPS, elem_id="steps")
        self.cost_line = gr.HTML(status_line(""), elem_id="cost", padding=False)
        self.guidance = control(
            GuidanceConfig, "guidance_scale", maximum=20, step=0.1, elem_id="guidance", **_guidance(known)
        )
        with gr.Accordion("More options", open=False):
            self.others = [control(_group(name), name, elem_id=name.replace("_", "-")) for name in _ADVANCED]

    def _connect(self, picker: Picker) -> None:
        steps = [self.sampler, self.steps, self.guidance, *self.others]
        asked = [picker.model, picker.average, self.classes, self.n, self.seed, *steps]
        self.go.click(self.draw, asked, self.result.outputs(self.go), **AT_ONCE)
        self.dice.click(_new_seed, None, self.seed, **AT_ONCE)
        picker.on_change(self.fit, [self.classes, self.guidance, self.go], [self.classes])
        picker.on_change(self.fit_steps, [self.sampler, self.steps], [self.sampler])
        priced = [picker.model, picker.average, self.n, *steps]
        gr.on([each.change for each in priced], self.cost, priced, self.cost_line, **AT_ONCE)
        picker.loaded.then(self.cost, priced, self.cost_line, **AT_ONCE)

    async def draw(
        self, request: gr.Request, model: str | None, average: str, classes: Any, n: Any, seed: Any, *steps: Any
    ) -> AsyncIterator[Any]:
        """Draw, and show the images as they come."""
        try:
            order = self.order(model, average, classes, n, seed, _options(steps))
        except UserError as error:
            yield refused(error)
            return
        async for values in self.result.follow(request, order):
            yield values

    def order(
        self, model: str | None, average: str, classes: Any, n: Any, seed: Any, options: Mapping[str, Any]
    ) -> Order:
        """What the controls ask for. Raises UserError for what cannot be drawn."""
        known = facts(self.app_state, model, average)
        n, seed = whole_number("num_samples", n, 1, MOST), whole_number("seed", seed, 0)
        classes = tuple(classes or ())
        request = Request("sample", known.info.name, average, n, seed, classes, options)
        return Order(request, SampleRecipe(known.path, n, seed, classes, options))

    def fit(self, model: str | None, chosen: list[str] | None) -> tuple[Any, ...]:
        """The controls for a model: what it cannot do is switched off, and says why."""
        known = known_facts(self.app_state, model)
        classes = gr.update(**class_menu(known, _CLASSES, chosen or []))
        return classes, gr.update(**_guidance(known)), gr.update(**_button(known))

    def fit_steps(self, model: str | None, sampler: str) -> tuple[Any, Any]:
        """The sampler and the steps for a model."""
        return steps_for(known_facts(self.app_state, model), sampler)

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


def steps_for(known: Facts | None, sampler: str) -> tuple[Any, Any]:
    """The updates of sampler and steps for a model: a distilled one has its own, which `auto` takes."""
    distilled = known is not None and known.info.own_steps > 0
    if distilled == (sampler == "auto"):
        return gr.update(interactive=True), gr.update()
    name, steps = ("auto", 0) if distilled else (SAMPLER, STEPS)
    return gr.update(value=name, interactive=True), gr.update(value=steps)


def _guidance(known: Facts | None) -> dict[str, Any]:
    why = "" if known is None else known.why_no_guidance
    return {"interactive": False, "value": 1, "info": why} if why else {"interactive": True, "info": _SCALE}


def _button(known: Facts | None) -> dict[str, Any]:
    can = known is not None and known.info.kind == "image"
    return {"value": "Draw" if can or known is None else "This model enlarges images: see Upscale", "interactive": can}


def _group(name: str) -> Any:
    return GuidanceConfig if name in _GUIDANCE else SamplerConfig


def _options(values: Sequence[Any]) -> dict[str, Any]:
    """The options that differ from the command's defaults, by name, so that commands stay short."""
    known = ImageSampling.options()
    given = zip(("sampler", "steps", "guidance_scale", *_ADVANCED), values)
    return {name: value for name, value in given if value is not None and value != known[name].default}


def _new_seed() -> int:
    return secrets.randbelow(2**31)
