"""The model card: what it says, where that comes from, and that nothing of a file becomes markup."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from model_helpers import STUDENT, save_checkpoint, tiny_settings
from PIL import Image
from script_helpers import call, refused

import improved_diffusion as idf
from improved_diffusion.checkpoints import checkpoint
from improved_diffusion.config import UserError
from improved_diffusion.config.exchange import CardConfig, PushCommandConfig, PushConfig
from improved_diffusion.config.settings import SuperResModel
from improved_diffusion.exchange.card import base_name
from improved_diffusion.utils import files

FAST = dict(num_samples=2, steps=1)
HOSTILE = ["猫", "a|b", "<script>x</script>", "c\n# d", "\x1b[31mred", "![x](http://127.0.0.1/x)", "`e`", "\u202eabc"]


def write(path, *, class_names=None, **facts):
    """A checkpoint with these facts in its description; `config` is added to the model's own options."""
    save_checkpoint(path, tiny_settings(class_cond=class_names is not None), class_names=class_names)
    state_dict, metadata = checkpoint.load(str(path))
    config = {**metadata["config"], **facts.pop("config", {})}
    checkpoint.save_state_dict(state_dict, str(path), {**metadata, **facts, "config": config})
    return path


@pytest.fixture
def trained(tmp_path):
    """The path of a checkpoint as training writes it."""
    config = {"data_dir": "/home/alice/secret/photos/", "total_batch_size": 64, "lr": 1e-4, "dropout": 0.1}
    facts = dict(step=5000, num_images=100, version="0.1.0", ema_rate=0.999, seen_classes=[0])
    return write(tmp_path / "run" / "ema_0.999_005000.pt", class_names=["cat", "dog"], config=config, **facts)


def report(path, checkpoint, **more):
    """A report.json on samples of a checkpoint, None where it does not say."""
    made_by = checkpoint and {"model_sha256": files.sha256(checkpoint), "model_path": "/home/alice/secret/x.pt"}
    about = {"images": "/home/alice/secret/samples", "count": 50, "image_size": "8x8", "channels": 3}
    content = {
        "samples": {**about, "made_by": made_by},
        "reference": {**about, "images": "/home/alice/secret/real|<b>", "count": 1200}, "train": None, "held_out": None,
        "metrics": {"fid": {"value": 12.34567}, "kid": {"value": 0.00123, "error": 0.0004}},
        "real": {"count": 40, "metrics": {"fid": {"value": 1.5}}}, "missing": {},
        "warnings": ["few images in /home/alice/secret/samples: the FID is biased <i>"],
        "pictures": {}, "asked": {}, "versions": {}, **more,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def bound(path, checkpoint, **more):
    content = {"bits_per_dim": 3.21, "standard_error": 0.04, "images": 50, "data_dir": "/home/alice/secret/test",
               "model_sha256": files.sha256(checkpoint), **more}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def row(text, name):
    """The second cell of a table's row."""
    return re.search(rf"^\| {re.escape(name)} \| (.*?) \|", text, re.M)[1]


# What it says


def test_it_says_what_the_checkpoint_knows(trained):
    card = idf.load(trained).card(repo="user/name", license="mit", **FAST)
    text = card.text
    assert "8 x 8 pixels (RGB) of 2 classes" in text
    assert row(text, "classes") == "cat, dog"
    assert row(text, "`diffusion_steps`") == "20" and row(text, "`noise_schedule`") == "cosine"
    assert row(text, "images") == "100" and row(text, "data") == "photos"
    assert row(text, "steps") == "5,000 of 64 images, 3,200.0 epochs"
    assert row(text, "weights") == "exponential moving average, rate 0.999"
    assert row(text, "`lr`") == "0.0001" and row(text, "`dropout`") == "0.1"
    assert "5,000 steps only" in text and "3,200 times" in text and "training: cat." in text
    assert "alice" not in text and "secret" not in text


def test_an_average_with_initial_weights_and_an_undescribed_file_say_so(tmp_path):
    early = write(tmp_path / "early.pt", step=10, ema_rate=0.999)
    assert "99.0% of these weights are those that training began with" in idf.load(early).card(**FAST).text
    settings = tiny_settings()
    bare = save_checkpoint(tmp_path / "bare.pt", settings)
    state_dict, _ = checkpoint.load(str(bare))
    checkpoint.save(dict(state_dict), str(tmp_path / "foreign.pt"))
    known = {name: settings.values()[name] for name in ("diffusion_steps", "noise_schedule", "num_heads", "image_size")}
    text = idf.load(tmp_path / "foreign.pt", **known).card(**FAST).text
    assert "does not describe its training" in text and "## Training" not in text


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"ema_sigma_rel": 0.1, "posthoc": True}, "moving average of relative width 0.1"),
        ({"best": {"val_loss": 0.1, "step": 3, "ema": "0.9"}}, "best validation loss"),
        ({}, None),
    ],
)
def test_other_averages(tmp_path, facts, words):
    text = idf.load(write(tmp_path / "model000005.pt", step=5, **facts)).card(**FAST).text
    assert re.findall(r"^\| weights \| (.*?) \|", text, re.M) == ([words] if words else [])


