"""The tab that enlarges images with a super-resolution model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from ..config import SampleConfig, SamplerConfig, UserError
from ..config.run import RunConfig
from ..service.requests import Request
from ..utils.images import encode_png
from .controls import control, help_of, whole_number
from .edit import image_input, number_of_images, use_sample
from .events import AT_ONCE
from .facts import Facts, facts, known_facts
from .picker import Picker, class_menu
from .pictures import read_upload
from .reproduce import EditRecipe
from .result import Order, Result, refused
from .sample import SAMPLER, STEPS, steps_for
from .state import AppState

_CLASSES = help_of(SampleConfig, "classes")


class UpscaleTab:
    """The tab's controls, and what they do.

    :param sampled: what the Sample tab has drawn, to enlarge it.
    """

    def __init__(self, app_state: AppState, picker: Picker, sampled: Result):
        self.app_state = app_state
        with gr.Column(elem_classes="work"):
            with gr.Column(elem_classes="ask"):
                self.image = image_input("Image to enlarge", "upscale-image")
                use_sample(sampled, [self.image], "upscale-use-sample")
                self.classes = gr.Dropdown(
                    label="Classes", multiselect=True, elem_id="upscale-classes", **class_menu(picker.known, _CLASSES)
                )
                with gr.Row(elem_classes="snug"):
                    self.n = number_of_images("upscale-n")
                    self.seed = control(RunConfig, "seed", min_width=90, elem_id="upscale-seed")
                self.go = gr.Button(variant="primary", elem_id="upscale-go", **_button(picker.known))
            with gr.Column(elem_classes="got"):
                self.result = Result(app_state, "upscale", "The enlarged images appear here.")
            with gr.Column(elem_classes="more"):
                self.sampler = control(SamplerConfig, "sampler", value=SAMPLER, elem_id="upscale-sampler")
                self.steps = control(SamplerConfig, "steps", value=STEPS, elem_id="upscale-steps")
        model = [picker.model, picker.average]
        asked = [*model, self.image, self.classes, self.n, self.seed, self.sampler, self.steps]
        self.go.click(self.upscale, asked, self.result.outputs(self.go), **AT_ONCE)
        picker.on_change(self.fit, [self.classes, self.go], [self.classes])
        picker.on_change(self.fit_steps, [self.sampler, self.steps], [self.sampler])

    def fit(self, model: str | None, chosen: list[str] | None) -> tuple[Any, ...]:
        """The controls for a model: what it cannot do is switched off, and says why."""
        known = known_facts(self.app_state, model)
        return gr.update(**class_menu(known, _CLASSES, chosen or [])), gr.update(**_button(known))

    def fit_steps(self, model: str | None, sampler: str) -> tuple[Any, Any]:
        """The sampler and the steps for a model."""
        return steps_for(known_facts(self.app_state, model), sampler)

    async def upscale(
        self, request: gr.Request, model: str | None, average: str, image: str | None, classes: Any, n: Any, seed: Any,
        sampler: str, steps: Any,
    ) -> AsyncIterator[Any]:  # fmt: skip
        """Enlarge the image, in one or several ways."""
        try:
            known = facts(self.app_state, model, average)
            if image is None:
                raise UserError("give an image: upload one, or select one in the Sample tab and press Use sample")
            array = read_upload(image, known.info.small_size, known.info.channels)
            n, seed = whole_number("num_samples", n, 1), whole_number("seed", seed, 0)
            classes = tuple(classes or ())
            options = {"sampler": sampler, "steps": whole_number("steps", steps, 0)}
            asked = Request("upscale", known.info.name, average, n, seed, classes, options, images=array[None])
            recipe = EditRecipe(
                known.path, "upscale", {"base_samples": "image.png"}, '"image.png"',
                {"num_samples": n, "seed": seed, **options}, classes, command_name="super-res-sample",
            )  # fmt: skip
        except UserError as error:
            yield refused(error)
            return
        async for values in self.result.follow(request, Order(asked, recipe, {"image.png": encode_png(array)})):
            yield values


def _button(known: Facts | None) -> dict[str, Any]:
    can = known is not None and known.info.kind == "super_res"
    return {"value": "Enlarge" if can else "Needs a super-resolution model", "interactive": can}
