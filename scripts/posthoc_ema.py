"""The command `improved-diffusion posthoc-ema` under its published file name."""

from improved_diffusion.cli.command import run
from improved_diffusion.cli.posthoc_ema import COMMAND

if __name__ == "__main__":
    run(COMMAND)
