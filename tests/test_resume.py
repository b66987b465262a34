"""Going on with a run: steps of another size, settings that are left out or new, data that has changed."""

import json
import random
import re

import pytest
import torch

import convert
import train
from configurator import UserError
from conftest import WORDS, tiny_run, tune
from optim import OptimSettings, lr_at
from runtime import checkpoint
from test_reliability import finish, launch
from test_train import column, interrupt_at, same
from text.batches import Batches


def progress(folder):
    return checkpoint.load_newest(folder)["progress"]


def saved(folder):
    return json.loads(checkpoint.load_newest(folder)["settings"])


@pytest.fixture
def seen(monkeypatch):
    """The index of every sample that a step takes, in order (a prefetcher also asks for some that no step takes)."""
    taken = []
    get, step = Batches.get, train.Run.step

    def remember(self, first, count):
        batch = get(self, first, count)
        batch[0].first, batch[0].count = first, count
        return batch

    def take(self, wrapped, batch, factor):
        taken.extend(range(batch[0].first, batch[0].first + batch[0].count))
        return step(self, wrapped, batch, factor)

    monkeypatch.setattr(Batches, "get", remember)
    monkeypatch.setattr(train.Run, "step", take)
    return taken


# ---- steps of another size


def test_every_sample_comes_once_whatever_the_batches_of_the_resumes(go, tmp_path, seen):
    go(max_steps=4)
    go(max_steps=9, batch_size=2)
    go(max_steps=12, batch_size=16)
    go(max_steps=15, grad_accum=3, batch_size=4)
    go(max_steps=17, total_batch_size=7 * 16)
    sizes = [4] * 4 + [2] * 5 + [16] * 3 + [12] * 3 + [7] * 2
    assert seen == list(range(sum(sizes)))
    assert progress(tmp_path / "run")["samples"] == sum(sizes) and progress(tmp_path / "run")["step"] == len(sizes)
    assert progress(tmp_path / "run")["tokens"] == 16 * sum(sizes)
    assert [int(row) for row in column(tmp_path / "run", "step")] == sorted(column(tmp_path / "run", "step"))


def test_another_number_of_processes_and_another_batch_continue_with_the_next_sample(text, tmp_path):
    log = tmp_path / "samples"
    script = tmp_path / "logged.py"
    script.write_text(f"""
import train
original = train.Run.step
def step(self, wrapped, batch, factor):
    first = self.progress.samples + self.machine.rank * self.plan.per_rank
    with open({str(log)!r}, "a") as file:
        file.write(" ".join(map(str, range(first, first + len(batch[0])))) + "\\n")
    expected = self.batches.get(first, len(batch[0]))[0]
    assert (expected == batch[0]).all()
    return original(self, wrapped, batch, factor)
train.Run.step = step
if __name__ == "__main__":
    train.run(train.main)
""")
    for processes, more in ((0, dict(max_steps=4)), (2, dict(max_steps=6, batch_size=6)), (0, dict(max_steps=8))):
        code, out = finish(launch(tiny_run(text, tmp_path / "run", **more), processes, script))
        assert code == 0, out
    assert sorted(map(int, log.read_text().split())) == list(range(4 * 4 + 2 * 6 + 2 * 4))


@pytest.mark.parametrize("batch_size, steps", [(4, 32), (16, 4 + 7), (1, 4 + 112)])
def test_max_tokens_counts_the_tokens_of_all_batches(go, tmp_path, batch_size, steps):
    tokens = dict(max_tokens=2048, max_steps=None, eval_interval=4)
    interrupted = dict(tokens, max_tokens=4 * 4 * 16)
    go(**interrupted)
    go(**tokens | dict(batch_size=batch_size))
    assert progress(tmp_path / "run")["tokens"] == 2048 and progress(tmp_path / "run")["step"] == steps
    assert go(**tokens | dict(batch_size=32)) == 0  # complete, whatever the size of a step
    assert progress(tmp_path / "run")["step"] == steps


