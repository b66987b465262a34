"""The corpora of data/: no text is in train and in val, none is damaged, and every choice is read as it was meant."""

import csv
import gzip
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest

import data
from configurator import ROOT, UserError, configure
from model import ModelConfig
from test_download import Server
from text import corpus
from text.shards import read_meta

prepare = corpus.import_dataset  # open_dataset would ask for its sources, and so the network


def both(module) -> tuple[list[str], list[str]]:
    return list(module.documents("train")), list(module.documents("val"))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **more):
        raise AssertionError("asked the network for something that is here")

    monkeypatch.setattr("text.download.open_url", refuse)


CHOOSER = """
chosen = []
def choose(text): chosen.append(text)
def sources(): return [] if chosen else None  # chosen first
def documents(split): yield f"{chosen} {split}"
"""


def test_what_stands_behind_the_colon_reaches_the_corpus(tmp_path, monkeypatch):
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "data" / "mine" / "prepare.py").write_text(CHOOSER)
    monkeypatch.setattr(corpus, "ROOT", tmp_path)
    raw = corpus.open_dataset("mine:a/b:c")
    assert list(raw.pieces("val")) == [("['a/b:c'] val", True)] and raw.name == "mine-a-b-c"
    assert list(corpus.open_dataset("mine").pieces("train")) == [("[''] train", True)]
    with pytest.raises(UserError, match="dataset=mine has no choices: remove the :3.12"):
        (tmp_path / "data" / "mine" / "prepare.py").write_text("def documents(split): return []")
        corpus.open_dataset("mine:3.12")


@pytest.mark.parametrize("name", sorted(path.parent.name for path in (ROOT / "data").glob("*/prepare.py")))
def test_every_corpus_is_a_command(name, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "data" / name / "prepare.py"), "--help"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr and "prepare.py" in done.stdout + done.stderr


def test_command_of_a_corpus_shows_how_its_documents_begin(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "data" / "stdlib" / "prepare.py")], cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the first documents begin") == 2 and done.stdout.count("characters: ") == 6


@pytest.mark.parametrize("config", ["gpt2", "lumen", "mla_moe", "mini", "tinystories", "ancients", "poetry"])
def test_preset_names_a_corpus_that_is_there(config):
    s = configure([ModelConfig, data.DataSettings], [], environ={})
    namespace = {}
    exec((ROOT / "config" / f"{config}.py").read_text(encoding="utf-8"), namespace)
    names = [part.rpartition(":")[0] for part in namespace.get("mixture", "").split()] or [namespace["dataset"]]
    assert s.dataset == "stdlib" and all(corpus.is_dataset(name) for name in names)


# ---------------------------------------------------------------------------------------------------------------------
# Standard library, Shakespeare


def test_stdlib_is_found_from_any_directory_and_split_by_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train, val = both(prepare("stdlib"))
    assert 5e6 < sum(map(len, train + val)) < 40e6
    assert 0.02 < sum(map(len, val)) / sum(map(len, train + val)) < 0.1
    assert not set(train) & set(val) and both(prepare("stdlib")) == (train, val)


def test_stdlib_skips_and_lists_files_that_are_not_utf8(tmp_path, monkeypatch):
    module = prepare("stdlib")
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    with pytest.raises(UserError, match="no library sources"):
        list(module.documents("train"))
    for i in range(100):
        (tmp_path / f"m{i}.py").write_text(f"x = {i}")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_m.py").write_text("left out")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
    assert len([*module.documents("train"), *module.documents("val")]) == 100
    assert module.skipped == [tmp_path / "latin.py"]


def test_shakespeare_takes_the_file_that_is_there_and_splits_like_nanogpt(tmp_path, monkeypatch):
    module = prepare("shakespeare")
    monkeypatch.setattr(module, "FILE", tmp_path / "input.txt")
    module.FILE.write_text("First Citizen:\n" * 100)
    (train,), (val,) = both(module)
    assert (len(train), len(val)) == (1350, 150) and train + val == "First Citizen:\n" * 100


# ---------------------------------------------------------------------------------------------------------------------
# Poetry

DAWN = {"title": "春曉", "author": "孟浩然", "paragraphs": ["春眠不覺曉，處處聞啼鳥。", "夜來風雨聲，花落知多少。"]}


@pytest.fixture
def poetry(monkeypatch, tmp_path):
    """(the module, a function that writes a file of poems)"""
    module = prepare("poetry")
    monkeypatch.setattr(module, "FOLDER", tmp_path / "package")

    def write(name: str, content: object) -> Path:
        path = module.FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return module, write


def poems(module) -> list[str]:
    train, val = both(module)
    return train + val


def test_poetry_says_how_to_fetch_it(poetry):
    with pytest.raises(UserError, match="no poems in .*: run `npm pack chinese-poetry.* and `tar xf"):
        poetry[0].sources()


