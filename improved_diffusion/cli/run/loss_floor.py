"""The least loss that any model can have on a set of images, by noise level, and a model's loss beside it."""

from ... import distributed
from ...checkpoints.loading import load_model
from ...config.settings import LossFloor
from ...evaluation.loss_floor import FloorEvaluation
from ...logs import logger
from ...logs.run_folder import RunFolder
from ..parsing import Parsed


def evaluate(parsed: Parsed[LossFloor]) -> None:
    """Measure, print and write the results."""
    distributed.join_ranks(parsed.settings.run)
    model_path = parsed.settings.floor.model_path
    loaded = load_model(parsed.settings, parsed.given, model_path) if model_path else None
    evaluation = FloorEvaluation(parsed.settings if loaded is None else loaded.settings, loaded)
    folder = RunFolder(parsed.settings.run, evaluation.name)
    result = evaluation.run()
    folder.open()
    if distributed.get_rank() == 0:
        for line in result.lines():
            logger.log(line)
        for warning in result.warnings:
            logger.warn(warning)
        logger.log(f"wrote {' and '.join(result.save(folder.path))}")
