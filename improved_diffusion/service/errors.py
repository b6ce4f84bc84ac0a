"""What an engine answers instead of images."""


class Busy(Exception):
    """The queue is full."""

    def __init__(self, retry_after: float):
        super().__init__("busy")
        self.retry_after = retry_after


class Cancelled(Exception):
    """The job was cancelled."""


class OutOfMemory(Exception):
    """The job does not fit into memory."""


class Failed(Exception):
    """The job failed."""
