# make demo   train a model of handwritten digits, sample from it and evaluate it, in minutes on a CPU
# make test   the tests          make check   lint, types and import contracts          make docs   the documentation as a site
# make bench  how fast everything is on this machine, in about 10 minutes
# Without a GPU, the CPU build of torch saves gigabytes: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
       $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
RUN := runs/digits
DIGITS := data/digits
STEPS := 1500
MODEL = $(RUN)/ema_0.99_$$(printf %06d $(STEPS)).pt

.PHONY: demo docs test test-slow bench check format clean

$(VENV)/.venv: ; $(PYTHON) -m venv $(VENV) && touch $@

# torch is installed first, so that no other package chooses a different build of it.
$(VENV)/.torch: $(VENV)/.venv constraints.txt
	@echo "installing torch into $(VENV)"
	$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt) && touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "installing improved_diffusion into $(VENV)"
	$(PIP) -e '.[digits,web]' && touch $@

# gradio names pillow < 13 and works with 13, whose bicubic filter made the stored numbers of tests/golden.
$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "installing the tests' packages into $(VENV)"
	$(PIP) -e '.[test,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps pillow==13.0.0 && touch $@

demo: $(VENV)/.demo
	$(BIN)/python datasets/digits.py --out_dir $(DIGITS)
	$(BIN)/improved-diffusion train --config datasets/digits.json --data_dir $(DIGITS)/train --max_steps $(STEPS) \
	    --out_dir $(RUN) --resume auto
	$(BIN)/improved-diffusion sample --model_path $(MODEL) --num_samples 200 --batch_size 100 --timestep_respacing 50 \
	    --classes 0,1,2,3,4,5,6,7,8,9 --out_dir $(RUN)
	$(BIN)/improved-diffusion nll --model_path $(MODEL) --data_dir $(DIGITS)/test --batch_size 99 \
	    --timestep_respacing 100 --out_dir $(RUN)
	$(BIN)/python datasets/check_digits.py --samples $(RUN)/samples --digits $(DIGITS)
	$(BIN)/python datasets/digits_features.py --digits $(DIGITS) --out $(DIGITS)/features.pt2
	$(BIN)/improved-diffusion evaluate --samples $(RUN)/samples_200x16x16x1.npz --reference $(DIGITS)/train \
	    --held_out $(DIGITS)/test --resize 16 --features $(DIGITS)/features.pt2 --trust_features --out_dir $(RUN)/report
	@echo "look at $(RUN)/samples.png, $(RUN)/report/report.md, and $(RUN)/previews for its progress"
	@echo "open the page on this model:  $(BIN)/improved-diffusion web --runs $(dir $(RUN))"

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open site/index.html, or serve it: $(BIN)/mkdocs serve"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build site *.egg-info
