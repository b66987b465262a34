"""Fine-tuning as a whole: train.main(), sample.main() and convert.main() with real files."""

import io
import json
import sys

import pytest
import torch
import torch.nn.functional as F

import convert
import lora
import sample
import train
from configurator import UserError, configure
from conftest import tiny_run, tune
from generate import SamplingSettings, generate
from runtime import checkpoint, run
from runtime.device import Machine
from test_chat import make, talk
from test_model import shaken, tiny
from test_reliability import finish, launch
from test_train import column, interrupt_at, same
from text.chat import ChatSettings, Template
from text.corpus import DataSettings
from text.sft import Examples, SftSettings, open_examples

# ---- the run


@pytest.mark.parametrize("more", [{}, dict(use_lora=1, lora_rank=4),
                                  dict(use_lora=1, lora_dora=1, learn="all"),
                                  dict(packing=0, template="alpaca")])
def test_fine_tuning_lowers_the_held_out_loss_and_leaves_the_base_alone(text, base, questions, tmp_path, more):
    before = {path: path.read_bytes() for path in base.iterdir() if path.is_file()}
    assert train.main(tune(text, base, questions, tmp_path / "run", max_steps=30, eval_interval=10, **more)) == 0
    losses = column(tmp_path / "run", "val_loss")
    assert losses[-1] < losses[0]
    assert {path: path.read_bytes() for path in base.iterdir() if path.is_file()} == before


def test_the_reported_loss_is_that_of_the_answers_alone(text, base, questions, tmp_path):
    train.main(tune(text, base, questions, tmp_path / "run"))
    model, tokenizer, _ = checkpoint.load_model(tmp_path / "run" / "step_00000012.pt")
    s = configure(train.SETTINGS, tune(text, base, questions, tmp_path / "run"), {})
    _, held_out = open_examples(tokenizer, *map(s.part, (DataSettings, ChatSettings, SftSettings)), seq_len=64,
                                seed=s.seed, eval_tokens=s.eval_tokens, quiet=True)
    template, nats, learned = Template("chatml", tokenizer), 0.0, 0
    for conversation in held_out.conversations:  # one by one, unpacked, by hand
        ids, counts = template.render(conversation)
        rows = F.cross_entropy(model(torch.tensor([ids]))[0, :-1], torch.tensor(ids[1:]), reduction="none")
        nats += (rows * torch.tensor(counts[1:])).sum().item()
        learned += sum(counts[1:])
    assert column(tmp_path / "run", "val_loss")[-1] == pytest.approx(nats / learned, rel=1e-4)


@pytest.mark.parametrize("kind", ["quickstart", "gpt2", "alibi", "reversible", "enigma"])
def test_packed_examples_give_the_loss_and_the_gradients_of_single_ones(kind):
    tokenizer = make("char")
    talks = [talk("what is a fox", "it is quick" * n) for n in (1, 2, 1, 3)] + [talk("a", "b", "c", "d")]
    results = []
    for packing in (True, False):
        examples = Examples(talks, Template("chatml", tokenizer), 96, packing=packing)
        model = shaken(tiny(kind, vocab_size=tokenizer.vocab_size, seq_len=96, reversible_grid=0)).train()
        torch.manual_seed(0)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        loss = model(*examples.get(0, examples.per_epoch)).sum()
        loss.backward()
        results.append((examples.per_epoch, loss.item(), [p.grad for p in model.parameters()]))
    (rows, a, packed), (more_rows, b, single) = results
    assert rows < more_rows == 5 and a == pytest.approx(b, rel=1e-4)
    for x, y in zip(packed, single, strict=True):
        if kind != "gpt2" or x.shape[0] != 96:  # the learned positions that padding reads
            assert torch.allclose(x, y, atol=1e-3 * y.abs().max().item() + 1e-6)


def test_a_forward_pass_without_learned_tokens_is_harmless():
    model = tiny()
    ids = torch.randint(97, (2, 32))
    loss = model(ids, ids, torch.zeros(2, 32)).sum()
    loss.backward()
    assert loss.item() == 0.0 and all(p.grad.abs().max() == 0.0 for p in model.parameters())


