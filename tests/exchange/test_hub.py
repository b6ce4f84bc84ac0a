"""Models to the Hugging Face Hub and back, against a stand-in for it."""

import builtins
import errno
import io
import os
import stat

import pytest
import torch as th
from hub_server import TOKEN, commit_id
from model_helpers import CLASSES, save_checkpoint, tiny_settings
from PIL import Image
from script_helpers import call, contents, refused, run

import improved_diffusion as idf
from improved_diffusion.checkpoints import checkpoint, hub_model, safetensors_file
from improved_diffusion.config import UserError
from improved_diffusion.utils.hub import HubName, may_be_name, name_in_url, parse_name

# The package sends large files in a way that its own client has given up.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
FAST = dict(license="mit", num_samples=1, steps=1)
FAST_FLAGS = ("--license", "mit", "--num_samples", 1, "--steps", 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "ema_0.9_000003.pt"
    return idf.load(save_checkpoint(path, tiny_settings(class_cond=True), class_names=CLASSES, steps=0))


@pytest.fixture(scope="module")
def weights(model):
    """The model as the bytes of a .safetensors file."""
    return safetensors_file.to_bytes(model.network.state_dict(), model._loaded.description())


@pytest.fixture(scope="module")
def pt(model):
    with open(model.path, "rb") as f:
        return f.read()


def assert_same(one, other):
    weights, theirs = one.network.state_dict(), other.network.state_dict()
    assert list(weights) == list(theirs)
    assert all(th.equal(weights[name], theirs[name]) for name in weights)
    assert one._loaded.description() == other._loaded.description()


def fails(do, *phrases):
    """The message of the one UserError, in which the token is not."""
    with pytest.raises(UserError) as caught:
        do()
    message = str(caught.value)
    assert TOKEN not in message and "\n" not in message
    for phrase in phrases:
        assert phrase in message, message
    return message


def snapshot_files(hub):
    return sorted(path.name for path in hub.cache.glob("models--*/snapshots/*/**/*") if path.is_file())


# There and back


def test_a_pushed_model_loads_to_the_same_bits_and_description(hub, model, monkeypatch):
    url = model.push_to_hub("user/name", token=TOKEN, **FAST)
    assert url == f"{hub.url}/user/name/commit/{commit_id(1)}"
    files = hub.repositories["user/name"].commits[1]
    assert sorted(files) == [".gitattributes", "README.md", "model.safetensors", "samples.png"]
    assert Image.open(io.BytesIO(files["samples.png"])).format == "PNG"
    loaded = idf.load("user/name")
    assert_same(loaded, model)
    assert loaded.path.startswith(str(hub.cache))
    assert_same(idf.load("hf://user/name", revision=commit_id(1)), model)


def test_it_is_one_commit_with_the_message(hub, model):
    model.push_to_hub("user/name", token=TOKEN, message="Second try", **FAST)
    assert len([path for path in hub.paths("POST") if "/commit/" in path]) == 1
    assert len(hub.repositories["user/name"].commits) == 2


def test_the_command_pushes_and_samples_by_the_name(hub, model, tmp_path):
    done = call("push", "--model_path", model.path, "--repo", "user/name", *FAST_FLAGS, cwd=tmp_path,
                env={"HF_TOKEN": TOKEN}).succeed()  # fmt: skip
    assert "model.safetensors" in done.out and f"{hub.url}/user/name" in done.out and commit_id(1) in done.out
    flags = ("--num_samples", 1, "--steps", 2, "--sampler", "ddim", "--out_dir", "out")
    done = call("image_sample", "--model_path", "user/name", *flags, cwd=tmp_path).succeed()
    assert f"user/name: loading model.safetensors of commit {commit_id(1)[:12]}" in done.out
    drawn = (tmp_path / "out" / "samples.png").read_bytes()
    call("image_sample", "--model_path", model.path, *flags[:-1], "other", cwd=tmp_path).succeed()
    assert (tmp_path / "other" / "samples.png").read_bytes() == drawn


@pytest.mark.slow
def test_the_ranks_share_one_download(hub, model, weights, tmp_path):
    hub.add("user/name", {"model.safetensors": weights})
    run("torchrun", 2, "image_sample", "--model_path", "user/name", "--num_samples", 2, "--batch_size", 1, "--sampler",
        "ddim", "--steps", 2, "--out_dir", "out", cwd=tmp_path).succeed()  # fmt: skip
    assert hub.paths("GET").count("/user/name/resolve/main/model.safetensors") == 1


@pytest.mark.parametrize("name", ["weights.safetensors", "ema_0.9_000003.pt"])
def test_a_single_checkpoint_of_any_name_is_found(hub, model, weights, pt, name):
    content = pt if name.endswith(".pt") else weights
    hub.add("user/name", {"README.md": b"x", name: content, "opt000003.pt": b"y", "train.py": b"z"})
    assert_same(idf.load("user/name"), model)
    assert snapshot_files(hub) == [name]


@pytest.mark.parametrize("folders", [True, False])
def test_of_a_pipeline_the_settings_and_the_network_are_fetched(hub, folders):
    unet, scheduler = ("unet/", "scheduler/") if folders else ("", "")
    wanted = {
        "model_index.json": b"{}", f"{unet}config.json": b"{}", f"{scheduler}scheduler_config.json": b"{}",
        f"{unet}diffusion_pytorch_model.safetensors": b"weights",
    }  # fmt: skip
    other = {
        "README.md": b"x",
        f"{unet}diffusion_pytorch_model.bin": b"y",
        "vae/config.json": b"{}",
        "pipeline.py": b"",
    }
    hub.add("user/name", {**wanted, **other})
    folder = hub_model.fetch("user/name")
    assert contents(folder) == wanted


def test_a_pipeline_of_diffusers_loads(hub, model, tmp_path):
    pytest.importorskip("diffusers")
    model.to_diffusers(tmp_path / "pipeline")
    hub.add("user/name", contents(tmp_path / "pipeline"))
    assert_same(idf.load("user/name"), idf.load(tmp_path / "pipeline"))
    hub.stop()
    assert_same(idf.load("user/name"), idf.load(tmp_path / "pipeline"))


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, model, weights):
    repository = hub.add("user/name", {"model.safetensors": weights})
    repository.commits.append({"other.txt": b""})
    fails(lambda: idf.load("user/name"), "has no model")
    assert_same(idf.load("user/name", revision=commit_id(0)), model)
    assert_same(idf.load(f"user/name@{commit_id(0)}"), model)
    fails(lambda: idf.load("user/name", revision="v9"), "no revision v9")


