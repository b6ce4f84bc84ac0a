"""The tab that trains a model: a form made of the command's options, and the runs, live."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import gradio as gr

from ..config import UserError
from ..config.presets import PRESETS, options_for
from ..config.recipes import AUTO, RECIPES
from ..config.settings import ImageTraining
from ..service.run_files import caption, read_preview
from ..service.trainings import LABELS, OFFERED, Status, Trainings
from .events import AT_ONCE, close_menus
from .form import Form, default_of, groups, menu
from .live import enclosing_tab, lines_view, log_view, mistake, note, timer_of
from .state import AppState

# Shown first; the others are in a closed group each, as in --help-all.
FIRST = (
    "image_size", "class_cond", "batch_size", "max_steps", "lr", "precision", "sample_interval", "save_interval",
    "val_dir",
)  # fmt: skip
_LISTED = ("data_dir", "val_dir", "labels", "init_checkpoint")  # chosen from what is below the roots
_FIRST_COLUMN = "loss"
_PREVIEWS = 4


def build_train(app_state: AppState) -> None:
    """The tab's controls."""
    try:
        trainings = Trainings(app_state.runs, app_state.data_root)
    except UserError as error:
        gr.HTML(note(f"No training here: {error}; --data_root names the folder below which images are."))
        return
    tab = enclosing_tab()
    with gr.Row():
        with gr.Column(min_width=320):
            form = RunForm(trainings)
        with gr.Column(min_width=320):
            view = RunView(trainings)
    form.connect(tab, view)
    view.connect(tab)


def placeholder(name: str, preset: str) -> str:
    """What an option is where its control is left empty."""
    also = "total_batch_size" if name == "batch_size" else name  # presets set the batch of all ranks
    if preset == AUTO and any(also in recipe.options for recipe in RECIPES.values()):
        return "chosen by auto"
    options = options_for(preset, ImageTraining) if preset else {}
    if name in options:
        return f"preset: {options[name]}"
    return f"preset: {options[also]} in all" if also in options else default_of(OFFERED[name])


class RunForm:
    """The form of a new run."""

    def __init__(self, trainings: Trainings):
        self.trainings = trainings
        gr.Markdown("### New run")
        self.form = Form("train", OFFERED, _LISTED)
        below = f"folders, .zip and .npz files below {trainings.data_root.path}"
        self.form.add("data_dir", "", label="Images", info=below)
        self.thumbnails = gr.Gallery(
            show_label=False, columns=5, rows=1, height=110, format="png", object_fit="contain", allow_preview=False,
            elem_classes="sharp", interactive=False, visible=False, buttons=[],
        )  # fmt: skip
        presets = [AUTO, *RECIPES, *filter(_is_image, PRESETS)]
        with gr.Row():
            self.name = gr.Textbox(
                label="Name", info="of the run's folder", placeholder="the images' name", elem_id="train-name",
                min_width=140, max_length=200,
            )  # fmt: skip
            self.preset = gr.Dropdown(
                [*presets, ("none", "")], value=AUTO, label="Preset", info=f"{AUTO}: by the images and the hardware",
                interactive=True, elem_id="train-preset", min_width=140,
            )  # fmt: skip
        self.form.add_row({name: placeholder(name, AUTO) for name in FIRST})
        self.message = gr.HTML(elem_id="train-message")
        with gr.Row():
            self.dry = gr.Button("Dry run", elem_id="train-dry-run", min_width=100)
            self.start = gr.Button("Start", variant="primary", elem_id="train-start", min_width=100)
        self.table = gr.HTML(
            label="What the run needs", show_label=True, container=True, padding=True, visible=False,
            elem_id="train-table",
        )  # fmt: skip
        gr.Markdown("Further options, as in `improved-diffusion train --help-all`:")
        for group, names in groups(ImageTraining, OFFERED, self.form.controls.keys() | {*FIRST}).items():
            self.form.add_group(group, {name: placeholder(name, AUTO) for name in names})

    def connect(self, tab: gr.Tab, view: RunView) -> None:
        """Have the controls do what they say. :param view: shows a run that is started."""
        self.runs = view.runs
        controls: Any = {self.name, self.preset, *self.form.controls.values()}
        changed: Any = {*self.form.parts, self.message, self.table, self.dry, self.start, self.runs}
        data = self.form.controls["data_dir"]
        tab.select(self._fill_menus, None, [self.form.controls[name] for name in _LISTED], **AT_ONCE)
        data.change(self._look, data, [self.thumbnails, self.message], **AT_ONCE)
        self.preset.change(
            lambda preset: [self.form.with_empty(name, placeholder(name, preset)) for name in self.form.controls],
            self.preset, [*self.form.controls.values()], **AT_ONCE,
        )  # fmt: skip
        self.dry.click(partial(self._submit, starts=False), controls, changed, **AT_ONCE)
        self.start.click(partial(self._submit, starts=True), controls, changed, **AT_ONCE)

    def _fill_menus(self) -> list[gr.Dropdown]:
        """The menus of _LISTED."""
        sets = self.trainings.data_root.sets()
        names = [each.name for each in sets]
        found = (names, [*LABELS[1:], *self.trainings.data_root.label_files()], self.trainings.names())
        return [
            gr.Dropdown(choices=[(str(each), each.name) for each in sets]),
            *(menu(each, placeholder(name, "")) for name, each in zip(_LISTED[1:], found)),
        ]

    def _look(self, data: str | None) -> tuple[Any, str]:
        try:
            seen = self.trainings.data_root.thumbnails(data, 5) if data else []
        except UserError as error:
            return gr.Gallery(visible=False), mistake(str(error))
        return gr.Gallery(seen, visible=bool(seen)), ""

    def _submit(self, given: Mapping[Any, Any], starts: bool) -> Iterator[dict[Any, Any]]:
        """Measure what a run needs, and start it."""
        yield {
            self.message: note("Measuring 3 steps of training ..."), self.table: gr.HTML(visible=False),
            self.dry: gr.Button(interactive=False), self.start: gr.Button(interactive=False), **self.form.helps(),
        }  # fmt: skip
        try:
            options = {**self.form.options(given), "preset": given[self.preset]}
            result = self._started(given[self.name], options) if starts else self._measured(options)
        except UserError as error:
            result = {self.message: mistake(str(error)), **self.form.beside(error)}
        yield {**result, self.dry: gr.Button(interactive=True), self.start: gr.Button(interactive=True)}

    def _measured(self, options: Mapping[str, Any]) -> dict[Any, Any]:
        table = self.trainings.dry_run(options)
        return {self.table: gr.HTML(lines_view(table), visible=True), self.message: note("Nothing was written.")}

    def _started(self, wanted: str, options: Mapping[str, Any]) -> dict[Any, Any]:
        name = wanted.strip() or self.trainings.root.free_name(str(options["data_dir"]))
        table = self.trainings.start(name, options)
        return {
            self.table: gr.HTML(lines_view(table), visible=True),
            self.message: note(f"{name} has started. It goes on when this page is closed."),
            self.runs: gr.Dropdown(choices=self.trainings.names(), value=name),
        }


