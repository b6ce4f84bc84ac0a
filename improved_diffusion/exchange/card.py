"""The model card: what a checkpoint and its evaluations know of a model, as the Hugging Face Hub shows it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checkpoints.averages import LARGEST_SHARE, initial_share_of
from ..checkpoints.loading import LoadedModel
from ..config import UserError, fixed_names, height_width
from ..config.exchange import CardConfig
from ..evaluation.report import EXPLAINED, escape, number, title
from ..utils import files, images
from ..utils.text import counted
from .evaluations import Evaluations, find_evaluations

CARD_FILE, GRID_FILE = "README.md", "samples.png"
SAMPLER = "dpmpp_2m_sde"
MOST_CLASSES = 100  # that are named
FEW_STEPS = 10_000
MANY_EPOCHS = 1000
MOSTLY_NOISE = 0.9  # the share of the first weights
_OURS = b"\nlibrary_name: improved_diffusion\n"  # in the front matter
_ANYONE = "user/name"  # where the repository is not known

# Sampling options -> the PNG of a grid of samples.
Draw = Callable[[Mapping[str, Any]], bytes]


@dataclass(frozen=True)
class Card:
    """A model card: its text, Markdown with the Hub's front matter, and the PNG of its samples, None without."""

    text: str
    grid: bytes | None = field(default=None, repr=False)

    def contents(self) -> dict[str, bytes]:
        """The files, by name."""
        grid = {} if self.grid is None else {GRID_FILE: self.grid}
        return {CARD_FILE: self.text.encode(), **grid}

    def save(self, folder: str | os.PathLike) -> str:
        """Write README.md and samples.png; returns the path of the former. Raises UserError where that fails, and as
        `require_own` does."""
        require_own(folder)
        files.make_dirs(folder)
        files.write_together((files.join(folder, name), content) for name, content in self.contents().items())
        return files.join(folder, CARD_FILE)

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        return self.text.partition("\n---\n")[2]


def require_own(folder: str | os.PathLike) -> None:
    """Raise UserError where a card would replace files that do not belong to one, such as a project's README.md."""
    there = [name for name in (CARD_FILE, GRID_FILE) if files.exists(files.join(folder, name))]
    if there and (there[0] != CARD_FILE or _OURS not in files.read_start(files.join(folder, CARD_FILE), 2**12)):
        raise UserError(f"{files.join(folder, there[0])} is not of a model card of this package: name another folder")


def make_card(loaded: LoadedModel, options: CardConfig, draw: Draw) -> Card:
    """The card of a model. Raises UserError, before samples are drawn, for evaluations or an image that are wrong."""
    evaluations = find_evaluations(loaded.path, options.report)
    is_super_res = loaded.settings.model.kind == "super_res"
    student = loaded.metadata.get("distilled")
    steps = {"sampler": SAMPLER, "steps": min(options.steps, loaded.diffusion.num_timesteps)}
    asked = {"seed": 0, **({name: student[name] for name in steps} if student else steps)}
    if options.samples:
        grid, caption = _read_image(options.samples), "Samples."
    elif is_super_res or not options.num_samples:
        grid, caption = None, ""
    else:
        grid = draw({"n": options.num_samples, **asked})
        caption = f"{counted(options.num_samples, 'sample')} of seed 0, none left out, by the command below."
    repo = options.repo or _ANYONE
    sections = [
        _front_matter(options, is_super_res),
        f"# {repo.rpartition('/')[2]}\n\n{_summary(loaded)}",
        f"![samples]({GRID_FILE})\n\n{caption}" if grid else "",
        "## Use\n\n" + (_use_super_res(repo, asked) if is_super_res else _use(repo, options.num_samples or 16, asked)),
        _section("Model", _model(loaded)),
        _section("Training", _training(loaded)),
        "## Evaluation\n\n" + _evaluation(evaluations),
        "## Limitations\n\n" + "\n".join(f"- {line}" for line in _limitations(loaded, evaluations)),
        "## Licence\n\n" + _licence(options),
    ]
    return Card("\n\n".join(section for section in sections if section) + "\n", grid)


def _front_matter(options: CardConfig, is_super_res: bool) -> str:
    licence = [f"license: {options.license or 'unknown'}"]
    if options.license_name:
        licence.append(f'license_name: "{options.license_name}"')
    if options.license_link:
        licence.append(f'license_link: "{options.license_link}"')
    task = "image-to-image" if is_super_res else "unconditional-image-generation"
    tags = "\n".join(f"- {tag}" for tag in ("diffusion", "iddpm", "pixel-space", "pytorch"))
    lines = [*licence, "library_name: improved_diffusion", f"pipeline_tag: {task}", f"tags:\n{tags}"]
    return "\n".join(["---", *lines, "---"])


