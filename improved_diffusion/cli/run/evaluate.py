"""Evaluate samples: scores in a report, statistics of real images, sweeps, and reports side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from ... import distributed
from ...checkpoints.loading import load_model
from ...config import EvaluationConfig, FeaturesConfig, ReadingConfig, RunConfig, UserError, comma_list
from ...config.settings import Comparison, ReferenceStatistics, Scoring, Sweeping
from ...evaluation.comparison import comparison, name_reports, report_dir, write_comparison
from ...evaluation.evaluator import Inputs, prepare_like_training
from ...evaluation.loss_floor import training_loss
from ...evaluation.provenance import report_folder
from ...evaluation.references import write_reference
from ...evaluation.report import Report
from ...evaluation.sweep import Point, run_sweep
from ...logs.run_folder import open_run, run_folder
from ...sampling.pipeline import SamplingPipeline
from ...utils.terminal import show
from ..parsing import Parsed


def score(parsed: Parsed[Scoring]) -> None:
    """Evaluate samples that are given, or that a model draws."""
    check_source(parsed)
    distributed.join_ranks(parsed.settings.run)
    if parsed.settings.evaluation.samples:
        score_given(parsed)
    else:
        score_drawn(parsed)


def score_given(parsed: Parsed[Scoring]) -> None:
    """Evaluate the samples of --samples."""
    settings, path = parsed.settings, parsed.settings.evaluation.samples
    inputs = Inputs.of(settings.evaluation, settings.features, settings.reading)
    samples = inputs.open_samples(path, settings.sample.num_samples if "num_samples" in parsed.given else 0)
    run = replace(settings.run, out_dir=settings.run.out_dir or report_folder(path))
    inputs.check_out_dir(run.out_dir, samples.path)
    out_dir = open_run(run, "")
    inputs.prepare().evaluate(samples, out_dir)


def score_drawn(parsed: Parsed[Scoring]) -> None:
    """Evaluate what --model_path draws."""
    pipeline = SamplingPipeline(load_model(parsed.settings, parsed.given, parsed.settings.sample.model_path))
    settings, count = pipeline.loaded.settings, len(pipeline.numbers)
    features = prepare_like_training(settings, pipeline.loaded.path, count)
    inputs = Inputs.of(settings.evaluation, features, settings.reading)
    inputs.check_model(pipeline.loaded.path, count)
    inputs.check_out_dir(run_folder(settings.run, pipeline.name))
    loss = training_loss(pipeline.loaded, settings.evaluation.train_dir) if settings.evaluation.loss_floor else None
    out_dir = open_run(settings.run, pipeline.name)
    measured = None if loss is None else loss.run()  # before the samples are drawn, since it may fail, and so may this
    evaluator = inputs.prepare()
    evaluator.evaluate(inputs.open_samples(pipeline.write(out_dir)), out_dir, loss=measured)


def check_source(parsed: Parsed[Scoring]) -> None:
    """Raise UserError unless samples are either given or drawn."""
    settings = parsed.settings
    samples, floor = settings.evaluation.samples, settings.evaluation.loss_floor
    if bool(samples) == bool(settings.sample.model_path):
        raise UserError("give --samples, to evaluate those, or --model_path, to draw them first: one of the two")
    if floor and not (settings.sample.model_path and settings.evaluation.train_dir):
        raise UserError("--loss_floor needs a model and its training images: give --model_path and --train_dir")
    groups = (EvaluationConfig, FeaturesConfig, ReadingConfig, RunConfig)
    of_evaluation = {f.name for group in groups for f in fields(group)} - {"seed"} | {"num_samples"}
    others = (["preset"] if parsed.preset else []) + sorted(parsed.given - of_evaluation)
    if samples and others:
        raise UserError(f"--{others[0]} is for drawing samples, but --samples {samples} are given: leave it out")


def reference(parsed: Parsed[ReferenceStatistics]) -> None:
    """Write the statistics of real images."""
    distributed.setup_dist()
    write_reference(parsed.settings)


def sweep(points: Sequence[tuple[dict[str, str], Parsed[Sweeping]]]) -> None:
    """Evaluate a model under several settings."""
    if points[0][1].settings.evaluation.loss_floor:
        raise UserError("--loss_floor does not depend on how samples are drawn: give it to evaluate, or use loss-floor")
    distributed.join_ranks(points[0][1].settings.run)
    run_sweep([Point(chosen, parsed.settings, parsed.given) for chosen, parsed in points])


def compare(parsed: Parsed[Comparison]) -> None:
    """Print reports side by side."""
    distributed.setup_dist()
    distributed.from_rank0(show_comparison, parsed.settings)


def show_comparison(settings: Comparison) -> None:
    """Print the comparison, and write it to --out_dir."""
    paths = comma_list(settings.compare.reports, str.strip)
    if len(paths) < 2:
        raise UserError("name two reports or more: evaluate compare FOLDER FOLDER")
    reports, names = [Report.read(path) for path in paths], name_reports(paths)
    show(comparison(reports, names).rstrip("\n"))
    if settings.compare.out_dir:
        folders = [report_dir(path) for path in paths]
        show(f"wrote {write_comparison(settings.compare.out_dir, reports, names, folders)}")
