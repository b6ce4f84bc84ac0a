"""What the page's tabs share."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.service import WebConfig
from ..service.catalogue import Catalogue
from ..service.engine import Engine


@dataclass(frozen=True)
class AppState:
    """What is the same for all users of the page; each tab keeps what is a user's own in gr.State.

    :param engine: draws the images; started and stopped by who made it.
    :param catalogue: the models that may be used.
    :param options: the command's.
    :param runs: the folder of runs, an absolute path; new runs are made below it.
    :param data_root: the folder of images that the operator allows, an absolute path.
    :param work_dir: a temporary folder of this process, for files that users download.
    """

    engine: Engine
    catalogue: Catalogue
    options: WebConfig
    runs: str
    data_root: str
    work_dir: str
