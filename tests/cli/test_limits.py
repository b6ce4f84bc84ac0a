"""The limits of the ranks reach them from every command."""

import pytest

from improved_diffusion import distributed
from improved_diffusion.cli.main import COMMANDS
from improved_diffusion.config import RunConfig
from improved_diffusion.distributed import watchdog


class JoinedError(Exception):
    """Raised in place of joining the other ranks."""


WORDS = {
    "sample": [],
    "super-res-sample": [],
    "nll": [],
    "edit": ["encode"],
    "evaluate": ["--samples", "s", "--reference", "r"],
    "train": ["photos"],
    "super-res-train": ["--data_dir", "photos"],
    "classifier-train": ["--data_dir", "photos"],
}


@pytest.mark.parametrize("name", WORDS)
def test_a_command_joins_the_ranks_with_its_own_limits(name, monkeypatch):
    from importlib import import_module

    joined = []

    def join(config):
        joined.append(config)
        raise JoinedError

    monkeypatch.setattr(distributed, "join_ranks", join)
    command = import_module(f"improved_diffusion.cli.{COMMANDS[name][0]}").COMMAND
    with pytest.raises(JoinedError):
        command.main([*WORDS[name], "--start_timeout", "7", "--hang_timeout", "8"], name)
    assert (joined[0].start_timeout, joined[0].hang_timeout) == (7, 8)


def test_a_sweep_joins_the_ranks_with_its_own_limits(monkeypatch):
    from improved_diffusion.cli.evaluate import COMMAND

    seen = []

    def join(config):
        seen.append(config.hang_timeout)
        raise JoinedError

    monkeypatch.setattr(distributed, "join_ranks", join)
    with pytest.raises(JoinedError):
        COMMAND.main(["sweep", "--steps", "2,3", "--hang_timeout", "8"], "evaluate")
    assert seen == [8]


def test_a_later_run_of_the_process_has_its_own_hang_timeout(monkeypatch):
    monkeypatch.setattr(watchdog._process, "limit_s", 1.0)
    distributed.join_ranks(RunConfig())
    distributed.join_ranks(RunConfig(hang_timeout=77))
    assert watchdog._process.limit_s == 77
