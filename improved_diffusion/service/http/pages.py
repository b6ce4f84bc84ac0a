"""The page that describes the service, made from its OpenAPI schema: no script, and nothing from other hosts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>improved-diffusion</title><style>
body{font:15px/1.5 system-ui;max-width:60em;margin:2em auto;padding:0 1em}
code{background:#eee8;padding:.1em .3em;border-radius:3px}table{border-collapse:collapse;width:100%}
td{border-top:1px solid #8884;padding:.25em .5em .25em 0;vertical-align:top}summary{cursor:pointer;padding:.4em 0}
@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}a{color:#8cf}}</style></head><body>
"""


def docs_page(schema: Mapping[str, Any]) -> str:
    """Each route with its fields."""
    info = schema["info"]
    parts = [_HEAD, f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['description'])}</p>"]
    parts.append('<p>For programs: <a href="/openapi.json">/openapi.json</a></p>')
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            title = f"<code>{method.upper()} {escape(path)}</code> {escape(operation.get('summary', ''))}"
            parts.append(f"<details><summary>{title}</summary>")
            parts.extend(_bodies(operation, schema))
            parts.append("</details>")
    return "".join([*parts, "</body></html>"])


def _bodies(operation: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[str]:
    for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
        yield f"<p><code>{escape(media_type)}</code></p>"
        fields = _resolved(content["schema"], schema)
        yield _table(fields)
        if "options" in fields.get("properties", {}):
            yield "<p>Fields of <code>options</code>:</p>"
            yield _table(_resolved(fields["properties"]["options"], schema))


def _resolved(part: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    name = part.get("$ref", "").removeprefix("#/components/schemas/")
    return schema["components"]["schemas"][name] if name else part


def _table(fields: Mapping[str, Any]) -> str:
    rows = []
    for name, facts in fields.get("properties", {}).items():
        choices = [each for option in facts.get("anyOf", [facts]) for each in option.get("enum", [])]
        listed = f" ({', '.join(map(str, choices))})" if choices else ""
        needed = " <b>needed</b>" if name in fields.get("required", ()) else ""
        rows.append(
            f"<tr><td><code>{escape(name)}</code>{needed}<td>{escape(facts.get('description', '') + listed)}</tr>"
        )
    return f"<table>{''.join(rows)}</table>"