@pytest.mark.parametrize("schedule", ["cosine", "cosine_restarts", "linear", "wsd", "constant"])
@pytest.mark.parametrize("size", [1, 3, 7, 480])
def test_the_schedule_by_samples_is_that_by_steps_where_the_step_never_changes(schedule, size):
    s = OptimSettings(schedule=schedule, t0=50, warmup_steps=30)
    for steps in (1, 2, 37, 1001):
        by_steps = [lr_at(step, s, steps) for step in range(steps)]
        assert by_steps == [lr_at(step * size / size, s, steps * size / size) for step in range(steps)]


def test_the_schedule_ends_with_the_samples_that_are_planned(go, tmp_path):
    shape = dict(schedule="linear", min_lr=0.0, warmup_steps=0)
    go(**shape, max_steps=8)
    go(**shape, max_steps=12, batch_size=8)  # 8 · 4 + 4 · 8 samples
    rates = column(tmp_path / "run", "lr")[8:]
    assert rates == pytest.approx([3e-3 * (1 - step / 7) for step in (4, 5, 6, 7)], abs=1e-9)


def test_a_checkpoint_of_before_samples_continues_with_its_own_batch(go, tmp_path, seen):
    go(max_steps=3, grad_accum=2)
    path = checkpoint.steps(tmp_path / "run")[-1]
    state = torch.load(path, weights_only=True)
    del state["progress"]["samples"], state["made_of"], state["config"]
    torch.save(state, path)
    go(max_steps=5, batch_size=2, grad_accum=1)
    assert seen == list(range(3 * 8 + 2 * 2))


# ---- settings


FIRST = dict(dropout=0.1, seed=7, ema=0.9, weight_decay=0.05, beta2=0.9, schedule="linear", patience=30, batch_size=6,
             label_smoothing=0.1, data_order="sequential", balance_loss=0.5, eval_tokens=320,
             keep_checkpoints=5)


def test_settings_that_are_left_out_come_from_the_run(go, text, tmp_path, monkeypatch, capsys):
    first = dict(FIRST, lr=1e-2, muon_lr=0.03, optimizer="muon", dtype="float32")
    go(out_dir=tmp_path / "whole", **first)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        go(out_dir=tmp_path / "broken", **first)
    capsys.readouterr()
    tokens = set((text.parent / "cache").iterdir())
    names = [*first, "vocab_size", "warmup_steps", "max_steps", "eval_interval"]
    go(out_dir=tmp_path / "broken", **dict.fromkeys(names))
    assert set((text.parent / "cache").iterdir()) == tokens  # of vocab_size too: nothing is tokenized again
    out = capsys.readouterr().out
    assert "lr=0.01" in out and "ema=0.9" in out and "new:" not in out
    whole, broken = (checkpoint.load_newest(tmp_path / name) for name in ("whole", "broken"))
    assert same(whole["model"], broken["model"]) and same(whole["ema"], broken["ema"])
    assert same(whole["optimizer"], broken["optimizer"])


def test_a_new_value_wins_and_is_said(go, tmp_path, capsys):
    go(max_steps=3)
    capsys.readouterr()
    go(max_steps=6, lr=1e-3, dropout=0.2)
    out = capsys.readouterr().out
    assert "new: dropout=0.2 (before: 0.0), lr=0.001 (before: 0.003), max_steps=6 (before: 3)" in out
    assert (saved(tmp_path / "run")["lr"], saved(tmp_path / "run")["dropout"]) == (1e-3, 0.2)


