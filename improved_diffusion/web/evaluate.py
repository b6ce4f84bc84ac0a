"""The tab that evaluates samples: a form made of the command's options, and reports, alone or side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from ..config import UserError
from ..config.settings import Scoring
from ..service.evaluations import MOST_COMPARED, OFFERED, Evaluations
from .events import AT_ONCE
from .form import Form, default_of, groups, menu
from .live import enclosing_tab, log_view, mistake, note, timer_of
from .state import AppState

# Shown first; the others are in a closed group each. The network's options come from the model itself.
FIRST = ("samples", "model_path", "reference", "held_out", "num_samples", "steps", "resize")
_LISTED = ("samples", "model_path", "reference", "held_out", "train_dir")  # chosen from what is below the roots
_BEST = (
    "Bold: better than each of the others by more than two standard errors of the difference. FID has no standard "
    "error: bold is the lowest."
)


def build_evaluate(app_state: AppState) -> None:
    """The tab's controls."""
    options = app_state.options
    try:
        evaluations = Evaluations(app_state.runs, app_state.data_root, options.features, options.trust_features)
    except UserError as error:
        gr.HTML(note(f"No evaluation here: {error}; --data_root names the folder below which real images are."))
        return
    tab = enclosing_tab()
    with gr.Row():
        with gr.Column(min_width=320, scale=2):
            form = EvaluationForm(evaluations)
        with gr.Column(min_width=320, scale=3):
            reports = Reports(evaluations)
    form.connect(tab, reports)
    reports.connect(tab)


class EvaluationForm:
    """The form of an evaluation, and how the one that runs is doing."""

    def __init__(self, evaluations: Evaluations):
        self.evaluations = evaluations
        gr.Markdown("### New evaluation")
        if not evaluations.features:
            gr.HTML(note("Start this page with --features FILE, or --features inception, to evaluate."))
        self.form = Form("evaluate", OFFERED, _LISTED)
        self.form.add_row({name: default_of(OFFERED[name]) for name in FIRST})
        self.name = gr.Textbox(
            label="Name", info="of the report's folder", placeholder="the samples' or the model's name, and _report",
            elem_id="evaluate-name", max_length=200,
        )  # fmt: skip
        self.message = gr.HTML(elem_id="evaluate-message")
        with gr.Row():
            self.start = gr.Button("Evaluate", variant="primary", elem_id="evaluate-start", min_width=100)
            self.cancel = gr.Button("Cancel", interactive=False, elem_id="evaluate-cancel", min_width=100)
        self.progress = gr.HTML(elem_id="evaluate-progress")
        gr.Markdown("Further options, as in `improved-diffusion evaluate score --help-all`:")
        for group, names in groups(Scoring, OFFERED, FIRST).items():
            self.form.add_group(group, {name: default_of(OFFERED[name]) for name in names})
        self.current = gr.State("")  # the evaluation that is watched

    def connect(self, tab: gr.Tab, reports: Reports) -> None:
        """Have the controls do what they say. :param reports: show one that is finished."""
        self.chosen = reports.chosen
        controls: Any = {self.name, *self.form.controls.values()}
        changed: Any = {*self.form.parts, self.message, self.current, self.progress, self.cancel}
        watched: Any = {self.current, self.progress, self.cancel, self.message, self.chosen}
        tab.select(self._fill_menus, None, [self.form.controls[name] for name in _LISTED], **AT_ONCE)
        gr.on([timer_of(tab).tick, tab.select], self._look, self.current, watched, **AT_ONCE)
        self.start.click(self._start, controls, changed, **AT_ONCE)
        self.cancel.click(self._cancel, self.current, watched, **AT_ONCE)

    def _fill_menus(self) -> list[gr.Dropdown]:
        """The menus of _LISTED."""
        sets = [each.name for each in self.evaluations.data_root.sets()]
        names = (self.evaluations.samples(), self.evaluations.models(), sets, sets, sets)
        return [menu(found, default_of(OFFERED[name])) for name, found in zip(_LISTED, names)]

    def _start(self, given: Mapping[Any, Any]) -> dict[Any, Any]:
        shown = self.form.helps()
        try:
            options = self.form.options(given)
            like = str(options["samples"] or options["model_path"] or "").replace("/", "_")
            name = given[self.name].strip() or self.evaluations.root.free_name(f"{like}_report")
            self.evaluations.start(name, options)
        except UserError as error:
            return {**shown, self.message: mistake(str(error)), **self.form.beside(error)}
        progress = log_view("starting")
        return {
            **shown, self.message: note(f"{name} is being evaluated."), self.current: name, self.progress: progress,
            self.cancel: gr.Button(interactive=True),
        }  # fmt: skip

    def _look(self, current: str) -> dict[Any, Any]:
        """How the evaluation is doing; also one that was started from another window, or before the page was loaded."""
        running = self.evaluations.running()
        if not current and running:
            current = running[0]
        if not current:
            return {self.current: ""}
        if current not in self.evaluations.started():  # cancelled, from another window
            return self._ended("")
        progress = self.evaluations.progress(current)
        if progress.state == "running":
            shown = {self.progress: log_view(progress.text), self.cancel: gr.Button(interactive=True)}
            return {self.current: current, **shown}
        if progress.state == "failed":
            return self._ended(mistake(f"{current}: {progress.text}"))
        chosen = gr.Dropdown(choices=self.evaluations.reports(), value=[current])
        return {**self._ended(note(f"{current} is finished.")), self.chosen: chosen}

    def _ended(self, message: str) -> dict[Any, Any]:
        return {
            self.current: "", self.message: message, self.progress: "", self.cancel: gr.Button(interactive=False),
        }  # fmt: skip

    def _cancel(self, current: str) -> dict[Any, Any]:
        try:
            self.evaluations.cancel(current)
        except UserError as error:
            return self._ended(mistake(str(error)))
        return self._ended(note(f"{current} was cancelled."))


