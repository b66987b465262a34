# make quickstart   install, prepare a corpus without any download, train about three minutes, sample
# make test         install what the tests need, then run them
# make bench        the benchmarks of docs/benchmarks.md that take minutes
# make lint

PYTHON ?= python3
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: quickstart test bench lint clean

quickstart: .venv/installed
	.venv/bin/python train.py config/quickstart.py
	.venv/bin/python sample.py --prompt "def "

test: .venv/tested
	.venv/bin/python -m pytest -q tests

bench: .venv/installed
	.venv/bin/python bench.py optim
	.venv/bin/python bench.py step

lint: .venv/tested
	.venv/bin/ruff check .

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@echo "installing torch, numpy, tiktoken and sentencepiece into .venv (once, some minutes)"
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/tested: .venv/installed requirements-test.txt
	.venv/bin/pip install -q -r requirements-test.txt
	touch $@

clean:
	rm -rf .venv out data/cache
