"""One thread per process, because two thread pools that spin on two cores are slow, and the scripts on the path."""

import json
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402  (after the thread count is set)
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "peers: needs llama.cpp, SmolLM2 or Chromium (make test-peers fetches)")


def pytest_collection_modifyitems(config, items):
    """Tests marked `peers` run only when -m asks for them."""
    if not config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("peers")])
        items[:] = [item for item in items if not item.get_closest_marker("peers")]


WORDS = "the quick brown fox jumps over a lazy dog and runs home to eat some honey with its seven friends".split()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (6000,), generator=generator)]
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text("\n".join(" ".join(words[i : i + 9]) for i in range(0, 6000, 9)), encoding="utf-8")
    return path


def tiny_run(text, out_dir, **changes) -> list[str]:
    """Arguments of train.py for a run of a second; None leaves a setting at its default."""
    settings = dict(data_path=text, cache_dir=text.parent / "cache", out_dir=out_dir, vocab_size=300, seq_len=16,
                    d_model=32, n_layer=2, n_head=4, n_kv_head=2, batch_size=4, max_steps=12, warmup_steps=2, lr=3e-3,
                    muon_lr=0.02, log_interval=1, eval_interval=6, eval_tokens=640,
                    device="cpu", dtype="float32")
    return [f"{name}={value}" for name, value in (settings | changes).items() if value is not None]


def tune(text, base, examples, out_dir, **changes) -> list[str]:
    """Arguments for a fine-tuning run; the model's shape comes from the base."""
    shape = dict.fromkeys(("vocab_size", "seq_len", "d_model", "n_layer", "n_head", "n_kv_head"))
    settings = dict(task="sft", init_from=base, data_path=examples, lr=1e-2, muon_lr=1e-2)
    return tiny_run(text, out_dir, **(shape | settings | changes))


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    pairs = [(f"say {a} and {b}", f"{a} {b}") for a in WORDS[:12] for b in WORDS[:8]]
    path.write_text("".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in pairs), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def base(text, tmp_path_factory):
    """A pretraining run of some seconds, for the tests that fine-tune it."""
    import train

    folder = tmp_path_factory.mktemp("base") / "run"
    train.main(tiny_run(text, folder, vocab_size=320, seq_len=64, max_steps=8, eval_interval=8))
    return folder


@pytest.fixture(scope="session")
def base_of_experts(text, tmp_path_factory):
    import train

    folder = tmp_path_factory.mktemp("experts") / "run"
    train.main(tiny_run(text, folder, vocab_size=320, seq_len=64, max_steps=8, eval_interval=8, n_expert=4))
    return folder


@pytest.fixture
def go(text, tmp_path):
    """Run train.main() with tiny settings; keyword arguments override them."""
    import train

    def start(**changes):
        return train.main(tiny_run(text, changes.pop("out_dir", tmp_path / "run"), **changes))

    return start


# ---- peers: what `make test-peers` fetches. A test that lacks it fails, because a skipped one is easily overlooked.


def fetched(path: Path) -> Path:
    assert path.exists(), f"{path} is missing: `make test-peers` fetches it"
    return path


@pytest.fixture(scope="session")
def llama_cpp():
    """llama.cpp's library: llama_cpp.load("model.gguf") -> tokenize, logits."""
    import peers
    from benchmarks.llama_cpp import LlamaCpp

    return LlamaCpp(fetched(peers.LLAMA_CPP))


@pytest.fixture(scope="session")
def smollm2_gguf():
    """The real SmolLM2-135M-Instruct: Q4_1, and Q8_0 for the embedding."""
    import peers

    return fetched(peers.SMOLLM2)
