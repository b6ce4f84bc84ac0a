"""The command `improved-diffusion nll` under its published file name."""

from improved_diffusion.cli.command import run
from improved_diffusion.cli.image_nll import COMMAND

if __name__ == "__main__":
    run(COMMAND)
