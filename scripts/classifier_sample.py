"""The command `improved-diffusion sample`, guided as guided-diffusion's script of this name does."""

from improved_diffusion.cli.classifier_sample import COMMAND
from improved_diffusion.cli.command import run

if __name__ == "__main__":
    run(COMMAND)
