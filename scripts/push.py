"""The command `improved-diffusion push` as a script."""

from improved_diffusion.cli.command import run
from improved_diffusion.cli.push import COMMAND

if __name__ == "__main__":
    run(COMMAND)
