# make demo   decompose real adapters: report and plots in examples/out
# make test   lint, types, tests, package build
# make picture  the picture of a page in the README, docs/page.png, by Chromium
# make cases  what files of the field and corners of the arithmetic once got wrong: tests/cases
# make bench  timings on this machine
# make gpu    on a machine with a GPU: build, tests and times there, into benches/results/; installs nothing. Two windows:
#             make gpu-first, five and a half minutes, and make gpu-record, six and a half
# make gpu-prebuild  what these would compile, made beforehand and without a device: build/gpu
# make rehearsal  what make gpu runs, on a machine without a GPU: torch for CUDA on stand-ins for its libraries; 6 GB
# make triton every test of the ops in Triton's interpreter, and all specialisations ahead of time: an hour and more
# make fuzz   100,000 damaged directories, 20,000 single files, 10,000 in several forms, 10,000 names: tests/fuzz/*.json
# make wheel  dist/: a wheel for every Linux with glibc 2.28 or later, tried in an environment without compilers
# make aarch64  the kernels for that processor by a cross compiler, and the tests of the ops in an emulator: hours
# make sanitize  the kernels' and the writer's tests under AddressSanitizer and UndefinedBehaviorSanitizer
VENV ?= .venv
PY := $(VENV)/bin/python
SOURCES := $(shell git ls-files 'csrc/*' CMakeLists.txt setup.py pyproject.toml constraints.txt 2>/dev/null)
# Tests run in as many processes at once, which share the processor; a file's tests stay together where they can.
WORKERS ?= 2
PYTEST = $(PY) -m pytest -q
PARALLEL = -n $(WORKERS) --dist worksteal
ISAS := baseline avx2 avx512 avx512_bf16
# avx512 and avx512_bf16 differ in one thing, how bfloat16 is stored (csrc/cpu/tile.h): these ops store it.
STORING := $(addprefix tests/ops/test_,add_products.py combine.py empty_terms.py merge_masks.py merge_tiles.py passes.py)
BEST_ISA = $(PY) -c "from fastlora.backends import cpu; print(cpu.isa())"
HAS_ISA = $(PY) -c "from fastlora.backends import cpu; cpu.isa()" 2>/dev/null

.PHONY: demo test lint types unit isas package picture cases bench gpu gpu-prebuild gpu-first gpu-record rehearsal rehearsed \
  rehearsed-first rehearsed-record rehearsed-tests rehearsed-stand-in triton fuzz wheel aarch64 sanitize clean

# Of 18,000 modules most are never imported: those that are get their bytecode then, which tests leave to the next ones.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = $(PY) -m pip install -q --disable-pip-version-check --no-compile

$(VENV)/ready: $(SOURCES) tests/owners.txt
	python3 -m venv $(VENV)
	$(INSTALL) -c constraints.txt torch
	$(INSTALL) -c constraints.txt -e ".[dev]"
	$(INSTALL) --no-deps -r tests/owners.txt
	touch $@

demo: $(VENV)/ready
	$(PY) examples/demo.py --out examples/out

test: lint types unit isas package

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run --Werror

types: $(VENV)/ready
	$(VENV)/bin/mypy

# Without the small tests that start an interpreter for each instruction set: `isas` runs all of the ops' tests there.
unit: $(VENV)/ready
	$(PYTEST) $(PARALLEL) -m "not package" -k "not every_instruction_set"

# Every kernel under every other instruction set that this processor has, at every size; `unit` does so for the best
# one. What is the same for all is left out: plain torch and the reference (tests/ops/factors.py), and what ops do before
# they reach a kernel.
isas: $(VENV)/ready
	best=$$($(BEST_ISA)) || exit 1; \
	for isa in $(ISAS); do \
	  [ $$isa != $$best ] || continue; \
	  FASTLORA_ISA=$$isa $(HAS_ISA) || { echo "$$isa: skipped, not on this processor"; continue; }; \
	  [ $$isa = avx512 ] && tests="$(STORING)" || tests=tests/ops; \
	  echo "$$isa:"; FASTLORA_ISA=$$isa $(PYTEST) $(PARALLEL) -k "not every_instruction_set and not reference" \
	    --ignore tests/ops/test_dispatch.py --ignore tests/ops/test_team.py $$tests || exit 1; \
	done