def test_a_config_file_that_says_the_same_again_says_nothing_new(text, tmp_path, capsys):
    config = tmp_path / "mine.py"
    config.write_text("lr = 1e-2\nmax_tokens = 100_000\ndropout = 0.3\n")
    argv = [str(config), *tiny_run(text, tmp_path / "run", lr=None, max_steps=None)]
    train.main([*argv, "lr=5e-3", "max_steps=3"])
    capsys.readouterr()
    train.main(argv)  # lr and max_steps were given on the first command line only
    out = capsys.readouterr().out
    assert "new:" not in out and "the run is complete" in out
    config.write_text("lr = 2e-2\nmax_tokens = 100_000\ndropout = 0.3\n")
    train.main([*argv, "max_steps=4"])
    out = capsys.readouterr().out
    assert "lr=0.02 (before: 0.005)" in out and "dropout=" not in out.split("new:")[1].splitlines()[0]
    assert saved(tmp_path / "run")["max_tokens"] == 0


def test_max_steps_given_anew_beats_the_tokens_of_the_run(go, tmp_path):
    go(max_tokens=4 * 4 * 16, max_steps=None)
    go(max_steps=6)
    assert progress(tmp_path / "run")["step"] == 6


def test_what_names_a_place_is_never_taken_from_a_checkpoint(go, text, tmp_path):
    go(max_steps=2)
    path = checkpoint.steps(tmp_path / "run")[-1]
    state = torch.load(path, weights_only=True)
    evil = dict(json.loads(state["settings"]), cache_dir=str(tmp_path / "evil"), val_path=str(tmp_path / "evil.txt"),
                dataset="../evil", tokenizer="/evil", mixture="evil:1", wandb="evil", device="evil")
    state["settings"] = json.dumps(evil)
    torch.save(state, path)
    go(max_steps=4)
    assert progress(tmp_path / "run")["step"] == 4 and not (tmp_path / "evil").exists()


# ---- data


