"""Training pixel-space diffusion models and sampling from them by the IDDPM method (Nichol & Dhariwal 2021)."""

__version__ = "0.1.0"
