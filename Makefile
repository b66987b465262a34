# make quickstart   install, prepare a corpus without any download, train for about three minutes, sample
# make chat         fine-tune the same model to answer (LoRA, some minutes), then ask it four questions
# make test         install what the tests need and run them in two processes; shows the slowest ten
# make bench        the benchmarks of docs/benchmarks.md that take minutes
# make lint         check the style with ruff

PYTHON ?= python3
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: quickstart chat test bench lint clean

quickstart: .venv/installed
	.venv/bin/python train.py config/quickstart.py
	.venv/bin/python sample.py --prompt "def "

chat: .venv/installed
	.venv/bin/python train.py config/quickstart.py
	USE_LORA=1 .venv/bin/python train.py INIT_FROM=out/quickstart
	.venv/bin/python sample.py --chat --init_from out/quickstart-sft-lora --temperature 0.3 --prompt "Who are you?" \
	  --prompt "What does shutil.copyfile(src, dst) do?" --prompt "In which module is OrderedDict defined?" \
	  --prompt "Write the header of a Python function. Return the number of items."
	@echo "Chat: .venv/bin/python sample.py --chat"

test: .venv/tested
	.venv/bin/python -m pytest -q -n 2 --dist loadfile --durations=10 tests

bench: .venv/installed
	.venv/bin/python -m benchmarks optim
	.venv/bin/python -m benchmarks step

lint: .venv/tested
	.venv/bin/ruff check .

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and sys.executable + " is Python %d.%d, and 3.11 or newer is needed: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	@echo "installing torch, numpy, tiktoken and sentencepiece into .venv (once; takes some minutes)"
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/tested: .venv/installed requirements-test.txt
	.venv/bin/pip install -q -r requirements-test.txt
	touch $@

clean:
	rm -rf .venv out data/cache
