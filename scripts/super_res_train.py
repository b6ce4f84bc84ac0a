"""The command `improved-diffusion super-res-train` under its published file name."""

from improved_diffusion.cli.command import run
from improved_diffusion.cli.super_res_train import COMMAND

if __name__ == "__main__":
    run(COMMAND)
