"""Logging under its published name; the code is in `logs.logger` and `logs.outputs`."""

from .distributed import get_rank as get_rank_without_mpi_import
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
    mpi_weighted_mean,
    profile,
    profile_kv,
    reset,
    scoped_configure,
    set_comm,
    set_level,
    warn,
)
from .logs.outputs import (
    CSVOutputFormat,
    HumanOutputFormat,
    JSONOutputFormat,
    KVWriter,
    SeqWriter,
    TensorBoardOutputFormat,
    make_output_format,
)
from .logs.progress import Progress

record_tabular = logkv
dump_tabular = dumpkvs

__all__ = [
    "DEBUG", "DISABLED", "ERROR", "INFO", "WARN", "CSVOutputFormat", "HumanOutputFormat", "JSONOutputFormat",
    "KVWriter", "Logger", "Progress", "SeqWriter", "TensorBoardOutputFormat", "add_output", "configure", "debug",
    "drop_rows", "dump_tabular", "dumpkvs", "error", "get_current", "get_dir", "get_rank_without_mpi_import", "getkvs",
    "info", "log", "log_image", "logkv", "logkv_mean", "logkvs", "make_output_format", "mpi_weighted_mean", "profile",
    "profile_kv", "record_tabular", "reset", "scoped_configure", "set_comm", "set_level", "warn",
]  # fmt: skip
