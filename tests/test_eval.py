"""Scores of text: every byte once, whatever the batches and windows; the numbers that the run itself reported."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as module
import train
from configurator import ROOT, UserError, configure
from conftest import tiny_run
from eval import Choice, Score, evaluate, log_likelihoods
from model import LanguageModel, ModelConfig
from runtime import checkpoint, resume
from runtime.device import MachineSettings, choose_machine
from text.shards import TokenStream
from text.tokenizer_files import train_tokenizer
from text.windows import TextWindows, overlapping

MACHINE = choose_machine(MachineSettings(device="cpu", dtype="float32"))
TEXT = "Ein süßer Hund, 水 and the quick brown fox.\n" * 30


class Uniform(torch.nn.Module):
    """Gives every byte of a text 8 bits."""

    def __init__(self, tokenizer):
        super().__init__()
        self.sizes = torch.from_numpy(tokenizer.token_sizes)

    def forward(self, ids, targets, weights):
        return self.sizes[targets].double() * math.log(256) * weights


@pytest.fixture(scope="module")
def base(text, tmp_path_factory):
    """A finished run with averaged weights."""
    folder = tmp_path_factory.mktemp("runs") / "base"
    train.main(tiny_run(text, folder, ema=0.9))
    return folder


def command(capsys, *arguments) -> str:
    module.main([f"device={MACHINE.device}", *arguments])
    return capsys.readouterr().out


def summary(run, name) -> dict:
    (path,) = [path for path in (run / "eval").iterdir() if re.fullmatch(rf"{name}(-[0-9a-f]{{6}})?\.json", path.name)]
    return json.loads(path.read_text(encoding="utf-8"))


def score_again(run, cache, abs=1e-6) -> float:
    """The loss of a run on its own validation data, which is the best that it reported."""
    module.main([f"device={MACHINE.device}", f"init_from={run}", f"cache_dir={cache}"])
    loss = summary(run, "validation")["loss"]
    assert loss == pytest.approx(checkpoint.load(run / "best.pt")["progress"]["best"], abs=abs)
    return loss


@pytest.mark.parametrize("length, seq_len, stride", [(2, 4, 4), (5, 4, 2), (6, 4, 4), (30, 7, 3), (31, 8, 1)])
def test_windows_predict_every_token_once_from_enough_context(length, seq_len, stride):
    made = []
    for row, known in overlapping(np.arange(length), seq_len, stride):
        assert len(row) <= seq_len + 1
        made += list(row[known + 1 :])
        assert row[0] == 0 or known >= seq_len - stride  # tokens before the first one that counts
    assert made == list(range(1, length))


def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    for kind, size in (("bpe", 300), ("bpe", 270), ("char", 0)):
        tokenizer = train_tokenizer(kind, [TEXT], size)
        windows = TextWindows(tokenizer, 16).add_text([(TEXT, True), ("and a fox", True)])
        score = evaluate(Uniform(tokenizer), windows, MACHINE, 4)
        assert score.bits_per_byte == pytest.approx(8, abs=1e-9)
        assert windows.bytes == len((TEXT + "and a fox").encode())


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary():
    tokenizer = train_tokenizer("bpe", [TEXT], 300)
    model = LanguageModel(ModelConfig(vocab_size=300, seq_len=16, d_model=32, n_layer=1, n_head=4))
    model.embed.weight.data.zero_()  # tied: all logits are equal
    windows = TextWindows(tokenizer, 16).add_text([(TEXT, True)])
    assert evaluate(model, windows, MACHINE).perplexity == pytest.approx(300, rel=1e-5)


def test_score_of_a_text_is_that_of_its_windows_one_by_one(base, text):
    model, tokenizer, _ = checkpoint.load_model(base / "best.pt")
    begin, documents = tokenizer.role("eot"), ["the fox jumps", text.read_text()[:900], "over"]
    windows = TextWindows(tokenizer, 16, 5).add_text([(each, True) for each in documents])
    nats = tokens = 0
    for document in documents:
        ids = torch.tensor([[begin, *tokenizer.encode(document)]])
        for row, known in overlapping(ids[0].numpy(), 16, 5):
            row = torch.tensor(row)[None]
            with torch.no_grad():
                nats += model(row[:, :-1], row[:, 1:].contiguous())[0, known:].double().sum().item()
        tokens += ids.shape[1] - 1
    assert windows.tokens == tokens
    for batch_size in (1, 7):
        assert evaluate(model, windows, MACHINE, batch_size).loss == pytest.approx(nats / tokens, abs=1e-6)


def tokens_of_text(text, run):
    """All tests share a cache, and each tokenizer and each split of the text leaves a folder of tokens."""
    _, tokenizer, state = checkpoint.load_model(run / "best.pt")
    made_of = json.loads(state["made_of"])
    wanted = {split: made_of[split] for split in ("train", "val")}
    return resume.find_tokens(str(text.parent / "cache"), tokenizer, wanted)[0]


def test_perplexity_is_the_exponential_of_the_loss_and_a_number_where_a_run_diverged():
    assert Score(math.log(7), 1.0).perplexity == pytest.approx(7)
    assert Score(1e5, 1.0).perplexity > 1e300 and math.isnan(Score(math.nan, 1.0).perplexity)


def test_text_in_pieces_and_prepared_tokens_score_alike(base, text):
    model, tokenizer, state = checkpoint.load_model(base / "best.pt")
    folder = tokens_of_text(text, base)
    stream = TokenStream(folder, "val", tokenizer)
    whole = tokenizer.decode(stream.read(0, len(stream) - 1).tolist())
    pieces = [(whole[:500], False), (whole[500:], True)]
    a = TextWindows(tokenizer, 16).add_text(pieces)
    b = TextWindows(tokenizer, 16).add_stream(stream)
    assert (a.tokens, a.bytes) == (b.tokens, b.bytes)
    assert evaluate(model, a, MACHINE) == evaluate(model, b, MACHINE)


def test_more_context_does_not_change_a_short_text_nor_what_is_counted(base):
    model, tokenizer, _ = checkpoint.load_model(base / "best.pt")
    scores = [evaluate(model, TextWindows(tokenizer, 16, stride).add_text([("the dog", True)]), MACHINE)
              for stride in (1, 16)]
    assert scores[0] == scores[1]


# ---- the command

def test_default_is_the_loss_that_the_run_reported(base, text, capsys):
    best = score_again(base, text.parent / "cache")
    shown = re.findall(r"(?:validation: loss|the best of the run so far was) ([\d.]+)", capsys.readouterr().out)
    assert list(map(float, shown)) == pytest.approx([best, best], abs=2e-6)


def test_without_its_tokens_in_the_cache_a_sentence_names_the_command_that_makes_them(base, text, tmp_path, capsys):
    with pytest.raises(UserError, match="or prepare it: python data.py DATA_PATH=.*words.txt VOCAB_SIZE=300"):
        command(capsys, f"init_from={base}", f"cache_dir={tmp_path}")
    folder = data.prepare(configure([ModelConfig, data.DataSettings],
                                    [f"data_path={text}", "vocab_size=300", f"cache_dir={tmp_path}"], {}))
    shutil.move(folder, tmp_path / "moved")  # what it holds counts, not its name
    score_again(base, tmp_path)


@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_of_two_projects_with_files_of_one_name_each_run_is_scored_on_its_own(base, text, tmp_path, monkeypatch, task):
    losses = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if task == "sft":
            rows = [{"instruction": f"{name} {i}", "output": f"{name} runs {i * i}"} for i in range(30)]
            Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            more = dict(sft_mode=1, init_from=base, data_path="train.jsonl", max_steps=2)
        else:
            Path("train.txt").write_text(text.read_text().replace("fox", name))
            folder = tokens_of_text(text, base)
            more = dict(data_path="train.txt", tokenizer=folder, max_steps=2)
        more |= dict.fromkeys(("vocab_size", "d_model", "n_layer", "n_head", "n_kv_head"))
        train.main(tiny_run(text, tmp_path / "out" / name, **more | dict(seq_len=None, cache_dir=tmp_path / "cache")))
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        losses.add(score_again(tmp_path / "out" / name, tmp_path / "cache", abs=2e-6))
    assert len(losses) == 2


def test_a_run_of_before_fingerprints_is_scored_if_its_tokens_are_the_only_ones(base, text, tmp_path):
    state = torch.load(base / "best.pt", weights_only=True)
    del state["made_of"]
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / "best.pt")
    shutil.copytree(tokens_of_text(text, base), tmp_path / "cache" / "tokens")
    score_again(tmp_path / "run", tmp_path / "cache")


def test_a_run_with_adapters_reports_its_loss_too(base, text, tmp_path):
    shape = dict.fromkeys(("vocab_size", "seq_len", "d_model", "n_layer", "n_head", "n_kv_head"))
    more = dict(use_lora=1, task="pretrain", init_from=base, max_steps=4, eval_interval=2, eval_tokens=300)
    train.main(tiny_run(text, tmp_path / "tuned", **shape | more))
    score_again(tmp_path / "tuned", text.parent / "cache", abs=2e-6)


def test_any_text_and_prepared_tokens_can_be_scored(base, text, tmp_path, capsys):
    records = tmp_path / "a.jsonl"
    records.write_text(json.dumps({"body": "the fox"}) + "\n")
    out = command(capsys, f"init_from={base}", f"data_path={records}", "text_field=body")
    assert "7 bytes" in out and summary(base, "a")["bytes"] == 7
    folder = tokens_of_text(text, base)
    assert "validation" not in command(capsys, f"init_from={base}", f"data_path={folder}", "eval_tokens=0")
    assert "by 3:" in command(capsys, f"init_from={base}", "stride=3", f"cache_dir={text.parent / 'cache'}")


def test_unknown_characters_are_reported(text, tmp_path, capsys):
    train.main(tiny_run(text, tmp_path / "char", tokenizer="char", vocab_size=None, max_steps=2, eval_interval=2))
    other = tmp_path / "other.txt"
    other.write_text("the 水 dog\n", encoding="utf-8")
    assert "1 tokens (" in command(capsys, f"init_from={tmp_path / 'char'}", f"data_path={other}")


def test_what_normalisation_loses_of_scored_text_is_known(tmp_path):
    tokenizer = train_tokenizer("bpe", ["cafe"], 270)
    tokenizer.nfc = True
    windows = TextWindows(tokenizer, 8).add_text([("cafe\u0301 ", False), ("cafe", True)])
    assert windows.bytes == 11 and windows.unknown == 0 and windows.lost.rate > 0
    assert TextWindows(tokenizer, 8).add_text([("cafe", True)]).lost.rate == 0


def test_mistakes_end_in_a_sentence(base, text, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    run = f"init_from={base}"
    for arguments, words in (
        ([f"init_from={tmp_path}"], "holds no checkpoint"), ([run, "limit=-1"], r"limit=-1 .* must be at least 0"),
        ([run, "tasks=mmlu"], "there is no task mmlu"), ([run, "stride=17"], "seq_len is 16"),
        ([run, f"data_path={tmp_path / 'none'}"], "not found"), ([run, f"data_path={empty}"], "holds no text"),
        ([run, f"data_path={text}", "eval_tokens=9"], "a file is scored whole"),
        ([run, "tasks=piqa", f"task_dir={tmp_path}"], "piqa: no .jsonl or .parquet file"),
    ):
        with pytest.raises(UserError, match=words):
            module.main(["device=cpu", *arguments])
    (tmp_path / "shards").mkdir()
    meta = next((text.parent / "cache").glob("*/meta.json"))
    changed = json.loads(meta.read_text()) | {"tokenizer": "0123456789abcdef"}
    changed.pop("check")
    (tmp_path / "shards" / "meta.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="come from tokenizer 0123456789abcdef"):
        module.main(["device=cpu", run, f"data_path={tmp_path / 'shards'}"])


# ---- benchmarks

@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    for split, n in (("train", 8), ("valid", 40)):
        rows = [{"goal": "the dog " * (1 + i % 5), "sol1": f"runs {i}", "sol2": "jumps"} for i in range(n)]
        (folder / "piqa").mkdir(exist_ok=True)
        (folder / "piqa" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "piqa" / f"{split}-labels.lst").write_text("".join(f"{i % 2}\n" for i in range(n)))
    return folder


def test_a_benchmark_leaves_a_line_for_each_question_and_a_table(base, questions, capsys):
    out = command(capsys, f"init_from={base}", "tasks=piqa", f"task_dir={questions}", "n_shot=1", "limit=30")
    lines = [json.loads(line) for line in (base / "eval" / "piqa.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(range(30))
    row = out.splitlines()[-1].split()
    found = summary(base, "piqa")
    assert row[:3] == ["piqa", "30", "1"] and float(row[3]) == round(found["acc"], 4)
    assert found["acc"] == sum(line["acc"] for line in lines) / 30
    assert out.count("right: Question: the dog") == min(3, sum(line["acc_norm"] for line in lines))


def launch(*arguments, processes=0, **popen):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv_backend=c10d",
             "--rdzv_endpoint=localhost:0"] * bool(processes)
    return subprocess.Popen([sys.executable, *start, str(ROOT / "eval.py"), "device=cpu", *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, **popen)


def test_two_processes_give_the_results_of_one(base, text, questions, capsys):
    found = []
    for processes in (0, 2):
        for more in (["tasks=piqa", f"task_dir={questions}", "n_shot=2", "batch_tokens=60"], []):
            more = [*more, f"cache_dir={text.parent / 'cache'}"]
            process = launch(f"init_from={base}", *more, processes=processes)
            out, _ = process.communicate(timeout=120)
            assert process.returncode == 0, out
            found.append(out.splitlines()[-1] if "tasks=piqa" in more else out.splitlines()[-2])
    numbers = [[float(number) for number in re.findall(r"\d+\.\d+|\d+", line.replace(",", ""))] for line in found]
    assert numbers[0] == numbers[2] and numbers[1] == pytest.approx(numbers[3], rel=1e-5)


def test_what_is_done_before_ctrl_c_stays(base, questions):
    slow = ("import sys, time, runpy\nimport eval\nfast = eval.log_likelihoods\n"
            "def slow(*a):\n    time.sleep(0.2)\n    return fast(*a)\neval.log_likelihoods = slow\n"
            "sys.argv = sys.argv[1:]\neval.run(eval.main)")
    path = base / "eval" / "piqa.jsonl"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-c", slow, "eval.py", "device=cpu", f"init_from={base}", "tasks=piqa",
               f"task_dir={questions}", "batch_tokens=60"]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    begin = time.monotonic()
    while not path.exists() or path.read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() - begin < 600
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert process.returncode == 130 and "interrupted" in error
    assert 3 <= len(lines) < 40 and all(len(line["scores"]) == 2 for line in lines)


class AppleTensor(torch.Tensor):
    """A tensor on a device without float64; only what was copied to the CPU may become float64."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if function in (torch.Tensor.cpu, torch.Tensor.tolist) or isinstance(result, torch.Tensor) is False:
            return result.as_subclass(torch.Tensor) if isinstance(result, torch.Tensor) else result
        if isinstance(result, cls) and result.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return result


def test_nothing_is_summed_in_float64_on_the_device(base):
    """An Apple GPU has no float64: what the model computes refuses it here."""
    model, tokenizer, _ = checkpoint.load_model(checkpoint.find(base))
    with pytest.raises(TypeError, match="no float64"):
        torch.zeros(2).as_subclass(AppleTensor).double()
    model.register_forward_hook(lambda module, inputs, output: output.as_subclass(AppleTensor))
    windows = TextWindows(tokenizer, model.cfg.seq_len)
    windows.add_text([("the quick brown fox", True)])
    assert math.isfinite(evaluate(model, windows, MACHINE).loss)
    rows = [Choice([1, 2], [3], False), Choice([1, 2], [3, 4], False)]
    assert all(map(math.isfinite, log_likelihoods(model, rows, MACHINE)))


def test_a_benchmark_says_which_files_it_read(base, questions, capsys):
    assert "piqa: 40 questions of valid.jsonl" in command(capsys, f"init_from={base}", "tasks=piqa",
                                                          f"task_dir={questions}")
