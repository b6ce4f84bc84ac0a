"""The command `improved-diffusion loss-floor` under its published file name."""

from improved_diffusion.cli.main import run_script

if __name__ == "__main__":
    run_script("loss_floor")
