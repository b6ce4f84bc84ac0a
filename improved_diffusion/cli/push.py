"""Upload a model to the Hugging Face Hub."""

from ..config.settings import Pushing
from .command import Command

COMMAND = Command(
    "Upload a model to the Hugging Face Hub, with a model card.",
    Pushing,
    "push:push",
    first=("model_path", "repo", "license", "private", "message", "report", "out"),
)
