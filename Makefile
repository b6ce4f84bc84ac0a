# make demo   your own model of handwritten digits, in minutes, on a CPU
# make test   the tests          make check   lint and types
# A machine without a GPU may save gigabytes: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
       $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
RUN := runs/digits
DIGITS := data/digits
STEPS := 1500

.PHONY: demo test test-slow check format clean

$(VENV)/.venv: ; $(PYTHON) -m venv $(VENV) && touch $@

# torch first and alone: the constraint then keeps every other package from choosing another build of it.
$(VENV)/.torch: $(VENV)/.venv constraints.txt
	@echo "installing torch into $(VENV)"
	$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt) && touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "installing improved_diffusion into $(VENV)"
	$(PIP) -e '.[digits]' && touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "installing the tests' packages into $(VENV)"
	$(PIP) -e '.[test,dev]' && touch $@

demo: $(VENV)/.demo
	$(BIN)/python datasets/digits.py --out_dir $(DIGITS)
	$(BIN)/python scripts/image_train.py --config datasets/digits.json --data_dir $(DIGITS)/train --max_steps $(STEPS) \
	    --out_dir $(RUN) --resume auto
	$(BIN)/python scripts/image_sample.py --model_path $(RUN)/ema_0.99_$$(printf %06d $(STEPS)).pt --num_samples 200 \
	    --batch_size 100 --timestep_respacing 50 --classes 0,1,2,3,4,5,6,7,8,9 --out_dir $(RUN)
	$(BIN)/python scripts/image_nll.py --model_path $(RUN)/ema_0.99_$$(printf %06d $(STEPS)).pt --data_dir $(DIGITS)/test \
	    --batch_size 99 --timestep_respacing 100 --out_dir $(RUN)
	$(BIN)/python datasets/check_digits.py --samples $(RUN)/samples --digits $(DIGITS)
	$(BIN)/python datasets/digits_features.py --digits $(DIGITS) --out $(DIGITS)/features.pt2
	$(BIN)/python scripts/evaluate.py --samples $(RUN)/samples_200x16x16x1.npz --reference $(DIGITS)/train \
	    --held_out $(DIGITS)/test --resize 16 --features $(DIGITS)/features.pt2 --out_dir $(RUN)/report
	@echo "look at $(RUN)/samples.png, at $(RUN)/report/report.md, and at $(RUN)/previews for how it came about"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info