# sdist, wheel from the sdist, import of the wheel in an environment of its own.
package: $(VENV)/ready
	$(PYTEST) -m package

picture: $(VENV)/ready
	$(PY) examples/page_picture.py --out docs/page.png

cases: $(VENV)/ready
	$(PYTEST) $(PARALLEL) tests/cases

bench: $(VENV)/ready
	OMP_WAIT_POLICY=passive $(PY) -m pytest benches --benchmark-only --benchmark-columns=median,iqr,rounds

OUT ?= benches/results
WINDOW = python3 -m benches.gpu --out $(OUT) $(if $(RESUME),--resume)

gpu: gpu-first gpu-record

# For a machine with CPython 3.12 and an H100 or H200: PYTHON312 is an interpreter of that version with its headers.
PYTHON312 ?= python3.12

gpu-prebuild: $(VENV)/ready
	$(PY) -m benches.gpu.prebuild --python $(PYTHON312)

gpu-first:
	$(WINDOW) first

gpu-record:
	$(WINDOW) record

REHEARSAL ?= build/rehearsal
REHEARSE_PY := $(REHEARSAL)/venv/bin/python
REHEARSE := $(REHEARSE_PY) tests/on_gpu/rehearsal/run.py
COMMIT ?= rehearsed
# With fused multiply-adds, as the kernels of any processor beside a device have them: bits are compared.
REHEARSED := CMAKE_ARGS="-DFASTLORA_CUDA_RUNTIME=Shared -DFASTLORA_CPU=BASELINE -DCMAKE_CXX_FLAGS=-mfma"
REHEARSE_BUILD := $(REHEARSED) FASTLORA_CUDA=ON FASTLORA_CUDA_ARCHS=90-real $(REHEARSE_PY) setup.py -q build_ext --inplace
REHEARSE_WINDOW = PATH=$(CURDIR)/tests/on_gpu/rehearsal/tools:$$PATH FASTLORA_COMMIT=$(COMMIT) $(REHEARSED) \
  $(REHEARSE_PY) -m benches.gpu --tiny --slower 30 --python "$(REHEARSE)" --out build/results $(if $(RESUME),--resume)
REHEARSE_TESTS := PYTHONPATH=$(CURDIR) $(REHEARSE) -m pytest -q -p no:cacheprovider -W ignore::DeprecationWarning

# Of Python 3.12, if there is one, like most machines with a device: then also the kernels of gpu-prebuild are tried.
$(REHEARSAL)/ready: tests/on_gpu/rehearsal/requirements.txt
	$$($(PYTHON312) -c "import sys; print(sys.executable)" 2>/dev/null || echo python3) -m venv --clear $(REHEARSAL)/venv
	$(REHEARSAL)/venv/bin/pip install -q --disable-pip-version-check -r tests/on_gpu/rehearsal/requirements.txt
	touch $@

# In a copy without .git, as on a device's machine, with what gpu-prebuild made if it did. RESUME=1: of windows, what the
# same files have done already is not done again. PART=rehearsed-tests: one part alone.
rehearsal: $(REHEARSAL)/ready
	mkdir -p $(REHEARSAL)/tree/build
	git ls-files -z | xargs -0 cp -p --parents -t $(REHEARSAL)/tree
	[ ! -d build/gpu ] || cp -r build/gpu $(REHEARSAL)/tree/build
	commit=$$(git ls-files -z | xargs -0 cat | sha1sum | cut -c -12) && \
	$(MAKE) -C $(REHEARSAL)/tree $(PART) REHEARSAL=$(abspath $(REHEARSAL)) COMMIT=$$commit

