"""The run as a whole, in small: train.main() with real files, in this process."""

import ast
import csv
import json
import math
import re
import signal

import pytest
import sentencepiece
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import sample
import train
from configurator import ROOT, UserError, configure
from conftest import tiny_run
from generate import SamplingSettings, generate
from model import LanguageModel, ModelConfig
from optim import OptimSettings, lr_at
from runtime import checkpoint
from runtime.run import run_folder


def rows(folder):
    with open(folder / "log.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(folder, name):
    return [float(row[name]) for row in rows(folder) if row[name]]


def interrupt_at(monkeypatch, step, number=signal.SIGTERM):
    """A real signal in the middle of the given step."""
    original, seen = train.Run.step, []

    def wrapped(*args):
        seen.append(1)
        if len(seen) == step:
            signal.raise_signal(number)
        return original(*args)

    monkeypatch.setattr(train.Run, "step", wrapped)


def same(a, b):
    """Equal to the last bit, through dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ("seconds", "settings"))
    return a == b


@pytest.mark.parametrize("step", [1, 5, 6, 11])
@pytest.mark.parametrize("optimizer, dropout, ema", [("muon", 0.1, 0.9), ("adamw", 0.0, 0.0)])
def test_resume_is_bit_exact_from_any_step(go, tmp_path, monkeypatch, step, optimizer, dropout, ema):
    more = dict(optimizer=optimizer, dropout=dropout, ema=ema, log_interval=4, grad_accum=2)
    assert go(out_dir=tmp_path / "whole", **more) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        assert go(out_dir=tmp_path / "broken", **more) == 128 + signal.SIGTERM
    assert checkpoint.steps(tmp_path / "broken")[-1].name == f"step_{step:08d}.pt"
    assert go(out_dir=tmp_path / "broken", **more) == 0
    for name in ("step_00000012.pt", "best.pt"):
        whole, broken = (checkpoint.load(tmp_path / folder / name) for folder in ("whole", "broken"))
        assert same(whole, broken), name
    for name in ("step", "tokens", "loss", "lr", "grad_norm", "val_loss", "val_bits_per_byte"):
        assert [r[name] for r in rows(tmp_path / "whole")] == [r[name] for r in rows(tmp_path / "broken")], name


def test_the_same_settings_give_the_same_weights_and_another_seed_others(go, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        go(out_dir=tmp_path / name, seed=seed, max_steps=3)
    a, b, c = (checkpoint.load(tmp_path / n / "step_00000003.pt")["model"] for n in "abc")
    assert same(a, b) and not same(a, c)


def test_training_learns(go, tmp_path):
    go(max_steps=150, eval_interval=50, lr=3e-3)
    losses = column(tmp_path / "run", "val_loss")
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.3
    assert column(tmp_path / "run", "loss")[0] == pytest.approx(math.log(300), rel=0.05)


@pytest.mark.parametrize("schedule", ["cosine", "cosine_restarts", "linear", "wsd", "constant"])
def test_recorded_learning_rate_equals_the_formula_in_optimizer_steps(go, tmp_path, schedule):
    go(schedule=schedule, lr=0.01, min_lr=0.002, t0=3, grad_accum=4, eval_interval=12)
    settings = OptimSettings(schedule=schedule, lr=0.01, min_lr=0.002, warmup_steps=2, t0=3)
    recorded = column(tmp_path / "run", "lr")
    assert recorded == pytest.approx([0.01 * lr_at(step, settings, 12) for step in range(12)], rel=1e-6)
    assert recorded[0] > 0 and max(recorded) == pytest.approx(0.01)
    assert recorded[-1] == pytest.approx(0.01 if schedule == "constant" else 0.002)


def test_accumulation_does_not_change_the_run(go, tmp_path):
    same = dict(batch_size=2, max_steps=4, optimizer="adamw")  # Muon's bfloat16 would make rounding visible
    go(out_dir=tmp_path / "a", **same | dict(batch_size=8))
    go(out_dir=tmp_path / "b", **same, grad_accum=4)
    go(out_dir=tmp_path / "c", **same, total_batch_size=8 * 16)
    for name in ("loss", "grad_norm", "val_loss"):
        a, b, c = (column(tmp_path / folder, name) for folder in "abc")
        assert a == pytest.approx(b, rel=1e-4) and b == pytest.approx(c, rel=1e-6)


def test_a_large_batch_is_cut_into_the_largest_forward_passes_that_divide():
    for world, expected in ((1, 8), (2, 5), (4, 5), (5, 8), (8, 5)):
        s = configure(train.SETTINGS, ["total_batch_size=640", "seq_len=16", "batch_size=8"], {})
        plan = train.plan_steps(s, world, train.Progress())
        assert (plan.sequences, plan.per_rank, plan.micro_batch) == (40, 40 // world, expected)


def test_max_tokens_sets_the_length(go, tmp_path):
    go(max_tokens=5 * 4 * 16 - 3, max_steps=None)
    assert checkpoint.load(checkpoint.find(tmp_path / "run"))["progress"]["tokens"] == 5 * 4 * 16


def test_max_steps_on_the_command_line_is_stronger_than_the_tokens_of_a_config(tmp_path):
    config = tmp_path / "long.py"
    config.write_text("max_tokens = 10_000_000")
    for argv, expected in (([], -(-10_000_000 // (16 * 256))), (["max_steps=2"], 2), (["max_tokens=8192"], 2)):
        s = configure(train.SETTINGS, [str(config), *argv], {})
        assert train.plan_steps(s, 1, train.Progress()).max_steps == expected


def test_validation_does_not_change_the_training(go, tmp_path):
    go(out_dir=tmp_path / "a", eval_interval=2, dropout=0.2)
    go(out_dir=tmp_path / "b", eval_interval=12, eval_tokens=64, dropout=0.2)
    assert column(tmp_path / "a", "loss") == column(tmp_path / "b", "loss")


def test_best_holds_the_weights_that_were_scored_and_last_those_at_the_end(go, text, tmp_path):
    from eval import evaluate
    from runtime.device import MachineSettings, choose_machine
    from text.batches import Validation
    from text.shards import TokenStream

    go(lr=0.3, muon_lr=0.3, max_steps=18, ema=0.5, eval_interval=3)  # so large that it gets worse again
    losses = column(tmp_path / "run", "val_loss")
    model, tokenizer, state = checkpoint.load_model(tmp_path / "run" / "best.pt")
    assert state["progress"]["step"] == 3 * (losses.index(min(losses)) + 1)
    folder = data.prepare(configure(train.SETTINGS, tiny_run(text, tmp_path / "run"), {}), quiet=True)
    windows = Validation(TokenStream(folder, "val", tokenizer), 16, tokenizer, 640)
    machine = choose_machine(MachineSettings(device="cpu", dtype="float32"))
    assert evaluate(model, windows, machine).loss == pytest.approx(min(losses), abs=1e-6)
    assert [p.name for p in checkpoint.steps(tmp_path / "run")] == ["step_00000015.pt", "step_00000018.pt"]


def test_the_averaged_weights_are_what_sampling_loads(go, tmp_path):
    go(ema=0.9)
    model, _, state = checkpoint.load_model(checkpoint.steps(tmp_path / "run")[-1])
    weight, averaged = model.blocks[0].attn.q.weight.data, state["ema"]["weights"]
    assert same(weight, averaged["blocks.0.attn.q.weight"])
    assert not same(weight, state["model"]["blocks.0.attn.q.weight"])
    assert same(model.embed.weight.data, averaged["embed.weight"]) and same(model.head.weight, model.embed.weight)
    best, _, _ = checkpoint.load_model(tmp_path / "run" / "best.pt")
    assert same(best.embed.weight, model.embed.weight), "the last validation was the best"


def test_train_sample_train_in_one_process(go, tmp_path, capsys):
    go(max_steps=6)
    sample.main([f"init_from={tmp_path / 'run'}", "prompt=the quick", "max_new_tokens=40", "temperature=0"])
    first = capsys.readouterr().out.splitlines()[-1]
    go(max_steps=12)
    assert "the quick" in first
    assert column(tmp_path / "run", "step")[-1] == 12


def test_a_complete_run_says_so_and_changes_nothing(go, tmp_path, capsys):
    go()
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert go() == 0
    assert "the run is complete" in capsys.readouterr().out
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


def test_starting_from_a_checkpoint_takes_its_shape_and_tokenizer(go, text, tmp_path):
    go(d_model=48, vocab_size=280)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text() + "Zebras and quartz! " * 40)
    shape = dict.fromkeys(("d_model", "n_layer", "n_head", "n_kv_head", "vocab_size", "seq_len"))
    tune = dict(data_path=other, cache_dir=tmp_path / "cache", out_dir=tmp_path / "tuned", init_from=tmp_path / "run")
    go(**tune, **shape, max_steps=2, lr=1e-9, muon_lr=1e-9)
    base, tuned = checkpoint.load(tmp_path / "run/best.pt"), checkpoint.load(tmp_path / "tuned/step_00000002.pt")
    assert base["tokenizer"] == tuned["tokenizer"]
    for name, weight in base["model"].items():
        assert torch.allclose(weight, tuned["model"][name], atol=1e-6)
    go(**tune, **shape, max_steps=4, lr=1e-9, muon_lr=1e-9)  # and the tuned run continues
    assert checkpoint.steps(tmp_path / "tuned")[-1].name == "step_00000004.pt"


def test_a_start_from_a_checkpoint_does_not_drop_another_tokenizer_silently(go, tmp_path):
    go(max_steps=2)
    with pytest.raises(UserError, match="tokenizer=char: .*best.pt has its own, from tokenizer=bpe"):
        go(init_from=tmp_path / "run", out_dir=tmp_path / "more", tokenizer="char")
    assert not (tmp_path / "more").exists()


def test_a_run_never_starts_from_a_checkpoint_into_the_folder_of_that_run(go, tmp_path):
    go(max_steps=2)
    for path in (tmp_path / "run", tmp_path / "run" / "best.pt"):
        with pytest.raises(UserError, match="set another out_dir"):
            go(max_steps=4, init_from=path)


@pytest.mark.parametrize("changes, words", [
    (dict(d_model=64), ["d_model=32", "d_model=64", "out_dir"]),
    (dict(n_kv_head=4), ["n_kv_head"]),
    (dict(init_from="scratch"), ["scratch", "out_dir"]),
    (dict(vocab_size=290), ["tokenizer", "out_dir"]),
])
def test_another_model_in_a_runs_folder_is_refused_and_nothing_is_lost(go, tmp_path, changes, words):
    go(max_steps=3)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError) as error:
        go(max_steps=6, **changes)
    assert all(word in str(error.value) for word in words), error.value
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("changes, words", [
    (dict(data_path="nothere.txt"), ["nothere.txt"]),
    (dict(total_batch_size=100), ["total_batch_size=100", "96"]),
    (dict(total_batch_size=1000), ["total_batch_size=1000", "992"]),
    (dict(n_head=5), ["d_model=32", "n_head=5"]),
    (dict(vocab_size=50000), ["vocab_size"]),
    (dict(seq_len=100000), ["seq_len"]),
    (dict(batch_size=0), ["batch_size=0"]),
    (dict(device="tpu"), ["device=tpu"]),
    (dict(optimizer="sgd"), ["optimizer=sgd", "muon"]),
    (dict(tokenizer="nothere.json"), ["nothere.json"]),
    (dict(max_steps=0), ["max_steps"]),
    (dict(init_from="nothere"), ["nothere"]),
])
def test_a_mistake_gets_one_sentence_before_any_training(go, tmp_path, changes, words):
    with pytest.raises(UserError) as error:
        go(**changes)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("run/*.pt"))


def test_a_run_has_a_folder_of_its_own(monkeypatch):
    def folder(*argv, **environ):
        path = run_folder(configure(train.SETTINGS, list(argv), environ))
        return path.relative_to(ROOT / "out").as_posix()

    assert folder() == "quickstart"
    assert folder("config/gpt2.py", "lr=1") == "gpt2"
    assert folder("data_path=/x/my book.txt") == "quickstart-my book"
    assert folder("config/gpt2.py", DATA_PATH="a/b.jsonl") == "gpt2-b"
    assert folder("dataset=shakespeare") == "quickstart-shakespeare"
    for tokenizer, name in (("char", "char"), ("bpe", "bpe"), ("x/english/tokenizer.json", "english"),
                            ("out/tokenizer", "tokenizer"), ("llama.model", "llama"), ("gpt2", "gpt2")):
        assert folder("data_path=my.txt", TOKENIZER=tokenizer) == f"quickstart-my-{name}"


def test_a_checkpoint_needs_no_other_file(go, tmp_path):
    go(max_steps=2, tokenizer="char", vocab_size=None)
    alone = tmp_path / "elsewhere" / "model.pt"
    alone.parent.mkdir()
    (tmp_path / "run" / "best.pt").rename(alone)
    model, tokenizer, _ = checkpoint.load_model(alone)
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"
    assert model.cfg.vocab_size == tokenizer.vocab_size
    assert generate(model, [tokenizer.encode("the")], SamplingSettings(max_new_tokens=3))


def samples(folder):
    """[(settings, text)] of samples.txt"""
    parts = re.split(r"^-------- (.*)\n", (folder / "samples.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture
def documents(tmp_path):
    """Training and validation documents that do not share a beginning."""
    for split in ("train", "val"):
        lines = [json.dumps({"text": f"{split} {i} is a number, and {i + 1} follows. " * 4}) for i in range(40)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    return dict(data_path=tmp_path / "train.jsonl", val_path=tmp_path / "val.jsonl", cache_dir=tmp_path / "cache")


def test_samples_begin_as_documents_that_were_not_trained_on_at_every_temperature(go, tmp_path, documents):
    go(**documents, max_steps=2)
    found = samples(tmp_path / "run")
    assert len(found) == 4 * 3
    for k, temperature in enumerate(("0.8, top_p 0.95", "0, top_p 1", "1, top_p 0.95")):
        for n, (settings, text) in enumerate(found[4 * k : 4 * k + 4]):
            assert settings.startswith(f"temperature {temperature}, seed 1337; the prompt is "), settings
            prompt = ast.literal_eval(settings.partition("prompt is ")[2])
            assert text.startswith(prompt) and len(text) > len(prompt)
            assert prompt == "" if n == 0 else re.match(r"val \d+ is a number", prompt) and len(prompt) <= 40, prompt
    assert len({settings for settings, _ in found}) == 12, "the documents are different ones"


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_sample_and_its_prompt_join_with_the_space_of_their_text(go, tmp_path, documents, monkeypatch, kind):
    """As in Llama 2, a space stands before the text and goes when it is decoded: a continuation that is decoded alone
    would lose one, too."""
    truth, path = {}, tmp_path / "tokenizer.model"
    with open(path, "wb") as file:
        lines = (tmp_path / "train.jsonl").read_text().splitlines()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(json.loads(line)["text"] for line in lines), model_writer=file, model_type=kind,
            vocab_size=300, hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, add_dummy_prefix=True, minloglevel=2)

    def oracle(model, prompts, sampling, stops, unused):  # a model that knows how each document goes on
        rows = []
        for prompt in prompts:
            text = truth["tokenizer"].decode(prompt[1:])
            whole = next((t for t in truth["texts"] if text and t.startswith(text)), "")
            ids = truth["tokenizer"].encode(whole)
            rows.append(ids[len(prompt) - 1 :] if ids[: len(prompt) - 1] == prompt[1:] else [])
        return rows

    original = sample.write_samples

    def write_samples(run, model, tokenizer, *rest):
        lines = (tmp_path / "val.jsonl").read_text().splitlines()
        truth.update(tokenizer=tokenizer, texts=[json.loads(line)["text"] for line in lines])
        return original(run, model, tokenizer, *rest)

    monkeypatch.setattr(sample, "generate", oracle)
    monkeypatch.setattr(sample, "write_samples", write_samples)
    go(**documents, tokenizer=path, vocab_size=None, max_steps=1)
    texts = [text.rstrip("\n") for settings, text in samples(tmp_path / "run") if not settings.endswith("''")]
    assert len(texts) == 9 and set(texts) <= set(truth["texts"])


def test_samples_have_a_fixed_number_of_tokens_whatever_the_machine(go, tmp_path, monkeypatch, documents):
    asked, original = [], sample.generate

    def generating(model, prompts, sampling, stops, unused):
        asked.append((len(prompts), sampling.max_new_tokens))
        return original(model, prompts, sampling, stops, unused=unused)

    monkeypatch.setattr(sample, "generate", generating)
    for name, seq_len, tokens in (("short", 16, 8), ("long", 256, 100)):
        go(**documents, out_dir=tmp_path / name, max_steps=1, seq_len=seq_len)
        assert asked == [(4, tokens)] * 3
        asked.clear()


def test_the_same_run_writes_the_same_samples(go, tmp_path):
    for name in ("one", "two"):
        go(out_dir=tmp_path / name, max_steps=2)
    assert samples(tmp_path / "one") == samples(tmp_path / "two")


def test_samples_that_cannot_be_written_are_a_sentence_and_the_run_is_complete(go, tmp_path, capsys):
    (tmp_path / "run" / "samples.txt").mkdir(parents=True)
    assert go(max_steps=2) == 0
    out = capsys.readouterr().out
    assert "cannot write more of them to" in out and "Is a directory" in out and "\nsample   python sample.py" in out


@pytest.mark.parametrize("here, scripts, run", [(ROOT, "", "{}/run"), ("{}", f"{ROOT}/", "run")])
def test_the_end_says_what_came_out_and_its_commands_work_here(text, tmp_path, capsys, monkeypatch, here, scripts, run):
    monkeypatch.chdir(str(here).format(tmp_path))
    assert train.main(tiny_run(text, tmp_path / "run")) == 0
    out = capsys.readouterr().out
    end = re.search(r"^trained  [\d:]+ for 768 tokens; best validation loss ([\d.]+); peak memory .* GB$", out, re.M)
    assert float(end[1]) == pytest.approx(min(column(tmp_path / "run", "val_loss")), abs=1e-4)
    commands = dict(re.findall(r"^(sample|evaluate|plot|continue) +(.*)$", out, re.M))
    run = run.format(tmp_path)
    assert commands["sample"] == f"python {scripts}sample.py --init_from {run} --prompt ..."
    assert commands["evaluate"] == f"python {scripts}eval.py --init_from {run}"
    assert commands["plot"] == f"python {scripts}plot.py {run}"
    assert commands["continue"] == "the same command with MAX_STEPS=24"


def test_bf16_training_keeps_fp32_masters(go, tmp_path):
    go(dtype="bfloat16", max_steps=3)
    state = checkpoint.load(tmp_path / "run/step_00000003.pt")
    tensors = [*state["model"].values(), *(t for n, t in state["optimizer"].items() if n != "applied")]
    assert {t.dtype for t in tensors} == {torch.float32}


@pytest.mark.parametrize("preset", ["quickstart", "llama", "gpt2"])
def test_initial_loss_of_presets_is_that_of_guessing(preset):
    """At full width and depth of 2: the head's scale is what matters."""
    names = {"quickstart": [], "llama": ["config/lumen.py"], "gpt2": ["config/gpt2.py"]}[preset]
    s = configure(train.SETTINGS, [*names, "n_layer=2", "vocab_size=8000"], {})
    torch.manual_seed(0)
    model = LanguageModel(s.part(ModelConfig)).eval()
    ids = torch.randint(8000, (2, 128))
    with torch.no_grad():
        assert model(ids[:, :-1], ids[:, 1:]).mean().item() == pytest.approx(math.log(8000), rel=0.05)


def test_overwrite_train_begins_anew_and_keeps_what_was_there(go, tmp_path, capsys):
    go(max_steps=4)
    old = checkpoint.load_newest(tmp_path / "run")
    assert go(max_steps=4, seed=5, overwrite="train") == 0
    assert not same(checkpoint.load_newest(tmp_path / "run")["model"], old["model"])
    assert same(checkpoint.load_newest(tmp_path / "run" / "before_1"), old)
    assert [row["step"] for row in rows(tmp_path / "run")] == [row["step"] for row in rows(tmp_path / "run/before_1")]
    assert go(max_steps=4, seed=5, overwrite="tokens") == 0, "a stage before training includes it"
    assert (tmp_path / "run" / "before_2").is_dir()
    assert "the same command with MAX_STEPS=8 OVERWRITE=\n" in capsys.readouterr().out
    go(max_steps=6, seed=5, overwrite="")
    assert not (tmp_path / "run" / "before_3").exists()


def test_overwrite_is_not_for_the_attempts_after_a_crash(go, tmp_path, monkeypatch):
    go(max_steps=4)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    go(max_steps=6, overwrite="train")
    assert not (tmp_path / "run" / "before_1").exists()
    assert checkpoint.load_newest(tmp_path / "run")["progress"]["step"] == 6


@pytest.fixture(scope="module")
def plain_weights(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    train.main(tiny_run(text, folder, max_steps=4, eval_interval=4))
    return checkpoint.load(folder / "step_00000004.pt")["model"]


@pytest.mark.parametrize("changes", [
    dict(beta1=0.5), dict(beta2=0.5), dict(eps=1e-2), dict(weight_decay=0.5), dict(grad_clip=1e-9), dict(lr=1e-3),
    dict(muon_lr=1e-3), dict(muon_momentum=0.5), dict(min_lr=2e-3), dict(warmup_steps=0), dict(schedule="constant"),
    dict(optimizer="adamw"), dict(init_std=0.1), dict(embed_scale=2.0), dict(logit_softcap=5.0), dict(dropout=0.3),
    dict(label_smoothing=0.3), dict(seed=1), dict(data_order="sequential"), dict(data_window="document"),
    dict(batch_size=3), dict(grad_accum=2), dict(tie_embeddings=False), dict(norm="layernorm"), dict(qk_norm=False),
    dict(norm_eps=0.1), dict(rope_theta=10.0), dict(window=2), dict(ffn="gelu"),
], ids=str)
def test_a_setting_changes_what_is_learned(go, tmp_path, plain_weights, changes):
    go(max_steps=4, eval_interval=4, **changes)
    assert not same(checkpoint.load(tmp_path / "run" / "step_00000004.pt")["model"], plain_weights)


@pytest.mark.parametrize("schedule, changes", [("wsd", dict(decay_share=0.9)), ("cosine_restarts", dict(t_mult=1))])
def test_a_setting_of_a_schedule_changes_its_curve(go, tmp_path, schedule, changes):
    for name, more in (("plain", {}), ("changed", changes)):
        go(out_dir=tmp_path / name, schedule=schedule, t0=3, **more)
    assert column(tmp_path / "plain", "lr") != column(tmp_path / "changed", "lr")


def test_gradients_are_clipped_to_grad_clip_and_the_log_has_their_norm_before(go, tmp_path, monkeypatch):
    original, after = train.clip_grad_norm, []

    def clip(params, *args, **kwargs):
        params = list(params)
        norm = original(params, *args, **kwargs)
        after.append(torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm().item())
        return norm

    monkeypatch.setattr(train, "clip_grad_norm", clip)
    go(max_steps=4, grad_clip=0.01)
    assert after == pytest.approx([0.01] * 4, rel=1e-3)
    assert min(column(tmp_path / "run", "grad_norm")) > 0.01


def test_log_interval_is_the_number_of_steps_between_lines(go, tmp_path):
    go(log_interval=5)
    assert [row["step"] for row in rows(tmp_path / "run") if row["loss"]] == ["5", "10", "12"]


def test_keep_checkpoints_says_how_many_stay(go, tmp_path):
    go(eval_interval=2, keep_checkpoints=3)
    kept = [path.name for path in checkpoint.steps(tmp_path / "run")]
    assert kept == ["step_00000008.pt", "step_00000010.pt", "step_00000012.pt"]


def test_overwrite_keeps_the_run_in_place_when_the_data_is_a_mistake(go, tmp_path):
    go(max_steps=4)
    with pytest.raises(UserError, match="vocab_size=9999"):
        go(max_steps=4, overwrite="train", vocab_size=9999)
    assert checkpoint.load_newest(tmp_path / "run")["progress"]["step"] == 4


class NoFloat64(TorchDispatchMode):
    """As an Apple GPU: whatever comes out as float64 is refused."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(isinstance(each, torch.Tensor) and each.dtype == torch.float64 for each in tree_leaves(result)):
            raise TypeError(f"this device has no float64: {function}")
        return result


@pytest.mark.parametrize("changes", [
    {}, dict(optimizer="adamw", ema=0.9), dict(n_expert=4, top_k=2, balance="bias", ema=0.9), dict(grad_clip=0),
    dict(n_expert=4, top_k=2, balance="loss", router="sigmoid"), dict(label_smoothing=0.1, dropout=0.1),
])
def test_a_step_needs_no_float64(go, monkeypatch, changes):
    step = train.Run.step

    def without(self, *args):
        with NoFloat64():
            return step(self, *args)

    monkeypatch.setattr(train.Run, "step", without)
    with pytest.raises(TypeError, match="no float64"), NoFloat64():
        torch.zeros(2).double()
    assert go(max_steps=3, **changes) == 0
