"""Make moving averages of other lengths from the snapshots of a run trained with --ema_sigma_rel (EDM2 sec. 3.2)."""

from improved_diffusion import distributed
from improved_diffusion.cli.parsing import parse_options
from improved_diffusion.config import PosthocConfig, UserError, comma_list
from improved_diffusion.logs import logger
from improved_diffusion.training.posthoc_ema import rebuild


def main():
    options = parse_options((PosthocConfig,), __doc__)
    widths = comma_list(options.sigma_rel, float)
    if not widths:
        raise UserError("--sigma_rel is missing: give the relative widths of the averages to make, such as 0.07,0.15")
    if distributed.get_rank() == 0:  # one process does it all: the others have nothing to do
        paths = rebuild(options.run_dir, widths, options.step)
        logger.log(f"sample from one with: python scripts/image_sample.py --model_path {paths[0]}")


if __name__ == "__main__":
    distributed.run_script(main)
