"""The command `improved-diffusion classifier-train` under its published file name."""

from improved_diffusion.cli.classifier_train import COMMAND
from improved_diffusion.cli.command import run

if __name__ == "__main__":
    run(COMMAND)