# What is a name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("user/name", HubName("user/name")),
        ("google/ddpm-cifar10-32", HubName("google/ddpm-cifar10-32")),
        ("hf://user/name@v1.0", HubName("user/name", "v1.0")),
        ("user/name@refs/pr/1", HubName("user/name", "refs/pr/1")),
        *((text, None) for text in (
            "name", "/user/name", "user/name/x", "../name", "user/..", "user/na me", "user/a--b", "user/name@",
            "user/name@../x", "user/name@a/../b", "user/name.git", "user/", "runs/mine/", "gs://user/name", "", "猫/n",
            "user/name\n", f"user/{'x' * 100}",
        )),
    ],
)  # fmt: skip
def test_names(text, name):
    assert parse_name(text) == name


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("", "user/name"), ("/", "user/name"), ("/tree/main", "user/name"), ("/tree/v1.0", "user/name@v1.0"),
        ("/resolve/main/model.safetensors?download=true", "user/name"), ("/blob/v1.0/model.pt", "user/name@v1.0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("site", ["https://huggingface.co", "https://hf.co", "http://www.huggingface.co"])
def test_a_page_of_the_hub_is_answered_with_the_name_to_give(hub, site, page, name):
    url = f"{site}/user/name{page}"
    fails(lambda: idf.load(url), url, f"give {name} ")
    assert hub.asked == []


@pytest.mark.parametrize("path", ["", "datasets/user/name", "spaces/user/name", "user", "docs"])
def test_another_page_of_the_hub_is_no_model(path):
    assert name_in_url(f"https://huggingface.co/{path}") is None


def test_a_path_that_is_misspelt_is_not_asked_for(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for text in ("runs/mnie", "models/ema_0.9_000003.pt", "models/x.safetensors", "absent", "/user/name"):
        assert not may_be_name(text)
        fails(lambda: idf.load(text), f"{text} does not exist")  # noqa: B023
    assert hub.asked == []
    fails(lambda: idf.load("hf://runs/mnie"), "hf://runs/mnie", "does not exist on")
    assert hub.asked != []


def test_a_local_folder_wins(hub, model, pt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "name").mkdir(parents=True)
    (tmp_path / "user" / "name" / "model000003.pt").write_bytes(pt)
    assert_same(idf.load("user/name"), model)
    assert hub.asked == []


# What is already there


def test_what_is_replaced_is_said_and_the_rest_stays(hub, model, tmp_path):
    hub.add("user/name", {".gitattributes": b"", "README.md": b"by hand", "notes.txt": b"mine"})
    done = call("push", "--model_path", model.path, "--repo", "user/name", *FAST_FLAGS, cwd=tmp_path,
                env={"HF_TOKEN": TOKEN}).succeed()  # fmt: skip
    assert "warning: user/name has README.md: replaced" in done.out and commit_id(0) in done.out
    assert "notes.txt" in done.out
    newest = hub.repositories["user/name"].commits[-1]
    assert newest["notes.txt"] == b"mine" and newest["README.md"] != b"by hand"


def test_a_push_between_ours_is_not_overwritten(hub, model):
    repository = hub.add("user/name", {"notes.txt": b"mine"})

    def somebody_pushes(handler):
        if "preupload" in handler.path:
            repository.commits.append({"notes.txt": b"newer"})

    hub.answers.append(somebody_pushes)
    fails(lambda: model.push_to_hub("user/name", token=TOKEN, **FAST), "user/name has changed meanwhile")
    assert repository.commits[-1] == {"notes.txt": b"newer"}


def test_private_is_for_new_repositories(hub, model):
    model.push_to_hub("user/hidden", token=TOKEN, private=True, **FAST)
    assert hub.repositories["user/hidden"].private
    model.push_to_hub("user/hidden", token=TOKEN, private=True, **FAST)
    fails(lambda: idf.load("user/hidden"), "user/hidden does not exist", "private", "HF_TOKEN")
    assert_same(idf.load("user/hidden", token=TOKEN), model)
    hub.add("user/open", {"x": b""})
    fails(lambda: model.push_to_hub("user/open", token=TOKEN, private=True, **FAST), "user/open", "public")
    assert len(hub.repositories["user/open"].commits) == 1


def test_paths_of_this_machine_are_not_uploaded(hub, model, tmp_path):
    secret = str(tmp_path / "secret")
    config = {"data_dir": f"{secret}/photos/", "val_dir": f"{secret}/val.zip", "trackers": ""}
    description = model._loaded.description()
    state_dict = model.network.state_dict()
    metadata = {**description, "config": {**description["config"], **config}, "num_images": 7}
    checkpoint.save_state_dict(state_dict, str(tmp_path / "model000003.pt"), metadata)
    idf.load(tmp_path / "model000003.pt").push_to_hub("user/name", token=TOKEN, **FAST)
    files = hub.repositories["user/name"].commits[-1]
    assert all(str(tmp_path).encode() not in content for content in files.values())
    assert "photos" in files["README.md"].decode()
    uploaded = idf.load("user/name")._loaded.metadata["config"]
    assert uploaded == {**metadata["config"], "data_dir": "photos", "val_dir": "val.zip"}


# Wrong requests


@pytest.mark.parametrize(
    ("repo", "options", "phrase"),
    [
        ("name", {}, "--repo 'name'"),
        ("user/name@v1", {}, "--repo"),
        ("../name", {}, "--repo"),
        ("user/name", {"license": ""}, "--license is missing"),
        ("user/name", {"license": "My own: licence"}, "--license"),
        ("user/name", {"license": "mitt"}, "did you mean mit"),
        ("user/name", {"message": " "}, "--message"),
        ("user/name", {"token": ""}, "token"),
        ("user/name", {"token": "two words"}, "token"),
        ("user/name", {"token": 5}, "token"),
        ("user/name", {"report": "absent"}, "absent"),
        ("user/name", {"samples": "absent.png"}, "absent.png"),
        ("user/name", {"licence": "mit"}, "licence"),
    ],
)
def test_a_wrong_push_is_refused_and_makes_nothing(hub, model, repo, options, phrase):
    with pytest.raises((UserError, TypeError), match=phrase):
        model.push_to_hub(repo, **{"token": TOKEN, **FAST, **options})
    assert hub.repositories == {}


def test_pushing_without_a_token_says_how_to_get_one(hub, model):
    fails(lambda: model.push_to_hub("user/name", **FAST), "hf auth login", "HF_TOKEN")
    assert hub.asked == []


@pytest.mark.parametrize("missing", ["model_path", "repo", "license"])
def test_the_command_names_what_is_missing(hub, model, missing, tmp_path):
    flags = {"model_path": model.path, "repo": "user/name", "license": "mit"}
    words = [word for name, value in flags.items() if name != missing for word in (f"--{name}", value)]
    refused(call("push", *words, cwd=tmp_path, env={"HF_TOKEN": TOKEN}), f"--{missing} is missing")
    assert hub.repositories == {}


def test_the_package_is_asked_for_where_it_is_needed(model, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    fails(lambda: idf.load("user/name"), "user/name", "improved_diffusion[hub]")
    fails(lambda: model.push_to_hub("user/name", token=TOKEN, **FAST), "improved_diffusion[hub]")


# The token


def test_the_token_is_seen_by_the_server_only(hub, model, tmp_path, capsys, caplog):
    out = tmp_path / "work"
    out.mkdir()
    done = [
        call("push", "--model_path", model.path, "--repo", "user/name", "--private", *FAST_FLAGS, cwd=out,
             env={"HF_TOKEN": TOKEN}).succeed(),
        call("image_sample", "--model_path", "user/name", "--num_samples", 1, "--steps", 1, "--sampler", "ddim",
             "--out_dir", "out", cwd=out, env={"HF_TOKEN": TOKEN}).succeed(),
    ]  # fmt: skip
    loaded = idf.load("user/name", token=TOKEN)
    model.push_to_hub("user/name", token=TOKEN, **FAST)
    loaded.save(out / "again.pt")
    texts = [each.out + each.err for each in done] + list(capsys.readouterr()) + [caplog.text, repr(loaded)]
    assert not any(TOKEN in text for text in texts)
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert written and not any(TOKEN.encode() in content for content in written.values())
    assert not any(TOKEN.encode() in content for content in hub.repositories["user/name"].commits[-1].values())
    senders = {path for _, path, who in hub.asked if who == f"Bearer {TOKEN}"}
    assert "/api/models/user/name" in senders and not any(path.startswith("/lfs/") for path in senders)


@pytest.mark.parametrize("status", [400, 403, 404, 418, 500])
def test_a_server_that_repeats_the_token_is_not_repeated(hub, model, status, capfd):
    repeated = " ".join([TOKEN] * 30)  # a part of one, too, where the message is cut
    hub.answers.append(lambda handler: handler.fail(status, "", repeated) or True)
    messages = [
        fails(lambda: model.push_to_hub("user/name", token=TOKEN, **FAST), "user/name"),
        fails(lambda: idf.load("user/name", token=TOKEN), "user/name"),
    ]
    assert TOKEN[:6] not in "".join([*messages, *capfd.readouterr()])


def test_the_login_of_the_hub_is_used(hub, model):
    hub.cache.parent.mkdir(parents=True, exist_ok=True)
    (hub.cache.parent / "token").write_text(TOKEN)
    model.push_to_hub("user/name", private=True, **FAST)
    assert_same(idf.load("user/name"), model)


# Servers that fail


@pytest.mark.parametrize(
    ("status", "code", "phrases"),
    [
        (401, "RepoNotFound", ("does not exist", "private", "HF_TOKEN")),
        (401, "", ("does not exist", "private", "HF_TOKEN")),
        (403, "GatedRepo", ("gated", "user/name", "HF_TOKEN")),
        (403, "", ("refuses access", "permission")),
        (404, "RepoNotFound", ("does not exist",)),
        (404, "RevisionNotFound", ("no revision main",)),
        (429, "", ("too many requests", "cache")),
        (500, "", ("500", "cache")),
        (503, "", ("503", "cache")),
        (418, "", ("418",)),
    ],
)
@pytest.mark.parametrize("where", ["/api/models/", "/resolve/"])
def test_each_refusal_is_one_clear_error(hub, weights, status, code, phrases, where):
    hub.add("user/name", {"model.safetensors": weights})
    hub.answers.append(lambda handler: where in handler.path and (handler.fail(status, code) or True))
    message = fails(lambda: idf.load("user/name"), "user/name")
    if where == "/api/models/":
        assert all(phrase in message for phrase in phrases), message
    assert snapshot_files(hub) == []


def test_a_gated_model_says_where_to_accept_its_conditions(hub, model, weights):
    hub.add("user/name", {"model.safetensors": weights}, gated=True)
    fails(lambda: idf.load("user/name"), "gated", f"{hub.url}/user/name")
    assert_same(idf.load("user/name", token=TOKEN), model)


@pytest.mark.parametrize("where", ["/api/models/", "/resolve/", "everything"])
def test_a_server_that_never_answers_is_left(hub, model, weights, where, monkeypatch):
    monkeypatch.setattr("improved_diffusion.utils.hub.FIRST_SECONDS", 0.2)
    monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 0.2)
    hub.add("user/name", {"model.safetensors": weights})
    hub.answers.append(lambda handler: (where in handler.path or where == "everything") and hub.done.wait(30))
    fails(lambda: idf.load("user/name"), "user/name", "gives no answer", "network")


def test_a_push_to_a_server_that_stops_answering_ends(hub, model, monkeypatch):
    monkeypatch.setattr("improved_diffusion.utils.hub.TIMEOUT_SECONDS", 0.2)
    hub.answers.append(lambda handler: "/create" in handler.path and hub.done.wait(30))
    fails(lambda: model.push_to_hub("user/name", token=TOKEN, **FAST), "cannot push to user/name", "no answer")


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "nonsense", "http://", "ftp://127.0.0.1"])
def test_no_network_is_one_error(hub, model, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    fails(lambda: idf.load("user/name"), "user/name", endpoint)
    fails(lambda: model.push_to_hub("user/name", token=TOKEN, **FAST), "user/name", endpoint)


def test_the_cache_is_used_where_the_hub_cannot_be_reached(hub, model, weights, capsys):
    hub.add("user/name", {"model.safetensors": weights})
    idf.load("user/name")
    hub.stop()
    assert_same(idf.load("user/name"), model)
    fails(lambda: idf.load("user/other"), "neither", "user/other")
    fails(lambda: idf.load("user/name", revision="v2"), "user/name@v2")


@pytest.mark.parametrize("damage", ["blobs", "branch"])
def test_a_damaged_cache_counts_as_none_where_the_hub_cannot_be_reached(hub, weights, damage):
    hub.add("user/name", {"model.safetensors": weights})
    idf.load("user/name")
    hub.stop()
    (path,) = hub.cache.glob("models--*/blobs/*" if damage == "blobs" else "models--*/refs/main")
    path.unlink() if damage == "blobs" else path.write_bytes(b"\xff")
    fails(lambda: idf.load("user/name"), "user/name", "cache", "no answer")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), PermissionError(13, "x", "/cache")]
)
def test_a_cache_that_cannot_be_written_is_said(hub, weights, error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    hub.add("user/name", {"model.safetensors": weights})
    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    fails(lambda: idf.load("user/name"), "user/name", "cache", "HF_HOME")


def test_offline_mode_asks_nobody(hub, model, weights, monkeypatch):
    hub.add("user/name", {"model.safetensors": weights})
    idf.load("user/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert_same(idf.load("user/name"), model)
    assert hub.asked == []


# Hostile and damaged answers


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"null", b"{}", b'{"id": "user/name", "siblings": 5}'])
def test_an_answer_that_is_not_the_hubs_is_one_error(hub, model, answer):
    hub.answers.append(lambda handler: handler.send(answer) or True)
    fails(lambda: idf.load("user/name"), "user/name")
    fails(lambda: model.push_to_hub("user/name", token=TOKEN, **FAST), "user/name")


