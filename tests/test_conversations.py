"""Fine-tuning data of other programs: read with every field that means something, or refused with file and line."""

import json
from collections import Counter

import pytest

from configurator import UserError
from test_chat import Template, make, talk
from text.chat import ChatSettings
from text.conversations import read_examples
from text.corpus import DataSettings
from text.sft import Examples, SftSettings, open_examples

ASKED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def read(tmp_path, record, notes=None):
    (tmp_path / "a.jsonl").write_text(json.dumps(record), encoding="utf-8")
    return list(read_examples(tmp_path / "a.jsonl", notes=notes))[0]


def open_rows(kind, seq_len=256, **data):
    return open_examples(make(kind), DataSettings(**data), ChatSettings(), SftSettings(), seq_len=seq_len, seed=1337,
                         eval_tokens=50_000)


def unlearned(messages, *answers):
    """These answers, by their numbers, are not learned."""
    assistants = [each for each in messages if each["role"] == "assistant"]
    for number in answers:
        assistants[number]["learn"] = False
    return messages


SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
KINDS = {
    "openai": ({"messages": ASKED}, talk("a", "b")),
    "openai parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ASKED[1]]},
                     talk("a", "b")),
    "developer": ({"messages": [{"role": "developer", "content": "s"}, *ASKED]}, talk("a", "b", system="s")),
    "system beside messages": ({"system": "s", "messages": ASKED}, talk("a", "b", system="s")),
    "empty tools": ({"messages": [ASKED[0], ASKED[1] | {"tool_calls": []}], "tools": None}, talk("a", "b")),
    "sharegpt": ({"conversations": SHAREGPT, "system": "s"}, talk("a", "b", system="s")),
    "sharegpt with openai's names": ({"conversations": ASKED}, talk("a", "b")),
    "alpaca": ({"instruction": "a", "input": "i", "output": "b"},
               [{"role": "user", "content": "a", "input": "i"}, ASKED[1]]),
    "alpaca with system and history": (
        {"instruction": "a", "input": "", "output": "b", "system": "s", "history": [["q", "w"], ["e", "r"]]},
        talk("q", "w", "e", "r", "a", "b", system="s")),
    "only an input": ({"instruction": "", "input": "a", "output": "b"}, talk("a", "b")),
    "dolly": ({"instruction": "a", "context": "i", "response": "b"},
              [{"role": "user", "content": "a", "input": "i"}, ASKED[1]]),
    "trl": ({"prompt": "a", "completion": "b"}, talk("a", "b")),
    "trl's messages": ({"prompt": [*talk("q", "w"), ASKED[0]], "completion": [ASKED[1]]},
                       unlearned(talk("q", "w", "a", "b"), 0)),
    "swift": ({"system": "s", "query": "a", "response": "b", "history": [["q", "w"]]},
              talk("q", "w", "a", "b", system="s")),
    "orca": ({"system_prompt": "s", "question": "a", "response": "b"}, talk("a", "b", system="s")),
    "null columns of parquet": ({"messages": None, "instruction": "a", "output": "b", "history": None},
                                talk("a", "b")),
    "weights": ({"messages": [*talk("q", "w"), ASKED[0], ASKED[1] | {"weight": 1}]}, talk("q", "w", "a", "b")),
    "weight 0": ({"messages": [ASKED[0], ASKED[1] | {"weight": 0}, *talk("q", "w")]},
                 unlearned(talk("a", "b", "q", "w"), 0)),
    "train": ({"conversations": [SHAREGPT[0], SHAREGPT[1] | {"train": False}, *SHAREGPT]},
              unlearned(talk("a", "b", "a", "b"), 0)),
    "xtuner": ({"conversation": [{"system": "s", "input": "a", "output": "b"}, {"input": "c", "output": "d"}]},
               talk("a", "b", "c", "d", system="s")),
    "tools of llama-factory": ({"conversations": SHAREGPT, "tools": "[]", "system": ""}, talk("a", "b")),
    "training": ({"messages": [ASKED[0] | {"training": False}, ASKED[1] | {"training": True}]}, talk("a", "b")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_records_of_every_format_become_messages(tmp_path, kind):
    record, messages = KINDS[kind]
    assert read(tmp_path, record) == messages


@pytest.mark.parametrize("record, complaint", [
    ({"messages": ASKED, "tools": [{"name": "f"}]}, "has tools"),
    ({"messages": [ASKED[0], ASKED[1] | {"tool_calls": [{"id": 1}]}]}, ": message 2 has tool_calls"),
    ({"messages": [ASKED[0], {"role": "assistant", "content": None, "function_call": {"name": "f"}}]}, "function_call"),
    ({"messages": ASKED, "images": ["a.png"]}, "images"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASKED[1]]}, "'content' holds a list"),
    ({"messages": [{"role": "tool", "content": "3"}, *ASKED]}, "message 1 has the role 'tool'"),
    ({"messages": [{"role": "narrator", "content": "3"}, *ASKED]}, "message 1 has the role 'narrator'"),
    ({"conversations": [{"from": "function_call", "value": "{}"}]}, "role 'function_call'"),
    ({"messages": ASKED, "instruction": "c", "output": "d"}, "two versions of its conversation"),
    ({"messages": ASKED, "history": [["c", "d"]]}, "two versions of its conversation"),
    ({"messages": ASKED, "conversations": SHAREGPT}, "messages and conversations"),
    ({"instruction": "a", "output": "b", "response": "c"}, "output and response"),
    ({"messages": [{"role": "user", "content": "a", "value": "b"}, ASKED[1]]}, "content and value"),
    ({"system": "s", "messages": talk("a", "b", system="t")}, "a field system and a message of that role"),
    ({"messages": [ASKED[0], ASKED[1] | {"weight": 0.5}]}, "weight=0.5"),
    ({"messages": [ASKED[0], ASKED[1] | {"train": "false"}]}, "train='false'"),
    ({"messages": [ASKED[0], ASKED[1] | {"train": False, "weight": 1}]}, "both that it is learned"),
    ({"messages": [ASKED[0] | {"train": True}, ASKED[1]]}, "message 1 wants to be learned"),
    ({"instruction": "a", "output": "b", "weight": 0}, "says that it must not be learned"),
    ({"instruction": "a", "output": "b", "history": [["q"]]}, "entry 1 of history"),
    ({"instruction": "a", "output": "b", "history": "q"}, "history"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen"),
    ({"prompt": "a", "completion": "b", "label": False}, "label=False, a rating"),
    ({"conversation": [{"input": "a", "output": 3}]}, "message 2: field 'content' holds a int"),
    ({"text": "a"}, "instruction and output; it has text"),
    ({"messages": "a"}, "a list of messages, found a str"),
    ({"prompt": [ASKED[0]], "completion": "b"}, "a list of messages, found a str"),
])
def test_what_we_cannot_learn_is_refused_with_file_and_line(tmp_path, record, complaint):
    with pytest.raises(UserError, match=rf"a\.jsonl, line 1.*{complaint}"):
        read(tmp_path, record)


