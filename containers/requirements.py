"""Print what the package and some extras need, one requirement a line: python containers/requirements.py mpi,yaml

The Dockerfile installs these before the source is copied, so that a changed line of it installs nothing again.
"""

import re
import sys
from collections.abc import Iterator

import tomllib


def needed(project: dict, extra: str) -> Iterator[str]:
    """The requirements of an extra, and of the package's extras that it names: "improved_diffusion[serve]"."""
    for requirement in project["optional-dependencies"][extra]:
        own = re.fullmatch(rf"{project['name']}\[([\w,-]+)\]", requirement)
        if own:
            for name in own[1].split(","):
                yield from needed(project, name)
        else:
            yield requirement


def main():
    with open("pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    extras = [name for name in sys.argv[1].split(",") if name]
    unknown = sorted(set(extras) - project["optional-dependencies"].keys())
    if unknown:
        sys.exit(f"the package has no extra {', '.join(unknown)}")
    lines = [*project["dependencies"], *(line for extra in extras for line in needed(project, extra))]
    print("\n".join(dict.fromkeys(lines)))


if __name__ == "__main__":
    main()