@pytest.mark.parametrize("content, documents", [
    ([DAWN], ["春曉\n孟浩然\n\n春眠不覺曉，處處聞啼鳥。\n夜來風雨聲，花落知多少。\n"]),
    ([{"rhythmic": "如梦令", "paragraphs": [" 昨夜雨疏风骤。", "", 7]}], ["如梦令\n\n昨夜雨疏风骤。\n"]),
    ([{"title": None, "author": " ", "para": ["一"]}, {"content": "有字句之锦绣"}], ["\n一\n", "\n有字句之锦绣\n"]),
    ({"title": "千家詩", "author": "王相", "content": [{"type": "五言", "content": [
        {"chapter": "春眠", "author": "孟浩然", "paragraphs": ["春眠"]}, {"paragraphs": ["花落"]}]}]},
     ["春眠\n孟浩然\n\n春眠\n", "千家詩\n王相\n\n花落\n"]),
    ([{"name": "孟浩然", "desc": "盛唐詩人"}, "loose", None, 3], []),
])
def test_poetry_is_found_in_every_shape_of_json(poetry, content, documents):
    module, write = poetry
    write("a/poems.json", content)
    assert sorted(poems(module)) == sorted(documents) and not module.skipped


def test_a_poem_comes_once_whatever_its_edition(poetry):
    module, write = poetry
    edition = DAWN | {"title": "Other", "paragraphs": ["春眠不覺曉，處處聞啼鳥。夜來風雨聲，", "花落知多小。"]}
    new = DAWN | {"paragraphs": ["春眠不覺曉，", "一", "二", "三"]}
    write("a.json", [DAWN])
    write("b.json", [edition, new, DAWN])
    assert [text.splitlines()[3] for text in poems(module)] == ["春眠不覺曉，處處聞啼鳥。", "春眠不覺曉，"]


def test_poetry_leaves_out_what_is_no_poem_and_counts_what_it_cannot_read(poetry):
    module, write = poetry
    write("a/bom.json", "\ufeff".encode() + json.dumps([DAWN]).encode())
    for folder in ("strains/json", "error", "tang/error"):
        write(f"{folder}/a.json", [{"paragraphs": ["仄仄平平仄"]}])
    deep = {"content": ["deep"]}
    for _ in range(300):
        deep = {"content": [deep]}
    broken = [write("broken.json", b'[{"content": "half'), write("deep.json", b"[" * 9999 + b"]" * 9999),
              write("latin.json", b'["caf\xe9"]'), write("surrogate.json", b'[{"content": "\\ud83d"}]')]
    write("deep_enough.json", deep)
    assert len(poems(module)) == 2 and module.skipped == broken


def test_poetry_holds_out_the_same_poems_when_others_are_added(poetry):
    module, write = poetry
    numbered = [{"content": f"poem{i}"} for i in range(600)]
    write("b.json", numbered[:500])
    train, val = both(module)
    assert 2 <= len(val) <= 25 and len(train) + len(val) == 500
    write("a.json", numbered[500:])
    more_train, more_val = both(module)
    assert set(train) < set(more_train) and set(val) <= set(more_val) and not set(more_train) & set(more_val)


# ---------------------------------------------------------------------------------------------------------------------
# TinyStories


@pytest.fixture
def tinystories(monkeypatch, tmp_path):
    """(module, files of the server: name -> bytes); its hashes and sizes are those of the files."""
    monkeypatch.setattr("text.records.PIECE", 64)  # a story comes in several pieces
    module = prepare("tinystories")
    story = "Once upon a time, {} had a red ball.\n\n\"I like it,\" said {}.\n" * 3
    train = [story.replace("{}", name) for name in ("Lily", "Tom", "Ben", "Mia")]
    val = [train[2], story.replace("{}", "Sue")]
    texts = {"train": train, "val": val}
    files = {}
    for split, (name, _, _) in module.FILES.items():
        files[name] = ("\n" + "\n<|endoftext|>\n\n".join(texts[split]) + "<|endoftext|>\n").encode()
        facts = (name, len(files[name]), hashlib.sha256(files[name]).hexdigest())
        monkeypatch.setitem(module.FILES, split, facts)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    return module, files


def test_tinystories_are_whole_stories_and_none_is_in_both_splits(tinystories, tmp_path, no_network):
    module, files = tinystories
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    train, val = both(module)
    assert [text.split()[4] for text in train] == ["Lily", "Tom", "Mia"], "Ben's story is for validation"
    assert [text.split()[4] for text in val] == ["Ben", "Sue"]
    assert all(text.startswith("Once") and text.endswith(".") and text.count("\n\n") == 3 for text in train + val)


