# Everything lives in .venv, .venv-flower and results/; remove them with `make clean`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
FLOWER := .venv-flower
FLOWER_STAMP := $(FLOWER)/.stamp
EXTRAS := embedded,tabular,text,audit,medical,privacy,search,bench,federated,docs,test,lint

# Matplotlib would write its font cache to the home folder.
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/.matplotlib
# Ranks that each take every core spend their time waiting for each other.
TEST_THREADS ?= 1
# Many tests wait for processes they start; three at a time keep two cores busy.
TEST_WORKERS ?= 3

.PHONY: help setup bench federated gpu docs test lint clean

help:
	@echo "make setup   create $(VENV) and $(FLOWER) with the tested versions (constraints*.txt)"
	@echo "make bench   train, invert and report the four defense schemes (results/schemes/)"
	@echo "make federated  measure leakage in simulated federations (results/federated/)"
	@echo "make gpu     on a GPU: its tests, speed and published attacks, at most 25 minutes"
	@echo "make docs    build the documents as a static site (site/)"
	@echo "make test    run the tests"
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove both environments, caches and uncommitted results"

setup: $(STAMP) $(FLOWER_STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the tested versions into $(VENV) (a few minutes, about 5 GB)"
	@$(BIN)/python -m pip install -qq --no-cache-dir --disable-pip-version-check \
		-c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

# Flower and NVFlare want other versions of some packages. Those alone are installed here, in
# front of everything that $(VENV) has.
PURELIB := import sysconfig; print(sysconfig.get_path("purelib"))
$(FLOWER_STAMP): $(STAMP) constraints-flower.txt
	@test -x $(FLOWER)/bin/python || $(BIN)/python -m venv $(FLOWER)
	@echo "import site; site.addsitedir('$$($(BIN)/python -c '$(PURELIB)')')" \
		> "$$($(FLOWER)/bin/python -c '$(PURELIB)')/behind.pth"
	@echo "installing Flower's versions into $(FLOWER) (a minute, about 350 MB)"
	@$(FLOWER)/bin/python -m pip install -qq --no-cache-dir --disable-pip-version-check \
		-c constraints-flower.txt -e ".[flower]"
	@touch $@

gpu: $(STAMP)
	@$(BIN)/python -m benchmarks.speed.gpu_suite

bench: $(STAMP)
	@$(BIN)/python -m benchmarks schemes --preset embedded

# One client that sends updates of a single image, then nine at three noise levels; figures.
FEDERATED := results/federated
federated: export GRADINVBENCH_CACHE ?= $(CURDIR)/$(VENV)/.cache
federated: $(STAMP)
	@$(BIN)/python -m federated.create_job_config --n_clients 1 --num_rounds 3 --scale 0.02 \
		--output $(FEDERATED)/jobs/cxr_1client
	@PYTHON=$(BIN)/python ./start_fl_sim.sh 1 $(FEDERATED)/jobs/cxr_1client cxr_1client \
		--overwrite
	@$(BIN)/python -m federated.recipe --n_clients 9 --num_rounds 2 --invert_clients 1,5,9 \
		--scale 0.02 --iterations 100 --sigma0 0 0.3 3 --workspace $(FEDERATED)/cxr_9clients
	@$(BIN)/python -m federated.plot_rdlv_per_round \
		--workspace $(FEDERATED)/cxr_9clients/sigma0_0 --output $(FEDERATED)/rdlv_per_round.png
	@$(BIN)/python -m federated.plot_rdlv_vs_gauss \
		--workspaces $(FEDERATED)/cxr_9clients --output $(FEDERATED)/rdlv_vs_gauss.png
	@$(BIN)/python -m federated.plot_reconstructions \
		--workspaces $(FEDERATED)/cxr_9clients --output $(FEDERATED)/reconstructions.png

# The generated pages first: they say what the docstrings, the parsers and the tables say.
docs: $(STAMP)
	@$(BIN)/python docs/generate.py
	@$(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

# Flower's tests in its own environment; in the other they are skipped.
FLOWER_TESTS := tests/federated/test_flower_*.py tests/federated/test_same_numbers.py
test: export OMP_NUM_THREADS = $(TEST_THREADS)
test: $(STAMP) $(FLOWER_STAMP)
	@status=0; \
	$(FLOWER)/bin/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(FLOWER_TESTS) || status=1; \
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal || status=1; \
	exit $$status

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	@rm -rf $(VENV) $(FLOWER) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	@rm -rf results/store results/logs results/federated
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
