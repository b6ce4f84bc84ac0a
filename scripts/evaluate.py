"""The command `improved-diffusion evaluate` under the scripts' file name."""

from improved_diffusion.cli.command import run
from improved_diffusion.cli.evaluate import COMMAND

if __name__ == "__main__":
    run(COMMAND)
