"""Fine-tuning examples: files -> conversations -> rows that are whole, apart, and a function of the sample's number."""

import gzip
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from configurator import UserError, configure
from test_chat import BLOCKS, CHINESE, EMOJI, make, model_for, talk
from text.chat import TEMPLATES, ChatSettings, Template, make_template
from text.corpus import DataSettings
from text.sft import (
    Examples,
    SftSettings,
    held_out_rows,
    pack,
    prepare_examples,
    read_examples,
    read_split,
    show_example,
    split_examples,
)

WORDS = "the quick brown fox jumps over it".split()


def conversations(count: int = 40, longest: int = 12) -> list[list[dict]]:
    """Of one to three turns, all different, with texts of odd lengths."""
    rng = np.random.default_rng(0)
    text = lambda n: " ".join([str(n), *rng.choice(WORDS, rng.integers(longest))])  # noqa: E731
    return [talk(*(text(n) for _ in range(2 * rng.integers(1, 4)))) for n in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return make("bpe")


@pytest.fixture(scope="module", params=TEMPLATES)
def template(request, tokenizer) -> Template:
    return Template(request.param, tokenizer)


def runs(row) -> list[tuple[list[int], list[int]]]:
    """A row of a batch -> (whole ids, weights of the targets) of each run of positions that begins with 0."""
    ids, targets, weights, positions = (t.tolist() for t in row)
    starts = [t for t, position in enumerate(positions) if position == 0] + [len(ids)]
    found = []
    for a, b in zip(starts, starts[1:], strict=False):
        assert positions[a:b] == list(range(b - a)), "positions count up within an example"
        assert targets[a : b - 1] == ids[a + 1 : b], "a target is the next token of its own example"
        found.append(([*ids[a:b], targets[b - 1]], weights[a:b]))
    return found


def all_rows(examples: Examples, first: int = 0):
    return list(zip(*examples.get(first, examples.per_epoch), strict=True))


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("learn", ["response", "all"])
def test_every_example_is_once_in_an_epoch_whole_and_with_its_mask(template, learn, packing):
    data = conversations()
    examples = Examples(data, template, 256, learn, seed=3, packing=packing)
    expected = Counter()
    for conversation in data:
        ids, learned = template.render(conversation, learn)
        expected[tuple(ids), tuple(map(float, learned[1:]))] += 1
    found = Counter()
    for row in all_rows(examples):
        parts = runs(row)
        if not packing:
            assert len(parts) <= 2  # an example and its padding
        found.update((tuple(ids), tuple(weights)) for ids, weights in parts if set(ids) != {examples.pad})
    assert found == expected
    assert examples.cut == examples.dropped == 0


def test_padding_is_a_run_of_its_own_without_weight(template):
    examples = Examples(conversations(5), template, 200, packing=False)
    for row in all_rows(examples):
        (_, _), (padding, no_weights) = runs(row)
        assert set(padding) == {template.tokenizer.role("pad")} and not any(no_weights)
    assert [t.dtype for t in examples.get(0, 1)] == [torch.int64, torch.int64, torch.float32, torch.int64]


def test_samples_are_a_function_of_seed_and_number_and_each_row_comes_once_an_epoch(template):
    data = conversations()
    examples, again = (Examples(data, template, 128, seed=7) for _ in range(2))
    n = examples.per_epoch
    assert n > 5
    whole = examples.get(0, 3 * n)
    for first, count in ((0, 1), (n - 2, 5), (2 * n + 1, 3), (5, 0)):
        for one, other in zip(again.get(first, count), whole, strict=True):
            assert torch.equal(one, other[first : first + count])
    epochs = [[tuple(row.tolist()) for row in whole[0][e * n : (e + 1) * n]] for e in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2]) and len(set(epochs[0])) == n
    assert epochs[0] != epochs[1] != epochs[2], "each epoch has its own order"
    other = Examples(data, template, 128, seed=8).get(0, n)[0]
    assert not torch.equal(other, whole[0][:n]), "the seed matters"


def test_counts_are_those_of_the_rows(template):
    data = conversations()
    examples = Examples(data, template, 128)
    rows = [part for row in all_rows(examples) for part in runs(row)]
    real = [(ids, weights) for ids, weights in rows if set(ids) != {examples.pad}]
    assert examples.places == sum(len(weights) for _, weights in real)
    assert examples.tokens == sum(sum(weights) for _, weights in real)
    answers = [m["content"] for messages in data for m in messages if m["role"] == "assistant"]
    assert examples.bytes == sum(len(answer.encode()) for answer in answers)
    assert examples.fill == examples.places / (128 * examples.per_epoch)
    assert examples.fill > 1.3 * Examples(data, template, 128, packing=False).fill, "packing is worth it"