@pytest.mark.parametrize("licence", ["mit", "other", "unknown", "cc-by-nc-4.0", "openrail++", ""])
def test_the_front_matter_is_what_the_hub_expects(trained, licence):
    package = pytest.importorskip("huggingface_hub")
    text = idf.load(trained).card(license=licence, **FAST).text
    data = package.ModelCard(text).data
    assert data.license == (licence or "unknown") and data.library_name == "improved_diffusion"
    assert data.pipeline_tag == "unconditional-image-generation" and "diffusion" in data.tags


@pytest.mark.parametrize(
    ("licence", "words"),
    [("mitt", "did you mean mit"), ("MIT", "did you mean mit"), ("apache2.0", "did you mean apache-2.0"),
     ("cc-by-4", "did you mean cc-by-4.0"), ("proprietary", "--license_name"), ("a\nb: c", "--license_name"),
     ("x" * 60, "--license_name"), ("{a: b}", "--license_name")],
)  # fmt: skip
@pytest.mark.parametrize("config", [CardConfig, PushConfig, PushCommandConfig])
def test_a_licence_is_one_that_the_hub_has(config, licence, words):
    with pytest.raises(UserError, match="--license") as error:
        config(license=licence)
    assert words in str(error.value)


def test_a_student_says_whose_it_is_and_is_used_in_its_own_steps(tmp_path):
    path = write(tmp_path / "run/model000010.pt", distilled={**STUDENT, "teacher": "digits_ema"})
    text = idf.load(path).card(num_samples=1).text
    assert "--sampler renoise --steps 3" in text and 'sampler="renoise", steps=3' in text
    assert "| distilled | from digits_ema (consistency), for 3 steps |" in text


def test_another_licence_has_a_name_and_a_link(trained):
    package = pytest.importorskip("huggingface_hub")
    model = idf.load(trained)
    link = "https://example.org/a_b/licence?x=1#y"
    for name, url in ((None, None), ("my-own 1.0", None), (None, link), ("c++", link)):
        more = {"license_name": name} if name else {}
        more |= {"license_link": url} if url else {}
        text = model.card(license="other", **more, num_samples=0).text
        data = package.ModelCard(text).data
        assert data.license == "other"
        assert (data.get("license_name"), data.get("license_link")) == (name, url)
        assert all(value in text.partition("## Licence")[2] for value in more.values())


@pytest.mark.parametrize(
    "options",
    [{"license_name": "mine"}, {"license": "mit", "license_name": "mine"}, {"license": "mit", "license_link": "https://x"},
     {"license": "other", "license_name": 'a"b'}, {"license": "other", "license_name": "a\nb"},
     {"license": "other", "license_link": "file:///x"}, {"license": "other", "license_link": "https://x y"},
     {"license": "other", "license_link": 'https://x"'}, {"license": "other", "license_link": "https://x)"}],
    ids=str,
)  # fmt: skip
def test_a_name_and_a_link_of_a_licence_are_checked(options):
    with pytest.raises(UserError, match=r"--license_(name|link)"):
        CardConfig(**options)


def test_a_card_without_a_licence_says_how_to_give_one(trained):
    text = idf.load(trained).card(num_samples=0).text.partition("## Licence")[2]
    assert "--license mit" in text and 'license="mit"' in text


@pytest.mark.parametrize(("step", "share"), [(0, "All"), (1, "Nearly all"), (100, "99.0%"), (20_000, "13.5%")])
def test_an_average_is_noise_as_far_as_it_is(tmp_path, step, share):
    text = idf.load(write(tmp_path / "e.pt", step=step, ema_rate=0.9999)).card(num_samples=0).text
    assert f"{share} of these weights" in text and ("partly" in text) == (step == 20_000) and "100.0%" not in text