def test_a_list_that_no_hub_sends_is_one_error_with_the_remedy(hub):
    hub.answers.append(lambda handler: handler.send({"siblings": [{"name": 1}], "sha": commit_id(0)}) or True)
    fails(lambda: idf.load("user/name"), "user/name", "another server")


def test_a_cut_download_is_not_kept(hub, model, weights):
    hub.add("user/name", {"model.safetensors": weights})

    def cut(handler):
        if handler.command != "GET" or "/resolve/" not in handler.path:
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(weights)))
        handler.end_headers()
        handler.wfile.write(weights[:1000])
        handler.close_connection = True
        return True

    hub.answers.append(cut)
    fails(lambda: idf.load("user/name"), "user/name")
    assert snapshot_files(hub) == [] and not list(hub.cache.rglob("*.incomplete"))
    hub.answers.clear()
    assert_same(idf.load("user/name"), model)


def test_a_download_without_end_ends(hub, weights):
    hub.add("user/name", {"model.safetensors": weights})
    sent = []

    def endless(handler):
        if handler.command != "GET" or "/resolve/" not in handler.path:
            return False
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(2000):
            handler.wfile.write(b"100000\r\n" + bytes(2**20) + b"\r\n")
            sent.append(1)
        return True

    hub.answers.append(endless)
    fails(lambda: idf.load("user/name"), "model.safetensors", f"{len(weights):,} bytes")
    assert len(sent) < 200 and snapshot_files(hub) == []