def _summary(loaded: LoadedModel) -> str:
    model = loaded.settings.model
    colours = {1: "grey", 2: "grey and alpha", 3: "RGB", 4: "RGB and alpha"}[model.channels]
    classes = f" of {counted(model.num_classes, 'class', 'classes')}" if model.class_cond else ""
    does = f"enlarges images from {_size(model.small_size)} to" if model.kind == "super_res" else "draws images of"
    return (
        f"A pixel-space diffusion model that {does} {_size(model.size)} pixels ({colours}){classes}, by the method of "
        "[Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672)."
    )


def _size(size: Any) -> str:
    height, width = height_width(size)
    return f"{height} x {width}"


def _use(repo: str, count: int, asked: Mapping[str, Any]) -> str:
    flags = " ".join(f"--{name} {value}" for name, value in asked.items())
    keywords = ", ".join(f"{name}={value!r}" for name, value in asked.items()).replace("'", '"')
    return (
        "With the package `improved_diffusion` and its extra `hub`:\n\n"
        f'```python\nimport improved_diffusion as idf\n\nmodel = idf.load("{repo}")\n'
        f'model.sample({count}, {keywords}).save("out/")\n```\n\n'
        f"```\nimproved-diffusion sample --model_path {repo} --num_samples {count} {flags}\n```"
    )


def _use_super_res(repo: str, asked: Mapping[str, Any]) -> str:
    return (
        "With the package `improved_diffusion` and its extra `hub`:\n\n"
        f'```python\nimport improved_diffusion as idf\n\nmodel = idf.load("{repo}")\n'
        f'model.upscale("small_images/", sampler="{asked["sampler"]}", steps={asked["steps"]}).save("out/")\n```\n\n'
        f"```\nimproved-diffusion super-res-sample --model_path {repo} --base_samples small_images/\n```"
    )