def test_tinystories_are_downloaded_once_and_checked(tinystories, tmp_path, server, monkeypatch):
    module, files = tinystories
    server.files |= {f"/{name}": content for name, content in files.items()}
    monkeypatch.setattr(module, "BASE", server.url)
    assert [path.read_bytes() for path in module.sources()] == list(files.values())[::-1]
    module.sources()
    assert len(server.paths) == 2
    (tmp_path / module.FILES["val"][0]).unlink()
    monkeypatch.setitem(module.FILES, "val", (*module.FILES["val"][:2], "0" * 64))
    with pytest.raises(UserError, match="not the expected"):
        module.sources()


# ---------------------------------------------------------------------------------------------------------------------
# Gutenberg

TRAPS = """“Yes.”

Yes. He said so [see note 3], i.e. 3.14 of them (in brackets), e.g. at 10:30 a.m....

CONTENTS of the box were three: wine, oil, figs.

Contents

  BOOK I ........ 1

Of arms . . . and the man--
    indented, as verse is;
*** three stars are no end ***
[Illustration: the ships]"""


def book_text(body: str, start: str = "*** START OF THE PROJECT GUTENBERG EBOOK X ***") -> str:
    return (f"\ufeffThe Project Gutenberg eBook of X\n\nTitle: X\n\n{start}\n\n\n\nProduced by A. Volunteer and\n"
            f"another\n\n\n\n{body}\n\n\n\nEnd of the Project Gutenberg EBook of X, by\nSomebody\n\n"
            "*** END OF THE PROJECT GUTENBERG EBOOK X ***\n\nSTART: FULL LICENSE\nPLEASE READ")


def prose(seed: str, words: int) -> str:
    """Paragraphs of about 80 words in lines of ten, each word another one."""
    lines = [" ".join(f"{seed}{i}" for i in range(n, min(n + 10, words))) for n in range(0, words, 10)]
    return "\n\n".join(".\n".join(lines[n : n + 8]) + "." for n in range(0, len(lines), 8))


@pytest.mark.parametrize("start", ["*** START OF THE PROJECT GUTENBERG EBOOK X ***",
                                   "***START OF THIS PROJECT GUTENBERG EBOOK A LONG\nTITLE***"])
def test_cleaner_takes_the_frame_and_leaves_every_character_of_the_book(start):
    clean = prepare("gutenberg").clean
    assert clean(book_text(TRAPS, start).lstrip("\ufeff")) == TRAPS
    assert clean(book_text("One  \n\n \t\n\n\nTwo\t\nlines", start)) == "One\n\nTwo\nlines"


@pytest.mark.parametrize("line", ["3.14", "...", "i.e.", "[in brackets]", "(in brackets)", "Yes.", "contents of it"])
def test_cleaner_keeps_what_cleaners_like_to_damage(line):
    clean = prepare("gutenberg").clean
    for body in (line, f"{line} and more\n\nthen", f"before\n\n{line}", f"before {line} behind"):
        assert clean(book_text(body)) == body


def test_book_without_its_end_is_not_taken(tmp_path):
    module = prepare("gutenberg")
    whole = book_text("The text.\n" * 9)
    for text in (whole.replace("*** END", "*** AND"), whole.replace("*** START", "*** SMART"), whole[:200], ""):
        assert module.clean(text) == ""


@pytest.mark.parametrize("words", [*range(1, 12), 499, 500, 501, 999, 1000, 1001, 1002, 1499, 1501, 2001, 7777])
@pytest.mark.parametrize("shape", ["paragraphs", "lines", "one long line"])
def test_chunks_have_500_to_1000_words_and_lose_none(words, shape):
    text = prose("w", words)
    text = text if shape == "paragraphs" else re.sub(r"\n+", "\n" if shape == "lines" else " ", text)
    chunks = list(prepare("gutenberg").chunks(text))
    assert " ".join(chunks).split() == text.split()
    counts = [len(chunk.split()) for chunk in chunks]
    assert counts == [words] if words <= 1000 else 500 <= min(counts) <= max(counts) <= 1000


def test_chunks_end_with_a_paragraph_where_there_are_paragraphs():
    text = prose("w", 7777)
    paragraphs = text.split("\n\n")
    chunks = list(prepare("gutenberg").chunks(text))
    assert len(chunks) > 7 and [part for chunk in chunks for part in chunk.split("\n\n")] == paragraphs


