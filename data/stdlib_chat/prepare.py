"""Questions and answers about the Python standard library, to fine-tune a small model: made with `ast`, no download.

    python data/stdlib_chat/prepare.py FOLDER     # writes FOLDER/train.jsonl and FOLDER/val.jsonl, prints the counts

About 19,000 examples with CPython 3.11, in ten kinds, and a few about the model itself (`self`, in train only). Each is
made from one file and belongs to the split of that file in data/stdlib: a model that was pretrained there is not asked
in training what it has not read. All choices (wording, follow-up questions, which examples of a large kind stay) are
made by hashes, so the same interpreter always gives the same examples.
"""

import ast
import functools
import gc
import json
import re
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))  # a command finds its own folder only

from configurator import UserError
from runtime.files import replacing
from runtime.screen import run
from text.corpus import document_hash, import_dataset

LIMIT = 600        # characters of all messages of an example: about 170 tokens of 3.5 bytes, a context is 256
CAP = 2500         # examples of one kind, at most
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
FOLLOW_SHARE = 5   # one in five of the examples that have a follow-up question asks it

QUESTIONS = {  # several wordings of each kind; the hash of what is filled in chooses
    "what": ("What does {0}({1}) do?", "What is {0}({1}) for?", "Explain {0} in one sentence.", "What does {0} do?"),
    "call": ("Which function of {0} does this? {1}", "What in {0} do I call for this? {1}",
             "Which function of the module {0} has this description? {1}"),
    "header": ("Write a function header: {0}", "Write the header of a Python function. {0}",
               "How would you declare a function with this docstring? {0}"),
    "body": ("Write the body of this function.\n{0}", "Complete this function:\n{0}", "Fill in the body:\n{0}"),
    "name": ("What would you call this function?\n{0}", "Find a name for this function:\n{0}",
             "Which name fits this function?\n{0}"),
    "where": ("Where is the {0} {1} defined?", "In which module is {1} defined?", "Which module defines {1}?"),
    "import": ("How do I import {0}?", "Write the import of {0}.", "Which import gives me {0}?"),
    "line": ("Complete this import of the module {0}: from {1} import", "How does {0} go on: from {1} import"),
    "module": ("What is the module {0} for?", "What does the module {0} do?", "Describe the module {0}."),
    "methods": ("Which public methods does the class {0} define?", "List the public methods of {0}.",
                "What are the methods of {0}?"),
    "constant": ("What is the value of {0}?", "What is {0}?", "Which value has the constant {0}?"),
}

ME = "I am a small language model, trained on the source code of Python's standard library."
SELF = {  # questions, apart by |: answer
    "Who are you?|What are you?|What is your name?|Tell me about yourself.|Introduce yourself.": ME,
    "Are you a human?|Are you a person?|Am I talking to a human?": "No. " + ME,
    "What were you trained on?|What have you read?|Where is your knowledge from?":
        "The source code of Python's standard library, and questions and answers made out of it.",
    "What can you do?|How can you help me?|What can I ask you?|What do you know?":
        "I can say what a function of the standard library does, where it is defined, and write short code.",
    "Are you always right?|Can I trust you?|Do you make mistakes?|Is what you say true?":
        "No. I am very small and make many mistakes, so check what I say.",
    "How large are you?|Are you a large language model?": "I am very small, and I was trained for a few minutes.",
    "Do you speak other languages?|Do you know French?": "I know some English and some Python, and nothing else.",
    "Hello|Hi|Good morning|Hey there": "Hello. Ask me about Python's standard library.",
    "Thank you|Thanks|Many thanks": "You are welcome.",
    "Bye|Goodbye|See you": "Goodbye.",
}
OPENINGS = ("{0}", "{1}", "Hello. {0}", "Hi, {1}", "Please tell me: {1}", "A question: {1}")