@pytest.mark.parametrize(
    ("name", "size", "phrase"),
    [
        ("model.safetensors", 10**15, "1,000,000,000,000,000 bytes"),
        ("model.safetensors", -1, "damaged"),
        ("model.safetensors", "many", "damaged"),
        ("config.json", 10**9, "1,000,000,000 bytes"),
    ],
)
def test_the_size_of_a_file_has_a_limit(hub, name, size, phrase):
    files = {name: b"x", "diffusion_pytorch_model.bin": b"y"}
    hub.add("user/name", files)
    hub.sizes[name] = size
    fails(lambda: idf.load("user/name"), phrase)
    assert not any("/resolve/" in path for path in hub.paths("HEAD") + hub.paths("GET"))


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/tmp/x.pt", "a/../../x.pt", "..\\x.pt", "folder/x.pt", ".hidden.pt", "x.pt\n", "猫.pt"],
)
def test_names_that_lead_elsewhere_are_never_asked_for(hub, name, weights, tmp_path):
    hub.add("user/name", {name: weights})
    before = set(tmp_path.rglob("*"))
    fails(lambda: idf.load("user/name"), "has no model")
    assert set(tmp_path.rglob("*")) == before
    assert not any("/resolve/" in path for path in hub.paths("HEAD") + hub.paths("GET"))


