"""The command `improved-diffusion distill` as a script."""

from improved_diffusion.cli.main import run_script

if __name__ == "__main__":
    run_script("distill")