class Example(NamedTuple):
    kind: str                            # a key of QUESTIONS ("line" counts as "import"), or "self"
    split: str                           # "train" or "val"
    source: str                          # the module that it is made of; "" for those about the model itself
    turns: tuple[tuple[str, str], ...]   # ((question, answer), ...)


class Module(NamedTuple):
    name: str                       # "email.message"; a package goes by its own name
    split: str
    lines: list[str]
    tree: ast.Module
    sentences: dict[ast.AST, str]   # of each definition and of the module: see `sentence`
    stores: Counter[str]            # how often a name is assigned to, anywhere


def sources() -> list[Path]:
    return import_dataset("stdlib").sources()


def documents(split: str) -> Iterator[str]:
    raise UserError("dataset=stdlib_chat holds questions and answers, no text to pretrain on; use dataset=stdlib")


def examples(split: str) -> Iterator[dict]:
    """{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]} of each example."""
    for example in table():
        if example.split == split:
            pairs = [(("user", question), ("assistant", answer)) for question, answer in example.turns]
            yield {"messages": [{"role": role, "content": content} for pair in pairs for role, content in pair]}


@functools.cache
def table() -> tuple[Example, ...]:
    """All examples of both splits, mixed; no question twice, also not once in each split."""
    collected = gc.isenabled()
    gc.disable()  # it would search the 700 trees again and again, and take half of the time
    try:
        found = [*about_itself(), *about_modules(read_modules())]
    finally:
        if collected:
            gc.enable()
    seen, kinds = set(), {}
    for example in found:  # train comes first, so it keeps what val repeats
        question = " ".join(example.turns[0][0].lower().split())
        if question not in seen:
            seen.add(question)
            kinds.setdefault(example.kind, []).append(example)
    kept = [example for kind in kinds.values() for example in sorted(kind, key=question_hash)[:CAP]]
    return tuple(sorted(kept, key=question_hash))


def question_hash(example: Example) -> int:
    return document_hash(example.turns[0][0])


# ---------------------------------------------------------------------------------------------------------------------
# Source -> pieces


def read_modules() -> list[Module]:
    """Those of train, then those of val; without files that do not parse, or are no modules (a dash in the name)."""
    prepare, modules = import_dataset("stdlib"), []
    for path in prepare.sources():
        parts = path.relative_to(prepare.FOLDER).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not all(part.isidentifier() for part in parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in strings
                tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue
        split = "val" if document_hash(text) < prepare.VAL_SHARE * 2**64 else "train"
        sentences, stores = {}, Counter()
        for node in ast.walk(tree):
            if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module)):
                sentences[node] = sentence(ast.get_docstring(node) or "")
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                stores[node.id] += 1
        modules.append(Module(".".join(parts), split, text.split("\n"), tree, sentences, stores))
    return sorted(modules, key=lambda module: module.split)  # stable


def sentence(docstring: str) -> str:
    """The first sentence of a docstring on one line, or "" where there is none that reads well.

    'Return the\\n  ``next`` item.  Raises ...' -> "Return the `next` item."
    """
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    paragraph = re.sub(r":[\w:]+:`~?([^`]+)`", r"`\1`", paragraph).replace("``", "`")
    found = re.match(r".+?(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)(?<!cf)(?<!\b[A-Z])[.!?](?=\s|$)", paragraph)
    text = found[0] if found else paragraph + "." * (paragraph[-1:].isalnum() or paragraph[-1:] in ")`'\"")
    balanced = text.count("(") == text.count(")") and text.count("`") % 2 == text.count('"') % 2 == 0
    bad = re.search(r'\\|>>>|\bXXX|TODO|FIXME|->| -- |"""|Internal|^[^A-Z]|^\S+\(', text)
    return text if balanced and not bad and 15 <= len(text) <= 200 and text.isprintable() and text[-1] in ".!?" else ""