def _section(name: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {key} | {value} |" for key, value in rows.items() if value not in (None, "")]
    return "\n".join([f"## {name}", "", "| | |", "|---|---|", *lines]) if lines else ""


def _model(loaded: LoadedModel) -> dict[str, str]:
    model, values, names = loaded.settings.model, loaded.settings.values(), loaded.metadata.get("class_names")
    return {
        "parameters": f"{sum(p.numel() for p in loaded.model.parameters()):,}",
        "classes": _class_names(names) if names else f"{model.num_classes:,}, without names" * model.class_cond,
        **{f"`{name}`": escape(values[name]) for name in values if name in fixed_names()},
    }


def _class_names(names: Sequence[str]) -> str:
    more = f", ... ({len(names):,} in all)" if len(names) > MOST_CLASSES else ""
    return ", ".join(map(escape, names[:MOST_CLASSES])) + more


def _training(loaded: LoadedModel) -> dict[str, str]:
    facts, config = loaded.metadata, loaded.metadata.get("config", {})
    step, count, epochs = facts.get("step"), facts.get("num_images"), _epochs(facts)
    batch = config.get("total_batch_size")
    of = f" of {counted(batch, 'image')}" if _is_count(batch) else ""
    return {
        "images": f"{count:,}" if count else "",
        "data": escape(", ".join(map(base_name, str(config.get("data_dir") or "").split(",")))),
        "steps": "" if step is None else f"{step:,}{of}" + (f", {epochs:,.1f} epochs" if epochs else ""),
        "weights": _average(facts),
        "distilled": _teacher(facts),
        **{f"`{name}`": escape(config[name]) for name in ("lr", "dropout", "precision", "seed") if name in config},
        "package": f"improved_diffusion {escape(facts['version'])}" if "version" in facts else "",
    }


def _teacher(facts: Mapping[str, Any]) -> str:
    student = facts.get("distilled")
    if not student:
        return ""
    teacher, method = escape(student.get("teacher", "a teacher")), escape(student["method"])
    return f"from {teacher} ({method}), for {counted(student['steps'], 'step')}"


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _epochs(facts: Mapping[str, Any]) -> float | None:
    """How often training saw each image; None where that is not known."""
    batch, step, count = facts.get("config", {}).get("total_batch_size"), facts.get("step"), facts.get("num_images")
    return step * batch / count if step and count and _is_count(batch) else None  # type: ignore[operator]


def _average(facts: Mapping[str, Any]) -> str:
    if facts.get("ema_sigma_rel") is not None:
        return f"moving average of relative width {facts['ema_sigma_rel']}"
    if facts.get("ema_rate") is not None:
        return f"exponential moving average, rate {facts['ema_rate']}"
    return "best validation loss" if facts.get("best") else ""


def base_name(path: str) -> str:
    """The last part of a path: a card does not show how somebody's folders are called."""
    return re.split(r"[/\\]", path.strip().rstrip("/\\"))[-1]


def _without_folders(text: str) -> str:
    """A text from a report, in which absolute paths become base names."""
    return re.sub(r"(?<![\w.])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\]+[/\\])*(?=[^\s/\\])", "", text)


def _evaluation(found: Evaluations) -> str:
    parts = []
    if found.report is not None:
        report, real = found.report, found.report.real
        name = escape(base_name(str(report.reference.get("name") or report.reference["images"])))
        lines = [f"{counted(report.samples['count'], 'sample')} against {name}, with standard errors:", ""]
        lines += [f"| metric | value |{' real images |' * bool(real)} |", f"|---|---|{'---|' * bool(real)}---|"]
        for metric, value in report.metrics.items():
            beside = f" {number(metric, real.metrics[metric]) if metric in real.metrics else ''} |" if real else ""
            lines.append(f"| {title(metric)} | {number(metric, value)} |{beside} {EXPLAINED[metric]} |")
        for warning in report.warnings:
            lines += ["", f"**Warning:** {escape(_without_folders(warning))}."]
        parts.append("\n".join(lines))
    if found.bound is not None:
        error = "" if found.bound.error is None else f" ± {found.bound.error:.4f} (standard error)"
        parts.append(
            f"Variational bound: {found.bound.value:.4f}{error} bits/dim, of {counted(found.bound.images, 'image')} of "
            f"{escape(base_name(found.bound.data))}."
        )
    return "\n\n".join(parts) or "Not evaluated, as far as is known."


def _limitations(loaded: LoadedModel, found: Evaluations) -> list[str]:
    facts = loaded.metadata
    share, step, epochs, seen = initial_share_of(loaded.path, facts), facts.get("step"), _epochs(facts), facts.get(
        "seen_classes"
    )  # fmt: skip
    lines = ["Its images resemble those that it was trained on, with their mistakes and biases."]
    if share > LARGEST_SHARE:
        lines.append(f"{_part(share)} of these weights are those that training began with: {_noise(share)}.")
    if step is not None and step < FEW_STEPS:
        lines.append(f"It was trained for {counted(step, 'step')} only." if step else "It is not trained.")
    if epochs is not None and epochs > MANY_EPOCHS:
        lines.append(f"Training saw each image {epochs:,.0f} times: it may have memorised some.")
    if seen:
        names = facts["class_names"]
        classes = "this class" if len(seen) == 1 else "these classes"
        lines.append(f"Only {classes} had images in training: {_class_names([names[i] for i in seen])}.")
    if not facts:
        lines.append("The checkpoint does not describe its training.")
    if found.report is not None and not found.report_names_model:
        lines.append("The evaluation does not say which checkpoint drew its samples.")
    return lines


def _part(share: float) -> str:
    if share < 0.9995:
        return f"{share:.1%}"
    return "All" if share == 1 else "Nearly all"


def _noise(share: float) -> str:
    return "the images are noise" if share > MOSTLY_NOISE else "the images are partly noise"


def _licence(options: CardConfig) -> str:
    match options.license:
        case "":
            return (
                "No licence is given, so that others may not use the model. Give one: `--license mit` with "
                '`improved-diffusion push`, or `model.card(license="mit")`.'
            )
        case "unknown":
            return "Unknown: its author has not said how it may be used."
        case "other" if options.license_name:
            name = f"`{options.license_name}`"
            return (
                f"[{name}]({options.license_link})" if options.license_link else f"{name}: ask its author for the text."
            )
        case "other":
            return f"[Its text]({options.license_link})" if options.license_link else "Ask its author."
    return f"`{options.license}`"


def _read_image(path: str) -> bytes:
    """The PNG of an image file, without its metadata."""
    try:
        with files.open_read(path) as f:
            image = images.as_shown(images.load(f)).image
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"--samples {path} is not an image that can be read ({error}): name a PNG") from None
    return images.encode_png(images.to_array(image, len(image.getbands())))
