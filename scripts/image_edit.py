"""The command `improved-diffusion edit` under its file name in scripts/."""

from improved_diffusion.cli.main import run_script

if __name__ == "__main__":
    run_script("image_edit")
