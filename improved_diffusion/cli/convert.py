"""Write the weights in another program's checkpoint to a plain file."""

from ..config.settings import Converting
from .command import Command

COMMAND = Command(
    "Write the weights in another program's checkpoint to a plain file, a .pt or .safetensors, that all commands read.",
    Converting,
    "convert:convert",
    first=("model_path", "out", "network", "trust"),
)
