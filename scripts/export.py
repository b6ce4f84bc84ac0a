"""The command `improved-diffusion export` as a script."""

from improved_diffusion.cli.command import run
from improved_diffusion.cli.export import COMMAND

if __name__ == "__main__":
    run(COMMAND)
