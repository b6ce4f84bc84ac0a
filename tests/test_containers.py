"""What the Dockerfile and the compose files promise, read from them; their commands and their scripts run."""

import http.server
import json
import re
import shlex
import subprocess
import sys
import threading
from importlib import import_module
from typing import NamedTuple

import pytest
import yaml
from helpers import ROOT

import improved_diffusion as idf
from improved_diffusion.cli.main import COMMANDS
from improved_diffusion.config import UserError
from improved_diffusion.config.service import DoorConfig
from improved_diffusion.service.http.security import TOKEN_VARIABLE, access_for

OURS = {"train", "serve", "web"}  # commands that run in containers
COMPOSE_FILES = ("compose.yaml", "compose.gpu.yaml")


class Line(NamedTuple):
    """An instruction of the Dockerfile, and the name of its stage."""

    stage: str
    instruction: str
    text: str


def read_dockerfile():
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    lines, stage = [], ""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.strip():
            instruction, _, rest = line.partition(" ")
            if instruction == "FROM":
                stage = rest.partition(" AS ")[2]
            lines.append(Line(stage, instruction, rest.strip()))
    return lines


DOCKERFILE = read_dockerfile()
COMPOSE = {name: yaml.safe_load((ROOT / name).read_text()) for name in COMPOSE_FILES}
SERVICES = COMPOSE["compose.yaml"]["services"]


def all_of(instruction, stage=None):
    return [line.text for line in DOCKERFILE if line.instruction == instruction and stage in (None, line.stage)]


def extras_of_the_package():
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^([\w-]+) = ", section, re.M))


# The Dockerfile


def test_every_base_image_is_an_earlier_stage_or_has_a_tag():
    defaults = dict(text.split("=", 1) for text in all_of("ARG", ""))
    stages = set()
    for text in all_of("FROM"):
        base, _, name = text.partition(" AS ")
        base = re.sub(r"\$\{(\w+)\}", lambda found: defaults[found[1]], base)
        assert base in stages or re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", base), base
        stages.add(name)


def test_only_files_of_this_repository_are_copied():
    assert all_of("ADD") == []
    for line in DOCKERFILE:
        if line.instruction == "COPY" and "--from" not in line.text:
            *sources, _ = line.text.split()
            for source in sources:
                assert (ROOT / source).exists(), source
                assert is_sent(source), f"{source} is left out by .dockerignore"


def test_packages_are_pinned_and_not_installed_again_for_a_change_of_the_source():
    installs = [text for text in all_of("RUN", "packages") if "pip install" in text]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in text for text in installs)
    assert all_of("COPY", "packages") == ["constraints.txt .", "--from=requirements /build/requirements.txt ."]
    assert all_of("COPY", "requirements") == ["pyproject.toml containers/requirements.py ./"]
    assert "improved_diffusion improved_diffusion" in all_of("COPY", "wheel")


def test_nothing_that_pip_downloads_stays_in_a_layer():
    installs = [text for text in all_of("RUN") if re.search(r"\bpip\b", text)]
    assert len(installs) == 4
    for text in installs:
        assert "--mount=type=cache,target=/root/.cache/pip" in text or "--no-cache-dir --no-index" in text


def test_commands_run_without_root():
    [user] = all_of("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)  # numbers, which Kubernetes can check
    after_user = DOCKERFILE[DOCKERFILE.index(Line("commands", "USER", user)) :]
    assert not any(line.instruction in ("RUN", "COPY") for line in after_user)
    bases = {text.partition(" AS ")[2]: text.partition(" AS ")[0] for text in all_of("FROM")}
    assert bases["service"] == bases[""] == "commands"


def test_no_secret_is_built_in():
    for line in DOCKERFILE:
        assert line.instruction not in ("ARG", "ENV") or not re.search(r"(?i)token|password|secret|key", line.text)


def test_commands_run_as_the_first_process_so_that_signals_reach_them():
    assert json.loads(*all_of("ENTRYPOINT")) == ["improved-diffusion"]
    for text in all_of("CMD"):
        assert isinstance(json.loads(text), list)
    assert any("PYTHONUNBUFFERED=1" in text for text in all_of("ENV", "commands"))


def test_labels_and_volumes():
    [labels] = all_of("LABEL", "commands")
    names = {pair.partition("=")[0].removeprefix("org.opencontainers.image.") for pair in shlex.split(labels)}
    assert names == {"title", "description", "version", "licenses"}
    assert f"VERSION={idf.__version__}" in all_of("ARG", "commands")
    [volumes] = all_of("VOLUME")
    assert json.loads(volumes) == ["/project/runs", "/project/data"]


def test_extras_exist():
    [default] = [text.partition("=")[2] for text in all_of("ARG", "requirements") if text.startswith("EXTRAS")]
    assert {"mpi", *OURS - {"train"}} <= set(default.split(","))
    assert set(default.split(",")) <= extras_of_the_package() | OURS


PROJECT = """
[project]
name = "thing"
dependencies = ["torch>=2"]
optional-dependencies = {low = ["a>=1", "b[x]"], high = ["thing[low]", "c"], both = ["thing[low,high]"]}
"""
reads_toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="the image's Python reads TOML")


def requirements(folder, extras):
    script = [sys.executable, str(ROOT / "containers/requirements.py"), extras]
    return subprocess.run(script, cwd=folder, capture_output=True, text=True)


