# The only set-up a newcomer needs: every target makes .venv first if there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo demo-tools test check docs bench clean

demo: $(STAMP)  ## a tiny student learns two-digit addition from a tiny teacher
	$(BIN)/python -m recipes.on_policy_distillation behavior_if_log_dir_exists=delete

demo-tools: $(STAMP)  ## episodes with a shell in Docker sandboxes, on eight small tasks; MODEL=… TEACHER=… for real models
	$(BIN)/python -m recipes.on_policy_distillation_harbor_multi_turn behavior_if_log_dir_exists=delete \
		$(if $(MODEL),model_name=$(MODEL)) $(if $(TEACHER),teacher_model=$(TEACHER))

test: $(STAMP)  ## the fast suite: no network, GPU, Docker or vLLM
	$(BIN)/python -m pytest -n 2

check: $(STAMP)  ## formatting, lints, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: $(STAMP)  ## run every snippet of README and docs/
	$(BIN)/python -m pytest tests/test_docs.py

bench: $(STAMP)  ## speed and memory against TRL, on this machine
	$(BIN)/python -m benchmarks.side_by_side

$(STAMP): pyproject.toml
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -c 'import sys; assert (3, 11) <= sys.version_info[:2] < (3, 14), "Protege needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + "; set PYTHON=python3.12"'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) *.egg-info