def test_packing_never_overfills_a_row_and_is_close_to_the_best():
    rng = np.random.default_rng(0)
    for size in (1, 7, 64, 100):
        lengths = rng.integers(1, size + 1, 200)
        rows = pack(lengths, np.argsort(-lengths, kind="stable"), size)
        assert sorted(i for row in rows for i in row) == list(range(200))
        fills = [int(lengths[row].sum()) for row in rows]
        assert max(fills) <= size
        assert len(rows) <= math.ceil(11 / 9 * math.ceil(lengths.sum() / size) * 1.1) + 1
    assert pack(np.array([5, 3, 2, 4]), [0, 3, 1, 2], 7) == [[0, 2], [3, 1]]


def test_too_long_examples_lose_their_beginning_or_go(template):
    long, data = " fox" * 300, talk("Hi", "Hello")
    question, answer = talk(long, "Hello"), talk("Hi", long)
    turns = talk("Hi", "fox " * 60, "So?", "it jumps")
    examples = Examples([data, question, answer, turns], template, 48)
    assert (examples.cut, examples.dropped) == (2, 1)
    whole = [template.render(each) for each in (question, turns)]
    cut = [ids for row in all_rows(examples) for ids, _ in runs(row) if len(ids) == 49]
    assert sorted(cut) == sorted(ids[-49:] for ids, _ in whole)
    for ids, weights in (part for row in all_rows(examples) for part in runs(row)):
        if len(ids) == 49:  # what is left of an answer without its question is not learned, the last one is
            text = "it jumps" if ids == whole[1][0][-49:] else "Hello"
            learned = [i for i, weight in zip(ids[1:], weights, strict=True) if weight]
            assert learned == [*template.tokenizer.encode(text), template.ending[0]]


def test_an_answer_that_just_fits_stays_and_one_token_more_goes(template):
    conversation = talk("Hi", "fox jumps over it")
    ids, learned = template.render(conversation)
    begins = learned.index(True)
    tail = len(ids) - begins  # the answer and all behind it
    assert Examples([conversation], template, tail).cut == 1  # with one token before it, to be predicted from
    with pytest.raises(UserError, match=f"none of 1 examples .* seq_len={tail - 1}"):
        Examples([conversation], template, tail - 1)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_packed_examples_get_the_loss_that_each_has_alone(template, blocks):
    data = conversations(12)
    model = model_for(template.tokenizer, 128, **BLOCKS[blocks])
    packed = Examples(data, template, 128)
    alone = Examples(data, template, 128, packing=False)
    assert packed.per_epoch < alone.per_epoch
    sums = []
    for examples in (packed, alone):
        ids, targets, weights, positions = examples.get(0, examples.per_epoch)
        sums.append(model(ids, targets, weights, positions=positions).double().sum().item())
    one_by_one = 0.0
    for conversation in data:
        ids, learned = template.render(conversation)
        rows = torch.tensor([ids])
        one_by_one += model(rows[:, :-1], rows[:, 1:], torch.tensor([learned[1:]]).float()).double().sum().item()
    assert sums == pytest.approx([one_by_one] * 2, rel=1e-5)


def test_a_row_without_anything_to_learn_is_harmless(tokenizer):
    template = Template("chatml", tokenizer)
    examples = Examples([talk("Hi")], template, 32)
    assert examples.tokens == 0
    model = model_for(tokenizer, 32).train()
    ids, targets, weights, positions = examples.get(0, 2)
    loss = model(ids, targets, weights, positions=positions).sum()
    loss.backward()
    assert loss.item() == 0 and all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    with pytest.raises(UserError, match="validation"):
        held_out_rows([talk("Hi")], template, ChatSettings(), packing=True, seq_len=32, seed=0, eval_tokens=0)


