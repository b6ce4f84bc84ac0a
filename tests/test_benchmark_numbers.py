"""Numbers on the pages are those of the results in benchmarks/results, which the pages name.

A number is compared as it is shown: rounded to its last digit. Where a benchmark is run again and finds others, these
tests name the rows to change.
"""

import json
import re

import pytest
import torch as th
from helpers import ROOT

from benchmarks.__main__ import parse
from benchmarks.demo import follow
from improved_diffusion.config.presets import options_for
from improved_diffusion.config.recipes import RECIPES
from improved_diffusion.config.settings import ImageTraining
from improved_diffusion.evaluation.report import METRICS
from improved_diffusion.models.build import build_model_and_diffusion

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "datasets/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def page_and_results(page, results):
    """The text of a page, and the content of a file of results that it, or the benchmark's picture in it, names."""
    text = (ROOT / page).read_text()
    assert f"benchmarks/results/{results}." in text, f"{page} does not name {results}"
    return text, json.loads((ROOT / "benchmarks" / "results" / f"{results}.json").read_text())


def table(text, heading):
    """The cells of each row of the table whose first line begins so."""
    lines = text[text.index(heading) :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows
    return rows


def agrees(text, *values):
    """Whether the numbers in a text are these values, rounded as they are shown: 80,000 to tens of thousands."""
    shown = NUMBER.findall(text)
    return len(shown) == len(values) and all(map(_rounds_to, shown, values))


def _rounds_to(number, value):
    digits = number.replace(",", "")
    whole, _, decimals = digits.partition(".")
    zeros = 0 if decimals else len(whole) - len(whole.rstrip("0"))
    unit = 10.0 ** (zeros if float(digits) else 0) / 10 ** len(decimals)
    return abs(value - float(digits)) <= 0.5 * unit * (1 + 1e-6)


@pytest.mark.parametrize(
    "text, values, same",
    [
        ("80,000", [80_455], True), ("80,000", [75_000], True), ("80,000", [86_000], False), ("1,036x", [1036.3], True),
        ("-0.4 ± 0.3", [-0.36, 0.33], True), ("-0.4 ± 0.3", [-0.36, 0.36], False), ("57 seconds", [56.57], True),
        ("0", [0.4], True), ("0", [0.6], False), ("", [], True), ("", [1.0], False), ("97.5%", [97.45], True),
    ],
)  # fmt: skip
def test_a_number_is_compared_to_its_last_digit(text, values, same):
    assert agrees(text, *values) == same


# The demo


def demo_results():
    return json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())["results"]


@pytest.mark.parametrize(
    "page, beginning",
    [("README.md", "bits/dim"), ("datasets/README.md", "accuracy on"), ("datasets/README.md", "class")],
)
def test_what_the_demo_prints_is_what_it_printed(page, beginning):
    (block,) = re.findall(rf"^```text\n({beginning}.*?)^```$", (ROOT / page).read_text(), re.S | re.M)
    lines = [line for line in block.splitlines() if not line.startswith(("look at", "wrote"))]
    assert lines and set(lines) <= set(demo_results())


def test_the_table_of_the_demo_is_its_report():
    text, _ = page_and_results("docs/evaluation.md", "demo")
    printed = [line for line in demo_results() if line.split(":")[0].removesuffix(" x 1000") in METRICS.values()]
    rows = table(text, "| metric | 200 samples | 200 held-out real digits |")
    assert len(rows) == len(printed)
    for name, samples, real in rows:
        line = f"{name}: {samples}" + (f" (200 held-out real images: {real})" if real else "")
        assert line.replace("±", "+-") in printed


def test_the_demos_commands_are_timed_and_its_results_kept(capsys):
    output = [
        ".venv/bin/python -m pip install torch\n", ".venv/bin/improved-diffusion train --max_steps 1 \\\n",
        "    --out_dir runs/digits\n", "step 1, loss 0.5\n", ".venv/bin/python datasets/check_digits.py\n",
        "classifier's accuracy on real held-out digits: 95.3%\n", "features of --samples: 100% 200/200\n",
        "FID: 0.3 (200 held-out real images: 1.0)\n", "precision: none\n",
    ]  # fmt: skip
    results, seconds = follow(output)
    assert results == [
        "classifier's accuracy on real held-out digits: 95.3%",
        "FID: 0.3 (200 held-out real images: 1.0)",
    ]
    assert list(seconds) == ["train", "datasets/check_digits.py"] and min(seconds.values()) >= 0
    assert capsys.readouterr().out == "".join(output)


