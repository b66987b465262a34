"""What the documentation says must hold: commands parse, files exist, tests that it names are there."""

import re
import shlex

import pytest

import commands
import convert
import eval as eval_script
import sample
import serve
import train
from configurator import ROOT, configure

DOCUMENTS = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {"train.py": train.SETTINGS, "sample.py": sample.SETTINGS, "eval.py": eval_script.SETTINGS,
           "convert.py": [convert.ConvertSettings], "serve.py": serve.SETTINGS}


def parsed():
    for path in DOCUMENTS:
        for command in commands.commands(path):
            script = re.search(r"(\w+\.py)", command.text)
            if script and script[1] in SCRIPTS and not re.search(r"[…<]|\.\.\.", command.text):
                yield pytest.param(command.text, id=f"{command.page}: {command.text[:50]}")


@pytest.mark.parametrize("command", list(parsed()))
def test_every_command_of_the_documentation_is_understood(command):
    words = shlex.split(command.rpartition("| ")[2])
    at = next(i for i, word in enumerate(words) if word in SCRIPTS)
    environ = dict(word.split("=", 1) for word in words[:at] if re.match(r"[A-Z_]+=", word))
    script, *argv = words[at:]
    if "--help" not in argv:
        plain = {"convert.py": "paths"}.get(script, "")
        configure(SCRIPTS[script], argv, environ, plain=plain)


def test_every_command_of_the_documentation_runs_in_its_order(tmp_path):
    """In one copy of the checkout, by settings in the environment that make it small; tests/test_benchmarks.py has the
    benchmarks, and the fuzzers have tests of their own. What downloads is only parsed, above."""
    todo = []
    for command in [command for page in commands.PAGES for command in commands.commands(page)]:
        if command.runs and not re.search(r"-m benchmarks|fuzz_\w+\.py", command.text):
            todo += commands.recipe(command.text.split()[1]) if command.text.startswith("make ") else [command.text]
    todo = list(dict.fromkeys(todo))  # once each
    assert len(todo) > 20
    failed = commands.failures(todo, commands.clone(tmp_path / "nano"))
    assert not failed, "\n\n".join(failed)


def test_the_part_that_the_readme_imports_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    lines = (f"hello {n} and the number {n * n} again\n" for n in range(3000))
    (tmp_path / "my.txt").write_text("".join(lines), encoding="utf-8")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "my_tokenizer" / "tokenizer.json").is_file()


def test_both_readmes_have_the_same_commands_rows_links_and_sections():
    found = []
    for path in DOCUMENTS[:2]:
        text = path.read_text(encoding="utf-8")
        rows = re.findall(r"^\| ([`\[][^|]*)", text, re.MULTILINE)
        links = set(re.findall(r"\]\((\w[^)]*)\)", text)) - {"README.md", "README.zh.md"}
        sections = len(re.findall(r"^## ", text, re.MULTILINE))
        found.append(([command.text for command in commands.commands(path)], rows, links, sections))
    assert found[0] == found[1]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        assert target.startswith("http") or (path.parent / target).exists(), target


def test_every_test_that_the_documentation_names_exists():
    """Written as `test_x`, `test_x…` or `test_file.py: test_x`; without a file, reliability.md's own."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    found = 0
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        files = re.findall(r"\b(test_\w+)\.py", text)
        assert set(files) <= sources.keys(), path.name
        default = sources["test_reliability"] if path.name == "reliability.md" else "".join(sources.values())
        for file, name, open_ended in re.findall(r"(?:\b(test_\w+)\.py: )?\b(test_\w+)\b(?!\.py|: test)(…?)", text):
            source, end = sources[file] if file else default, "" if open_ended else r"\("
            assert re.search(rf"^def {name}{end}", source, re.MULTILINE), f"{path.name}: {name}"
            found += 1
    assert found > 15


def test_the_readme_lists_every_config_and_every_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.py"), *(ROOT / "config").glob("*.py")]:
        assert path.name in text or f"`{path.stem}`" in text, path.name