class Reports:
    """Reports: one with its pictures, or several side by side."""

    def __init__(self, evaluations: Evaluations):
        self.evaluations = evaluations
        gr.Markdown("### Reports")
        self.chosen = gr.Dropdown(
            [], value=[], multiselect=True, max_choices=MOST_COMPARED, label="Reports",
            info="several: side by side", interactive=True, elem_id="evaluate-reports",
        )  # fmt: skip
        self.message = gr.HTML()
        self.text = gr.Markdown("Choose a report to read it here.", elem_id="evaluate-report", elem_classes="report")
        self.pictures = gr.Gallery(
            label="Pictures", columns=2, format="png", interactive=False, elem_classes="sharp", visible=False,
            elem_id="evaluate-pictures", buttons=["fullscreen"], object_fit="contain",
        )  # fmt: skip
        with gr.Accordion("What was compared, and how the samples were made", open=False, visible=False) as self.place:
            self.details = gr.Markdown(elem_classes="report")

    def connect(self, tab: gr.Tab) -> None:
        """Have the controls do what they say."""
        tab.select(self._fill_menu, None, self.chosen, **AT_ONCE)
        outputs = [self.message, self.text, self.pictures, self.place, self.details]
        self.chosen.change(self._show, self.chosen, outputs, **AT_ONCE)

    def _fill_menu(self) -> gr.Dropdown:
        return gr.Dropdown(choices=self.evaluations.reports())

    def _show(self, names: list[str]) -> tuple[Any, ...]:
        """(a mistake, the text, the pictures, further text) of one report, or of several."""
        mistaken, text, details, pictures = "", "", "", []
        try:
            if len(names) == 1:
                text, details = self._one(names[0])
                pictures = self.evaluations.pictures(names[0])
            elif names:
                text = self._several(names)
                pictures = [(picture, name) for name in names for picture, _ in self.evaluations.pictures(name)[:1]]
        except UserError as error:
            mistaken = mistake(str(error))
        gallery = gr.Gallery(pictures, visible=bool(pictures))
        return mistaken, text, gallery, gr.Accordion(visible=bool(details)), details

    def _one(self, name: str) -> tuple[str, str]:
        """(the metrics, the rest) of a report."""
        text = self.evaluations.report(name).markdown(pictures=False).removeprefix("# Evaluation\n")
        metrics, heading, rest = text.partition("## What was compared")
        return metrics, heading + rest

    def _several(self, names: list[str]) -> str:
        text = self.evaluations.compare(names)
        return f"{text}\n{_BEST}\n" if "**" in text else text
