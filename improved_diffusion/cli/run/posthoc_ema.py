"""Make moving averages of other lengths from the snapshots of a run trained with --ema_sigma_rel (EDM2 sec. 3.2)."""

from ... import distributed
from ...config import UserError, comma_list
from ...config.settings import PosthocEMA
from ...logs import logger
from ...training.posthoc_ema import rebuild
from ..parsing import Parsed


def make_averages(parsed: Parsed[PosthocEMA]) -> None:
    """Rebuild the averages and write them."""
    options = parsed.settings.posthoc
    widths = comma_list(options.sigma_rel, float)
    if not widths:
        raise UserError("--sigma_rel is missing: give the relative widths of the averages to make, such as 0.07,0.15")
    if distributed.get_rank() == 0:  # one process does it all: the others have nothing to do
        paths = rebuild(options.run_dir, widths, options.step)
        logger.log(f"sample from one with: improved-diffusion sample --model_path {paths[0]}")