def resumes_bit_exact(argv: list[str], tmp_path, monkeypatch, at: int) -> dict:
    """Interrupts a second run like that of argv, in "a", at a step, and goes on. Returns the last state of "a"."""
    interrupt_at(monkeypatch, at)
    parts = [arg.replace(str(tmp_path / "a"), str(tmp_path / "b")) for arg in argv]
    assert train.main(parts) == 128 + 15
    monkeypatch.undo()
    assert train.main(parts) == 0
    a, b = (checkpoint.load(tmp_path / name / "step_00000012.pt") for name in "ab")
    assert same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"])
    return a


@pytest.mark.parametrize("more", [{}, dict(use_lora=1, lora_dora=1),
                                  dict(use_lora=1, lora_dropout=0.2),
                                  dict(use_lora=1, ema=0.9)])
@pytest.mark.parametrize("at", [3, 6])
def test_resume_is_bit_exact(text, base, questions, tmp_path, monkeypatch, more, at):
    argv = tune(text, base, questions, tmp_path / "a", **more)
    assert train.main(argv) == 0
    resumes_bit_exact(argv, tmp_path, monkeypatch, at)
    assert column(tmp_path / "a", "loss") == column(tmp_path / "b", "loss")


@pytest.fixture
def bf16_base():
    """Bases are held in bfloat16, as those of more parameters are. monkeypatch would end at its first undo()."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "SMALL", 0)
        yield dict(use_lora=1, dtype="bfloat16")


@pytest.mark.parametrize("more", [dict(lora_dora=1, lora_targets="all,head"), dict(ema=0.9)])
def test_a_bf16_base_resumes_bit_exact_and_is_merged_in_float32(text, base, questions, tmp_path, monkeypatch, capsys,
                                                                bf16_base, more):
    file = (base / "best.pt").read_bytes()
    argv = tune(text, base, questions, tmp_path / "a", **bf16_base, **more)
    assert train.main(argv) == 0
    assert "the frozen weights are in bfloat16" in capsys.readouterr().out
    a = resumes_bit_exact(argv, tmp_path, monkeypatch, 3)
    assert all(tensor.dtype == torch.float32 for tensor in a["model"].values())
    assert (base / "best.pt").read_bytes() == (tmp_path / "a" / "base.pt").read_bytes() == file

    convert.main([str(tmp_path / "a"), str(tmp_path / "merged"), "MERGE=1", "TO=run"])
    merged = checkpoint.load(tmp_path / "merged" / "best.pt")["model"]
    exact, adapters = (checkpoint.load(path / "best.pt")["model"] for path in (base, tmp_path / "a"))
    name = "blocks.0.ffn.up"
    expected = exact[f"{name}.weight"] + 2.0 * (adapters[f"{name}.lora_b"] @ adapters[f"{name}.lora_a"])
    if "lora_dora" in more:
        expected = (adapters[f"{name}.lora_magnitude"] / expected.norm(dim=1))[:, None] * expected
    assert torch.equal(merged[f"{name}.weight"], expected)
    assert torch.equal(merged["embed.weight"], exact["embed.weight"])


def test_two_processes_tune_as_one(text, base, questions, tmp_path):
    more = dict(use_lora=1, optimizer="adamw", batch_size=4)
    assert train.main(tune(text, base, questions, tmp_path / "one", **more)) == 0
    code, out = finish(launch(tune(text, base, questions, tmp_path / "two", **more), 2))
    assert code == 0, out
    for name in ("loss", "val_loss"):
        assert column(tmp_path / "one", name) == pytest.approx(column(tmp_path / "two", name), rel=2e-4)


# ---- adapters


@pytest.fixture(scope="module")
def adapted(text, base, questions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted") / "run"
    train.main(tune(text, base, questions, folder, use_lora=1, lora_rank=4))
    return folder


def test_an_adapter_run_saves_adapters_alone_and_what_they_belong_to(base, adapted):
    state = checkpoint.load(adapted / "best.pt")
    assert state["model"] and all("lora_" in name for name in state["model"])
    assert state["base"]["path"] == str(base / "best.pt")
    assert state["base"]["fingerprint"] == lora.fingerprint(checkpoint.load(base / "best.pt")["model"])
    moments = checkpoint.load(adapted / "step_00000012.pt")["optimizer"]
    assert all("lora_" in name for name in moments if name != "applied")


def test_adapters_on_their_base_and_the_merged_model_give_the_same_logits(base, adapted, tmp_path):
    ids = torch.randint(300, (2, 32))
    loaded, _, _ = checkpoint.load_model(adapted / "best.pt")
    convert.main([str(adapted), str(tmp_path / "merged"), "MERGE=1", "TO=run"])
    merged, _, state = checkpoint.load_model(tmp_path / "merged" / "best.pt")
    plain, _, _ = checkpoint.load_model(base / "best.pt")
    assert state["base"] is None and not any("lora_" in name for name in state["model"])
    assert torch.allclose(loaded(ids), merged(ids), atol=1e-5)
    assert not torch.allclose(loaded(ids), plain(ids), atol=1e-2)


def test_a_merge_that_cannot_be_written_leaves_no_folder(adapted, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_archive", full)
    with pytest.raises(UserError, match="No space left"):
        convert.main([str(adapted), str(tmp_path / "merged"), "MERGE=1", "TO=run"])
    assert not (tmp_path / "merged").exists()


def test_a_merged_model_can_be_a_base_and_adapters_cannot(text, adapted, questions, tmp_path):
    convert.main([str(adapted), str(tmp_path / "merged"), "MERGE=1", "TO=run"])
    assert train.main(tune(text, tmp_path / "merged", questions, tmp_path / "more", max_steps=2)) == 0
    with pytest.raises(UserError, match="convert.py"):
        train.main(tune(text, adapted, questions, tmp_path / "again"))
    with pytest.raises(UserError, match="is not empty"):
        convert.main([str(adapted), str(tmp_path / "merged"), "MERGE=1", "TO=run"])


def test_merging_an_adapted_head_unties_it(text, base, questions, tmp_path):
    train.main(tune(text, base, questions, tmp_path / "run", use_lora=1, lora_targets="all,head"))
    convert.main([str(tmp_path / "run"), "MERGE=1"])
    ids = torch.randint(300, (2, 32))
    loaded, merged = (checkpoint.load_model(checkpoint.find(tmp_path / name))[0] for name in ("run", "run-merged"))
    assert not merged.cfg.tie_embeddings and torch.allclose(loaded(ids), merged(ids), atol=1e-5)


def test_a_wrong_base_is_refused_and_a_moved_one_is_found(text, base, adapted, tmp_path):
    import shutil

    copy = shutil.copytree(adapted, tmp_path / "copy")
    state = torch.load(copy / "best.pt", weights_only=True)
    state["base"]["path"] = str(tmp_path / "gone" / "best.pt")
    torch.save(state, copy / "best.pt")
    assert checkpoint.load_model(copy / "best.pt")  # from the copy that the run kept
    (copy / "base.pt").unlink()
    with pytest.raises(UserError, match="LORA_BASE="):
        checkpoint.load_model(copy / "best.pt")
    assert checkpoint.load_model(copy / "best.pt", lora_base=str(base))
    train.main(tiny_run(text, tmp_path / "other", vocab_size=320, seq_len=64, max_steps=2, seed=2))
    with pytest.raises(UserError, match="does not hold the weights"):
        checkpoint.load_model(copy / "best.pt", lora_base=str(tmp_path / "other"))


# ---- what is chosen, and what is refused


@pytest.fixture
def home(monkeypatch, tmp_path):
    """An empty place for runs."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path)
    return tmp_path


