"""Puts what the pages link to outside of docs/ into the site: Markdown as it is, scripts with their source, pictures.

MkDocs calls these hooks. On GitHub the same links lead to the files themselves.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#\s])")
LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", ".yml": "yaml"}


def targets(text, origin):
    """{link: file or folder} of the relative links in the text of a file that lead out of docs/."""
    found = {}
    for link in LINK.findall(text):
        path = (origin.parent / link).resolve()
        if path.exists() and path.is_relative_to(ROOT) and not path.is_relative_to(DOCS):
            found[link] = path
    return found


def uri(path):
    """Where a file outside of docs/ is in the site's sources."""
    name = f"project/{path.relative_to(ROOT).as_posix()}"
    return name if path.suffix in (".md", ".png") else f"{name}.md"


def content(path):
    """The Markdown of the page of a file or a folder."""
    if path.suffix == ".md":
        return path.read_text()
    title = f"# {path.relative_to(ROOT).as_posix()}\n\n"
    if path.is_dir():
        names = sorted(each.name for each in path.iterdir() if each.suffix in LANGUAGES)
        return title + "\n".join(f"- [{name}]({name})" for name in names)
    return f"{title}````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}````\n"


def origin_of(file):
    """The file that a page was made from."""
    if not file.src_uri.startswith("project/"):
        return DOCS / file.src_uri
    path = ROOT / file.src_uri.removeprefix("project/")
    return path if path.exists() else path.with_suffix("")


def on_files(files, config):
    """Add the files that are linked to, and those that these link to."""
    waiting = [(page.content_string, origin_of(page)) for page in files.documentation_pages()]
    while waiting:
        for path in targets(*waiting.pop()).values():
            if uri(path) in files.src_uris:
                continue
            if path.suffix == ".png":
                files.append(File.generated(config, uri(path), abs_src_path=str(path)))
                continue
            text = content(path)
            files.append(File.generated(config, uri(path), content=text))
            waiting.append((text, path if path.is_file() else path / "index"))
    return files


def on_page_markdown(markdown, page, config, files):
    """Let the links lead to these pages."""
    origin = origin_of(page.file)
    found = targets(markdown, origin / "index" if origin.is_dir() else origin)
    inside = _links_into_docs(markdown, origin) if page.file.src_uri.startswith("project/") else {}

    def replaced(match):
        link = match.group(1)
        wanted = uri(found[link]) if link in found else inside.get(link)
        return link if wanted is None else os.path.relpath(wanted, os.path.dirname(page.file.src_uri))

    return LINK.sub(replaced, markdown)


def _links_into_docs(text, origin):
    """{link: page} of the links from outside of docs/ into it."""
    found = {}
    for link in LINK.findall(text):
        path = (origin.parent / link).resolve()
        if path.exists() and path.is_relative_to(DOCS):
            found[link] = "README.md" if path == DOCS else path.relative_to(DOCS).as_posix()
    return found
