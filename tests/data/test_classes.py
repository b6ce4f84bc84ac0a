"""The class of each image, and how classes are numbered."""

import itertools
import json
import os

import numpy as np
import pytest

from improved_diffusion.config import UserError
from improved_diffusion.data.classes import class_indices, integer_labels, read_classes, read_labels
from improved_diffusion.data.label_file import LabelFile
from improved_diffusion.data.sources import FolderImages, open_images
from improved_diffusion.logs import logger

PICTURES = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
NAMES = [f"{i:03d}.png" for i in range(12)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def warnings_given(monkeypatch):
    given = []
    monkeypatch.setattr(logger, "warn", given.append)
    return given


def names_as_source(names):
    return FolderImages("", names)


FORMS = ["npz", "json", "csv", "tsv", "pairs"]


def labelled(form, labels):
    """(source, --labels) of twelve images with these numbers as classes, in one of the FORMS."""
    if form == "npz":
        np.savez("d.npz", PICTURES, np.array(labels))
        return open_images("d.npz"), "prefix"
    pairs = list(zip(NAMES, labels))
    if form in ("csv", "tsv"):
        mark = "," if form == "csv" else "\t"
        text = "".join(f"{name}{mark}{label}\n" for name, label in [("file", "label"), *pairs])
    else:
        text = json.dumps(dict(pairs) if form == "json" else {"labels": pairs})
    path = f"labels.{'json' if form == 'pairs' else form}"
    with open(path, "w") as f:
        f.write(text)
    return names_as_source(NAMES), path


# Numbers


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("numbers", [(1, 2, 3), (0, 2), (5,), (0, 1, 7, 300), (10**9, 10**9 + 1), (2, 10, 1)], ids=str)
def test_the_classes_that_have_images_are_numbered(form, numbers, warnings_given):
    labels = list(itertools.islice(itertools.cycle(numbers), 12))
    classes, names = read_classes(*labelled(form, labels), "d.npz")
    assert names == [str(number) for number in sorted(numbers)]
    assert [int(names[i]) for i in classes] == labels
    assert len(warnings_given) == 1 and ", ".join(names) in warnings_given[0]


@pytest.mark.parametrize("form", FORMS)
def test_numbers_without_gaps_are_the_classes(form, warnings_given):
    labels = [2, 1, 0] * 4
    assert read_classes(*labelled(form, labels), "d.npz") == (labels, ["0", "1", "2"])
    assert warnings_given == []


@pytest.mark.parametrize("form", FORMS)
def test_a_model_of_more_classes_keeps_the_numbers(form, warnings_given):
    labels = [1, 7, 3] * 4
    for count in (8, 1000):
        classes, names = read_classes(*labelled(form, labels), "d.npz", num_classes=count)
        assert classes == labels and names == [str(i) for i in range(8)]
    assert "no images of 5 of the 8 classes" in warnings_given[0]
    assert read_classes(*labelled(form, labels), "d.npz", num_classes=3)[1] == ["1", "3", "7"]
    for count in (4, 7):  # neither the numbers nor the classes that have images
        with pytest.raises(UserError, match=f"1, 3, 7, which does not fit the {count} classes of --num_classes"):
            read_classes(*labelled(form, labels), "d.npz", num_classes=count)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("label", [-1, -(10**9)])
def test_negative_numbers_are_refused(form, label):
    with pytest.raises(UserError, match=f"must not be negative, found {label}"):
        read_classes(*labelled(form, [0, 1, label] * 4), "d.npz")


def test_names_that_look_like_numbers_stay_names():
    source = names_as_source(["01_a.png", "01_b.png", "1_a.png", "1_b.png"])
    assert read_classes(source, "prefix", "d") == ([0, 0, 1, 1], ["01", "1"])


def test_a_name_that_no_checkpoint_could_hold_is_refused():
    source = names_as_source([f"{'x' * 1001}_{i}.png" for i in range(2)])
    with pytest.raises(UserError, match="longer than 1000 characters"):
        read_classes(source, "prefix", "d")


@pytest.mark.parametrize("labels, form", [("prefix", "{}_{}.png"), ("folder", "{}/{}.png")])
def test_names_in_another_encoding_are_escaped(labels, form):
    broken = os.fsdecode(b"caf\xe9")  # Latin-1, of an older system
    source = names_as_source([form.format(name, i) for i in range(2) for name in (broken, "a")])
    assert read_classes(source, labels, "d") == ([1, 0, 1, 0], ["a", r"caf\udce9"])


@pytest.mark.parametrize("name", ["猫", "a cat, black", "x" * 300, "a\x1b[31m", "ß\n"])
def test_other_names_are_kept_as_they_are(name):
    source = names_as_source([f"{name}_{i}.png" for i in range(2)])
    assert read_classes(source, "prefix", "d") == ([0, 0], [name])


# Labels of an npz


@pytest.mark.parametrize(
    "labels",
    [np.arange(12), np.arange(12).reshape(12, 1), np.arange(12.0), np.arange(12, dtype=np.uint8),
     np.arange(12, dtype=">i2")],
)  # fmt: skip
def test_an_integer_for_each_image_in_whatever_form(labels):
    np.savez("d.npz", PICTURES, labels)
    assert read_labels(open_images("d.npz"), "prefix", "d.npz") == list(range(12))


@pytest.mark.parametrize(
    "labels",
    [np.arange(11), np.eye(12), np.arange(12) / 2, np.array(["a"] * 12), np.full(12, np.nan), np.full(12, np.inf),
     np.zeros((12, 1, 1)), np.array(3), np.zeros(12, bool), np.zeros(12, complex)],
)  # fmt: skip
def test_other_labels_are_refused_where_classes_are_used(labels):
    np.savez("d.npz", PICTURES, labels)
    with pytest.raises(UserError, match=r"d\.npz has arr_1 of .*expected an integer for each of 12 images"):
        read_labels(open_images("d.npz"), "prefix", "d.npz")


def test_a_label_file_overrides_those_of_an_npz(here):
    np.savez("d.npz", PICTURES, np.zeros(12, int))
    (here / "labels.json").write_text(json.dumps({str(i): "ab"[i % 2] for i in range(12)}))
    assert read_labels(open_images("d.npz"), "labels.json", "d.npz") == ["a", "b"] * 6


def test_integers_beyond_64_bits_are_names():
    assert integer_labels(np.full(2, 2**64 - 1, np.uint64), 2, "x") == [2**64 - 1] * 2


# In a checkpoint's numbering


@pytest.mark.parametrize("form", FORMS)
def test_images_have_the_checkpoints_classes(form):
    source, labels = labelled(form, [1, 3, 7] * 4)
    for names, expected in (
        (["1", "3", "7"], [0, 1, 2]),
        (["1", "2", "3", "5", "7"], [0, 2, 4]),
        ([str(i) for i in range(8)], [1, 3, 7]),  # as older versions numbered them
        (None, [1, 3, 7]),
    ):
        assert class_indices(source, labels, "d", names, 0, "m.pt")[:3] == expected
    with pytest.raises(UserError, match=r"d has the class 7, which m\.pt was not trained on"):
        class_indices(source, labels, "d", ["1", "3"], 0, "m.pt")
    with pytest.raises(UserError, match=r"d has class 7; .* has 7 classes"):
        class_indices(source, labels, "d", None, 7, "m.pt")
    with pytest.raises(UserError, match="d has class -1;"):
        class_indices(*labelled(form, [0, 1, -1] * 4), "d", None, 7, "m.pt")


@pytest.mark.parametrize("names", [["000.png", "001.png"], ["IMG_1.png"], ["IMG_1.png", "IMG_2.png"]])
@pytest.mark.parametrize("known", [["cat", "dog"], None])
def test_images_without_the_models_classes_are_told_how_to_get_them(names, known):
    source = names_as_source(names)
    if known is None and names[0].startswith("IMG"):
        return  # a model without names takes what it finds
    with pytest.raises(UserError, match=r"m\.pt.*--labels folder or a label file") as error:
        class_indices(source, "prefix", "d", known, 0, "m.pt")
    assert "--class_cond" not in str(error.value)


def test_an_npz_without_the_models_classes_is_told_how_to_get_them(here):
    np.savez("d.npz", PICTURES)
    with pytest.raises(UserError, match=r"m\.pt needs them: give a label file"):
        class_indices(open_images("d.npz"), "prefix", "d.npz", ["cat", "dog"], 0, "m.pt")
    with pytest.raises(UserError, match="drop --class_cond"):
        read_classes(open_images("d.npz"), "prefix", "d.npz")


# Label files


def test_entries_are_found_by_path_with_or_without_suffix(here):
    table = {"./a/1.png": "x", "a\\2.png": "y", "3": "z", "b/4": "x", "5.jpg": "y", "elsewhere.png": "q"}
    (here / "labels.json").write_text(json.dumps(table))
    names = ["a/1.png", "a/2.png", "3.png", "b/4.png", "5.png"]
    assert LabelFile("labels.json").of(names) == ["x", "y", "z", "x", "y"]
    (here / "labels.json").write_text(json.dumps({"1.jpg": "x", "1.png": "y", "2.gif": "x", "2.jpg": "y"}))
    assert LabelFile("labels.json").of(["1.png"]) == ["y"]
    with pytest.raises(UserError, match=r"no label for 2\.png and 0 more of 1"):  # either could be meant
        LabelFile("labels.json").of(["2.png"])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("l.csv", "file,label\n1.png,cat\n2.png,dog\n", ["cat", "dog"]),
        ("l.csv", "\ufeffLabel,x,Filename\r\ncat,0,1.png\r\ndog,0,2.png\r\n", ["cat", "dog"]),
        ("l.csv", '1.png,"cat, black"\n2.png,dog\n', ["cat, black", "dog"]),
        ("l.tsv", "image_id\tclass\n1\t10\n2\t9\n", [10, 9]),
        ("l.csv", "file;label\n1.png;a,b\n2.png;c\n", ["a,b", "c"]),
        ("l.CSV", "1.png, 3\n\n2.png, x\n", ["3", "x"]),
        ("l.csv", "1.png,01\n2.png,1\n", ["01", "1"]),
        ("l.json", '{"1.png": 3.0, "2.png": 4}', [3, 4]),
        ("l.json", '{"labels": {"1.png": "a", "2.png": "b"}}', ["a", "b"]),
        ("l", '[["1.png", "a"], ["2.png", "b"]]', ["a", "b"]),
        ("l.csv", "id,file,label,split\n7,1.png,cat,train\n8,2.png,dog,test\n", ["cat", "dog"]),
        ("l.csv", "y,name,id,class,img\n0,x,7,cat,1.png\n1,x,8,dog,2.png\n", ["cat", "dog"]),
        ("l.tsv", "target\tlabel\tpath\tfile_name\n0\tcat\tx\t1.png\n1\tdog\tx\t2.png\n", ["cat", "dog"]),
        ("l.csv", "1.png,cat\n./1.png,cat\n2.png,dog\n1.png,cat\n", ["cat", "dog"]),
        ("l.jsonl", '{"file": "1.png", "label": "cat"}\n\n{"file": "2.png", "label": "dog"}\n', ["cat", "dog"]),
        ("l.jsonl", '{"file_name": "1.png", "text": "cat", "id": 3}\r\n{"label": 4, "image": "2.png"}', ["cat", 4]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_json_and_tables_are_read(here, name, text, expected, encoding):
    (here / name).write_text(text.removeprefix("\ufeff") if encoding == "utf-16" else text, encoding, newline="")
    assert LabelFile(name).of(["1.png", "2.png"]) == expected


# Of 1.png, as each kind of file gives them.
TWO_LABELS = {
    "l.csv": "1.png,{}\n2.png,{}\n1.png,{}\n", "l.tsv": "label\tfile\n{}\t1.png\n{}\t2.png\n{}\t./1.png\n",
    "l.json": '[["1.png", "{}"], ["2.png", "{}"], ["1.png", "{}"]]',
    "l.jsonl": "\n".join(f'{{{{"file": "{i}.png", "label": "{{}}"}}}}' for i in (1, 2, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", TWO_LABELS)
def test_two_labels_of_one_image_must_agree(here, name):
    (here / name).write_text(TWO_LABELS[name].format("cat", "dog", "cat"))
    assert LabelFile(name).of(["1.png", "2.png"]) == ["cat", "dog"]
    (here / name).write_text(TWO_LABELS[name].format("cat", "dog", "bird"))
    with pytest.raises(UserError, match=rf"{name} has two labels for 1\.png, 'cat' and 'bird'"):
        LabelFile(name)


@pytest.mark.parametrize("label", ["", "  "])
@pytest.mark.parametrize("name", TWO_LABELS)
def test_an_empty_label_is_a_missing_one(here, name, label):
    (here / name).write_text(TWO_LABELS[name].format("cat", label, "cat"))
    with pytest.raises(UserError, match=rf"{name}.*2\.png.* has no label"):
        LabelFile(name)


@pytest.mark.parametrize("name", ["l.xlsx", "l.XLS", "l.ods", "l.numbers"])
def test_a_spreadsheet_is_to_be_saved_as_a_table(here, name):
    (here / name).write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match=f"{name} is a spreadsheet: save it as CSV"):
        LabelFile(name)


@pytest.mark.parametrize(
    ("name", "text", "culprit"),
    [
        ("l.json", "", "JSON"), ("l.json", "{", "JSON"), ("l.json", "[" * 100_000, "nested"), ("l.json", "3", "JSON"),
        ("l.json", "null", "JSON"), ("l.json", '{"labels": null}', "JSON"), ("l.json", '["ab"]', "JSON"),
        ("l.json", "[[1, 2]]", "JSON"), ("l.json", '[["a", 1, 2]]', "JSON"), ("l.json", '{"1.png": NaN}', "NaN"),
        ("l.json", '{"1.png": Infinity}', "finite"), ("l.json", '{"1.png": 1e999}', "finite"),
        ("l.json", '{"1.png": "\\ud800"}', "JSON"), ("l.json", '{"1.png": true}', "1.png .*True"),
        ("l.json", '{"1.png": null}', "1.png .*None"), ("l.json", '{"1.png": 1.5}', "1.png .*1.5"),
        ("l.json", '{"1.png": [1]}', "1.png .*list"), ("l.json", '{"1.png": {}}', "1.png .*dict"),
        ("l.json", '{"1.png": ' + "9" * 5000 + "}", "JSON"), ("l.json", '{"2.png": 1}', "no label for 1.png"),
        ("l.csv", "", "found nothing"), ("l.csv", "a,b,c\n1,2,3\n", "found a, b, c"), ("l.csv", "a\n", "found a"),
        ("l.csv", "file,label\n1.png\n", "row 1, 1.png, has no label"), ("l.csv", "1.png," + "x" * 200_000, "field"),
        ("l.csv", "2.png,3\n", "no label for 1.png"), ("l.csv", "lab/1.png,3\n", r"lab/1\.png \(paths .* --data_dir"),
        ("l.csv", "1.png,\xe9\n", "save it as CSV UTF-8"), ("l.jsonl", "[]\n", "line 1: expected"),
        ("l.jsonl", '{"file": "1.png"}', "line 1: expected"), ("l.jsonl", '{"file": 1, "label": 2}', "line 1: exp"),
        ("l.jsonl", '\n{"file": "1.png", "label": "a"}\n{', "line 3, is not readable JSON"),
        ("l.csv", "1.png,\x00\n2.png,\xff", None),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named(here, name, text, culprit):
    (here / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=culprit) as error:
        LabelFile(name).of(["1.png"])
    assert name in str(error.value)


def test_a_file_that_is_not_there_is_not_called_malformed(here):
    for labels, culprit in (
        ("labels.json", "labels.json does not exist"), ("foldr", "foldr does not exist: did you mean folder"),
        ("Prefix", "did you mean prefix"), ("folders", "did you mean folder"), ("gone/l.csv", "does not exist"),
        (".", "is a folder"),
    ):  # fmt: skip
        for source in (names_as_source(NAMES), labelled("npz", [0] * 12)[0]):
            with pytest.raises(UserError, match=f"--labels .*{culprit}") as error:
                read_labels(source, labels, "d")
            assert "JSON" not in str(error.value)


def test_an_endless_label_file_is_refused(here):
    os.mkfifo("labels.json")
    for path in ("labels.json", "/dev/zero"):
        with pytest.raises(UserError, match="pipe or a device"):
            LabelFile(path)