def test_a_pretraining_config_lends_its_rates_but_not_its_length(tmp_path):
    (tmp_path / "c.py").write_text("lr = 6e-4\nmin_lr = 6e-5\noptimizer = 'adamw'\nmax_tokens = 10**10\n"
                                   "tokenizer = 'char'")
    s = configure(train.SETTINGS, [str(tmp_path / "c.py"), "sft_mode=1"], {})
    run.choose_task(s)
    assert (s.lr, s.min_lr) == (pytest.approx(1e-4), pytest.approx(1e-5))
    assert (s.max_steps, s.max_tokens) == (400, 0) and "tokenizer" not in s.report()
    (tmp_path / "c.py").write_text("task = 'sft'\nlr = 6e-4\nmax_steps = 7")
    s = configure(train.SETTINGS, [str(tmp_path / "c.py"), "min_lr=1e-5"], {})
    run.choose_task(s)
    assert (s.lr, s.min_lr, s.max_steps) == (6e-4, 1e-5, 7), "a config that is for fine-tuning is taken at its word"


@pytest.mark.parametrize("config, argv, task", [
    ("task = 'sft'", ["sft_mode=0"], "pretrain"), ("sft_mode = True", ["task=pretrain"], "pretrain"),
    ("task = 'pretrain'", ["sft_mode=1"], "sft"), ("", ["sft_mode=1", "task=sft"], "sft"),
])
def test_of_task_and_sft_mode_the_later_source_counts(tmp_path, config, argv, task):
    (tmp_path / "c.py").write_text(config)
    s = configure(train.SETTINGS, [str(tmp_path / "c.py"), *argv], {})
    run.choose_task(s)
    assert s.task == s.part(train.SftSettings).task == task