@pytest.mark.parametrize("author, titles", [
    ("Homer", ["The Iliad", "The Iliad of Homer\nTranslated into Blank Verse", "Iliads", "The Iliad: in prose"]),
    ("Virgil", ["The Aeneid", "The Æneids of Virgil, Done into English Verse", "The Aeneid of Virgil, Book VI"]),
    ("Aesop", ["Aesop's Fables", "The Fables of Æsop; a new translation", "Æsop’s Fables (illustrated)"]),
    ("Plutarch", ["Plutarch's Lives, Volume 1 (of 4)", "Plutarch's Lives Vol. II", "The Lives, Complete"]),
    ("Sophocles", ["Oedipus King", "Œdipus King"]),
])
def test_translations_of_a_work_are_recognised(author, titles):
    assert len({prepare("gutenberg").work_of(title, author) for title in titles}) == 1


def test_different_works_stay_different():
    work_of = prepare("gutenberg").work_of
    works = {("Plato", "The Republic"), ("Plato", "Laws"), ("Plato", "Apology"), ("Cicero", "The Republic"),
             ("Homer", "The Odyssey"), ("Homer", "The Iliad"), ("Horace", "The Works of Horace"), ("Horace", "Horace")}
    assert len({work_of(title, author) for author, title in works}) == len(works)


def entry(number: int, title: str, author: str = "Plato", years=(-428, -348), downloads: int = 0, **changes) -> dict:
    person = {"name": author, "birth_year": years[0], "death_year": years[1]}
    return {"id": number, "title": title, "authors": [person], "translators": [], "languages": ["en"],
            "copyright": False, "media_type": "Text",
            "download_count": downloads or 1000 - number} | changes


def by(name: str) -> list[dict]:
    return [{"name": name, "birth_year": 1800, "death_year": 1870}]


def test_catalogue_is_narrowed_to_ancient_english_texts():
    entries = [entry(1, "Laws"), entry(2, "Emma", "Austen, Jane", (1775, 1817)), entry(3, "Leges", languages=["la"]),
               entry(4, "Ion", copyright=True), entry(5, "Crito", media_type="Sound"), entry(6, "?", "X", (None, None)),
               entry(7, "Phaedo", years=(None, -348)), entry(8, "Late", "Y", (501, 560)),
               entry(9, "Consolation", "Boethius", (480, 524)), entry(10, "No author", authors=[]),
               entry(12, "Lysis", copyright=None), entry(13, None)]
    comment = entry(11, "Meno, with a commentary")
    comment["authors"] += by("Somebody")
    assert [row["id"] for row in prepare("gutenberg").select([*entries, comment])] == [1, 7, 9]


def test_one_translation_per_work_and_it_is_the_most_downloaded():
    rows = prepare("gutenberg").select([entry(1, "The Republic", downloads=5), entry(2, "Republic", downloads=50),
                                        entry(3, "Laws", downloads=20), entry(2, "Republic", downloads=50)])
    assert [(row["id"], row["downloads"]) for row in rows] == [(2, 50), (3, 20)]


def test_volumes_of_the_chosen_translation_belong_to_the_work():
    lives = [entry(1, "Lives, Volume 1", downloads=9, translators=by("North")),
             entry(2, "Lives, Volume 2", downloads=7, translators=by("North")),
             entry(3, "Lives, Volume 2", downloads=8, translators=by("Long")),
             entry(4, "Lives", downloads=6, translators=by("North")),
             entry(5, "Lives, Volume 1", downloads=5, translators=by("North"))]
    assert [row["id"] for row in prepare("gutenberg").select(lives)] == [1, 2]
    lives[3]["download_count"] = 10
    assert [row["id"] for row in prepare("gutenberg").select(lives)] == [4], "the whole work holds the volumes"


class Library(Server):
    """Serves `files`, and the catalogue of `entries`, four a page (?page=); `script`: path -> words of its answers."""

    def __init__(self):
        super().__init__()
        self.url, self.tag, self.script = self.url.removesuffix("/big.bin"), "", {}
        self.files, self.entries, self.paths = {}, [], []

    def answer(self, path: str) -> tuple[str, bytes]:
        self.paths.append(path)
        url = urlsplit(path)
        words, content = self.script.get(url.path), self.files.get(url.path)
        if url.path == "/books/":
            page = int(parse_qs(url.query).get("page", ["1"])[0])
            more = page * 4 < len(self.entries)
            content = json.dumps({"results": self.entries[page * 4 - 4 : page * 4],
                                  "next": f"{self.url}/books/?page={page + 1}" if more else None}).encode()
        return (words.pop(0) if words else "404" if content is None else "ok"), content


@pytest.fixture
def server():
    with Library() as server:
        yield server
        server.shutdown()


