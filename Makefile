# make setup   a virtual environment with everything (.venv)
# make smoke   the main job on tiny models: convert, fine-tune 500 iterations, grade, report
# make test    format, lint, types, import layers, tests
# make slow    the wider test matrix that `make test` leaves out
# make detection   plant every fault, grade healthy runs: reports/detection.json (half an hour; stopped, it goes on)
# make mutation    how many mutants of the gates and the statistics the tests kill (an hour; SAMPLE=500: five minutes)
# make benchmark   how long judging takes, against its limits
# make lock    write requirements.lock from the installed environment

PYTHON := .venv/bin/python
export PYTHONHASHSEED := 0
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup smoke lint types layers unit test slow detection mutation benchmark lock clean

help:
	@sed -n 's/^# //p' Makefile

setup: .venv/.installed

.venv/.installed: pyproject.toml requirements.lock
	@python312=$$(sh scripts/find_python.sh) && { [ -x $(PYTHON) ] || "$$python312" -m venv .venv; }
	$(PYTHON) -m pip install --quiet --constraint requirements.lock --editable '.[dev]'
	@touch $@

smoke: setup
	.venv/bin/qwen-harness smoke

lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/codespell

types: setup
	.venv/bin/basedpyright

layers: setup
	.venv/bin/lint-imports

unit: setup
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test: setup
	@: beside each other, as checks keep one core busy and tests wait now and then
	$(MAKE) --no-print-directory --jobs 2 lint types layers unit

slow: setup
	$(PYTHON) -m pytest -m "slow and not gpu"

detection: setup
	$(PYTHON) -m suites.detection.run --jobs 2

mutation: setup
	@SAMPLE=$(SAMPLE) SEED=$(SEED) sh scripts/mutation.sh

benchmark: setup
	$(PYTHON) -m benchmarks.judge

lock:
	{ echo '# Every package of a tested environment (Python 3.12, Linux x86-64); `make lock` writes it anew.'; \
	  $(PYTHON) -m pip freeze --exclude-editable; } > requirements.lock.partial
	mv requirements.lock.partial requirements.lock

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build *.egg-info