def test_losses_under_two_chat_templates_are_not_compared():
    """Both are template=model: the text of the template tells them apart."""
    tokenizer, scored = make("bpe"), []
    text = Template("chatml", tokenizer).jinja()
    for written in (text, text, text + " "):
        tokenizer.config["chat_template"] = written
        template = make_template("model", tokenizer)
        rows = held_out_rows([talk("Hi", "Yo")], template, ChatSettings(), packing=True, seq_len=64, seed=0,
                             eval_tokens=0)
        scored.append(rows.scored)
    assert scored[0] == scored[1] != scored[2]


def test_validation_shows_each_row_once_in_a_fixed_order(template):
    validation = Examples(conversations(), template, 128, seed=1, shuffled=False)
    whole = validation.get(0, 10**6)
    assert len(whole[0]) == len(whole[0].unique(dim=0)) == len(validation) and whole[2].sum() == validation.tokens
    for size in (1, 4):
        parts = [validation.get(first, size) for first in range(0, len(validation), size)]
        assert torch.equal(torch.cat([ids for ids, *_ in parts]), whole[0])


# ---- files ----------------------------------------------------------------------------------------------------------


def write(path, *records, newline="\n"):
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_bytes(newline.join(lines).encode())
    return path


def test_both_kinds_of_records_become_messages(tmp_path):
    first = {"instruction": "Translate.", "input": CHINESE, "output": "Moon"}
    second = {"instruction": "3.14 ... i.e. [this]", "input": "", "output": EMOJI, "id": 7}
    third = {"messages": talk("Hi", "Hello", "So?", "Yes", system="Be brief.")}
    file = write(tmp_path / "a.jsonl", "\ufeff" + json.dumps(first), "", second, third, newline="\r\n")
    assert list(read_examples(file)) == [
        [{"role": "user", "content": "Translate.", "input": CHINESE}, {"role": "assistant", "content": "Moon"}],
        talk("3.14 ... i.e. [this]", EMOJI),
        third["messages"],
    ]


def test_half_a_surrogate_pair_in_json_becomes_text(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"instruction": "a", "output": "b\\ud83d"}')
    assert list(read_examples(file)) == [talk("a", "b\ufffd")]


@pytest.mark.parametrize("line, complaint", [
    ('{"instruction": "a", "output": ', "not JSON"),
    ('{"instruction": "a"}', "instruction and output"),
    ('["a"]', "instruction and output"),
    ('{"instruction": "a", "output": 3}', "'output' holds a int"),
    ('{"instruction": "a", "output": null}', "'output' holds a NoneType"),
    ('{"instruction": "a", "output": " \\n"}', "no answer"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "no answer"),
    ('{"messages": []}', "needs a message of the user"),
    ('{"messages": [{"role": "user"}]}', "message 1 needs a role and a content"),
    ('{"messages": [{"role": "gpt", "content": "a"}]}', "message 1 is of role 'assistant', expected 'user'"),
])
def test_a_broken_line_is_named_with_its_file(tmp_path, line, complaint):
    file = write(tmp_path / "bad.jsonl", {"instruction": "a", "output": "b"}, "", line)
    examples = read_examples(file)
    assert next(examples) == talk("a", "b")
    with pytest.raises(UserError, match=rf"bad\.jsonl, line 3\b.*{complaint}"):
        next(examples)


def test_a_text_file_holds_several_examples(tmp_path):
    text = """\ufeffBe brief.

### Instruction:
Sum up.

In one line.

### Input:
床前
明月光

### Response:

    x = 1  # ### Response: is text here

### Instruction: Hi
### Response: Hello
<|endoftext|>
Below is an instruction.
### Instruction:
So?
### Response:
3.14 ... i.e. [this]
<|endoftext|>
"""
    file = tmp_path / "a.txt"
    file.write_bytes(text.replace("\n", "\r\n").encode())
    assert list(read_examples(file)) == [
        [{"role": "system", "content": "Be brief."},
         {"role": "user", "content": "Sum up.\n\nIn one line.", "input": "床前\n明月光"},
         {"role": "assistant", "content": "    x = 1  # ### Response: is text here"}],
        talk("Hi", "Hello"),
        talk("So?", "3.14 ... i.e. [this]", system="Below is an instruction."),
    ]


