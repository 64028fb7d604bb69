# make demo   decompose real adapters: report and plots in examples/out
# make test   lint, types, tests, package build
# make bench  timings on this machine
VENV ?= .venv
PY := $(VENV)/bin/python
SOURCES := $(shell git ls-files 'csrc/*' CMakeLists.txt setup.py pyproject.toml constraints.txt 2>/dev/null)
ISAS := baseline avx2 avx512 avx512_bf16

.PHONY: demo test lint types unit package bench clean

$(VENV)/ready: $(SOURCES)
	python3 -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/ready
	$(PY) examples/demo.py --out examples/out

test: lint types unit package

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	git ls-files '*.cpp' '*.h' '*.cu' | xargs $(VENV)/bin/clang-format --dry-run --Werror

types: $(VENV)/ready
	$(VENV)/bin/mypy

unit: $(VENV)/ready
	$(PY) -m pytest -q -m "not package"

# sdist, wheel from the sdist, import of the wheel in an environment of its own.
package: $(VENV)/ready
	$(PY) -m pytest -q -m package

bench: $(VENV)/ready
	OMP_WAIT_POLICY=passive $(PY) -m pytest benches --benchmark-only --benchmark-columns=median,iqr,rounds

clean:
	rm -rf build dist *.egg-info $(VENV) examples/out fastlora/_core*.so
