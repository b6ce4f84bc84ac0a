"""The tab that edits images: inpaint, vary, interpolate, and change the class."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import gradio as gr
import numpy as np

from ..config import InpaintConfig, SamplerConfig, UserError, VariationsConfig
from ..config.editing import InterpolateConfig
from ..config.run import RunConfig
from ..sampling.labels import class_name
from ..service.requests import Request
from ..utils.images import encode_png, to_image
from .controls import control, help_of, whole_number
from .drawing import warn
from .events import AT_ONCE
from .facts import Facts, facts, known_facts
from .picker import Picker, class_menu
from .pictures import enlarged, painted_mask, read_upload
from .reproduce import EditRecipe, TransformRecipe
from .result import Drawn, Order, Result, refused
from .state import AppState

MOST = 16  # images of one request
_CLASS = "Class of the image"
_PAINT = "rgb(99, 102, 241)"
_MENUS = ("what the image shows", "empty: that of the first", "one image for each")
_BUTTONS = ("Inpaint", "Vary", "Interpolate", "Change the class")
_NO_IMAGE = "Give an image: upload one, or select one in the Sample tab and press Use sample."


class EditTab:
    """The tab's controls, and what they do.

    :param sampled: what the Sample tab has drawn, to edit it.
    """

    def __init__(self, app_state: AppState, picker: Picker, sampled: Result):
        self.app_state, self.picker = app_state, picker
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                self._build_source(sampled, picker.known)
                with gr.Tabs():
                    with gr.Tab("Inpaint", id="inpaint"):
                        self._build_inpaint(picker.known)
                    with gr.Tab("Vary", id="variations"):
                        self._build_variations(picker.known)
                    with gr.Tab("Interpolate", id="interpolate"):
                        self._build_interpolate(sampled, picker.known)
                    with gr.Tab("Class", id="transform"):
                        self._build_transform(picker.known)
            with gr.Column(scale=2, min_width=300, elem_classes="got"):
                self.result = Result(app_state, "edit", "The edited images appear here.")
                self._build_film()
        self._connect()

    def _build_source(self, sampled: Result, known: Facts | None) -> None:
        """The image to edit."""
        with gr.Row(elem_classes="snug"):
            self.image = image_input("Image to edit", "edit-image")
            with gr.Column(min_width=140):
                self.label = gr.Dropdown(
                    value=None, label=_CLASS, elem_id="edit-class", render=False, **class_menu(known, _MENUS[0], None)
                )
                use_sample(sampled, [self.image, self.label], "use-sample")
                self.label.render()
                self.seed = control(RunConfig, "seed", elem_id="edit-seed", min_width=90)

    def _build_inpaint(self, known: Facts | None) -> None:
        gr.Markdown("Paint over what is to be made anew; the rest stays as it is.")
        self.editor = gr.ImageEditor(
            type="pil", label="Mask", sources=(), transforms=(), layers=False, format="png", elem_id="mask",
            elem_classes="pixels", buttons=[], height=460, canvas_size=(512, 512),
            brush=gr.Brush(default_size=64, colors=[_PAINT], color_mode="fixed"), eraser=gr.Eraser(default_size=64),
        )  # fmt: skip
        with gr.Row(elem_classes="snug"):
            self.inpaint_n = number_of_images("inpaint-n")
            self.inpaint_steps = number_of_steps("inpaint-steps")
        with gr.Row(elem_classes="snug"):
            self.resamplings = control(InpaintConfig, "resamplings", value=3, maximum=50, min_width=90)
            self.jump = control(InpaintConfig, "jump_length", maximum=1000, min_width=90)
        self.inpaint_go = gr.Button(variant="primary", elem_id="inpaint-go", **_button(known, _BUTTONS[0]))

    def _build_variations(self, known: Facts | None) -> None:
        self.strength = gr.Slider(
            0.05, 1, value=VariationsConfig.strength, step=0.05, label="Strength",
            info=help_of(VariationsConfig, "strength"), elem_id="strength", buttons=[],
        )  # fmt: skip
        with gr.Row(elem_classes="snug"):
            self.vary_n = number_of_images("vary-n", 4)
            self.vary_steps = number_of_steps()
        self.vary_go = gr.Button(variant="primary", elem_id="vary-go", **_button(known, _BUTTONS[1]))

    def _build_interpolate(self, sampled: Result, known: Facts | None) -> None:
        gr.Markdown("From the image to edit to this one:")
        with gr.Row(elem_classes="snug"):
            self.last = image_input("Last image", "last-image")
            with gr.Column(min_width=140):
                self.last_label = gr.Dropdown(
                    value=None, label="Class of the last image", elem_id="last-class", render=False,
                    **class_menu(known, _MENUS[1], None),
                )  # fmt: skip
                use_sample(sampled, [self.last, self.last_label], "use-sample-last")
                self.last_label.render()
        with gr.Row(elem_classes="snug"):
            self.frames = control(InterpolateConfig, "frames", maximum=MOST, min_width=90, elem_id="frames")
            self.between_steps = number_of_steps()
        self.between_go = gr.Button(variant="primary", elem_id="interpolate-go", **_button(known, _BUTTONS[2]))

    def _build_transform(self, known: Facts | None) -> None:
        gr.Markdown("The image is encoded as noise with its own class, and decoded with each of these classes.")
        self.others = gr.Dropdown(
            label="New classes", multiselect=True, elem_id="other-classes", **class_menu(known, _MENUS[2])
        )
        self.transform_steps = number_of_steps()
        self.transform_go = gr.Button(variant="primary", elem_id="transform-go", **_button(known, _BUTTONS[3]))

    def _build_film(self) -> None:
        """The frames between two images, one at a time."""
        with gr.Group(visible=False) as self.film:
            self.frame = gr.Image(
                label="Frame", show_label=False, interactive=False, buttons=[], format="png", elem_classes="pixels",
                elem_id="frame", height=280,
            )  # fmt: skip
            self.position = gr.Slider(0, 1, value=0, step=1, label="Frame", elem_id="film-position", buttons=[])
            self.gif = gr.DownloadButton("GIF", size="sm", elem_id="gif")

    def _connect(self) -> None:
        model = [self.picker.model, self.picker.average]
        common = [*model, self.image, self.label, self.seed]
        jobs = {
            self.inpaint_go: (
                self.inpaint, [self.editor, self.inpaint_n, self.inpaint_steps, self.resamplings, self.jump],
            ),
            self.vary_go: (self.vary, [self.strength, self.vary_n, self.vary_steps]),
            self.between_go: (self.interpolate, [self.last, self.last_label, self.frames, self.between_steps]),
            self.transform_go: (self.transform, [self.others, self.transform_steps]),
        }  # fmt: skip
        for button, (fn, inputs) in jobs.items():
            done = button.click(fn, [*common, *inputs], self.result.outputs(button), **AT_ONCE)
            done.then(_film, self.result.drawn, [self.film, self.frame, self.position, self.gif], **AT_ONCE)
        self.position.change(_show_frame, [self.result.drawn, self.position], self.frame, **AT_ONCE)
        gr.on(
            [self.image.change, self.picker.model.change], self.show_in_editor, [*model, self.image], self.editor,
            **AT_ONCE,
        )  # fmt: skip
        menus = [self.label, self.last_label, self.others]
        self.picker.on_change(self.fit, [*menus, *jobs], menus)

    def fit(self, model: str | None, label: Any, last_label: Any, others: Any) -> tuple[Any, ...]:
        """The controls for a model: what it cannot do is switched off, and says why."""
        known = known_facts(self.app_state, model)
        chosen = (label, last_label, others or [])
        menus = [gr.update(**class_menu(known, info, value)) for info, value in zip(_MENUS, chosen)]
        return *menus, *[gr.update(**_button(known, text)) for text in _BUTTONS]

    def show_in_editor(self, model: str | None, average: str, image: str | None) -> Any:
        """The image as the model sees it, enlarged, to paint on."""
        if image is None or model is None:
            return None
        try:
            known = facts(self.app_state, model, average)
            shown = to_image(enlarged(_read(known, image, "the image")))
        except UserError as error:
            warn(error)
            return None
        return {"background": shown, "layers": [], "composite": shown}

    async def inpaint(
        self, request: gr.Request, model: str | None, average: str, image: str | None, label: str | None, seed: Any,
        editor: Any, n: Any, steps: Any, resamplings: Any, jump: Any,
    ) -> AsyncIterator[Any]:  # fmt: skip
        """Make the painted part anew."""
        try:
            known = facts(self.app_state, model, average)
            array = _read(known, image, "the image")
            mask = painted_mask(editor, known.info.size)
            if not mask.any():
                raise UserError("nothing is painted: paint over what is to be made anew")
            options = {
                "steps": whole_number("steps", steps, 1),
                "jump_length": whole_number("jump_length", jump, 1),
                "resamplings": whole_number("resamplings", resamplings, 1),
            }
            order = _order(known, "inpaint", average, array, label, n, seed, options, mask)
        except UserError as error:
            yield refused(error)
            return
        async for values in self.result.follow(request, order):
            yield values

    async def vary(
        self, request: gr.Request, model: str | None, average: str, image: str | None, label: str | None, seed: Any,
        strength: float, n: Any, steps: Any,
    ) -> AsyncIterator[Any]:  # fmt: skip
        """Make images like the one given."""
        try:
            known = facts(self.app_state, model, average)
            options = {"strength": strength, "steps": whole_number("steps", steps, 1)}
            array = _read(known, image, "the image")
            order = _order(known, "variations", average, array, label, n, seed, options)
        except UserError as error:
            yield refused(error)
            return
        async for values in self.result.follow(request, order):
            yield values

    async def interpolate(
        self, request: gr.Request, model: str | None, average: str, image: str | None, label: str | None, seed: Any,
        last: str | None, last_label: str | None, frames: Any, steps: Any,
    ) -> AsyncIterator[Any]:  # fmt: skip
        """Make the images between two."""
        try:
            known = facts(self.app_state, model, average)
            ends = [_read(known, image, "the image"), _read(known, last, "the last image")]
            frames = whole_number("frames", frames, 2, MOST)
            labels = _labels(known, label, last_label)
            options = {"steps": whole_number("steps", steps, 1)}
            asked = Request(
                "interpolate", known.info.name, average, frames, 0, labels, options, images=np.stack(ends)
            )  # fmt: skip
            files = {"first.png": encode_png(ends[0]), "last.png": encode_png(ends[1])}
            recipe = EditRecipe(
                known.path, "interpolate", {"images": "first.png,last.png"}, '"first.png", "last.png"',
                {"frames": frames, **options}, labels,
            )  # fmt: skip
        except UserError as error:
            yield refused(error)
            return
        async for values in self.result.follow(request, Order(asked, recipe, files)):
            yield values

    async def transform(
        self, request: gr.Request, model: str | None, average: str, image: str | None, label: str | None, seed: Any,
        others: Any, steps: Any,
    ) -> AsyncIterator[Any]:  # fmt: skip
        """Encode the image with its class, and decode it with others."""
        try:
            known = facts(self.app_state, model, average)
            array, labels = _read(known, image, "the image"), _labels(known, label)
            if not others:
                raise UserError("choose one new class or more")
            options = {"steps": whole_number("steps", steps, 1)}
            asked = Request(
                "transform", known.info.name, average, len(others), 0, tuple(others),
                {**options, "image_classes": list(labels)}, images=array[None],
            )  # fmt: skip
            recipe = TransformRecipe(known.path, labels, tuple(others), options)
        except UserError as error:
            yield refused(error)
            return
        async for values in self.result.follow(request, Order(asked, recipe, {"image.png": encode_png(array)})):
            yield values


def _button(known: Facts | None, text: str) -> dict[str, Any]:
    if known is None or known.info.kind != "image":
        return {"value": "Needs an image model", "interactive": False}
    if text == _BUTTONS[-1] and not known.classes:
        return {"value": "Needs a model with classes", "interactive": False}
    return {"value": text, "interactive": True}


# Controls that other tabs have too


def image_input(label: str, name: str) -> gr.Image:
    """A place for an image; its file is read as given."""
    return gr.Image(
        type="filepath", image_mode=None, sources=["upload", "clipboard"], label=label, format="png", height=220,
        buttons=[], elem_id=name, elem_classes="pixels",
    )  # fmt: skip


def use_sample(sampled: Result, outputs: Sequence[Any], name: str) -> gr.Button:
    """A button that takes the image selected in the Sample tab.

    :param outputs: of the image, and of its class where that is asked for.
    """
    button = gr.Button("Use sample", size="sm", min_width=90, elem_id=name)
    fn = _selected if len(outputs) == 2 else _selected_image
    button.click(fn, [sampled.drawn, sampled.chosen], list(outputs), **AT_ONCE)
    return button


def number_of_images(name: str, value: int = 1) -> Any:
    """How many images to make."""
    return gr.Number(
        value, label="Num samples", info=f"images to make, 1 to {MOST}", precision=0, minimum=1, maximum=MOST,
        min_width=90, elem_id=name,
    )  # fmt: skip


def number_of_steps(name: str | None = None) -> Any:
    """How many steps an edit takes: fewer than the command's default, so that it takes seconds."""
    return control(SamplerConfig, "steps", value=50, info="number of steps", min_width=90, elem_id=name)


