"""What the tests of this folder share."""

from hub_server import hub  # noqa: F401