@pytest.mark.parametrize("etag", ["../../../../evil", "/tmp/evil-etag", '"../evil"', "..", '"a/b"', "x" * 300, "a b"])
def test_an_etag_that_leads_out_of_the_cache_is_refused(hub, weights, etag, tmp_path):
    hub.add("user/name", {"model.safetensors": weights})
    hub.etags["model.safetensors"] = etag
    fails(lambda: idf.load("user/name"), "etag", hub.url)
    assert not any("evil" in path.name for path in tmp_path.rglob("*")) and snapshot_files(hub) == []
    assert not os.path.exists("/tmp/evil-etag")


def test_a_hostile_pickle_is_refused(hub, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    file = io.BytesIO()
    th.save({"weight": Evil()}, file)
    hub.add("user/name", {"model.pt": file.getvalue()})
    fails(lambda: idf.load("user/name"), "model.pt")
    assert not (tmp_path / "made").exists()


def test_several_models_are_not_chosen_among(hub, weights):
    hub.add("user/name", {"a.safetensors": weights, "b.pt": b"x"})
    fails(lambda: idf.load("user/name"), "a.safetensors, b.pt")


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "a.ckpt",
    ],
)
def test_weights_that_are_not_read_are_named(hub, name):
    hub.add("user/name", {"model_index.json": b"{}", "unet/config.json": b"{}", name: b"x"})
    fails(lambda: idf.load("user/name"), "has no model", name)


def test_a_branch_that_moves_between_is_noticed(hub, weights):
    repository = hub.add("user/name", {"model.safetensors": weights})

    def push_before(handler):
        if "/resolve/" in handler.path and len(repository.commits) == 1:
            repository.commits.append({"model.safetensors": weights[:-1] + b"x"})

    hub.answers.append(push_before)
    fails(lambda: idf.load("user/name"), "changed while it was downloaded")


def test_files_of_the_cache_cannot_be_run(hub, weights):
    hub.add("user/name", {"model.safetensors": weights, "model.py": b"raise SystemExit"})
    mode = os.stat(idf.load("user/name").path).st_mode
    assert not mode & (stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    assert snapshot_files(hub) == ["model.safetensors"]


def test_a_revision_is_given_once_and_of_a_hub_model(tmp_path):
    fails(lambda: idf.load("user/name@v1", revision="v2"), "two revisions")
    fails(lambda: idf.load(tmp_path, revision="v2"), "local path", "no revision")