# Quality


def test_kernel_distances_of_samplers():
    text, results = page_and_results("docs/sampling.md", "sampler_quality_digits")
    heading = "| evaluations |"
    columns = [int(cell) for cell in re.findall(r"\d+", text[text.index(heading) :].splitlines()[0])]
    found = {(row["rule"], row["asked"]): row for row in results["rows"]}
    for rule, *cells in table(text, heading):
        for evaluations, cell in zip(columns, cells, strict=True):
            row = found.pop((rule.strip("`"), evaluations), None)
            values = [1e3 * row["kid"], 1e3 * row["standard_error"]] if row else []
            assert agrees(cell, *values), (rule, evaluations)
    assert not found
    assert results["settings"]["num_samples"] == 2000


def test_metrics_of_degraded_images():
    text, results = page_and_results("docs/evaluation.md", "evaluation_cifar10")
    rows = table(text, "| | FID | KID x 1000 |")
    assert {name for name, *_ in rows} == results["rows"].keys()
    for name, *cells in rows:
        for cell, (metric, found) in zip(cells, results["rows"][name].items(), strict=True):
            assert agrees(cell, *(value * (1000 if metric == "kid" else 1) for value in found.values())), (name, metric)
    assert all(results["same_digits"].values())


def test_guidance():
    text, results = page_and_results("docs/classes-and-guidance.md", "guidance_digits")
    found = {row["scale"]: row for row in results["rows"]}
    sentence = re.search(r"On the digits, a classifier assigns .*? at 2 and all at 4", text, re.S)[0]
    assert agrees(sentence, 100 * found[1]["agreement"], 1, 100 * found[2]["agreement"], 2, 4)
    assert found[4]["agreement"] == 1
    assert 1 - found[4]["diversity"] / found[1]["diversity"] == pytest.approx(1 / 5, abs=0.05)
    assert agrees(re.search(r"costs (\S+) evaluations on a CPU", text)[1], results["cost_of_guided_evaluation"])


def test_bits_per_dimension_from_few_timesteps():
    text, results = page_and_results("docs/likelihood.md", "nll_estimate_digits")
    first = next(row for row in results["rows"] if row["seed"] == 0)
    whole, few = re.findall(r"^bits/dim: (.*?) \(", text, re.M)
    assert agrees(whole, results["whole_bits_per_dim"], results["whole_standard_error"])
    assert agrees(few, first["bits_per_dim"], first["standard_error"])
    part = re.search(r"^(\S+) of the standard error is due", text, re.M)[1]
    assert agrees(part, first["timesteps_error"])
    numbers = re.search(r"(\S+): from the noise \((\S+),[^(]*from the timesteps \((\S+)\)", text)
    for shown, name in zip(numbers.groups(), ("spread_of_estimates", "noise_error", "timesteps_error")):
        assert agrees(shown, results[name])
    assert results["of"] == 20
    assert results["within_two_standard_errors"] == results["within_two_timesteps_errors_same_noise"] == 20


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_small_data(name):
    text, results = page_and_results("docs/small-data.md", f"small_data_{name}")
    rows = table(text[text.index(f"--name {name}") :], "| setting | steps | loss on unseen images |")
    assert len(rows) == len(results["rows"])
    found = {(row["setting"], row["step"]): row for row in results["rows"]}
    for setting, steps, loss, kid, precision, recall, copies in rows:
        row = found[setting, int(steps.replace(",", ""))]
        assert agrees(loss, row["val_loss"])
        assert agrees(kid, *(1e3 * value for value in row["kid"].values()))
        assert agrees(precision, row["precision"]["value"]) and agrees(recall, row["recall"]["value"])
        assert agrees(copies, *row["copies"].values())


def test_kills():
    text, results = page_and_results("docs/resume.md", "kill_and_resume")
    assert agrees(re.search(r"kills a run on two ranks (\d+) times", text)[1], results["kills"])
    assert results["in_the_midst_of_a_save"] >= results["kills"] / 2 and not results["differences"]


