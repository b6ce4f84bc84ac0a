"""The evaluations of a checkpoint: the report of `evaluate`, and the bits/dim of `nll`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..config import UserError
from ..evaluation.report import JSON_FILE, Report
from ..logs import logger
from ..utils import files

BOUND_FILE = "nll.json"
_BESIDE = ("", "report", "nll")  # folders in a run's, where evaluations are looked for


class Bound(NamedTuple):
    """A variational bound in bits/dim, its standard error, None where unknown, and the images it is of."""

    value: float
    error: float | None
    images: int
    data: str


@dataclass(frozen=True)
class Evaluations:
    """What is known of a model's quality; `report_names_model`: whether the report says which model it is of."""

    report: Report | None = None
    bound: Bound | None = None
    report_names_model: bool = False


def find_evaluations(checkpoint: str, given: str) -> Evaluations:
    """The evaluations given, or those in a checkpoint's folder that are of this very file.

    :param given: paths separated by commas.
    Raises UserError for one that is damaged, or of another checkpoint.
    """
    paths = list(_named(given)) if given else list(_beside(files.folder_of(checkpoint)))
    sha256 = files.sha256(checkpoint) if paths else ""
    found: dict[str, Any] = {}
    for path in paths:
        kind, value, of = _read(path)
        if of != sha256 and (of or not given):
            problem = f"{path} is of another checkpoint than {checkpoint}"
            if given:
                raise UserError(f"{problem}: evaluate this one, or leave --report out")
            logger.log(
                f"{problem}: it is not in the card" if of else f"{path} does not say what it is of: not in the card"
            )
            continue
        if kind in found:
            raise UserError(f"{path} is the second {kind} of this model: name one of them in --report")
        found[kind] = value
        if kind == "report":
            found["report_names_model"] = bool(of)
    return Evaluations(**found)


def _beside(folder: str) -> Iterator[str]:
    for below in _BESIDE:
        for name in (JSON_FILE, BOUND_FILE):
            path = files.join(files.join(folder, below), name) if below else files.join(folder, name)
            if files.exists(path):
                yield path


def _named(given: str) -> Iterator[str]:
    for path in filter(None, map(str.strip, given.split(","))):
        if not files.is_dir(path):
            yield path
            continue
        found = [files.join(path, name) for name in (JSON_FILE, BOUND_FILE) if files.exists(files.join(path, name))]
        if not found:
            raise UserError(f"--report {path} holds neither {JSON_FILE} nor {BOUND_FILE}: evaluate or nll write them")
        yield from found


def _read(path: str) -> tuple[str, Report | Bound, str]:
    """("report" or "bound", what the file says, the SHA-256 of the checkpoint it is of, "" where it does not say)."""
    content = files.read_json(path)
    if isinstance(content, dict) and "bits_per_dim" in content:
        return "bound", _bound(content, path), str(content.get("model_sha256") or "")
    report = Report.read(path)
    return "report", report, str((report.samples.get("made_by") or {}).get("model_sha256") or "")


def _bound(content: dict[str, Any], path: str) -> Bound:
    values: list[Any] = [content.get(key) for key in ("bits_per_dim", "standard_error", "images", "data_dir")]
    found = Bound(*values)
    numbers = [found.value] if found.error is None else [found.value, found.error]
    is_sound = all(type(each) in (int, float) and abs(each) < 1e300 for each in numbers)
    if not is_sound or type(found.images) is not int or not 0 < found.images < 2**63 or not isinstance(found.data, str):
        raise UserError(f"{path} is not a result of the nll command, or is damaged: write it again")
    return found
