# What a person types. The environment is made once, in .venv, from requirements.lock:
# by uv where it is on PATH, else by python3 -m venv and pip.

BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup demo test long hosts tpu lint types lock clean

help:
	@echo "make setup   install into .venv"
	@echo "make demo    train, sample and score on two CPU cores, from nothing"
	@echo "make test    run the tests"
	@echo "make long    run those that take longer"
	@echo "make hosts   run the longer tests of several processes"
	@echo "make tpu     compile for TPUs, without one"
	@echo "make lint    check style, rows and doors"
	@echo "make types   check types"
	@echo "make lock    write requirements.lock again (needs uv)"
	@echo "make clean   remove .venv and caches"

setup: $(READY)

# Huge pages for XLA's buffers, which it takes afresh at every step: less time in the kernel (Linux).
demo: setup
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/arcond demo

test: setup
	$(BIN)/pytest -q -m "not long and not slow and not tpu" -n 2 --dist loadfile

# What takes more than about five seconds of a processor.
long: setup
	$(BIN)/pytest -q -m "long and not slow and not tpu" -n 2 --dist loadfile

# Several processes on this machine, end to end: minutes each.
hosts: setup
	$(BIN)/pytest -q -m slow tests/end_to_end/test_hosts.py

# With FULL=1 also the configs at full size, which takes hours.
tpu: setup
	$(BIN)/python -m pip install -q -e '.[tpu]'
	JAX_PLATFORMS=cpu $(BIN)/pytest -q -m "tpu $(if $(FULL),,and not slow)" tests/tpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: setup
	$(BIN)/pyright

$(READY): pyproject.toml requirements.lock
	@command -v uv >/dev/null || test -x $(BIN)/python || { \
	  for python in python3 python3.13 python3.12 python3.11; do \
	    $$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	      && { $$python -m venv .venv; exit; }; \
	  done; \
	  echo "make setup needs Python 3.11 or newer with its venv module, or uv; neither is on PATH."; \
	  exit 1; }
	@echo "Installing into .venv; the first time takes a few minutes."
	@if command -v uv >/dev/null; then \
	  test -x $(BIN)/python || uv venv -q --seed --python '>=3.11,<3.14' .venv; \
	  uv pip install -q --python $(BIN)/python --require-hashes -r requirements.lock \
	    && uv pip install -q --python $(BIN)/python --no-build-isolation --no-deps -e .; \
	else \
	  $(BIN)/python -m pip install -q --require-hashes -r requirements.lock \
	    && $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .; \
	fi
	@touch $@

# Versions already in the file stay; `make lock UPGRADE=--upgrade` takes the newest.
lock:
	uv pip compile -q --universal --python-version 3.11 --extra dev --generate-hashes $(UPGRADE) \
	  --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
	  -o requirements.lock pyproject.toml

clean:
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache build dist
	find . -name __pycache__ -prune -exec rm -rf {} +
