# Two commands do everything: `make demo` and `make test`. Both install first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VIEW := build/view/svgpipe
# For glibc: reuse freed memory instead of returning it. On a CPU this saves page faults at every large tensor.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=8589934592
FLOORS := pipeline stages models manifests

.PHONY: help install demo test lint view clean

help:            ## list the targets
	@grep -E '^[a-z]+: .*##|^[a-z]+:  *##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/:/' | column -t -s ':'

install: $(STAMP) view ## create .venv and install svgpipe with its demo and development extras

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,s3,dev]"
	@touch $(STAMP)

demo: install    ## run the whole pipeline on photographs into runs/demo
	$(KEEP_MEMORY) $(BIN)/svgpipe demo --workdir runs/demo

lint: install ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p svgpipe
	$(BIN)/mypy tests

test: lint       ## lint, types, floors and the test suite
	$(BIN)/pytest -n 2

# mypy and editors resolve `svgpipe.X` through these links, because the folders lie at the top level.
view:
	@mkdir -p $(VIEW)
	@for floor in $(FLOORS); do ln -sfn ../../../$$floor $(VIEW)/$$floor; done

clean:           ## remove .venv, build products and caches (runs/ stays)
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
