"""Logging under its published name; the code is in `logs.logger` and `logs.outputs`."""

from .logs.logger import (
    DEBUG,
    DISABLED,
    ERROR,
    INFO,
    WARN,
    Logger,
    add_output,
    configure,
    debug,
    drop_rows,
    dumpkvs,
    error,
    get_current,
    get_dir,
    getkvs,
    info,
    log,
    log_image,
    logkv,
    logkv_mean,
    logkvs,
    profile,
    profile_kv,
    reset,
    scoped_configure,
    set_comm,
    set_level,
    warn,
)
from .logs.outputs import CSVOutputFormat, HumanOutputFormat, JSONOutputFormat, make_output_format
from .logs.progress import Progress

__all__ = [
    "DEBUG", "DISABLED", "ERROR", "INFO", "WARN", "CSVOutputFormat", "HumanOutputFormat", "JSONOutputFormat", "Logger",
    "Progress", "add_output", "configure", "debug", "drop_rows", "dumpkvs", "error", "get_current", "get_dir",
    "getkvs", "info", "log", "log_image", "logkv", "logkv_mean", "logkvs", "make_output_format", "profile",
    "profile_kv", "reset", "scoped_configure", "set_comm", "set_level", "warn",
]  # fmt: skip
