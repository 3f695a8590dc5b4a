# make study   the whole study: environment, data, trainings, evaluation, report      make test   every test
# make lab     JupyterLab on the notebooks    make site   the report as a web site    make clean  what can be made again
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv

.PHONY: env study test lab site clean
env: .venv/.ready

# uv from the machine if it is there, else from a small environment of its own.
.venv/.ready: pins.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)")'
	@if command -v uv >/dev/null; then ln -sf "$$(command -v uv)" .uv-link; \
	 else $(PYTHON) -m venv .uv && .uv/bin/python -m pip install --quiet uv==0.13.9 && ln -sf .uv/bin/uv .uv-link; fi
	./.uv-link venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" .venv
	./.uv-link pip install --quiet --python .venv/bin/python --requirement pins.txt
	./.uv-link pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
	@rm -f .uv-link && touch $@

study: env
	dvc repro
	@echo "The report: reports/index.html"

test: env
	python -m pytest

lab: env
	jupyter lab nbs

site: env
	dvc repro site
	@echo "The site: reports/site/index.html"

clean:
	rm -rf build tmp .pytest_cache .ruff_cache .hypothesis _proc
	@echo "Kept: data/, models/, reports/ and .venv. To remove DVC's outputs: dvc remove or rm -rf models data/prepared"
