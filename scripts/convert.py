"""The command `improved-diffusion convert` as a script."""

from improved_diffusion.cli.command import run
from improved_diffusion.cli.convert import COMMAND

if __name__ == "__main__":
    run(COMMAND)
