"""The command `improved-diffusion super-res-train` under its published file name."""

from improved_diffusion.cli.main import run_script

if __name__ == "__main__":
    run_script("super_res_train")
