"""Training pixel-space diffusion models and sampling from them by the IDDPM method (Nichol & Dhariwal 2021).

import improved_diffusion as idf

model = idf.train("photos/", image_size=64, max_steps=20_000, out_dir="runs/mine")
model.sample(16, sampler="dpmpp_2m_sde", steps=20).save("out/")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Images", "Latents", "Model", "Report", "UserError", "__version__", "distill", "evaluate", "load", "loss_floor",
    "train",
]  # fmt: skip

if TYPE_CHECKING:
    from .api import Images, Latents, Model, Report, UserError, distill, evaluate, load, loss_floor, train


def __getattr__(name: str) -> Any:
    """The API is imported when it is first used, so that importing the package costs nothing."""
    if name in __all__:
        return getattr(import_module(".api", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