PARTS := rehearsed-first rehearsed-record rehearsed-tests rehearsed-stand-in
PART ?= rehearsed

rehearsed:
	for part in $(PARTS); do $(MAKE) $$part || exit 1; done

# Work of the default stream is done at once in the tests, that of other streams in the first window, and none of it
# before somebody waits in the record.
# With a prepared module. That of gpu-prebuild has CUDA's own runtime inside, which needs a device.
rehearsed-first:
	$(REHEARSE_BUILD)
	[ ! -d build/gpu ] || cp fastlora/_core*.so build/gpu
	REHEARSAL_AT_ONCE=others $(REHEARSE_WINDOW) first

# Without one: it builds in place.
rehearsed-record:
	rm -f build/gpu/_core*.so
	$(REHEARSE_WINDOW) record

rehearsed-tests:
	REHEARSAL_AT_ONCE=default $(REHEARSE_TESTS) -m gpu tests/on_gpu

rehearsed-stand-in:
	$(REHEARSE_TESTS) tests/on_gpu/rehearsal/stand_in.py

# Writing into files is left out, which the CPU alone does.
# The limits of a change that is meant to take more: remove tests/triton/limits.json first.
triton: $(VENV)/ready
	TRITON_INTERPRET=1 FASTLORA_BACKEND=triton $(PY) -m pytest -q -k "not results_are_written" \
	  tests/ops/test_gram.py tests/ops/test_combine.py \
	  tests/ops/test_passes.py tests/ops/test_empty_terms.py tests/triton/interpreted.py
	$(PY) -m pytest -q tests/triton/test_compiled.py
	$(PY) tests/triton/compile.py --all --write > /dev/null
	$(PY) tests/triton/compile.py --all --write --triton build/triton-3.6.0 > /dev/null
	git diff --exit-code tests/triton/limits.json

fuzz: $(VENV)/ready
	$(PY) tests/fuzz/run.py --count 100000 --seed 1 --json tests/fuzz/result.json
	$(PY) tests/fuzz/single_files.py --count 20000 --seed 1 --json tests/fuzz/single_files.json
	$(PY) tests/fuzz/forms.py --count 10000 --seed 1 --json tests/fuzz/forms.json
	$(PY) tests/fuzz/names.py --count 10000 --seed 1 --json tests/fuzz/names.json

wheel: $(VENV)/ready
	wheel=$$($(PY) platforms/manylinux.py build/wheel dist) && \
	FASTLORA_WHEEL=$$wheel $(PYTEST) -m package -k "installed or the_wheel_holds"

# Needs Debian's g++-aarch64-linux-gnu and qemu-user-static.
aarch64: $(VENV)/ready
	$(PY) platforms/aarch64.py build/aarch64

SANITIZED := build/sanitize/lib
SANITIZERS = $(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libubsan.so)

# Tests that start interpreters of their own for an instruction set are left out: the loop is over those.
sanitize: $(VENV)/ready
	CMAKE_ARGS=-DFASTLORA_SANITIZE=ON FASTLORA_CUDA=OFF $(PY) setup.py -q build_ext --build-lib $(SANITIZED) --build-temp build/sanitize/tmp
	tar -C fastlora --exclude='*.so' --exclude=__pycache__ -cf - . | tar -C $(SANITIZED)/fastlora -xf -
	for isa in $(ISAS) amx; do \
	  FASTLORA_ISA=$$isa $(HAS_ISA) || { echo "$$isa: skipped, not on this processor"; continue; }; \
	  PYTHONPATH=$(SANITIZED) FASTLORA_ISA=$$isa FASTLORA_BACKEND=cpu LD_PRELOAD="$(SANITIZERS)" \
	  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(VENV)/bin/pytest -q -x -s -p no:cacheprovider -k "not reference and not isa and not instruction_set" \
	  tests/ops tests/formats/test_peft_write.py || exit 1; \
	done

clean:
	rm -rf build dist *.egg-info $(VENV) examples/out fastlora/_core*.so