def test_a_folder_that_is_named_is_where_the_user_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("myrun", "out/quickstart", "tests"):
        assert settle(f"out_dir={name}")[1].resolve() == tmp_path / name
    (tmp_path / "out").mkdir()
    assert settle()[1] == run.ROOT / "out" / "quickstart"


def settle(*argv, **environ):
    s = configure(train.SETTINGS, list(argv), environ)
    run.choose_task(s)
    return s, run.run_folder(s)


def test_use_lora_alone_teaches_the_newest_pretraining_run_to_answer(home, base, adapted):
    import shutil

    shutil.copytree(base, home / "out" / "mine")
    shutil.copytree(adapted, home / "out" / "mine-sft-lora")  # newer, but no base
    s, folder = settle(USE_LORA="1")
    assert (s.task, s.dataset, s.lr, s.max_steps) == ("sft", "stdlib_chat", 5e-3, 400)
    assert folder == home / "out" / "mine-sft-lora" and run.base_of(s) == home / "out" / "mine" / "best.pt"
    s, folder = settle("LR=1e-4", USE_LORA="1", DATA_PATH="more.txt")  # adapters that go on with text
    assert (s.task, s.lr, folder.name) == ("pretrain", 1e-4, "mine-more-lora")
    s, folder = settle(SFT_MODE="1", DATA_PATH="my.jsonl")
    assert (s.task, s.use_lora, folder.name) == ("sft", False, "mine-my-sft")


def test_the_defaults_of_fine_tuning_fit_the_base_and_the_data(base, questions, tmp_path, monkeypatch, capsys):
    state = checkpoint.load(base / "best.pt", "meta")
    saved = json.loads(state["settings"]) | {"template": "model", "seq_len": 8192, "d_model": 576}

    def fitted(*argv, **changes):
        s = settle("use_lora=1", "task=sft", f"init_from={base}", *argv)[0]
        run.fit_to_base(s, saved | changes, print)
        return s.lr, s.seq_len, s.lora_targets

    assert fitted() == (1.2e-3, 512, "all") and "lr=0.0012, seq_len=512, lora_targets=all" in capsys.readouterr().out
    assert fitted(template="chatml")[0] == 1.7e-3
    assert fitted(d_model=192, seq_len=256, template="chatml") == (5e-3, 256, "all,head")  # the quickstart
    assert fitted("lr=1e-2", "lora_targets=q", "seq_len=9") == (1e-2, 9, "q")
    assert fitted(position="learned")[1] == 256

    def steps(rows, parameters, *argv):
        s = settle("use_lora=1", "task=sft", f"init_from={base}", *argv)[0]
        weights = {"w": torch.empty(int(parameters), device="meta")}
        run.fit_to_data(s, rows, weights, Machine(torch.device("cpu"), torch.float32, ""))
        return s.batch_size, s.grad_accum, s.max_steps

    assert steps(3, 1e6) == (1, 1, 30) and steps(1, 1e6) == (1, 1, 10)
    assert steps(100, 1e6) == (16, 1, 63) and steps(100, 1e9) == (1, 16, 63)
    assert steps(5000, 1e6) == (16, 1, 400)
    assert steps(100, 1e9, "batch_size=4") == (4, 1, 250) and steps(100, 1e9, "max_steps=7") == (1, 16, 7)