@pytest.mark.parametrize("line", [
    '{"instruction": "a", "output": "b", "output": "c"}',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "content": "c"}]}',
])
def test_a_field_that_is_there_twice_is_refused(tmp_path, line):
    for name, content in (("a.jsonl", line), ("a.json", f"[\n{line}]")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=rf"{name}, line \d.* twice"):
            list(read_examples(tmp_path / name))


def test_fields_that_are_not_read_and_answers_without_text_are_counted(tmp_path):
    notes = Counter()
    messages = [*talk("a", "b", "c", " "), {"role": "user", "content": "d", "name": "Ada"}, ASKED[1]]
    read(tmp_path, {"id": 7, "messages": messages, "empty": ""}, notes)
    assert notes == {"field id is not read": 1, "field name of messages is not read": 1,
                     "answer without text is not learned": 1}


@pytest.mark.parametrize("record, note", [
    ({"prompt": [ASKED[0]], "completion": [ASKED[1]], "history": [["q", "w"]]}, "field history is not read"),
    ({"prompt": [ASKED[0]], "completion": [ASKED[1]], "input": "i"}, "field input is not read"),
    ({"messages": ASKED, "loss": 1.3}, "field loss is not read"),
    ({"messages": [ASKED[0], ASKED[1] | {"input": "i"}]}, "field input of messages is not read"),
    ({"conversation": [{"input": "a", "output": "b", "score": 1}]}, "field score of turns is not read"),
])
def test_no_field_is_dropped_in_silence(tmp_path, record, note):
    notes = Counter()
    assert read(tmp_path, record, notes) == talk("a", "b")
    assert notes == {note: 1}