@reads_toml
@pytest.mark.parametrize(
    ("extras", "lines"),
    [
        ("", ["torch>=2"]),
        ("low", ["torch>=2", "a>=1", "b[x]"]),
        ("high", ["torch>=2", "a>=1", "b[x]", "c"]),
        ("low,both", ["torch>=2", "a>=1", "b[x]", "c"]),
    ],
)
def test_requirements_are_those_of_the_package_and_its_extras(tmp_path, extras, lines):
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    assert requirements(tmp_path, extras).stdout.splitlines() == lines


@reads_toml
def test_requirements_of_an_unknown_extra_are_an_error(tmp_path):
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    done = requirements(tmp_path, "low,hgih")
    assert done.returncode != 0 and done.stdout == "" and "hgih" in done.stderr


@reads_toml
def test_requirements_of_this_package():
    names = [re.match(r"[\w-]+", line)[0] for line in requirements(ROOT, "mpi,yaml").stdout.splitlines()]
    assert {"torch", "numpy", "pillow", "mpich", "pyyaml"} <= set(names) and "pytest" not in names


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (None, False)])
def test_the_health_check_asks_healthz(status, healthy):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        port = server.server_port
        if status:
            threading.Thread(target=server.handle_request, daemon=True).start()
        else:
            server.server_close()
        [check] = all_of("HEALTHCHECK", "service")
        _, *words = json.loads(check.partition("CMD ")[2].replace(":8000/", f":{port}/"))
        done = subprocess.run([sys.executable, *words], capture_output=True, timeout=30)
    assert (done.returncode == 0) == healthy
    assert asked == (["/healthz"] if status else [])


# .dockerignore


def is_sent(path):
    """Whether a path is sent to the builder: the last pattern that fits decides."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*" and not any("*" in pattern for pattern in patterns[1:] if pattern[0] == "!")
    allowed = [pattern[1:] for pattern in patterns if pattern[0] == "!"]
    return any(path == name or path.startswith(f"{name}/") for name in allowed)


@pytest.mark.parametrize("path", [".git", ".venv", "runs", "data", ".env", "tests", "notebooks/digits", "model.pt"])
def test_nothing_but_what_is_needed_is_sent_to_the_builder(path):
    assert not is_sent(path)


# Compose


def test_the_services_are_chosen_by_profile():
    assert {name: service["profiles"] for name, service in SERVICES.items()} == {name: [name] for name in OURS}
    assert set(COMPOSE["compose.gpu.yaml"]["services"]) == OURS


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_service_is_a_stage_of_the_dockerfile_with_few_rights(name):
    service = SERVICES[name]
    assert service["build"]["target"] in {line.stage for line in DOCKERFILE}
    assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"]
    assert not {"privileged", "network_mode", "cap_add", "pid"} & service.keys()
    assert ":latest" not in service["image"] and ":" in service["image"]
    assert set(service["build"]["args"]) <= {text.partition("=")[0] for text in all_of("ARG")}
    data = [volume for volume in service["volumes"] if volume["target"] == "/project/data"]
    assert all(volume["read_only"] for volume in data)


@pytest.mark.parametrize("name", ["serve", "web"])
def test_a_service_is_reached_from_this_machine_only_and_needs_a_token(name):
    service = SERVICES[name]
    [(address, _, inside)] = [port.split(":") for port in service["ports"]]
    assert address == "127.0.0.1"
    assert inside == service["command"][service["command"].index("--port") + 1] == "8000"  # the health check's
    assert all_of("EXPOSE", "service") == [inside] and service["build"]["target"] == "service"
    assert service["environment"] == {TOKEN_VARIABLE: "${IMPROVED_DIFFUSION_TOKEN:-}"}
    words = service["command"]
    with pytest.MonkeyPatch.context() as patched, pytest.raises(UserError, match=TOKEN_VARIABLE):
        patched.setenv(TOKEN_VARIABLE, "")
        access_for(DoorConfig(host=words[words.index("--host") + 1]))


def test_training_has_time_to_save_a_checkpoint_and_continues():
    train = SERVICES["train"]
    assert train["stop_grace_period"] == "2m" and train["init"] is True
    assert train["command"][-2:] == ["--resume", "auto"]
    assert "ports" not in train and "environment" not in train


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_gpu_is_reserved_by_the_second_file(name):
    service = COMPOSE["compose.gpu.yaml"]["services"][name]
    [device] = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert "whl/cpu" in SERVICES[name]["build"]["args"]["TORCH_INDEX"]
    assert "whl/cpu" not in service["build"]["args"]["TORCH_INDEX"]


def command_lines():
    """Each command that a container runs, as words."""
    return [service["command"] for service in SERVICES.values()] + [
        json.loads(text) for text in all_of("CMD") if json.loads(text) != ["--help"]
    ]


def test_containers_run_these_commands():
    assert {words[0] for words in command_lines()} == OURS


@pytest.mark.parametrize("words", [words for words in command_lines() if words[0] in COMMANDS], ids=" ".join)
def test_a_containers_command_line_is_one_of_the_commands(words):
    module = import_module(f"improved_diffusion.cli.{COMMANDS[words[0]][0]}")
    module.COMMAND.parse(words[1:], f"improved-diffusion {words[0]}")
