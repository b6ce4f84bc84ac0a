"""How a request can end without images, besides UserError."""

from __future__ import annotations


class ServiceError(Exception):
    """Base of the errors below; the message is for the user who asked."""


class Busy(ServiceError):
    """The engine takes no more requests for now.

    :param retry_after: seconds until it is worth another try.
    """

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class Cancelled(ServiceError):
    """The request was cancelled."""


class Failed(ServiceError):
    """The request could not be answered, through no fault of whoever asked."""


class Stopping(Failed):
    """The engine stopped before the request was answered."""


class TimedOut(Failed):
    """The request took longer than the time limit."""


class OutOfMemory(Failed):
    """A single image of the request does not fit into memory."""