def test_without_a_trained_model_fine_tuning_says_how_to_get_one(home):
    with pytest.raises(UserError, match="python train.py"):
        settle(USE_LORA="1")
    with pytest.raises(UserError, match="scratch"):
        settle("init_from=scratch", USE_LORA="1")


@pytest.mark.parametrize("changes, words", [
    (dict(lora_rank=8), "lora_rank=4"),
    (dict(use_lora=0), "use_lora=True"),
    (dict(template="alpaca"), "template=chatml"),
])
def test_a_run_cannot_change_its_kind_on_the_way(text, base, questions, adapted, changes, words):
    with pytest.raises(UserError, match=words):
        train.main(tune(text, base, questions, adapted, **(dict(use_lora=1, max_steps=20) | changes)))


def test_a_broken_line_is_named(text, base, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", "out', encoding="utf-8")
    with pytest.raises(UserError, match=r"broken\.jsonl, line 2"):
        train.main(tune(text, base, path, tmp_path / "run"))


@pytest.mark.parametrize("more", [{}, dict(use_lora=1)])
def test_a_start_that_fails_at_its_data_leaves_no_folder(text, base, tmp_path, more):
    (tmp_path / "broken.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="broken.jsonl"):
        train.main(tune(text, base, tmp_path / "broken.jsonl", tmp_path / "run", **more))
    assert not (tmp_path / "run").exists()


def test_text_to_read_is_no_data_to_answer(text, base, tmp_path):
    with pytest.raises(UserError, match="stdlib_chat"):
        train.main(tune(text, base, None, tmp_path / "run", dataset="stdlib"))


# ---- talking


def test_a_talk_through_a_pipe(adapted, monkeypatch, capsys):
    typed = ["say fox and dog", "", "/system be brief", "hello", "/nonsense", "/reset", "hi", "/quit", "no"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed)))
    sample.main([f"init_from={adapted}", "--chat", "device=cpu", "max_new_tokens=6", "temperature=0"])
    out, err = capsys.readouterr()
    assert out.count("\n") >= 3 and "/nonsense is none of" in err and "not to answer" not in err


def test_chat_answers_as_generating_from_its_template_does(adapted, capsys):
    sample.main([f"init_from={adapted}", "--chat", "--prompt", "say fox and dog", "device=cpu", "max_new_tokens=8",
                 "temperature=0"])
    model, tokenizer, _ = checkpoint.load_model(adapted / "best.pt")
    template = Template("chatml", tokenizer)
    ids = template.prompt([{"role": "user", "content": "say fox and dog"}])
    new = generate(model, [ids], SamplingSettings(max_new_tokens=8, temperature=0), template.stop_ids)[0]
    assert capsys.readouterr().out.strip() == tokenizer.decode(new).strip()


@pytest.mark.parametrize("came, argv, expected", [
    (None, [], (0.3, 0, 0.95, 1.1)),
    ({"temperature": 0.6, "top_k": 20}, [], (0.6, 20, 0.95, 1.0)),
    ({"temperature": 0.6, "top_k": 20}, ["top_p=0.5"], (0.8, 0, 0.5, 1.0)),  # whoever sets one rule sets them all
    ("nonsense", [], (0.3, 0, 0.95, 1.1))])
