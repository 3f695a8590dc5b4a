# make study     the whole study: environment, data, trainings, evaluation, report
# make test      the environment, then every test
# make env       the environment alone: 3 GB to download, 7 GB on disk
# make lab       JupyterLab on the notebooks
# make site      the report as a web site
# make openvino  what `levit-study predict --engine openvino` needs, added to the environment
# make clean     remove what is quickly made again
PYTHON ?= python3
INSIDE = PATH="$(CURDIR)/.venv/bin:$$PATH" VIRTUAL_ENV="$(CURDIR)/.venv"

.PHONY: help env study test lab site openvino clean
help:
	@sed -n 's/^# make/make/p' Makefile

env: .venv/.ready .dvc/plots/page.html

# uv from the machine if it is there, else in a small environment of its own.
.venv/.ready: pins.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 env")'
	@echo "Installing the pinned environment into .venv: about 3 GB to download (4 minutes at 100 Mbit/s), 7 GB on disk (mostly PyTorch), then a minute to compile it"
	@command -v uv >/dev/null || test -x .uv/bin/uv || { $(PYTHON) -m venv .uv && .uv/bin/python -m pip install --quiet uv==0.13.9; }
	@set -e; uv=$$(command -v uv || echo .uv/bin/uv); \
	test -x .venv/bin/python || $$uv venv --quiet --python "$$(command -v $(PYTHON))" .venv; \
	$$uv pip install --compile-bytecode --python .venv/bin/python --requirement pins.txt; \
	$$uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
	@echo "Installed. Next: 'make study' runs the study on synthetic scans; 'source .venv/bin/activate' gives levit-study and dvc."
	@touch $@

# What `dvc plots show` draws into, so that it needs no network.
.dvc/plots/page.html: .venv/.ready
	@$(INSIDE) levit-study plots-page $@

# DVC keeps its records beside those of git; checked before gigabytes are installed.
.PHONY: git
git:
	@git rev-parse --git-dir >/dev/null 2>&1 || grep -qs 'no_scm *= *true' .dvc/config .dvc/config.local || { \
	echo "No git repository here: run 'git init', or work without git: 'make env && .venv/bin/dvc config --local core.no_scm true'"; exit 1; }

study: git env
	@$(INSIDE) levit-study code
	@echo "Running the study: with params.yaml as it comes 4 to 15 minutes on two CPU cores, with real scans hours; what is complete already is not run again."
	$(INSIDE) dvc repro
	@echo "The report: reports/index.html"

test: env
	$(INSIDE) python -m pytest

lab: env
	$(INSIDE) jupyter lab nbs

site: env
	$(INSIDE) dvc repro --single-item --force site
	@echo "The site: reports/site/index.html"

openvino: env
	@echo "Adding OpenVINO and NNCF to .venv"
	@set -e; uv=$$(command -v uv || echo .uv/bin/uv); \
	$$uv pip install --python .venv/bin/python --no-build-isolation --editable '.[openvino]'

# build/jobs knows which trainings are queued or running on a cluster.
clean:
	test ! -d build || find build -mindepth 1 -maxdepth 1 ! -name jobs -exec rm -rf {} +
	rm -rf tmp _proc .pytest_cache .ruff_cache .hypothesis
	@echo "Kept: .venv, data, models and reports, which take long to make again, and build/jobs, the memory of jobs on a cluster."