# Speed


@pytest.mark.parametrize(
    "page, heading, results, group, columns",
    [
        ("docs/data.md", "| | images/s |", "speed_AMD_EPYC", "loading", {"per_second": 1, "ratio": 1}),
        ("docs/speed.md", "| way | images/s |", "speed_NVIDIA_H100_80GB_HBM3", "training",
         {"per_second": 1, "ratio": 1, "peak_bytes": 2**-30}),
        ("docs/speed.md", "| a training step on a CPU |", "speed_AMD_EPYC", "training", {"per_second": 1, "ratio": 1}),
    ],
)  # fmt: skip
def test_rows_of_speed(page, heading, results, group, columns):
    text, found = page_and_results(page, results)
    for name, *cells in table(text, heading):
        assert len(cells) == len(columns) and cells[0]

        def shows(row, cells=cells):
            values = [row[key] * scale for key, scale in columns.items()]
            return all(not cell or agrees(cell, value) for cell, value in zip(cells, values))

        assert any(shows(row) for row in found[group]["rows"] if "error" not in row), f"{name}: {cells}"


def test_shares_of_the_convolutions_peak():
    text, results = page_and_results("docs/speed.md", "speed_AMD_EPYC")
    (row,) = (row for row in results["training"]["rows"] if (row["workload"], row["way"]) == ("cifar10-8", "fp32"))
    both, forward = re.search(r"does (\d+)% of the .*\n.*backward pass, and (\d+)% of", text).groups()
    shares = row["share_of_convolution_step_peak"], row["share_of_convolution_peak"]
    assert agrees(f"{both} {forward}", *(100 * share for share in shares))


def test_operations_of_a_step():
    text, results = page_and_results("docs/speed.md", "speed_AMD_EPYC")
    found = [row["operations"] for row in results["launches"]["rows"]]
    assert [cells[-1] for cells in table(text, "| way | operations |")] == [f"{count:,}" for count in found]


def test_seconds_of_images_on_a_cpu():
    text, results = page_and_results("docs/speed.md", "speed_AMD_EPYC")
    found = {row["way"]: row for row in results["sampling"]["rows"]}["dpmpp_2m 15 steps"]
    seconds, ratio = re.search(r"in 15 steps take (\d+) s there, (\S+) times", text).groups()
    assert agrees(seconds, found["seconds"]) and agrees(ratio, found["ratio"])


def test_seconds_of_the_metrics():
    text, results = page_and_results("docs/evaluation.md", "speed_AMD_EPYC")
    found = results["metrics"]
    sentence = re.search(r"The metrics of \S+ against \S+ images with \d+ features take \d+ seconds", text)[0]
    assert agrees(sentence, found["rows_of_each"], found["rows_of_each"], found["width"], found["seconds_of_all"])


# Recipes


def test_the_table_of_recipes():
    text, results = page_and_results("docs/training.md", "recipes_x86_64_2_threads")
    rows = table(text, "| recipe | images |")
    assert [name.strip("`") for name, *_ in rows] == list(RECIPES)
    for name, images, _, parameters, batch, memory, step, preview, steps in rows:
        settings = ImageTraining.of(options_for(name.strip("`"), ImageTraining))
        row = results["recipes"][name.strip("`")]
        assert agrees(memory, row["memory_gib"])
        for cell, key in ((step, "seconds_per_step"), (preview, "seconds_per_preview")):
            assert key not in row or not cell or agrees(cell, row[key]), f"{name}, {key}"
        assert agrees(parameters, row["parameters"] / 1e6) and row["parameters"] == count_parameters(settings)
        side = settings.model.image_size
        assert (images, batch) == (f"{side}x{side}", str(settings.train.total_batch_size))
        assert steps == f"{settings.train.max_steps:,}"


def count_parameters(settings):
    with th.device("meta"):
        model, _ = build_model_and_diffusion(settings.model, settings.diffusion)
    return sum(p.numel() for p in model.parameters())


def test_the_front_page_shows_the_smallest_recipe():
    options = options_for("small-32", ImageTraining)
    text = (ROOT / "README.md").read_text()
    assert f"model: {count_parameters(ImageTraining.of(options)):,} parameters" in text
    assert f"here every {options['sample_interval']} steps" in text


