"""The command `improved-diffusion sample` under its published file name."""

from improved_diffusion.cli.command import run
from improved_diffusion.cli.image_sample import COMMAND

if __name__ == "__main__":
    run(COMMAND)
