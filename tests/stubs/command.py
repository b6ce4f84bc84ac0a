"""The console command `improved-diffusion`, as a file."""

from improved_diffusion.cli.main import main

if __name__ == "__main__":
    main()