def top_level(tree: ast.Module | ast.ClassDef) -> Iterator[ast.stmt]:
    """The statements of a module or class, also those under its `if` and `try`."""
    waiting = [*tree.body]
    while waiting:
        node = waiting.pop(0)
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            handlers = [statement for handler in getattr(node, "handlers", []) for statement in handler.body]
            waiting[:0] = [*node.body, *handlers, *node.orelse]


def is_called(node: ast.stmt) -> bool:
    """A function or method, and not one that serves as an attribute."""
    decorators = " ".join(map(ast.unparse, getattr(node, "decorator_list", [])))
    return isinstance(node, FUNCTIONS) and not re.search("property|setter|getter|deleter|overload", decorators)


def header(node) -> str:
    """ "def name(self, key=None):" """
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{word} {node.name}({ast.unparse(node.args)}){returns}:"


def arguments(node, method: bool) -> str:
    """ "key=None": what is between the parentheses of a call, without the `self` of a method."""
    args, static = copy(node.args), any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
    if method and not static:
        args.posonlyargs, args.args = (args.posonlyargs[1:], args.args) if args.posonlyargs else ([], args.args[1:])
    return ast.unparse(args)


def short_body(node, lines: list[str]) -> str:
    """The statements behind the docstring, dedented, if they are at most 8 lines that do something; else ""."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not body or not 1 <= body[-1].end_lineno - body[0].lineno + 1 <= 8:
        return ""
    text = textwrap.dedent("\n".join(lines[body[0].lineno - 1 : body[-1].end_lineno])).rstrip()
    if len(body) == 1 and re.match(r"pass|\.\.\.|raise NotImplemented", text):
        return ""
    try:  # they differ if a string has lines of its own, or the body is behind the colon
        same = [ast.dump(statement) for statement in ast.parse(text).body] == [ast.dump(part) for part in body]
    except SyntaxError:
        same = False
    return text if same and "\t" not in text else ""


# ---------------------------------------------------------------------------------------------------------------------
# Pieces -> questions and answers


def about_itself() -> Iterator[Example]:
    for questions, answer in SELF.items():
        for question in questions.split("|"):
            for opening in OPENINGS if question[-1] in "?." else OPENINGS[:1]:
                asked = opening.format(question, question[0].lower() + question[1:])
                yield Example("self", "train", "", ((asked, answer),))


def about_modules(modules: list[Module]) -> Iterator[Example]:
    """All questions; `table` removes repeated ones and the surplus of a kind."""
    definitions = (*FUNCTIONS, ast.ClassDef)
    uses = Counter(text for module in modules for text in module.sentences.values())
    homes = Counter(name for module in modules
                    for name in {node.name for node in top_level(module.tree) if isinstance(node, definitions)})
    for module in modules:
        public = [node for node in module.tree.body if isinstance(node, definitions) and node.name[0] != "_"]
        if text := module.sentences[module.tree]:
            follow = ("Name something that it defines.", public[0].name) if public else None
            yield from ask(module, "module", (module.name,), text, follow)
        for node in top_level(module.tree):
            if isinstance(node, ast.ImportFrom) and node.module != "__future__":
                origin = "." * node.level + (node.module or "")
                yield from ask(module, "line", (module.name, origin), ast.unparse(node))
            elif isinstance(node, ast.Assign):
                yield from about_constant(module, node)
        for node in public:
            text, what = module.sentences[node], "class" if isinstance(node, ast.ClassDef) else "function"
            if homes[node.name] == 1 and "._" not in "." + module.name:  # one answer, and one that can be imported
                follow = ("What is it for?", text) if text else None
                yield from ask(module, "where", (what, node.name), f"In the module {module.name}.", follow)
                yield from ask(module, "import", (node.name,), f"from {module.name} import {node.name}")
            if what == "class":
                methods = [part.name for part in top_level(node) if is_called(part) and part.name[0] != "_"]
                methods = [*dict.fromkeys(methods)]  # once, where `if` and `else` both define it
                if 2 <= len(methods) <= 12:
                    follow = ("What is the class for?", text) if text else None
                    yield from ask(module, "methods", (f"{module.name}.{node.name}",), ", ".join(methods), follow)
        yield from about_functions(module, uses)


def about_constant(module: Module, node: ast.Assign) -> Iterator[Example]:
    """The value as it is written, of a name that is assigned to once."""
    target, value = node.targets[0], node.value
    number = value.operand if isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.USub) else value
    if (isinstance(target, ast.Name) and target.id[0] != "_" and module.stores[target.id] == 1
            and isinstance(number, ast.Constant) and number.value is not None and value.lineno == value.end_lineno):
        text = module.lines[value.lineno - 1].encode()[value.col_offset : value.end_col_offset].decode()
        follow = ("What is its type?", type(number.value).__name__)
        if len(text) <= 80:
            yield from ask(module, "constant", (f"{module.name}.{target.id}",), text, follow)


def about_functions(module: Module, uses: Counter) -> Iterator[Example]:
    """Questions about the functions and methods of a module; `uses`: how often a sentence is in the library."""
    found = [("", node) for node in module.tree.body]  # one under an `if` may not be the one that runs
    found += [(node.name + ".", part) for _, node in found if isinstance(node, ast.ClassDef) for part in node.body]
    for owner, node in found:
        if not is_called(node):
            continue
        text, head, body = module.sentences[node], header(node), short_body(node, module.lines)
        name, call = owner + node.name, arguments(node, bool(owner))
        home, declare = ("Which module is it from?", f"In the module {module.name}."), ("Write its header.", head)
        if node.name[0] != "_" and text and uses[text] <= 3 and len(head) <= 150:
            yield from ask(module, "what", (f"{module.name}.{name}", call), text, declare)
            if uses[text] == 1:
                yield from ask(module, "header", (text,), head, home)
                yield from ask(module, "call", (module.name, text), f"{name}({call})", declare)
        if text and body:
            yield from ask(module, "body", (f'{head}\n    """{text}"""',), body, home)
        elif "\n" in body and node.name[0] != "_" and ast.get_docstring(node) is None:
            nameless = head.replace(f"def {node.name}(", "def _(", 1)
            yield from ask(module, "name", (f"{nameless}\n{textwrap.indent(body, '    ')}",), node.name, home)


def ask(module: Module, kind: str, parts: tuple, answer: str, follow: tuple[str, str] | None = None
        ) -> Iterator[Example]:
    """One example, or none where it would be too long; with `follow`, a second (question, answer), now and then."""
    key = document_hash(repr((kind, parts)))
    wordings = QUESTIONS[kind]
    turns = ((wordings[key % len(wordings)].format(*parts), answer),)
    if follow and (key >> 32) % FOLLOW_SHARE == 0 and sum(map(len, (*turns[0], *follow))) <= LIMIT:
        turns += (follow,)
    if sum(map(len, turns[0])) <= LIMIT:
        yield Example("import" if kind == "line" else kind, module.split, module.name, turns)


# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("give one folder to write to: python data/stdlib_chat/prepare.py FOLDER")
    folder = Path(argv[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split in ("train", "val"):
            with replacing(folder / f"{split}.jsonl") as file:
                for example in examples(split):
                    file.write((json.dumps(example, ensure_ascii=False) + "\n").encode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
    counts = Counter((example.kind, example.split) for example in table())
    for kind in sorted({example.kind for example in table()}):
        print(f"\n{kind}: {counts[kind, 'train']:,} train, {counts[kind, 'val']:,} val")
        for question, answer in next(example.turns for example in table() if example.kind == kind):
            print(textwrap.indent(f"Q: {question}\nA: {answer}", "    "))
    total, longer = len(table()), sum(len(example.turns) > 1 for example in table())
    print(f"\n{folder}: {total:,} examples; {longer / total:.0%} have a second turn")


if __name__ == "__main__":
    run(main)