def test_a_chat_samples_as_the_model_came_or_cautiously(came, argv, expected, adapted, monkeypatch):
    state, chats = checkpoint.load(adapted / "best.pt"), []
    tokenizer = json.loads(state["tokenizer"])
    tokenizer["config"]["sampling"] = came
    monkeypatch.setattr(checkpoint, "load", lambda path, device="cpu", load=checkpoint.load: load(path, device) | {
        "tokenizer": json.dumps(tokenizer)})
    monkeypatch.setattr(sample, "print_answer", lambda chat, said: chats.append(chat.sampling))
    sample.main([f"init_from={adapted}", "--chat", "--prompt", "hello", "device=cpu", *argv])
    got = chats[0]
    assert (got.temperature, got.top_k, got.top_p, got.repetition_penalty) == expected


def test_a_model_that_was_not_taught_to_answer_says_so(base, capsys):
    sample.main([f"init_from={base}", "--chat", "--prompt", "hello", "device=cpu", "max_new_tokens=4"])
    assert "USE_LORA=1 python train.py" in capsys.readouterr().err


def test_a_talk_is_held_in_the_template_and_with_the_system_text_of_the_run(text, base, questions, tmp_path, capsys,
                                                                            monkeypatch):
    run, chats = tmp_path / "run", []
    train.main(tune(text, base, questions, run, template="alpaca", system="be brief", max_steps=2, eval_interval=2))
    assert "be brief\n\n### Instruction:" in capsys.readouterr().out  # in the example that is shown
    monkeypatch.setattr(sample, "print_answer", lambda chat, said: chats.append(chat))
    sample.main([f"init_from={run}", "--chat", "--prompt", "hello", "device=cpu"])
    assert chats[0].template.name == "alpaca" and chats[0].system == "be brief"


