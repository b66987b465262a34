"""The questions about the standard library: what they say is true, val is held out, and all of it is reproducible."""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from configurator import ROOT, UserError
from text.corpus import import_dataset, open_dataset

SCRIPT = ROOT / "data" / "stdlib_chat" / "prepare.py"
IMPORTED = ["argparse", "threading", "queue", "configparser", "tarfile", "zipfile", "random", "shutil", "json.decoder",
            "email.message", "html.parser", "ast", "statistics", "fractions", "textwrap", "csv", "venv",
            "logging", "contextlib", "uuid"]  # (not inspect: torch changes it)


@pytest.fixture(scope="module")
def chat():
    return import_dataset("stdlib_chat")  # its table() is made once and kept


@pytest.fixture(scope="module")
def table(chat):
    return chat.table()


@pytest.fixture(scope="module")
def texts(chat) -> dict[str, str]:
    """Module name -> text of its file."""
    result = {}
    folder = import_dataset("stdlib").FOLDER
    for path in chat.sources():
        name = path.relative_to(folder).as_posix().removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        result[name] = path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
    return result


def of(table, *kinds):
    found = [example for example in table if example.kind in kinds]
    assert len(found) > 50, "nothing was tested"
    return found


def named(example, prefix: str):
    """The object of an imported module that a question names as `module.Class.name`."""
    name = re.search(re.escape(prefix) + r"\.([\w.]*\w)", example.turns[0][0])[1]
    found = importlib.import_module(prefix)
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    return found.__func__ if isinstance(found, (staticmethod, classmethod)) else found


def letters(text: str) -> str:
    return re.sub(r"\W|_", "", re.sub(r":[\w:]+:`", "", text))


def test_each_module_is_in_the_split_of_its_file_in_stdlib(table, texts):
    raw = open_dataset("stdlib")
    files = {split: {text for text, _ in raw.pieces(split)} for split in ("train", "val")}
    homes = {(example.source, example.split) for example in table if example.kind != "self"}
    assert len({source for source, _ in homes}) == len(homes) > 300
    assert all(texts[source] in files[split] for source, split in homes)
    assert not files["train"] & files["val"]


def test_no_question_is_asked_twice(table):
    questions = Counter(" ".join(example.turns[0][0].split()).lower() for example in table)
    assert questions.most_common(1)[0][1] == 1


def test_messages_alternate_are_short_and_never_empty(chat):
    for split in ("train", "val"):
        for example in chat.examples(split):
            messages = example["messages"]
            assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
            assert all(m["content"].strip() == m["content"] != "" for m in messages)
            assert sum(len(m["content"]) for m in messages) <= 600


def test_kinds_are_balanced_and_some_examples_have_two_turns(table):
    kinds = Counter(example.kind for example in table)
    assert 5_000 < len(table) < 25_000 and len(kinds) == 11
    assert max(kinds.values()) <= 0.25 * len(table)
    assert 0.10 < sum(len(example.turns) == 2 for example in table) / len(table) < 0.20


def test_the_model_itself_is_a_matter_of_train_only(chat, table):
    own = of(table, "self")
    assert {example.split for example in own} == {"train"}
    assert ("Who are you?", chat.ME) in [example.turns[0] for example in own]


