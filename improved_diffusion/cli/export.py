"""Write a model in the format of another program."""

from ..config.settings import Exporting
from .command import Command

COMMAND = Command(
    "Write a model in the format of another program.",
    Exporting,
    "export:export",
    first=("model_path", "to", "out"),
)