def test_reset_and_system_change_the_talk(adapted, monkeypatch):
    seen = []

    def print_answer(chat, said):
        seen.append((said, chat.system, len(chat.turns)))
        list(chat.say(said))

    monkeypatch.setattr(sample, "print_answer", print_answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n/system be brief\ntwo\n/reset\nthree"))
    sample.main([f"init_from={adapted}", "--chat", "device=cpu", "max_new_tokens=2"])
    assert seen == [("one", "", 0), ("two", "be brief", 1), ("three", "be brief", 0)]


def test_adapters_leave_the_balance_of_frozen_experts_alone(text, questions, tmp_path):
    shape = dict(n_expert=4, d_expert=16, balance="bias", balance_rate=0.05, vocab_size=320, seq_len=64)
    train.main(tiny_run(text, tmp_path / "base", max_steps=7, eval_interval=7, **shape))  # odd: ± 0.05 seven times
    weights = checkpoint.load(tmp_path / "base" / "best.pt")["model"]
    bias = torch.cat([weights[f"blocks.{i}.ffn.bias"] for i in (0, 1)])
    assert bias.abs().max() > 0 and torch.allclose((bias / 0.05).round() * 0.05, bias, atol=1e-6)
    run = tmp_path / "tuned"
    train.main(tune(text, tmp_path / "base", questions, run, use_lora=1, max_steps=6))
    model, _, _ = checkpoint.load_model(run / "best.pt")
    assert torch.equal(torch.cat([block.ffn.bias for block in model.blocks]), bias)


def test_a_base_that_trains_on_does_not_cost_its_adapters(text, questions, tmp_path):
    more = dict(vocab_size=320, seq_len=64)
    train.main(tiny_run(text, tmp_path / "base", max_steps=4, eval_interval=4, **more))
    train.main(tune(text, tmp_path / "base", questions, tmp_path / "tuned", use_lora=1, max_steps=2, eval_interval=2))
    before, _, _ = checkpoint.load_model(tmp_path / "tuned" / "best.pt")
    train.main(tiny_run(text, tmp_path / "base", max_steps=12, eval_interval=4, **more))
    after, _, _ = checkpoint.load_model(tmp_path / "tuned" / "best.pt")
    assert torch.equal(before.blocks[0].attn.q.weight, after.blocks[0].attn.q.weight)


@pytest.mark.parametrize("argv, word", [
    (["sft_mode=1", "task=pretrain"], "contradict"), (["lora_rank=8"], "use_lora=1"),
    (["sft_mode=1", "val_path=x.jsonl"], "data_path"), (["task=sft", "mixture=a:1 b:1"], "is for pretraining"),
    (["task=sft", "tokenizer=char"], "uses the tokenizer of its base"),
    (["task=sft", "vocab_size=300"], "uses the tokenizer of its base")])
def test_settings_that_contradict_each_other_are_refused(home, argv, word):
    with pytest.raises(UserError, match=word):
        settle(*argv)


def test_a_run_says_when_it_began_from_something_else(text, base, adapted, questions, tmp_path):
    train.main(tiny_run(text, tmp_path / "other", vocab_size=320, seq_len=64, max_steps=2, seed=2))
    with pytest.raises(UserError, match="started from"):
        train.main(tune(text, tmp_path / "other", questions, adapted, use_lora=1, lora_rank=4, max_steps=20))


def test_a_merged_model_is_not_overwritten(text, adapted, tmp_path):
    convert.main([str(adapted), str(tmp_path / "merged"), "MERGE=1", "TO=run"])
    with pytest.raises(UserError, match="holds a model"):
        train.main(tiny_run(text, tmp_path / "merged"))


def test_a_longer_context_can_be_trained_from_a_checkpoint(text, base, tmp_path):
    argv = tiny_run(text, tmp_path / "long", vocab_size=None, init_from=base, seq_len=128, rope_scaling="linear",
                    rope_factor=2.0, max_steps=2)
    assert train.main(argv) == 0
    model, _, _ = checkpoint.load_model(tmp_path / "long" / "best.pt")
    assert (model.cfg.seq_len, model.cfg.rope_scaling) == (128, "linear")


def test_no_example_left_is_a_sentence(text, base, questions, tmp_path):
    with pytest.raises(UserError, match="no example left"):
        train.main(tune(text, base, questions, tmp_path / "run", val_path=questions))


# ---- a model with more entries than its tokenizer


@pytest.fixture(scope="module")
def padded(base, tmp_path_factory):
    """The base with 26 entries more: whatever the model says, some of them have the largest logits."""
    state = checkpoint.load(checkpoint.find(base))
    saved = json.loads(state["settings"])
    model = state["model"]
    for name in ("embed.weight", "head.weight"):
        rows = model[name]
        more = rows.abs().amax(dim=0).expand(13, -1) * 50
        model[name] = torch.cat([rows, more, -more])
    saved["vocab_size"] += 26
    folder = tmp_path_factory.mktemp("padded") / "run"
    folder.mkdir()
    checkpoint.save(folder / "best.pt", {"format": checkpoint.FORMAT, "settings": json.dumps(saved), "config": "{}",
                                         "made_of": "{}", "base": None, "init": "", "tokenizer": state["tokenizer"],
                                         "progress": state["progress"], "model": model})
    return folder


@pytest.mark.parametrize("changes", [dict(task="pretrain"), dict(use_lora=1, lora_rank=4)])
def test_a_model_with_more_entries_than_its_tokenizer_is_trained_resumed_and_sampled(changes, text, padded, questions,
                                                                                     tmp_path, capsys):
    data = text if "task" in changes else questions
    run = tmp_path / "run"
    arguments = tune(text, padded, data, run, max_steps=6, eval_interval=3, **changes)
    assert train.main(arguments) == 0
    assert train.main([*arguments, "max_steps=8"]) == 0
    model, tokenizer, _ = checkpoint.load_model(checkpoint.find(run))
    assert model.cfg.vocab_size == tokenizer.vocab_size + 26
    capsys.readouterr()
    for temperature in (0, 3):
        options = ["init_from=" + str(run), "max_new_tokens=20", f"temperature={temperature}", "device=cpu"]
        sample.main([*options, "prompt=the", "n_samples=2"])
        if "task" not in changes:
            sample.main([*options, "chat=1", "prompt=say fox"])
    assert "is not in this vocabulary" not in capsys.readouterr().err
