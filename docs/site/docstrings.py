"""Docstrings as Markdown: their fields (`:param x:`, `:return:`) become a list."""

import re

import griffe

FIELD = re.compile(r":param ([\w, *]+): *|:(returns?|raises?)( \w+)?: *")


def as_markdown(text):
    """The text of a docstring with its fields as items of a list."""
    lines, listing = [], False
    for line in re.sub(r"(?<=[.;]) (?=:param )", "\n", text).splitlines():  # some stand behind a sentence
        match = FIELD.match(line)
        if match:
            if not listing:
                lines.append("")
            name = f"`{match[1]}`" if match[1] else match[2].capitalize() + (match[3] or "")
            line, listing = f"- {name}: {line[match.end() :]}", True
        elif listing and not line.startswith(" "):
            lines, listing = [*lines, ""], False
        lines.append(line)
    return "\n".join(lines)


class Fields(griffe.Extension):
    """Called for each object whose documentation is shown."""

    def on_instance(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
