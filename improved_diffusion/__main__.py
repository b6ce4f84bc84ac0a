"""`python -m improved_diffusion`: the same as the console command."""

from .cli.main import main

if __name__ == "__main__":
    main()