def write_lines(path, seed, count=400, words=WORDS):
    """Lines of random words, each a document."""
    generator = random.Random(seed)
    lines = [json.dumps({"text": " ".join(generator.choices(words, k=12))}) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_added_text_is_said_and_the_run_goes_on_with_its_own_tokenizer(go, tmp_path, capsys):
    data = write_lines(tmp_path / "grow.jsonl", 1)
    go(data_path=data, max_steps=3)
    before = checkpoint.load_newest(tmp_path / "run")
    with open(data, "a", encoding="utf-8") as file:
        file.write(write_lines(tmp_path / "more.jsonl", 2).read_text().replace("fox", "zebra"))
    capsys.readouterr()
    go(data_path=data, max_steps=6)
    after = checkpoint.load_newest(tmp_path / "run")
    assert "the training data has changed" in capsys.readouterr().out
    assert after["progress"]["step"] == 6 and after["tokenizer"] == before["tokenizer"]


def test_other_validation_text_begins_a_new_best(go, tmp_path, text, capsys):
    easy, hard = tmp_path / "easy.txt", tmp_path / "hard.txt"
    easy.write_text("the quick brown fox jumps over a lazy dog\n" * 60)
    hard.write_text(" ".join(random.Random(1).choices(WORDS, k=500)) + " Zq7 %% !! xy" * 80)
    go(val_path=easy, max_steps=6)
    easy_loss = checkpoint.load(tmp_path / "run/best.pt")["progress"]["best"]
    go(val_path=hard, max_steps=6)  # complete, but for this text
    assert "the validation data has changed" in capsys.readouterr().out
    state = checkpoint.load(tmp_path / "run/best.pt")
    assert state["progress"]["best"] > easy_loss + 0.1
    assert state["made_of"] == checkpoint.load_newest(tmp_path / "run")["made_of"]
    assert go(val_path=hard, max_steps=6) == 0
    out = capsys.readouterr().out
    assert "validation data has changed" not in out and "the run is complete" in out


@pytest.mark.parametrize("change", [dict(eval_tokens=64), dict(val_share=0.2)])
def test_another_choice_of_what_is_scored_begins_a_new_best_too(go, change, capsys):
    go(max_steps=3)
    capsys.readouterr()
    go(max_steps=4, **change)
    assert "the validation data has changed" in capsys.readouterr().out


def test_another_corpus_in_the_folder_of_a_run_is_refused(go, tmp_path, text):
    other = write_lines(tmp_path / text.name, 3, words=[word[::-1] + "o" for word in WORDS])
    go(max_steps=3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for steps in (3, 6):
        with pytest.raises(UserError, match="learned other data.*set another out_dir"):
            go(max_steps=steps, data_path=other)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_a_run_that_names_no_data_finds_its_own_in_the_cache_or_asks_for_it(go, text, tmp_path):
    cache = tmp_path / "cache"
    go(max_steps=3, cache_dir=cache)
    go(max_steps=5, cache_dir=cache, data_path=None)
    assert progress(tmp_path / "run")["step"] == 5
    with pytest.raises(UserError, match=rf"name it again, DATA_PATH={text}"):
        go(max_steps=6, cache_dir=tmp_path / "empty", data_path=None)


def test_a_run_of_an_older_rule_keeps_it(go, tmp_path):
    go(max_steps=3)
    path = checkpoint.steps(tmp_path / "run")[-1]
    state = torch.load(path, weights_only=True)
    del state["made_of"]
    torch.save(state, path)
    go(max_steps=6)
    assert json.loads(checkpoint.load_newest(tmp_path / "run")["made_of"])["rule"] == 1
    go(out_dir=tmp_path / "new", max_steps=3)
    assert json.loads(checkpoint.load_newest(tmp_path / "new")["made_of"])["rule"] == 2


# ---- what a run says of itself


def test_the_parameters_active_for_a_token_and_both_rates_are_said_and_logged(go, tmp_path, capsys):
    go(max_steps=2, n_expert=4, d_expert=16)
    out = capsys.readouterr().out
    found = re.search(r"model +([\d,]+) parameters, ([\d,]+) of them active", out)
    total, active = (int(number.replace(",", "")) for number in found.groups())
    assert total - active == 2 * 2 * (3 * 16 * 32)  # two layers, two idle experts of three matrices
    assert "lr 0.003 (AdamW), muon_lr 0.02 for hidden matrices (Muon)" in out
    assert column(tmp_path / "run", "muon_lr")[-1] == pytest.approx(0.002)
    go(out_dir=tmp_path / "adamw", max_steps=2, optimizer="adamw")
    assert not column(tmp_path / "adamw", "muon_lr")


def test_that_twice_the_steps_lift_the_learning_rate_is_said_with_a_way_that_keeps_it(go, tmp_path, capsys):
    go()
    out = capsys.readouterr().out
    advice = re.search(r"the learning rate rises from 0.0003 to 0.00\d+; (SCHEDULE.*) keeps it", out)
    new = dict(word.lower().split("=") for word in advice[1].split())
    go(**new, max_steps=24)
    assert column(tmp_path / "run", "lr")[12:] == pytest.approx([3e-4] * 12)
    assert column(tmp_path / "run", "muon_lr")[12:] == pytest.approx([2e-3] * 12)
    assert "rises" not in capsys.readouterr().out


# ---- saving and validating


def test_saving_and_validating_have_intervals_of_their_own(go, tmp_path, monkeypatch):
    saves = []
    original = checkpoint.save_step
    monkeypatch.setattr(checkpoint, "save_step", lambda *a: (saves.append(a[1]), original(*a)))
    go(max_steps=12, save_interval=2, eval_interval=6)
    assert saves == [2, 4, 6, 8, 10, 12] and len(column(tmp_path / "run", "val_loss")) == 2
    saves.clear()
    go(out_dir=tmp_path / "two", max_steps=12, save_interval=12, eval_interval=3)
    assert saves == [3, 6, 9, 12], "each new best has a checkpoint from which the run can go on"


@pytest.mark.parametrize("step", [5, 6, 7])
def test_resume_is_bit_exact_where_validations_are_not_saves(go, tmp_path, monkeypatch, step):
    more = dict(save_interval=4, eval_interval=3, ema=0.9, dropout=0.1)
    go(out_dir=tmp_path / "whole", **more)
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        go(out_dir=tmp_path / "broken", **more)
    go(out_dir=tmp_path / "broken", **more)
    for name in ("step_00000012.pt", "best.pt"):
        assert same(checkpoint.load(tmp_path / "whole" / name), checkpoint.load(tmp_path / "broken" / name)), name


# ---- from run to run


def tune_now(text, base, examples, out_dir, **changes):
    return train.main(tune(text, base, examples, out_dir, **(dict(max_steps=2, eval_interval=2) | changes)))


def test_template_and_system_follow_the_model_from_run_to_run(text, base, questions, tmp_path):
    tune_now(text, base, questions, tmp_path / "a", template="alpaca", system="be brief")
    tune_now(text, tmp_path / "a", questions, tmp_path / "b")
    tune_now(text, tmp_path / "b", questions, tmp_path / "c", use_lora=1, lora_rank=2)
    tune_now(text, tmp_path / "c", questions, tmp_path / "c", use_lora=1, init_from=None, max_steps=3)  # resumed
    convert.main([str(tmp_path / "c"), str(tmp_path / "d"), "MERGE=1", "TO=run"])
    tune_now(text, tmp_path / "d", text, tmp_path / "e", task="pretrain")  # text between the fine-tunings
    tune_now(text, tmp_path / "e", questions, tmp_path / "f")
    for name in "abcf":
        assert (saved(tmp_path / name)["template"], saved(tmp_path / name)["system"]) == ("alpaca", "be brief"), name
    tune_now(text, tmp_path / "a", questions, tmp_path / "g", template="chatml")  # a new run may choose another one
    assert (saved(tmp_path / "g")["template"], saved(tmp_path / "g")["system"]) == ("chatml", "be brief")


def test_adapters_learn_from_rows_shorter_than_those_of_their_base(text, base, questions, tmp_path):
    tune_now(text, base, questions, tmp_path / "run", use_lora=1, seq_len=32)
    assert saved(tmp_path / "run")["seq_len"] == 32
    with pytest.raises(UserError, match="seq_len=64"):
        tune_now(text, base, questions, tmp_path / "longer", use_lora=1, seq_len=128)


def test_examples_may_be_added_and_are_found_without_their_file(text, base, questions, tmp_path, capsys):
    data, cache = tmp_path / "mine.jsonl", tmp_path / "cache"
    data.write_text(questions.read_text())
    tune_now(text, base, data, tmp_path / "run", cache_dir=cache)
    with open(data, "a", encoding="utf-8") as file:
        file.write(json.dumps({"instruction": "new", "output": "words"}) + "\n")
    capsys.readouterr()
    tune_now(text, base, data, tmp_path / "run", cache_dir=cache, max_steps=4)
    assert "the training data has changed" in capsys.readouterr().out
    data.unlink()
    tune_now(text, base, None, tmp_path / "run", cache_dir=cache, max_steps=6)
    assert progress(tmp_path / "run")["step"] == 6
    with pytest.raises(UserError, match=f"name them again, DATA_PATH={data}"):
        tune_now(text, base, None, tmp_path / "run", cache_dir=tmp_path / "empty", max_steps=8)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"instruction": f"{i}?", "output": f"{i}!"}) + "\n" for i in range(30)))
    with pytest.raises(UserError, match="learned other data"):
        tune_now(text, base, other, tmp_path / "run", cache_dir=cache, max_steps=8)


@pytest.mark.parametrize("goal, other", [("stop_loss", 0), ("stop_ppl", 1), ("stop_loss", 0.5)])
def test_a_run_that_reached_its_goal_goes_on_with_another_one(go, tmp_path, capsys, goal, other):
    go(max_steps=6, eval_interval=2, **{goal: 1000})
    assert checkpoint.load_newest(tmp_path / "run")["progress"]["step"] == 2
    go(max_steps=6, eval_interval=2)
    assert "has reached its goal" in capsys.readouterr().out
    go(max_steps=6, eval_interval=2, **{goal: other})
    assert checkpoint.load_newest(tmp_path / "run")["progress"]["step"] == 6
