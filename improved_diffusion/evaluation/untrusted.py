"""Programs from anywhere: what in an exported program or TorchScript could do more than compute is refused.

torch.export.load unpickles what is not a plain tensor, evaluates size expressions as Python, and writes names into the
source of the function that it then executes. TorchScript can write files. What passes here is packed anew, so that
torch reads the very bytes that were checked, however it reads archives.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from typing import Any

import torch as th

from ..config import UserError

OLDER_PROGRAM = "serialized_exported_program.json"  # where torch up to 2.7 kept the graph
_OLDER_MEMBERS = re.compile(r"version|serialized_exported_program\.json|serialized_\w+\.pt|extra_files/.*")
_MEMBERS = re.compile(
    r"models/\w+\.json|data/(weights|constants|sample_inputs)/[\w.]+|archive_format|archive_version|version|byteorder"
    r"|\.data/\w+|extra/.*"
)
_WRITERS = re.compile(r"\b(save|from_file)\b")  # the operators that touch files

_PLAIN_GETATTR = re.compile(r'getattr\([\w.]+, "[\w.]+"\)')

# In the description of the graph
_PLAIN = re.compile(r"[\w.+\-]*")  # no text of Python without brackets, quotes and colons calls anything
_TARGET = re.compile(
    r"torch\.ops\.(aten|prims)\.(?!from_file|save)\w+\.\w+|math\.\w+|torch\._?sym_\w+"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast|cond)"
)
_TREES = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
_SYMBOLIC = {
    "Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs", "Piecewise",
    "ExprCondPair", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "StrictLessThan", "LessThan",
    "StrictGreaterThan", "GreaterThan", "And", "Or", "Not", "floor", "ceiling", "FloorDiv", "ModularIndexing", "Where",
    "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "LShift", "RShift", "PowByNatural", "FloatPow",
    "FloatTrueDiv", "IntTrueDiv", "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity",
}  # fmt: skip
_ARITHMETIC = (
    ast.Expression, ast.Constant, ast.Name, ast.Load, ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare, ast.operator,
    ast.unaryop, ast.boolop, ast.cmpop, ast.Call, ast.keyword,
)  # fmt: skip


class _Harmful(Exception):
    """What is harmful, in words."""


def is_program(names: list[str]) -> bool:
    """Whether an archive of these members is an exported program."""
    return OLDER_PROGRAM in names or any(re.fullmatch(r"[^/]+/models/[^/]+", name) for name in names)


def is_script(names: list[str]) -> bool:
    """Whether an archive of these members is TorchScript."""
    return any(name.endswith("/data.pkl") for name in names) and any("/code/" in name for name in names)


def clean_program(data: bytes, flag: str) -> bytes:
    """The exported program, of which torch.export.load runs nothing. Raises UserError where it could run code."""
    try:
        return _clean(data, _checked_in_program)
    except _Harmful as what:
        raise UserError(
            f"{flag} holds more than tensors and plain operators ({what}), which could run code when loaded; it was "
            "not loaded: export the program again, from plain layers and tensor inputs"
        ) from None


def clean_script(data: bytes, flag: str) -> bytes:
    """The TorchScript, which cannot write files. Raises UserError where it could."""
    try:
        return _clean(data, _checked_in_script)
    except _Harmful as what:
        raise UserError(
            f"{flag} holds more than a program on tensors ({what}), which could write files; it was not loaded: script "
            "or trace plain layers"
        ) from None


def _clean(data: bytes, checked: Any) -> bytes:
    given = zipfile.ZipFile(io.BytesIO(data))
    names = given.namelist()
    # torch finds members whatever their case.
    if len({name.lower() for name in names}) < len(names):
        raise _Harmful("members of one name")
    root = "" if OLDER_PROGRAM in names else names[0].split("/")[0] + "/"
    cleaned = io.BytesIO()
    with zipfile.ZipFile(cleaned, "w") as archive:
        for name in names:
            if not name.startswith(root):
                raise _Harmful(name)
            if not name.endswith("/"):
                archive.writestr(name, checked(name.removeprefix(root), given.read(name), not root))
    return cleaned.getvalue()


def _checked_in_script(name: str, content: bytes, older: bool) -> bytes:
    if older or name.lower() == "model.json":  # a form of before 2019, of which the code may lie anywhere
        raise _Harmful(name)
    if name.lower().endswith(".py"):
        code = content.decode()
        if found := _WRITERS.search(code):
            raise _Harmful(f"{found.group()} in {name}")
        # Of a plain name, as torch writes what stands in a Sequential; of a string with escapes or in parts, what is
        # got is not what it seems.
        replaced = 1
        while replaced:
            code, replaced = _PLAIN_GETATTR.subn("attribute", code)
        if "getattr" in code:
            raise _Harmful(f"getattr of a spelled-out name in {name}")
    return content


def _checked_in_program(name: str, content: bytes, older: bool) -> bytes:
    if not (_OLDER_MEMBERS if older else _MEMBERS).fullmatch(name):
        raise _Harmful(name)
    if name.startswith("models/") or name == OLDER_PROGRAM:
        return json.dumps(_checked_value(json.loads(content.decode()), "")).encode()
    if name.endswith("_config.json"):
        for entry in json.loads(content.decode())["config"].values():
            if entry.get("use_pickle") or "obj" in entry["path_name"]:
                raise _Harmful(f"{entry['path_name']} in {name}")
    elif content and (name.endswith(".pt") or name.startswith("data/sample_inputs/")):
        try:
            th.load(io.BytesIO(content), weights_only=True)
        except Exception:
            raise _Harmful(name) from None
    return content


def _checked_value(value: Any, key: str) -> Any:
    """The JSON value under a key of the graph's description, without what is only for people."""
    if key == "metadata":
        return {}
    if key == "guards_code":  # Python text that checks inputs, which their shapes say too
        return []
    if isinstance(value, dict):
        of_names = "expr_str" if key == "range_constraints" else ""
        return {_checked_text(name, of_names): _checked_value(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_checked_value(inner, key) for inner in value]
    return _checked_text(value, key) if isinstance(value, str) else value


def _checked_text(text: str, key: str) -> str:
    if key in ("as_string", "as_strings"):  # arguments of operators: such as an equation of einsum
        return text
    if key in ("in_spec", "out_spec"):
        harmless = not text or _is_plain_tree(json.loads(text)[1])
    elif key == "expr_str":
        harmless = _is_arithmetic(text)
    elif key == "target" and text.startswith(("torch", "_operator", "math", "#")):
        harmless = _TARGET.fullmatch(text) is not None
    else:
        harmless = key != "as_operator" and _PLAIN.fullmatch(text) is not None
    if not harmless:
        raise _Harmful(f"{key or 'a name'} {text[:60]!r}")
    return text


def _is_plain_tree(tree: Any) -> bool:
    """Whether a pytree is of tuples, lists and dicts with plain names; of others the types would be imported."""
    context = json.loads(tree["context"]) if isinstance(tree["context"], str) else tree["context"]
    names = context if isinstance(context, list) else [] if context is None else [None]
    return (
        tree["type"] in _TREES
        and all(isinstance(name, str) and name.isidentifier() for name in names)
        and all(map(_is_plain_tree, tree["children_spec"]))
    )


def _is_arithmetic(text: str) -> bool:
    """Whether a size, which sympy evaluates as Python, has numbers, symbols and functions of sizes alone."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError):
        return False
    for node in nodes:
        if not isinstance(node, _ARITHMETIC):
            return False
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in _SYMBOLIC):
            return False
        if isinstance(node, ast.Constant) and not re.fullmatch(r"[\w.+\-]+", str(node.value)):  # 64, or of Symbol("s0")
            return False
    return True