def _selected(drawn: Drawn | None, chosen: int | None) -> tuple[Any, Any]:
    """The selected image, or the first, and its class."""
    image = _selected_image(drawn, chosen)
    if drawn is None or drawn.images.labels is None:
        return image, gr.skip()
    return image, class_name(drawn.images.class_names, int(drawn.images.labels[chosen or 0]))


def _selected_image(drawn: Drawn | None, chosen: int | None) -> Any:
    if drawn is None:
        gr.Info("Draw images in the Sample tab first; then select one.", title="No sample yet")
        return gr.skip()
    return drawn.downloads.pngs[chosen or 0]


def _read(known: Facts, image: str | None, what: str) -> np.ndarray:
    """An image as the model takes it, uint8 [H, W, C]. Raises UserError where there is none."""
    if image is None:
        raise UserError(_NO_IMAGE)
    return read_upload(image, known.info.size, known.info.channels, what)


def _labels(known: Facts, *labels: str | None) -> tuple[str, ...]:
    """The classes of the images. Raises UserError where the model needs one and there is none."""
    if known.classes and not labels[0]:
        raise UserError("the model needs the class of the image: choose it")
    return tuple(label for label in labels if label)


def _order(
    known: Facts, kind: str, average: str, image: np.ndarray, label: str | None, n: Any, seed: Any,
    options: Mapping[str, Any], mask: np.ndarray | None = None,
) -> Order:  # fmt: skip
    """A request to make images of one, by the method of the same name."""
    n, seed, labels = whole_number("num_samples", n, 1, MOST), whole_number("seed", seed, 0), _labels(known, label)
    asked = Request(kind, known.info.name, average, n, seed, labels, options, images=image[None], mask=mask)
    files, inputs, first = {"image.png": encode_png(image)}, {"images": "image.png"}, '"image.png"'
    if mask is not None:
        files["mask.png"] = encode_png(np.where(mask, 255, 0).astype(np.uint8)[..., None])
        inputs["mask"], first = "mask.png", '"image.png", "mask.png"'
    recipe = EditRecipe(known.path, kind, inputs, first, {"n": n, "seed": seed, **options}, labels)
    return Order(asked, recipe, files)


def _film(drawn: Drawn | None) -> tuple[Any, ...]:
    """The frames, where the images are those of an interpolation."""
    if drawn is None or not drawn.downloads.gif:
        return gr.update(visible=False), gr.skip(), gr.skip(), gr.skip()
    last = len(drawn.images) - 1
    slider = gr.update(maximum=last, value=0, info=f"0: the first image, {last}: the last")
    return gr.update(visible=True), drawn.downloads.pngs[0], slider, gr.update(value=drawn.downloads.gif)


def _show_frame(drawn: Drawn | None, position: float) -> Any:
    if drawn is None:
        return gr.skip()
    return drawn.downloads.pngs[min(int(position), len(drawn.images) - 1)]