def _is_image(preset: str) -> bool:
    try:
        options_for(preset, ImageTraining)
    except UserError:  # of another kind of model
        return False
    return True


class RunView:
    """The runs, and how the chosen one is doing."""

    def __init__(self, trainings: Trainings):
        self.trainings = trainings
        gr.Markdown("### Runs")
        self.runs = gr.Dropdown([], label="Run", interactive=True, elem_id="train-runs")
        self.state = gr.HTML(note("No run yet."), elem_id="train-state")
        with gr.Row():
            self.stop = gr.Button("Stop", interactive=False, elem_id="train-stop", min_width=100)
            self.resume = gr.Button("Resume", interactive=False, elem_id="train-resume", min_width=100)
            self.until = gr.Textbox(
                "", label="Resume until step", placeholder="the same end", min_width=140, elem_id="train-until"
            )
        self.answer = gr.HTML(elem_id="train-answer")
        self.column = gr.Dropdown(
            [_FIRST_COLUMN], value=_FIRST_COLUMN, label="Curve", interactive=True, elem_id="train-column"
        )
        self.curve = gr.LinePlot(
            x="step", y="value", height=240, show_label=False, buttons=[], elem_id="train-curve", elem_classes="curve"
        )
        self.previews = gr.Gallery(
            label="Previews", columns=2, format="png", interactive=False, elem_classes="sharp",
            elem_id="train-previews", buttons=["fullscreen"], object_fit="contain",
        )  # fmt: skip
        self.log = gr.HTML(label="Log", show_label=True, container=True, padding=True, elem_id="train-log")
        self.seen = gr.State({})  # what is shown now, so that only what is new is sent

    def connect(self, tab: gr.Tab) -> None:
        """Have the controls do what they say."""
        inputs = [self.runs, self.column, self.seen]
        shown = {
            self.runs, self.state, self.stop, self.resume, self.column, self.curve, self.previews, self.log, self.seen,
        }  # fmt: skip
        events = [timer_of(tab).tick, tab.select, self.column.change]
        gr.on(events, self._look, inputs, shown, **AT_ONCE, trigger_mode="always_last")
        chosen = close_menus(self.runs.change, [self.column])
        chosen.then(self._look_again, inputs, shown, **AT_ONCE, trigger_mode="always_last")
        self.stop.click(self._stop, self.runs, [self.answer], **AT_ONCE)
        self.resume.click(self._resume, [self.runs, self.until], [self.answer], **AT_ONCE)
        self.runs.change(lambda: "", None, self.answer, **AT_ONCE)

    def _look(self, name: str | None, column: str, seen: dict[str, Any]) -> dict[Any, Any]:
        """What has changed since the last look."""
        names = self.trainings.names()
        chosen = name
        if name not in names:
            name = names[0] if names else None
        now: dict[str, Any] = {"runs": (name, names)}
        if name is not None:
            with suppress(UserError):  # its folder has just been removed
                now |= self._facts(name, column)
        changes: dict[Any, Any] = {self.seen: now}
        if now["runs"] != seen.get("runs"):
            # Without a value where it stays: the user may have chosen another one in the meantime.
            value: Any = {} if name == chosen else {"value": name}
            changes[self.runs] = gr.Dropdown(choices=names, **value)
        for key, show in (
            ("status", self._show_status), ("columns", self._show_columns), ("curve", self._show_curve),
            ("previews", self._show_previews), ("log", self._show_log),
        ):  # fmt: skip
            if key in now and now[key] != seen.get(key):
                changes |= show(now)
        return changes

    def _look_again(self, name: str | None, column: str, seen: dict[str, Any]) -> dict[Any, Any]:
        """As `_look`, and the curve's menu opens again."""
        return self._look(name, column, {**seen, "columns": None})

    def _facts(self, name: str, column: str) -> dict[str, Any]:
        """What tells whether a part of the view has changed."""
        status = self.trainings.status(name)
        previews = self.trainings.previews(name, _PREVIEWS)
        return {
            "status": status, "columns": (name, self.trainings.columns(name)), "previews": (name, previews),
            "curve": (name, column, self.trainings.curve(name, column)[0][-1:]), "log": self.trainings.log(name),
        }  # fmt: skip

    def _show_status(self, now: Mapping[str, Any]) -> dict[Any, Any]:
        status = now["status"]
        return {
            self.state: describe(status),
            self.stop: gr.Button(interactive=status.is_running and not status.outside and status.state != "stopping"),
            self.resume: gr.Button(interactive=not status.is_running),
        }

    def _show_columns(self, now: Mapping[str, Any]) -> dict[Any, Any]:
        columns, chosen = now["columns"][1] or [_FIRST_COLUMN], now["curve"][1]
        value: Any = {} if chosen in columns else {"value": _FIRST_COLUMN if _FIRST_COLUMN in columns else columns[0]}
        return {self.column: gr.Dropdown(choices=columns, interactive=True, **value)}

    def _show_curve(self, now: Mapping[str, Any]) -> dict[Any, Any]:
        import pandas

        column = now["curve"][1]
        steps, values = self.trainings.curve(now["curve"][0], column)
        return {self.curve: gr.LinePlot(pandas.DataFrame({"step": steps, "value": values}), y_title=column)}

    def _show_previews(self, now: Mapping[str, Any]) -> dict[Any, Any]:
        run, names = now["previews"]
        pictures = ((read_preview(self.trainings.folder(run), each), caption(each)) for each in names)
        return {self.previews: [(picture, text) for picture, text in pictures if picture is not None]}

    def _show_log(self, now: Mapping[str, Any]) -> dict[Any, Any]:
        return {self.log: log_view(now["log"])}

    def _stop(self, name: str | None) -> str:
        try:
            self.trainings.stop(name or "", seconds=0)
        except UserError as error:
            return mistake(str(error))
        return note(f"{name} ends after this step, with a checkpoint.")

    def _resume(self, name: str | None, until: str) -> str:
        try:
            if until.strip() and not until.strip().isdecimal():
                raise UserError(f"step {until.strip()!r}: expected a number of steps")
            self.trainings.resume(name or "", int(until.strip() or 0))
        except UserError as error:
            return mistake(str(error))
        return note(f"{name} continues from its newest checkpoint.")


def describe(status: Status) -> str:
    """The state of a run as HTML."""
    parts = [status.state + (" (started by another program)" if status.outside else "")]
    if status.step or status.loss is not None:
        done = f"{status.step + 1:,}"  # the log counts from 0
        parts.append(f"{done} of {status.steps:,} steps" if status.steps else f"{done} steps")
    for value, form in (
        (status.loss, "loss {:.4g}"), (status.images_per_second if status.is_running else None, "{:.4g} images/s"),
        (status.peak_gib, "{:.2f} GiB of memory"),
    ):  # fmt: skip
        if value is not None:
            parts.append(form.format(value))
    if status.seconds_left is not None:
        parts.append(f"{datetime.timedelta(seconds=round(status.seconds_left))} left")
    text = note(" \N{MIDDLE DOT} ".join(parts))
    return text + (mistake if status.state == "failed" else note)(status.reason)