@pytest.mark.parametrize("text, line, complaint", [
    ("just text", 1, "text without ### Instruction:"),
    ("### Instruction:\na\n### Instruction:\nb", 3, "after ### Instruction:"),
    ("\n### Instruction:\na\n<|endoftext|>\n", 2, "no ### Response:"),
    ("### Instruction:\na\n### Response:\nb\n### Response:\nc", 5, "after ### Response:"),
    ("### Response:\nb", 1, "after no ### Instruction:"),
    ("### Instruction:\na\n### Response:\nb\n### Instruction:\nc\n### Response:\n \n", 5, "no answer"),
])
def test_a_broken_text_file_is_named_with_the_line(tmp_path, text, line, complaint):
    (tmp_path / "bad.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"bad\.txt, line {line}\b.*{complaint}"):
        list(read_examples(tmp_path / "bad.txt"))


def test_a_folder_gives_the_examples_of_all_its_files_in_natural_order(tmp_path):
    write(tmp_path / "part_10.jsonl", {"instruction": "c", "output": "c"})
    (tmp_path / "part_2.jsonl.gz").write_bytes(gzip.compress(b'{"instruction": "b", "output": "b"}\n'))
    (tmp_path / "part_1.txt").write_text("### Instruction:\na\n### Response:\na\n", encoding="utf-8")
    assert list(read_examples(tmp_path)) == [talk(name, name) for name in "abc"]


def test_equal_conversations_never_part_whatever_their_order():
    data = conversations(100)
    train, val = split_examples(data + data, 0.1)
    assert len(val) == 20 and len(train) == 180
    assert all(example not in train for example in val)
    backwards = split_examples(data[::-1], 0.1)[1]
    assert all(example in val for example in backwards) and len(backwards) == 10


def test_two_examples_are_the_least_to_split():
    one, two = split_examples(conversations(2), 0.01)
    assert len(one) == len(two) == 1
    for data, share in ((conversations(1) * 3, 0.1), (conversations(9), 0.0), (conversations(9), 1.0)):
        with pytest.raises(UserError, match="val_share"):
            split_examples(data, share)


# ---- settings and a look at the data --------------------------------------------------------------------------------


def test_sft_mode_means_task_sft():
    for argv, task in (([], "pretrain"), (["SFT_MODE=1"], "sft"), (["task=sft"], "sft")):
        assert configure([SftSettings], argv, {}).part(SftSettings).task == task


def test_a_shown_example_marks_what_is_learned(tokenizer):
    template = Template("alpaca", tokenizer)
    shown = show_example(*template.render(talk("Hi", CHINESE, "So?", EMOJI)), tokenizer)
    assert shown == (f"### Instruction:\nHi\n\n### Response:\n⟦{CHINESE}</s>⟧"
                     f"### Instruction:\nSo?\n\n### Response:\n⟦{EMOJI}</s>⟧")


def test_damaged_examples_of_the_cache_are_made_again(tmp_path, monkeypatch, capsys):
    script = tmp_path / "data" / "chat" / "prepare.py"
    script.parent.mkdir(parents=True)
    script.write_text("def documents(split): return ()\n"
                      "def examples(split): return [{'instruction': split, 'output': str(i)} for i in range(9)]\n")
    monkeypatch.setattr("text.corpus.ROOT", tmp_path)
    cache = str(tmp_path / "cache")
    right = {path.name: path.read_bytes() for path in prepare_examples("chat", cache, quiet=True).iterdir()}
    assert sorted(right) == ["hashes.json", "train.jsonl", "val.jsonl"]
    for name, content in right.items():
        for damaged in (b"", content[:-9], content.replace(b"1", b"2"), b"[]"):
            folder = prepare_examples("chat", cache, quiet=True)
            (folder / name).write_bytes(damaged)
            prepare_examples("chat", cache, quiet=False)
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == right, (name, damaged)
    assert "we prepare its examples again" in capsys.readouterr().out


def test_examples_named_for_validation_are_not_learned(tmp_path, capsys):
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"instruction": "a", "output": name}))
    (tmp_path / "more.csv").write_text("instruction,output\na,more\n")
    train, val = read_split(DataSettings(data_path=str(tmp_path)))
    assert [each[-1]["content"] for each in train] == ["more", "train"]
    assert [each[-1]["content"] for each in val] == ["valid"]
    said = capsys.readouterr().out
    assert "validation on valid.jsonl" in said and "not used: test.jsonl" in said


def test_a_validation_file_without_examples_is_refused(tmp_path):
    lines = [json.dumps({"instruction": f"say {i}", "output": "yes"}) for i in range(4)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "val.jsonl").write_text("")
    with pytest.raises(UserError, match="no example left to validate on"):
        read_split(DataSettings(data_path=str(tmp_path)))