@pytest.mark.parametrize("learn", ["response", "all"])
def test_answers_that_are_not_to_be_learned_have_no_weight(learn):
    template = Template("chatml", make("bpe"))
    whole, some = talk("a", "b", "c", "d"), unlearned(talk("a", "b", "c", "d"), 0)
    ids, learned = template.render(some, learn)
    both = template.render(whole, learn)
    answer = [*template.tokenizer.encode("b"), template.ending[0]]
    assert ids == both[0] and sum(both[1]) - sum(learned) == len(answer)
    assert Examples([some], template, 256, learn).tokens == sum(learned[1:])


@pytest.mark.parametrize("content", [
    '[{0}, {1}]', '\ufeff[\r\n  {0},\r\n  {1}\r\n]\r\n', '{0}\n{1}\n', '[\n{0}\n,{1}]\n',
])
def test_a_json_file_is_an_array_or_records_one_behind_the_other(tmp_path, content):
    records = [json.dumps({"instruction": name, "output": "b"}, indent=1) for name in "ac"]
    (tmp_path / "a.json").write_bytes(content.replace("{0}", records[0]).replace("{1}", records[1]).encode())
    assert list(read_examples(tmp_path)) == [talk("a", "b"), talk("c", "b")]


@pytest.mark.parametrize("content, complaint", [
    ('[{"instruction": "a", "output": "b"},\n{"instruction": "a"}]', "line 2: expected a record"),
    ('[{"instruction": "a", "output": "b"},\n{"instruction": ', "line 2 begins a record that is not JSON"),
    ('[{"instruction": "a", "output": "b"}', "cut short"),
    ('[{"instruction": "a", "output": "b"}] x', "text follows the array"),
    ("[" * 100_000, "not JSON"),
])
def test_a_broken_json_file_is_named_with_the_line(tmp_path, content, complaint):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=rf"a\.json.*{complaint}"):
        list(read_examples(tmp_path / "a.json"))


def test_rows_of_parquet_files_are_records(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    rows = [{"conversations": SHAREGPT, "system": None}, {"conversations": SHAREGPT, "system": "s"}]
    pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(read_examples(tmp_path)) == [talk("a", "b"), talk("a", "b", system="s")]


@pytest.mark.parametrize("name, encoding", [("a.jsonl", "utf-16"), ("a.json", "utf-16"), ("a.txt", "utf-16")])
def test_other_encodings_are_named(tmp_path, name, encoding):
    (tmp_path / name).write_bytes('{"instruction": "a", "output": "b"}'.encode(encoding))
    with pytest.raises(UserError, match=f"{name}.*not UTF-8"):
        list(read_examples(tmp_path / name))


def test_a_dataset_of_the_hub_or_a_folder_is_read_for_fine_tuning(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    package = pytest.importorskip("datasets", minversion="4")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows").mkdir()
    records = [json.dumps({"conversations": SHAREGPT[:1] + [{"from": "gpt", "value": str(i)}]}) for i in range(20)]
    (tmp_path / "rows" / "train.jsonl").write_text("\n".join(records))
    rows, val = open_rows("bpe", dataset=f"hf:{tmp_path / 'rows'}", cache_dir=str(tmp_path / "cache"))
    assert (len(rows.conversations), len(val.conversations)) == (19, 1)


def test_what_the_files_hold_is_said(tmp_path, capsys):
    records = [{"instruction": f"a{i}", "output": "b", "id": i} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    open_rows("bpe", data_path=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    shown = capsys.readouterr().out
    assert "20 of a.jsonl" in shown and "field id is not read (20 times)" in shown


def test_validation_examples_that_are_too_long_are_passed_over(tmp_path):
    """Whichever examples the hash chooses: only those that fit are for validation."""
    records = [{"instruction": f"a{i}", "output": "b" * (500 if i < 19 else 1)} for i in range(21)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    rows, val = open_rows("bpe", seq_len=64, data_path=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert (len(rows.ids), rows.dropped, len(val.ids), val.dropped) == (1, 19, 1, 0)


def test_what_the_tokenizer_loses_of_the_examples_is_said(tmp_path, capsys):
    records = [{"instruction": f"a{i}", "output": "fox \u0416"} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    open_rows("char", data_path=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert "in the examples, the tokenizer loses" in capsys.readouterr().out
