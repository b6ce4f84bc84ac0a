"""The command `improved-diffusion sample`, guided as guided-diffusion's script of this name does."""

from improved_diffusion.cli.main import run_script

if __name__ == "__main__":
    run_script("classifier_sample")
