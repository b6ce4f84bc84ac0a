"""Make moving averages of other lengths from the snapshots of a run trained with --ema_sigma_rel (EDM2 sec. 3.2)."""

from ..config.settings import PosthocEMA
from .command import Command

COMMAND = Command(
    "Make moving averages of other lengths from the snapshots of a run trained with --ema_sigma_rel (EDM2 sec. 3.2).",
    PosthocEMA,
    "posthoc_ema:make_averages",
)
