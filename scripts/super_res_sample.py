"""The command `improved-diffusion super-res-sample` under its published file name."""

from improved_diffusion.cli.command import run
from improved_diffusion.cli.super_res_sample import COMMAND

if __name__ == "__main__":
    run(COMMAND)
