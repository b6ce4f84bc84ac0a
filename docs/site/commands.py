"""Breaks long command lines before a flag, so that they fit beside the navigation. MkDocs calls the hook."""

import re

WIDTH = 86
BASH = re.compile(r"(?<=^```bash\n)(.*?)(?=^```$)", re.S | re.M)


def broken(command):
    """The lines of a command, with a backslash at the end of each but the last."""
    lines = [""]
    for part in re.split(r" (?=--)", command):
        if lines[-1] and len(lines[-1]) + len(part) > WIDTH:
            lines.append(f"    {part}")
        else:
            lines[-1] = f"{lines[-1]} {part}" if lines[-1] else part
    return " \\\n".join(lines)


def on_page_markdown(markdown, page, config, files):
    """Break the commands in the page's blocks of bash."""

    def block(match):
        commands = re.sub(r" *\\\n\s*", " ", match[0]).splitlines()
        return "\n".join(map(broken, commands)) + "\n"

    return BASH.sub(block, markdown)