def test_one_of_a_kind_is_singular(tmp_path):
    facts = dict(step=1, num_images=1, seen_classes=[0], config={"total_batch_size": 1})
    text = idf.load(write(tmp_path / "m.pt", class_names=["cat"], **facts)).card(num_samples=1, steps=1).text
    assert not re.findall(r"\b1 (samples|steps|images|classes)\b", text)
    assert "1 step only" in text and "1 sample of" in text and "of 1 class," in text
    assert "not trained" in idf.load(write(tmp_path / "n.pt", step=0)).card(num_samples=0).text


@pytest.mark.parametrize("size", [10**18, 2**63 - 1, -1, 0, "x", None, 1.5])
def test_any_batch_size_of_a_description_makes_a_card(tmp_path, size):
    path = write(tmp_path / "m.pt", step=10**12, num_images=1, config={"total_batch_size": size})
    assert "## Training" in idf.load(path).card(num_samples=0).text


def test_names_from_files_are_not_markup(tmp_path):
    path = write(tmp_path / "m.pt", class_names=HOSTILE, config={"data_dir": "/x/<b>|![y](z)"}, version="`1`|\n# h")
    text = idf.load(path).card(**FAST).text
    assert "猫" in text and "\x1b" not in text and "\u202e" not in text
    assert "<script>" not in text and "![x]" not in text and "<b>" not in text and "\n# d" not in text
    assert "\n# h" not in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3, line
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# name"]


def test_many_classes_are_counted(tmp_path):
    path = write(tmp_path / "m.pt", class_names=[f"c{i}" for i in range(150)])
    assert row(idf.load(path).card(**FAST).text, "classes").endswith("c99, ... (150 in all)")


@pytest.mark.parametrize(
    ("path", "name"),
    [("/a/b/c", "c"), ("/a/b/c/", "c"), ("C:\\x\\y\\", "y"), ("gs://b/c", "c"), ("c", "c"), (" ~/c ", "c"), ("/", "")],
)
def test_a_base_name_has_no_folders(path, name):
    assert base_name(path) == name


# Samples


def test_the_samples_are_those_of_the_command_in_the_card(trained, tmp_path):
    model = idf.load(trained)
    card = model.card(repo="user/name", num_samples=4, steps=3)
    command = re.search(r"^improved-diffusion sample (.*)$", card.text, re.M)[1]
    words = command.replace("user/name", str(trained)).split()
    call("image_sample", *words, "--out_dir", "out", cwd=tmp_path).succeed()
    drawn = Image.open(tmp_path / "out" / "samples.png").convert("RGB")
    shown = Image.open(io.BytesIO(card.grid)).convert("RGB")
    assert np.array_equal(np.asarray(drawn), np.asarray(shown))
    python = re.search(r"```python\n(.*?)```", card.text, re.S)[1].replace("user/name", str(trained))
    assert len(python.strip().splitlines()) == 4  # with an empty one
    exec(python.replace("out/", str(tmp_path / "python")), {})
    assert (tmp_path / "python" / "samples.png").read_bytes() == (tmp_path / "out" / "samples.png").read_bytes()


def test_no_samples_and_given_ones(trained, tmp_path, monkeypatch):
    model = idf.load(trained)
    card = model.card(num_samples=0)
    assert card.grid is None and "![samples]" not in card.text
    image = Image.new("RGB", (30, 20), "red")
    exif = Image.Exif()
    exif[0x010E] = "alice was here"
    image.save(tmp_path / "mine.jpg", exif=exif)
    monkeypatch.setattr(idf.Model, "sample", None)
    card = model.card(samples=tmp_path / "mine.jpg")
    shown = Image.open(io.BytesIO(card.grid))
    assert shown.size == (30, 20) and shown.format == "PNG" and b"alice" not in card.grid
    assert "![samples](samples.png)" in card.text


@pytest.mark.parametrize("content", [None, b"", b"nonsense", b"\x89PNG\r\n\x1a\n" + b"x" * 50])
def test_a_given_image_that_is_none_is_refused(trained, tmp_path, content):
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.png"):
        idf.load(trained).card(samples=path)