@pytest.fixture
def gutenberg(monkeypatch, tmp_path, server):
    """The module with a catalogue of 40 works (10 pages), the first of which has two volumes, and their texts."""
    module = prepare("gutenberg")
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "CATALOGUE", f"{server.url}/books/?languages=en&author_year_end=500")
    monkeypatch.setattr(module, "TEXT", server.url + "/{id}.txt")
    slept = []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the pauses between tries
    names = [f"{kind} {letter}x" for kind in ("Dialogue", "Letter") for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    server.entries += [entry(number, names[number - 1]) for number in range(2, 41)]
    server.entries += [entry(41, "Dialogue Bx, Volume 1", downloads=5000), entry(42, "Dialogue Bx, Volume 2"),
                       entry(43, "Dialogue Cx, done into English verse", downloads=1)]
    for book in server.entries:
        text = book_text(prose(f"b{book['id']}x", 3000)) if book["id"] != 2 else "never asked for"
        server.files[f"/{book['id']}.txt"] = text.replace("\n", "\r\n").encode("utf-8")
    return SimpleNamespace(module=module, server=server, folder=tmp_path, slept=slept)


def seen(texts: list[str]) -> set[str]:
    """The books that chunks come from."""
    return {match for text in texts for match in re.findall(r"\bb(\d+)x", text)}


def test_gutenberg_splits_by_work_before_it_cuts(gutenberg):
    train, val = both(gutenberg.module)
    assert not seen(train) & seen(val) and len(seen(train) | seen(val)) == 40
    assert len({"41", "42"} & seen(val)) in (0, 2), "the volumes of a work were parted"
    words = Counter(word for text in train + val for word in text.split())
    assert len(words) == 40 * 3000 and set(words.values()) == {1}, "words were lost or came twice"
    assert 0.02 < sum(map(len, val)) / sum(map(len, train + val)) < 0.1
    assert {len(seen([text])) for text in train + val} == {1}
    assert both(gutenberg.module) == (train, val)


def test_gutenberg_leaves_a_manifest_and_asks_for_nothing_twice(gutenberg):
    files = gutenberg.module.sources()
    assert len(gutenberg.server.paths) == 11 + 40 == len(gutenberg.slept), "pages of the catalogue, texts"
    assert set(gutenberg.slept) == {0.3} and "author_year_end=500" in gutenberg.server.paths[0]
    with open(gutenberg.folder / "manifest.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"id": "41", "title": "Dialogue Bx, Volume 1", "author": "Plato", "born": "-428", "died": "-348",
                       "translators": "", "volume": "1", "downloads": "5000", "work": "plato: dialogue bx"}
    assert len(rows) == 40 and "2" not in [row["id"] for row in rows]
    gutenberg.server.paths.clear()
    assert gutenberg.module.sources() == files and both(gutenberg.module)[0]
    assert gutenberg.server.paths == []


def test_gutenberg_takes_as_many_works_as_it_is_told(gutenberg):
    gutenberg.module.choose("3")
    names = [path.name for path in gutenberg.module.sources()]
    assert names == ["manifest.csv", "41.txt", "42.txt", "3.txt", "4.txt"]
    gutenberg.module.choose("4,delay=1.5")
    assert (gutenberg.module.works, gutenberg.module.delay) == (4, 1.5)
    for wrong in ("1", "0", "-3", "many", "1.5", "delay=x", "delay=-1", "50,pause=1", "²"):
        with pytest.raises(UserError, match="how many works"):
            gutenberg.module.choose(wrong)


def test_gutenberg_outlives_a_bad_line(gutenberg):
    gutenberg.server.script = {"/books/": ["cut100", "503", "ok", "429"], "/5.txt": ["cut100", "cut100"],
                               "/6.txt": ["500", "503"]}
    train, val = both(gutenberg.module)
    assert len(set(" ".join(train + val).split())) == 40 * 3000


def test_gutenberg_text_that_does_not_come_is_named_and_the_others_come(gutenberg):
    del gutenberg.server.files["/7.txt"]
    with pytest.raises(UserError, match=r"1 texts did not come .*/7\.txt.*rows out of .*manifest\.csv"):
        gutenberg.module.sources()
    assert len(list((gutenberg.folder / "texts").iterdir())) == 39
    manifest = gutenberg.folder / "manifest.csv"
    lines = manifest.read_text(encoding="utf-8").splitlines(keepends=True)
    manifest.write_text("".join(line for line in lines if not line.startswith("7,")), encoding="utf-8")
    assert len(gutenberg.module.sources()) == 40


def test_gutenberg_gives_up_at_once_where_nothing_comes(gutenberg):
    for path in list(gutenberg.server.files):
        gutenberg.server.script[path] = ["404"]
    with pytest.raises(UserError, match="3 texts did not come"):
        gutenberg.module.sources()


def test_gutenberg_lists_texts_that_it_cannot_use(gutenberg):
    gutenberg.server.files["/8.txt"] = book_text("caf\xe9").encode("latin-1", "replace")
    gutenberg.server.files["/9.txt"] = b"<html>no book</html>"
    train, val = both(gutenberg.module)
    assert sorted(path.name for path in gutenberg.module.skipped) == ["8.txt", "9.txt"]
    assert len(seen(train) | seen(val)) == 38


@pytest.mark.parametrize("elsewhere", ["file:///etc/hostname", "http://example.com/books/?page=2", "https://x/y"])
def test_catalogue_leads_to_no_other_place(gutenberg, elsewhere):
    (gutenberg.folder / "catalogue").mkdir()
    page = {"results": [], "next": elsewhere}
    (gutenberg.folder / "catalogue" / "001.json").write_text(json.dumps(page))
    with pytest.raises(UserError, match="page 1 of the catalogue names a page elsewhere"):
        gutenberg.module.sources()
    assert gutenberg.server.paths == []


def test_page_that_is_no_catalogue_is_one_sentence(gutenberg):
    (gutenberg.folder / "catalogue").mkdir()
    (gutenberg.folder / "catalogue" / "001.json").write_text("<html>")
    with pytest.raises(UserError, match=r"001\.json cannot be read as JSON.*remove it and start again"):
        gutenberg.module.sources()


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    """The package, offline, with its cache in a folder of the test."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    package = pytest.importorskip("datasets", minversion="4", reason="pip install datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(package.config, "HF_DATASETS_OFFLINE", True, raising=False)
    return package


def hf(choice: str):
    module = prepare("hf")
    module.choose(choice)
    return module


def rows(name: str, n: int) -> dict:
    return {"text": [f"{name} {i}" for i in range(n)], "id": list(range(n))}


def write_jsonl(path, texts: list[str], column: str = "text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps({column: text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_save_to_disk_folders_are_read(datasets, tmp_path):
    train, val = datasets.Dataset.from_dict(rows("a", 5)), datasets.Dataset.from_dict(rows("b", 3))
    datasets.DatasetDict({"train": train, "validation": val}).save_to_disk(tmp_path / "two")
    module = hf(str(tmp_path / "two"))
    assert both(module) == (rows("a", 5)["text"], rows("b", 3)["text"])
    assert sum(path.suffix == ".arrow" for path in module.sources()) == 2
    datasets.Dataset.from_dict(rows("c", 3000)).save_to_disk(tmp_path / "one")
    train, val = both(hf(str(tmp_path / "one")))
    assert sorted(train + val) == sorted(rows("c", 3000)["text"]) and 10 < len(val) < 60


def test_folder_of_files_is_streamed_and_parquet_is_read(datasets, tmp_path):
    datasets.Dataset.from_dict(rows("a", 5)).to_parquet(tmp_path / "p" / "train.parquet")
    datasets.Dataset.from_dict(rows("b", 2)).to_parquet(tmp_path / "p" / "validation.parquet")
    assert both(hf(str(tmp_path / "p"))) == (rows("a", 5)["text"], rows("b", 2)["text"])


def test_several_datasets_follow_each_other_with_choices_of_their_own(datasets, tmp_path):
    write_jsonl(tmp_path / "a" / "train.jsonl", ["a0", "a1", "shared"], "story")
    write_jsonl(tmp_path / "a" / "validation.jsonl", ["av"], "story")
    write_jsonl(tmp_path / "b" / "train.jsonl", ["b0", "b1", "av"])
    write_jsonl(tmp_path / "b" / "test.jsonl", ["bt", "shared"])
    module = hf(f"{tmp_path}/a,column=story+{tmp_path}/b,val=test")
    assert both(module) == (["a0", "a1", "b0", "b1"], ["av", "bt", "shared"]), "validation text was trained on"


def test_limit_is_in_characters(datasets, tmp_path):
    write_jsonl(tmp_path / "a" / "train.jsonl", ["x" * 100 + str(i) for i in range(100)])
    write_jsonl(tmp_path / "a" / "validation.jsonl", ["y"])
    assert len(list(hf(f"{tmp_path}/a,limit=1e3").documents("train"))) == 10


def test_validation_part_is_small_and_nothing_is_in_both(datasets, tmp_path, monkeypatch):
    texts = [f"document {i}" for i in range(6000)]
    write_jsonl(tmp_path / "a" / "train.jsonl", texts + texts[::-1])
    module = hf(f"{tmp_path}/a")
    train, val = both(module)
    assert sorted(train + val) == sorted(texts * 2) and not set(train) & set(val)
    assert 0.005 < len(val) / 12000 < 0.02
    monkeypatch.setattr(module, "VAL_DOCUMENTS", 7)
    assert list(module.documents("val")) == val[:7] and list(module.documents("train")) == train


def test_rows_without_text_are_passed_over_and_a_wrong_column_is_one_sentence(datasets, tmp_path):
    write_jsonl(tmp_path / "a" / "train.jsonl", ["one", "", None, "two"])
    write_jsonl(tmp_path / "a" / "validation.jsonl", ["v"])
    assert list(hf(f"{tmp_path}/a").documents("train")) == ["one", "two"]
    with pytest.raises(UserError, match="no text in a column 'body'; choose with column= from text"):
        list(hf(f"{tmp_path}/a,column=body").documents("train"))
    with pytest.raises(UserError, match="has no split dev; it has train, validation"):
        list(hf(f"{tmp_path}/a,val=dev").documents("val"))


def test_text_field_is_the_column_of_a_hub_dataset_too(datasets, tmp_path):
    write_jsonl(tmp_path / "a" / "train.jsonl", ["one", "two"], "story")
    write_jsonl(tmp_path / "a" / "validation.jsonl", ["v"], "story")
    for field in ("story", "*"):
        raw = corpus.open_dataset(f"hf:{tmp_path}/a", field)
        assert [text for text, _ in raw.pieces("train")] == ["one", "two"]


def test_code_that_a_dataset_brings_along_is_refused_and_not_run(datasets, tmp_path):
    folder = tmp_path / "trojan"
    write_jsonl(folder / "train.jsonl", ["x"])
    (folder / "trojan.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="brings code of its own along, which we do not run"):
        list(hf(str(folder)).documents("train"))
    assert not (tmp_path / "ran").exists()


def test_dataset_that_is_not_there_is_one_sentence(datasets):
    with pytest.raises(UserError, match=r"^cannot open dataset=hf:nobody/nothing \([^\n]+\)$"):
        list(hf("nobody/nothing").documents("train"))


def test_stream_that_breaks_is_one_sentence():
    def broken():
        yield {"text": "one"}
        raise ConnectionResetError("reset by peer")

    module = hf("a/b")
    found = module.texts(module.chosen[0], broken())
    assert next(found) == "one"
    with pytest.raises(UserError, match=r"hf:a/b broke off \(ConnectionResetError: reset by peer\)"):
        next(found)


@pytest.mark.parametrize("package, sentence", [(None, "pip install 'datasets>=4'"),
                                               (SimpleNamespace(__version__="3.6.0"), "3.6.0 may run code")])
def test_package_that_is_missing_or_runs_code_is_one_sentence(monkeypatch, package, sentence):
    monkeypatch.setitem(sys.modules, "datasets", package)
    with pytest.raises(UserError, match=sentence):
        list(hf("a/b").documents("train"))


def test_choices_are_read_as_they_are_meant():
    module = hf("a/b,sub,column=x,limit=2e9+c/d,split=s,val=t")
    one, two = module.chosen
    assert one == module.Choice("a/b", subset="sub", column="x", limit=2e9)
    assert two == module.Choice("c/d", split="s", val="t")
    with pytest.raises(UserError, match="there is no colum=; there are path, subset, column"):
        module.choose("a/b,colum=x")
    with pytest.raises(UserError, match="limit=lots is no number"):
        module.choose("a/b,limit=lots")
    with pytest.raises(UserError, match="say which dataset"):
        list(hf("").documents("train"))


def test_fineweb_edu_is_the_10bt_sample_unless_another_is_chosen(monkeypatch):
    module = prepare("fineweb_edu")
    opened = []

    def load(path, subset, streaming):
        opened.append((path, subset, streaming))
        return {"train": [{"text": f"page {i}"} for i in range(3000)]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(__version__="4.0.0", load_dataset=load))
    train, val = both(module)
    assert len(train) + len(val) == 3000 and not set(train) & set(val) and val
    module.choose("sample-100BT")
    next(module.documents("val"))
    module.choose("limit=1e3")
    assert sum(map(len, both(module)[0])) < 1010
    assert {path for path, _, _ in opened} == {"HuggingFaceFW/fineweb-edu"} and all(each[2] for each in opened)
    assert [subset for _, subset, _ in opened] == ["sample-10BT"] * 2 + ["sample-100BT"] + ["sample-10BT"] * 2
    assert [path.parent.name for path in module.sources()] == ["hf"], "a change there must make a new cache"


# ---------------------------------------------------------------------------------------------------------------------
# One command: download -> mix -> tokenizer -> tokens -> train -> samples


@pytest.fixture
def ancients(tmp_path, server, monkeypatch):
    """A folder to start train.py in, whose data/ holds both corpora of config/ancients.py, fed by `server`."""
    server.entries += [entry(n, f"Dialogue {letter}x") for n, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 1)]
    for book in server.entries:
        server.files[f"/{book['id']}.txt"] = book_text(prose(f"b{book['id']}x", 1200)).encode()
    facts = {}
    for split, n in (("train", 300), ("val", 60)):
        text = "\n<|endoftext|>\n".join(f"Once {split} {i} the cat sat on a mat and ran away.\n" * 3 for i in range(n))
        server.files[f"/{split}.txt"] = text.encode()
        facts[split] = (f"{split}.txt", len(text), hashlib.sha256(text.encode()).hexdigest())
    changes = {"tinystories": {"BASE": server.url, "FILES": facts},
               "gutenberg": {"CATALOGUE": f"{server.url}/books/?x=1", "TEXT": server.url + "/{id}.txt", "delay": 0}}
    for name, constants in changes.items():
        script = tmp_path / "data" / name / "prepare.py"
        script.parent.mkdir(parents=True)
        source = (ROOT / "data" / name / "prepare.py").read_text(encoding="utf-8")
        end = source.index("\n\n\ndef ")  # behind its constants
        constants = "".join(f"\n{key} = {value!r}" for key, value in constants.items())
        script.write_text(source[:end] + constants + source[end:], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "ROOT", tmp_path)
    return server


TINY = ["vocab_size=400", "seq_len=32", "mixture_size=20000"]


def ask(**changes):
    """Prepare the mixture in this process."""
    argv = ["mixture=gutenberg:0.4 tinystories:0.6", *TINY, f"cache_dir={Path.cwd() / 'cache'}",
            *(f"{key}={value}" for key, value in changes.items())]
    return data.prepare(configure([ModelConfig, data.DataSettings], argv, environ={}))


def test_one_command_goes_from_downloads_to_samples_and_does_nothing_twice(ancients, tmp_path):
    script = ("import sys, pathlib; sys.path.insert(0, sys.argv.pop(1)); import runtime.screen, train; "
              "from text import corpus; "
              "corpus.ROOT = pathlib.Path.cwd(); runtime.screen.run(train.main)")
    argv = [sys.executable, "-c", script, str(ROOT), str(ROOT / "config" / "ancients.py"), *TINY, "d_model=32",
            f"cache_dir={tmp_path / 'cache'}", f"out_dir={tmp_path / 'run'}", "d_ff=64", "n_layer=1",
            "n_head=2", "n_kv_head=2", "max_steps=4", "batch_size=4", "total_batch_size=0",
            "eval_tokens=1000", "device=cpu"]
    first = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert first.returncode == 0, first.stderr
    assert len(ancients.paths) == len(set(ancients.paths)) == 7 + 26 + 2, "pages of the catalogue, texts, stories"
    assert "training a bpe tokenizer" in first.stdout and "train: gutenberg 40.0% wanted" in first.stdout
    (folder,) = [path.parent for path in tmp_path.glob("cache/*/meta.json")]
    mixed = read_meta(folder)["splits"]["train"]["mixture"]
    assert 0.38 < mixed["gutenberg"]["got"] < 0.46 and mixed["gutenberg"]["words"] < 10_000
    ancients.paths.clear()
    second = subprocess.run([*argv, "max_steps=4"], capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    assert f"{folder.name} is current: downloads, tokenizer and tokens exist" in second.stdout
    assert "is complete" in second.stdout and "training a" not in second.stdout and ancients.paths == []


def test_stage_is_made_anew_with_all_behind_it_and_nothing_before_it(ancients, monkeypatch, capsys):
    folder = ask()
    tokens = {path.name: path.read_bytes() for path in folder.glob("*.npy")}
    for stage, downloads, said, made in (
        ("", 0, "is current", False), ("train", 0, "is current", False), ("tokens", 0, "tokenizer-", True),
        ("tokenizer", 0, "training a", True), ("mix,tokens", 0, "training a", True),
        ("download", 28, "training a", True), ("download:gutenberg", 26, "training a", True),
        ("all", 28, "training a", True),
    ):
        capsys.readouterr()
        ancients.paths.clear()
        written = (folder / "meta.json").stat().st_ino
        monkeypatch.setattr("text.overwrite.launch_id", lambda stage=stage: stage)  # another launch
        folder = ask(overwrite=stage)
        assert len(ancients.paths) == downloads and said in capsys.readouterr().out, stage
        assert ((folder / "meta.json").stat().st_ino != written) == made, stage
        assert {path.name: path.read_bytes() for path in folder.glob("*.npy")} == tokens
        ancients.paths.clear()
        assert ask(overwrite=stage) == folder and ancients.paths == [], "one process has done it for all"
        assert "training a" not in capsys.readouterr().out


def test_tokenizer_is_trained_anew_only_for_what_decides_about_it(ancients, capsys):
    ask()
    for changes, trained in ({"shard_tokens": 999}, False), ({"workers": 1, "shard_tokens": 998}, False), (
            {"vocab_size": 401}, True), ({"mixture_size": 19999}, True), ({"tokenizer_bytes": 9999}, True):
        capsys.readouterr()
        ask(**changes)
        assert ("training a" in capsys.readouterr().out) == trained, changes