def test_command_in_another_process_writes_the_same_examples(chat, tmp_path):
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, SCRIPT, "new/folder"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, check=True)
    assert sorted(path.name for path in (tmp_path / "new/folder").iterdir()) == ["train.jsonl", "val.jsonl"]
    for split in ("train", "val"):
        lines = (tmp_path / "new/folder" / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
        assert [json.loads(line) for line in lines[:-1]] == list(chat.examples(split)) and lines[-1] == ""
    assert re.search(r"^where: [\d,]+ train, \d+ val$", done.stdout, re.MULTILINE)


def test_signatures_parse(table):
    for example in of(table, "header"):
        assert len(ast.parse(example.turns[0][1] + " pass").body) == 1
    for example in of(table, "call"):
        name, rest = example.turns[0][1].split("(", 1)
        ast.parse(f"def {name.split('.')[-1]}({rest}: pass")


def test_calls_take_the_parameters_that_inspect_sees(table):
    checked = 0
    for example in of(table, "what"):
        asked = re.search(r"\((.*)\) (?:do|for)\?$", example.turns[0][0])
        if example.source in IMPORTED and asked:
            found = named(example, example.source)
            names = list(inspect.signature(found, follow_wrapped=True).parameters)
            given = ast.parse(f"def f({asked[1]}): pass").body[0].args
            given = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
            given = [argument.arg for argument in given if argument]
            assert given in (names, names[1:]), example
            assert "self" not in given
            checked += 1
    assert checked > 30


def test_imports_parse_and_name_what_was_asked(table):
    for example in of(table, "import"):
        question, answer = example.turns[0]
        statement = ast.parse(answer).body[0]
        origin = "." * statement.level + (statement.module or "")
        assert question.endswith(f"from {origin} import") or statement.names[0].name in re.findall(r"\w+", question)


def test_import_lines_stand_in_the_module_that_is_asked_about(table, texts):
    lines = [example for example in of(table, "import") if example.turns[0][0].endswith("import")]
    assert len(lines) > 300
    for example in lines:
        assert f" {example.source}" in example.turns[0][0]
        names = letters(example.turns[0][1])
        squeezed = letters(re.sub(r"#.*", "", texts[example.source]))
        assert names in squeezed, example


def test_what_is_defined_somewhere_is_defined_there_and_nowhere_else(table, texts):
    places = {}  # name -> modules that have it at the top, found without ast
    for module, text in texts.items():
        for name in re.findall(r"^(?:async def|def|class) +(\w+)", text, re.MULTILINE):
            places.setdefault(name, set()).add(module)
    for example in of(table, "where", "import"):
        question, answer = example.turns[0]
        if not question.endswith("import"):
            module = (re.fullmatch(r"In the module ([\w.]+)\.", answer) or re.match(r"from ([\w.]+) import", answer))[1]
            name = re.search(r"(\w+)(?: defined)?[.?]$", question)[1] if example.kind == "where" else answer.split()[-1]
            assert name in question
            assert re.search(rf"^\s*(?:async def|def|class) +{name}\b", texts[module], re.MULTILINE)
            assert places.get(name, {module}) == {module}


def test_sentences_are_how_the_docstrings_begin(table):
    checked = Counter()
    for example in of(table, "what"):
        if example.source in IMPORTED:
            said = inspect.getdoc(named(example, example.source))
            assert letters(said).startswith(letters(example.turns[0][1])), example
            checked[example.split] += 1
    assert checked["train"] > 100


def test_sentences_are_one_clean_line(table):
    for example in of(table, "what", "module"):
        assert re.fullmatch(r"[A-Z][^\n\\]{13,198}[.!?]", example.turns[0][1]), example


def test_values_are_what_the_module_assigns(table, texts):
    for example in of(table, "constant"):
        name = re.search(r"\.(\w+)\?$", example.turns[0][0])[1]
        value = example.turns[0][1]
        assert re.search(rf"\b{name}\s*=\s*(\w+\s*=\s*)*\(?\s*{re.escape(value)}", texts[example.source]), example
        assert len(re.findall(rf"^ {{0,4}}{name} *= ", texts[example.source], re.MULTILINE)) <= 1, example
        if len(example.turns) == 2:
            assert example.turns[1][1] == type(ast.literal_eval(value)).__name__


def test_methods_are_those_that_the_class_has(table):
    checked = 0
    for example in of(table, "methods"):
        if example.source in IMPORTED:
            owner = named(example, example.source)
            kinds = (staticmethod, classmethod)
            own = {name for name, value in vars(owner).items() if name[0] != "_" and (isinstance(value, kinds) or (
                inspect.isfunction(value) and value.__qualname__ == f"{owner.__qualname__}.{name}"))}
            assert own == set(example.turns[0][1].split(", ")), example
            checked += 1
    assert checked > 15


def test_bodies_stand_in_the_source_and_fit_their_function(table, texts):
    stripped = {name: "\n".join(map(str.strip, text.split("\n"))) for name, text in texts.items()}
    for example in of(table, "body"):
        question, body = example.turns[0]
        assert "\n".join(map(str.strip, body.split("\n"))) in stripped[example.source]
        assert body.count("\n") < 8
        compile_me = question.split("\n", 1)[1] + "\n" + "\n".join("    " + line for line in body.split("\n"))
        assert len(ast.parse(compile_me).body[0].body) > 1


def test_names_are_those_of_functions_with_that_header(table, texts):
    for example in of(table, "name"):
        question, name = example.turns[0]
        assert "def _(" in question and name.isidentifier()
        assert re.search(rf"\bdef {name}\b", texts[example.source])
        ast.parse(question.split("\n", 1)[1])


def test_follow_ups_are_about_the_same_thing(table):
    modules = {"Which module is it from?": 0, "Write its header.": 0}
    for example in table:
        for question, answer in example.turns[1:]:
            if question == "Which module is it from?":
                assert answer == f"In the module {example.source}."
            if question == "Write its header.":
                name = re.search(r"def (\w+)\(", answer)[1]
                assert name in " ".join(example.turns[0])
            modules[question] = modules.get(question, 0) + 1
    assert min(modules.values()) > 20


@pytest.mark.parametrize("docstring, expected", [
    ("Return the\n``next`` item.  Raise an error at the end.\n\nMore.", "Return the `next` item."),
    ("Call :meth:`~a.b` with e.g. two arguments. Then stop.", "Call `a.b` with e.g. two arguments."),
    ("Make a list of everything", "Make a list of everything."),
    ("name(key) -> value\n\nReturn the value.", ""),
    ("Usage:\n    first second third:", ""),
    ("TODO: write what this does.", ""),
    ("Open (or close the file.", ""),
    ("Short.", ""),
    ("", ""),
])
def test_first_sentence_of_a_docstring(chat, docstring, expected):
    assert chat.sentence(docstring) == expected


def test_mistakes_get_one_sentence(chat, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="FOLDER"):
        chat.main([])
    with pytest.raises(UserError, match="cannot write to .*file"):
        chat.main([str(tmp_path / "file")])
    with pytest.raises(UserError, match="dataset=stdlib$"):
        list(open_dataset("stdlib_chat").pieces("train"))


def test_pairs_differ_in_the_question_alone(chat, monkeypatch):
    pairs = import_dataset("stdlib_pairs")
    monkeypatch.setattr(pairs, "questions", lambda: chat)
    found = list(pairs.examples("val"))
    right, wrong = (Counter(pair[side] for pair in found) for side in ("chosen", "rejected"))
    assert len(found) > 300 and all(pair["chosen"] != pair["rejected"] for pair in found)
    assert (right & wrong).total() > 0.95 * len(found)  # each answer is on both sides
    lengths = [sum(len(pair[side]) for pair in found) for side in ("chosen", "rejected")]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.02)
