"""The command `improved-diffusion evaluate` under the scripts' file name."""

from improved_diffusion.cli.main import run_script

if __name__ == "__main__":
    run_script("evaluate")