# Names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_group_of_benchmarks_and_every_file_of_results_exists(page):
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    for line in re.findall(r"python -m benchmarks\b(?!\.)([^`\n)]*)", text):
        parse([word for word in line.split() if word != "GROUP"])
    for name in re.findall(r"benchmarks/results/([\w.]+)", text):
        assert "NAME" in name or (ROOT / "benchmarks" / "results" / name).exists(), name
    modules = [f"{name}.py" for name in re.findall(r"python -m benchmarks\.(\w+)", text)]
    for name in [*re.findall(r"benchmarks/(\w+\.(?:py|sh))", text), *modules]:
        assert (ROOT / "benchmarks" / name).exists(), name


def test_every_result_is_of_a_benchmark():
    stems = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} | {"speed", "profile", "evaluation", "nll_terms"}
    stems.add("loss_floor")  # of the command on docs/loss-floor.md
    for path in (ROOT / "benchmarks" / "results").iterdir():
        assert any(path.name.startswith(stem) for stem in stems), path.name


def test_memory():
    text, results = page_and_results("docs/speed.md", "memory")
    rows = table(text, "| preset | no checkpointing |")
    found = {(row["preset"], row["levels"]): row for row in results["rows"]}
    assert len(rows) * 5 == len(found)
    for name, *cells in rows:
        for levels, cell in zip(("", "0", "0,1", "0,1,2", "all"), cells, strict=True):
            row = found[name.strip("`"), levels]
            assert agrees(cell, row["one"] / 1e9, row["of_8"] / 1e9, row["fits"])


def assert_few_steps(cells, results, model, rule, grid):
    """The cells for 1, 2, 4 and 8 evaluations."""
    wanted = (model, rule.strip("`"), grid.strip("`"))
    rows = {row["asked"]: row for row in results["rows"] if (row["model"], row["rule"], row["grid"]) == wanted}
    assert rows
    for evaluations, cell in zip((1, 2, 4, 8), cells, strict=True):
        row = rows.get(evaluations)
        values = (1e3 * row["kid"], 1e3 * row["standard_error"], 100 * row["agreement"]) if row else ()
        assert agrees(cell, *values), (wanted, evaluations)


@pytest.mark.parametrize(
    "heading, name", [("| demo's model |", "few_steps_digits"), ("| long-trained model |", "few_steps_digits_long")]
)
def test_students_and_their_teachers(heading, name):
    text, results = page_and_results("docs/distillation.md", name)
    students = {row["model"] for row in results["students"]}
    rows = table(text, heading)
    for model, sampler, *cells in rows:
        rule, _, grid = sampler.partition(", ")
        assert_few_steps(cells, results, model.strip("`"), rule, grid or "auto")
    assert students <= {model.strip("`") for model, *_ in rows}
    (baseline,) = (row for row in results["rows"] if row["asked"] == 250)
    after = text[text.index(heading) :]
    shown = re.search(r"in 250 evaluations: (.*?%)", after)[1]
    assert agrees(shown, 1e3 * baseline["kid"], 1e3 * baseline["standard_error"], 100 * baseline["agreement"])


def test_students_by_prediction_and_length():
    text, results = page_and_results("docs/distillation.md", "few_steps_digits_options")
    _, demo = page_and_results("docs/distillation.md", "few_steps_digits")
    for student, predicts, steps, *cells in table(text, "| student | predicts |"):
        name = student.strip("`")
        found = next(each for each in (results, demo) if any(row["model"] == name for row in each["students"]))
        (facts,) = (row for row in found["students"] if row["model"] == name)
        assert predicts == {"v": "v", "teacher": "eps"}[facts["options"]["student_prediction"]]
        assert int(steps.replace(",", "")) == facts["options"]["max_steps"]
        assert_few_steps(cells, found, name, "renoise", "auto")


def test_few_steps_by_timestep_grid():
    text, results = page_and_results("docs/sampling.md", "few_steps_digits_long")
    for sampler, *cells in table(text, "| sampler and grid |"):
        assert_few_steps(cells, results, "runs/digits_long", *sampler.split(", "))
