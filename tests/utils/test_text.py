"""Text from outside: shown without effect on a terminal, and made into file names that are told apart."""

import re

import pytest

from improved_diffusion.config import one_line
from improved_diffusion.utils import text

CONTROLS = [*map(chr, [*range(32), *range(127, 160)]), "\u2028", "\u2029", "\u202a", "\u202e", "\u2066", "\u2069"]


@pytest.mark.parametrize("character", [c for c in CONTROLS if c not in "\n\t"])
def test_control_characters_are_escaped(character):
    for shown in (text.printable(f"a{character}b"), one_line(f"a{character}b")):
        assert re.fullmatch(r"a\\(x[0-9a-f]{2}|u[0-9a-f]{4}|r)b", shown)


def test_a_text_keeps_its_lines_and_a_name_is_one():
    assert text.printable("a\n\tb") == "a\n\tb"
    assert one_line("a\n\tb") == r"a\n\tb"
    assert text.as_one("a\nerror: b") == "a\n  error: b"


@pytest.mark.parametrize("number, noun, plural, expected", [
    (1, "image", "", "1 image"), (0, "image", "", "0 images"), (1200, "image", "", "1,200 images"),
    (1, "class", "classes", "1 class"), (2, "class", "classes", "2 classes"),
])  # fmt: skip
def test_numbers_of_things(number, noun, plural, expected):
    assert text.counted(number, noun, plural) == expected


@pytest.mark.parametrize("plain", ["cat", "ice cream", "猫", "Жук", "émeu", "a\u200db", "50%", "[x](y)", "🐈"])
def test_other_text_stays_as_it_is(plain):
    assert text.printable(plain) == one_line(plain) == text.file_name(plain) == plain


def test_bytes_that_are_not_utf_8_can_be_shown():
    name = b"caf\xe9".decode(errors="surrogateescape")
    assert text.printable(name).encode() == rb"caf\udce9"


def test_a_list_is_cut():
    assert text.listed(["a", "b\n", "c"], 2) == r"a, b\n, ..." and text.listed(["a"], 2) == "a"


@pytest.mark.parametrize("name", [
    "a/b", "a\\b", 'a:*?"<>|b', "a\0b", "a\nb", "..", ".", ".hidden", " a ", "a.", "a. ", "con", "NUL", "com1.txt", "",
    "x" * 300, "猫" * 300, "\x1b[2J", "\udce9", "\u202eb",
])  # fmt: skip
def test_what_file_systems_refuse_is_replaced(name):
    part = text.file_name(name)
    assert part and len(part.encode()) <= 101 and not re.search(r'[/\\:*?"<>|\x00-\x1f]', part)
    assert part == part.strip() and part[0] != "." and part[-1] not in ". "
    assert part.upper() not in ("CON", "NUL") and not part.upper().startswith("COM1.")
    assert text.file_name(part) == part


@pytest.mark.parametrize("names", [
    ["a/b", "a-b", "a\\b", "a_b"],
    ["A", "a", "a-2"],
    ["é", "e\u0301"],
    ["猫", "犬"],
    ["x" * 200 + "1", "x" * 200 + "2"],
    ["", "-", ".", " "],
    [f"c{between}{i}" for i in range(50) for between in "/-_"],
])  # fmt: skip
def test_every_class_has_a_part_of_its_own_that_ends_before_the_number(names):
    parts = text.class_parts(names)
    assert len({part.casefold() for part in parts}) == len(names)
    assert not any("_" in part for part in parts)
    index = text.class_index(names)
    assert all(index[name] == names.index(name) for name in set(names))
    assert [index[part] for part in parts if part not in names] == [
        i for i, part in enumerate(parts) if part not in names
    ]


def test_names_that_need_no_change_keep_their_own():
    assert text.class_parts(["big_cat", "big-cat", "cat"]) == ["big-cat-2", "big-cat", "cat"]