def test_a_super_resolution_model_has_a_card(tmp_path):
    settings = tiny_settings(SuperResModel, image_size=None, large_size=8, small_size=4)
    text = idf.load(save_checkpoint(tmp_path / "sr.pt", settings)).card(repo="user/sr").text
    assert "enlarges images from 4 x 4 to 8 x 8 pixels" in text and "model.upscale(" in text
    assert "pipeline_tag: image-to-image" in text and "![samples]" not in text


# Evaluations


def test_reports_beside_the_checkpoint_are_found(trained):
    model = idf.load(trained)
    assert "Not evaluated" in model.card(**FAST).text
    report(trained.parent / "report" / "report.json", trained)
    bound(trained.parent / "nll.json", trained)
    text = model.card(**FAST).text
    assert row(text, "FID") == "12.3457" and row(text, "KID x 1000") == "1.2300 ± 0.4000"
    assert "1.5000" in text and "50 samples against real\\|&lt;b&gt;" in text
    assert "3.2100 ± 0.0400 (standard error) bits/dim, of 50 images of test" in text
    assert "**Warning:** few images in samples: the FID is biased &lt;i&gt;" in text
    assert "alice" not in text and "Not evaluated" not in text


def test_reports_of_another_checkpoint_are_left_out_or_refused(trained, tmp_path, capsys):
    model = idf.load(trained)
    other = write(tmp_path / "other.pt", step=1)
    report(trained.parent / "report.json", other)
    bound(trained.parent / "nll" / "nll.json", other)
    assert "Not evaluated" in model.card(**FAST).text
    for path in ("report.json", "nll/nll.json", "nll"):
        with pytest.raises(UserError, match="another checkpoint"):
            model.card(report=trained.parent / path)


def test_a_report_that_does_not_say_its_model_needs_to_be_named(trained):
    model = idf.load(trained)
    path = report(trained.parent / "report.json", None)
    assert "Not evaluated" in model.card(**FAST).text
    text = model.card(report=path, **FAST).text
    assert row(text, "FID") == "12.3457" and "does not say which checkpoint" in text


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", b"[]", b"{}", b'{"bits_per_dim": "3"}', b'{"bits_per_dim": 3, "images": 0, "data_dir": "x"}',
     b'{"bits_per_dim": 3, "images": 5, "data_dir": 7}', b'{"bits_per_dim": 1e999}', b'{"metrics": {"fid": 3}}',
     b"[" * 100_000],
)  # fmt: skip
def test_a_damaged_report_is_named(trained, tmp_path, content):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"report\.json"):
        idf.load(trained).card(report=path)


def test_missing_and_double_reports_are_named(trained, tmp_path):
    model = idf.load(trained)
    for path in (tmp_path / "absent", trained.parent):
        with pytest.raises(UserError, match=path.name):
            model.card(report=path)
    first, second = (report(tmp_path / name / "report.json", trained) for name in "ab")
    with pytest.raises(UserError, match="second report"):
        model.card(report=f"{first},{second}")


# Files


def test_a_card_is_saved_and_shown(trained, tmp_path):
    card = idf.load(trained).card(**FAST)
    path = card.save(tmp_path / "card")
    assert Path(path).read_text(encoding="utf-8") == card.text
    assert (tmp_path / "card" / "samples.png").read_bytes() == card.grid
    assert "license:" not in card._repr_markdown_() and card._repr_markdown_().strip().startswith("# ")
    assert "PNG" not in repr(card)


def test_a_card_replaces_a_card_and_no_other_files(trained, tmp_path):
    card = idf.load(trained).card(**FAST)
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "notes.txt").write_text("mine")
    for _ in range(2):
        card.save(tmp_path / "card")
    for name in ("README.md", "samples.png"):
        other = tmp_path / f"with {name}" / name
        other.parent.mkdir()
        other.write_text("mine")
        with pytest.raises(UserError, match=re.escape(str(other))):
            card.save(other.parent)
        refused(call("push", "--model_path", "absent", "--out", other.parent, cwd=tmp_path), other)
        assert other.read_text() == "mine" and len(list(other.parent.iterdir())) == 1


def test_the_command_writes_the_card_and_uploads_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    flags = ("--model_path", trained.parent, "--num_samples", 2, "--steps", 1, "--license", "mit", "--out", "card")
    call("push", *flags, cwd=tmp_path).succeed()
    assert (tmp_path / "card" / "README.md").read_text() == idf.load(trained).card(license="mit", **FAST).text
    refused(call("push", *flags[:-2], cwd=tmp_path), "--repo is missing")
