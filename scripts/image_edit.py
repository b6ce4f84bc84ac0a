"""The command `improved-diffusion edit` under its file name in scripts/."""

from improved_diffusion.cli.command import run
from improved_diffusion.cli.image_edit import COMMAND

if __name__ == "__main__":
    run(COMMAND)
