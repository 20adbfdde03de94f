# make demo, make test and make docs. Each creates .venv if it is missing.
PYTHON ?= python3
VENV ?= .venv
READY := $(VENV)/.ready
# Python keeps what it compiles, of the modules that are imported, also where the shell forbids it: tests start many processes.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test docs clean

demo: $(READY)
	$(VENV)/bin/saelens-lite demo --out demo --exists overwrite

test: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest -n auto --dist worksteal

docs: $(READY)
	$(VENV)/bin/python .github/docs_pages.py build/pages
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet -f .github/mkdocs.yml
	@echo "open build/site/index.html; to search, run: $(PYTHON) -m http.server -d build/site"

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c .ci/constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build demo *.egg-info
