"""Evaluate the variational bound of a trained model on images, in bits/dim."""

from ... import distributed
from ...checkpoints.loading import load_model
from ...config.settings import Likelihood
from ...evaluation.likelihood import BoundEvaluation, describe_mean, network_of, results_name, write_results
from ...logs import logger
from ...logs.run_folder import open_run
from ..parsing import Parsed


def evaluate(parsed: Parsed[Likelihood]) -> None:
    """Evaluate the bound and write the results."""
    distributed.join_ranks(parsed.settings.run)
    loaded = load_model(parsed.settings, parsed.given, parsed.settings.nll.model_path)
    evaluation = BoundEvaluation.of(loaded)
    out_dir = open_run(loaded.settings.run, results_name(loaded))
    result = evaluation.run(network_of(loaded))
    logger.log(f"bits/dim: {describe_mean(result)}")
    if distributed.get_rank() == 0:
        write_results(out_dir, result, loaded)
