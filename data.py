"""Text -> tokenizer -> shards of token ids, once; later runs find them in the cache.

    python data.py stdlib                    # prepare a corpus of data/ and show what came out
    python data.py my.txt VOCAB_SIZE=8192    # your own text, a folder of it, or shards of token ids
    python data.py mixture="stdlib:0.7 my.txt:0.3"    # a mixture, by word share
    python data.py my.txt more/ TOKENIZER=unigram TOKENIZER_DIR=out/tokenizer    # only a tokenizer; also --profile

    folder = prepare(settings)
    stream = TokenStream(folder, "train", load_tokenizer(folder))        # text/batches.py continues from here

A prepared folder holds `train_00000.npy` ..., `val_00000.npy` ..., the tokenizer, and `meta.json`, which is written
last: without it the folder is incomplete. Its name ends in a hash of everything that determines the tokens: the content
of the files, the tokenizer, the settings. Change one of these, and a new folder appears beside the old one. A file is
read again only if its size or times have changed. A tokenizer that we train has its own folder, so it survives an
interruption and a change of shard_tokens.
"""

import runtime.screen  # isort: skip  # noqa: F401  (first: quiet Ctrl-C)

import cProfile
import hashlib
import json
import pstats
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import chain, takewhile
from pathlib import Path

from configurator import Count, Settings, UserError, cache_folder, configure, find_path, need, write_path
from runtime.files import Either, read_json, read_notes, require_file, working, write_json, writing
from runtime.screen import ProgressLine, run, say, visible
from text import corpus
from text.corpus import TRAINED, Corpus, DataSettings
from text.foreign_shards import count_shards, find_shards
from text.overwrite import Overwrite
from text.records import SEPARATOR, files_pieces, path_name, reading, text_files
from text.shards import FORMAT, PREPARED, TokenStream, read_meta, write_meta
from text.tokenizer_files import TIKTOKEN, holds_tokenizer, load_tokenizer, train_tokenizer
from text.write_shards import write_splits

OFTEN = 4  # passes over a part of a mixture; we mention more


@dataclass
class ScriptSettings:
    """The settings of this script alone. The first two are ModelConfig's: its file would load torch."""

    vocab_size: Count = 4096    # entries of the vocabulary; a loaded tokenizer sets it
    seq_len: Count = 256        # context length in tokens; text that is shorter is refused
    tokenizer_dir: str = ""     # train a tokenizer on all of the text, write it to this folder, and prepare nothing
    profile: bool = False       # with tokenizer_dir: train in one process and show where the time goes


def prepare(s: Settings, quiet: bool = False, known=None) -> Path:
    """The folder of tokens that the settings ask for; prepared now unless it exists and is current.

    Several processes may call this at once: one of them works and the others wait. `known` is the tokenizer of a
    resumed run: text that has changed since its start is encoded with that tokenizer, not with a new one.
    """
    data, asked_size = s.part(DataSettings), size_asked_for(s)
    folder = find_path(data.data_path)
    if data.data_path and (folder / "meta.json").is_file():  # a prepared folder itself
        meta = read_meta(folder, PREPARED)
        trained, size = meta["trained"], meta["vocab_size"]
        need(not data.val_path, f"{folder} holds tokens with their own validation part: leave val_path out")
        need(not trained or not s.chosen("vocab_size") or s.vocab_size == size,
             f"{folder} holds tokens of a vocabulary of {size:,}: leave vocab_size out")
        if data.tokenizer not in TRAINED:
            TokenStream(folder, "val", named_tokenizer(data.tokenizer))  # refuses another tokenizer
        elif s.given("tokenizer"):
            need(trained in ("", data.tokenizer),
                 f"{folder} has tokens of a {trained} tokenizer, not tokenizer={data.tokenizer}; leave it out")
    else:
        folder = Preparation(data, size_to_train(s), asked_size, quiet).folder(known)
        meta = read_meta(folder, PREPARED)
    check_vocabulary(meta["trained"], meta["vocab_size"], asked_size)
    for split, part in meta["splits"].items():
        if "lost" in part:
            say(f"data: at the beginning of {split}, {part['lost']}", quiet)
        need(part["tokens"] > s.seq_len,
             f"the {split} part of {meta['name']} has {part['tokens']:,} tokens, fewer than the seq_len + 1 = "
             f"{s.seq_len + 1:,} of one row; give more text or a smaller seq_len")
    return folder


def size_asked_for(s: Settings) -> int:
    """Entries of the vocabulary; 0 if nobody asked for a number."""
    return s.vocab_size if s.given("vocab_size") else 0


def size_to_train(s: Settings) -> int:
    """Entries of a tokenizer that is trained now; 0 = all characters. A resumed run has those of its checkpoint."""
    if s.tokenizer == "char":
        return size_asked_for(s)
    return s.vocab_size


def check_vocabulary(trained: str, size: int, asked_size: int) -> None:
    """UserError if the vocabulary is smaller than the user asked for."""
    need(trained in ("", "char") or size >= asked_size,
         f"vocab_size={asked_size}, but this text gives only {size} entries; set vocab_size={size} or less, or give "
         "more text")


class Preparation:
    """A corpus on its way into a folder of tokens."""

    def __init__(self, data: DataSettings, size: int, asked_size: int, quiet: bool):
        self.data, self.size, self.asked_size, self.quiet = data, size, asked_size, quiet
        self.cache = cache_folder(data.cache_dir)
        self.overwrite = Overwrite(data.overwrite, self.cache)
        if data.mixture:
            self.overwrite.put_downloads_aside(list(corpus.mixture_shares(data.mixture)), quiet)
        elif not data.data_path:
            self.overwrite.put_downloads_aside([data.dataset], quiet)
        self.raw, self.tokenizer, self.shards = find_source(data)  # no tokenizer: one is trained
        self.sources = self.raw.sources()
        hashes = content_hashes(self.sources, self.cache, quiet)
        self.raw.notes += equal_files(self.raw, hashes)
        # Everything that determines the documents: the content of the files, and how it is read.
        kinds = ["".join(path.suffixes[-2:]).lower() for path in self.raw.files]
        dataset = "" if data.data_path else data.dataset
        self.decides = [FORMAT, hashes, kinds, len(self.raw.val_files), dataset, data.val_share, data.text_field,
                        data.bin_dtype]
        if data.mixture:
            self.decides += [data.mixture, data.mixture_unit, data.mixture_size]
        self.training = [data.tokenizer, size, data.tokenizer_pattern, data.tokenizer_bytes]

    def folder(self, known=None) -> Path:
        """The complete folder."""
        folder = self.folder_for(self.tokenizer)
        if known and not self.tokenizer:
            made_by_known = (folder / "meta.json").is_file() and read_meta(folder)["tokenizer"] == known.fingerprint
            if not made_by_known:
                self.tokenizer, folder = known, self.folder_for(known)
        if self.is_current(folder, self.quiet):
            say(f"data: {folder} is current: downloads, tokenizer and tokens exist", self.quiet)
        else:
            with working(folder, self.quiet) as note:
                if not self.is_current(folder, quiet=True):  # another process may have prepared it
                    self.build(folder, note)
        return folder

    def folder_for(self, tokenizer) -> Path:
        decides = self.decides + self.training
        if tokenizer:
            decides = [*self.decides, tokenizer.fingerprint, tokenizer.role("eot")]
        if self.data.replace_missing:
            decides.append("replaced")
        return self.folder_named("", [*decides, self.data.shard_tokens])

    def folder_named(self, kind: str, decides: list) -> Path:
        return self.cache / f"{self.raw.name}{kind}-{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]}"

    def is_current(self, folder: Path, quiet: bool) -> bool:
        """Whether the folder is complete and need not be prepared again."""
        if not (folder / "meta.json").is_file() or self.overwrite.is_due(folder, "tokens"):
            return False
        try:
            meta = read_meta(folder, PREPARED)
            refuse_damage(folder, meta.get("tokenizer_sum"))
            if "home" not in meta:  # shards of ours
                for split in meta["splits"]:
                    TokenStream(folder, split)
        except UserError as error:
            say(f"data: {str(error).partition(';')[0]}; we prepare the tokens again", quiet)
            return False
        return True

    def build(self, folder: Path, note: Callable[[str], None]) -> None:
        """Fill the folder. Validation with files of its own comes first: if it is empty, we fail at once."""
        data, raw, quiet = self.data, self.raw, self.quiet
        (folder / "meta.json").unlink(missing_ok=True)
        if self.overwrite.is_due(folder, "tokens"):
            (folder / "state.json").unlink(missing_ok=True)
        notes = list(raw.notes)
        if hasattr(raw.module, "describe"):
            notes.insert(0, raw.module.describe())
        say("\n".join(f"data: {each}" for each in notes), quiet)
        tokenizer = self.tokenizer or self.train()

        def count_tokens(text: str) -> int:
            return len(tokenizer.encode_to_numpy(tokenizer.repaired(text)[0])) + 1  # end-of-text

        need(tokenizer.role("eot") is not None,
             f"tokenizer={data.tokenizer} has no end-of-text token to put between documents")
        if data.mixture and data.mixture_unit == "tokens":
            raw = corpus.open_mixture(data, count_tokens)
        splits = {}
        for split, files in self.shards.items():
            progress = ProgressLine(f"reading {split}", 0, "MB", 1e6, quiet, note)
            splits[split] = count_shards(files, tokenizer, data.bin_dtype, progress)
        for together in raw.passes():
            if not self.shards:
                splits |= write_splits(folder, together, raw, tokenizer, data.shard_tokens, data.workers, quiet, note,
                                       data.replace_missing)
        if raw.sources() != self.sources:
            (folder / "state.json").unlink(missing_ok=True)
            raise UserError(f"the files of {raw.name} changed while we read them; start again")
        tokenizer.save(folder)
        meta = {"format": FORMAT, "name": raw.name, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.role("eot"),
                "tokenizer": tokenizer.fingerprint, "tokenizer_sum": tokenizer_sum(folder),
                "trained": "" if self.tokenizer else data.tokenizer, "splits": splits,
                "skipped": len(getattr(raw.module, "skipped", [])), "settings": asdict(data)}
        if self.shards:  # they are not in the folder
            meta |= {"home": folder.stat().st_ino, "bin_ids": data.bin_dtype.replace("auto", "uint16")}
        write_meta(folder, meta)
        names = {name for part in splits.values() for name, _ in part["shards"]}
        for left_over in [folder / "state.json", *folder.glob("*.npy*")]:  # of runs that were killed
            if left_over.name not in names:
                left_over.unlink(missing_ok=True)
        for split in splits:
            TokenStream(folder, split, tokenizer)  # are they on the disk as we wrote them?
        self.overwrite.note(folder)
        say("\n".join(f"data: {line}" for line in remarks(meta)), quiet)

    def train(self):
        """A tokenizer trained on the training documents alone; from its own folder, or trained now."""
        data, raw, folder = self.data, self.raw, self.folder_named("-tokenizer", self.decides + self.training)
        with working(folder, self.quiet) as note:
            tokenizer = self.trained_before(folder)
            if tokenizer is None:
                texts = (text for text, _ in raw.pieces("train"))
                first = next(texts, None)
                need(first is not None, f"{raw.name} holds no text to train on")
                say(f"data: training a {data.tokenizer} tokenizer on {raw.name}", self.quiet)
                total, amount = raw.size("train"), raw.done
                if 0 < data.tokenizer_bytes < total:
                    total, amount = data.tokenizer_bytes, float
                line = ProgressLine("tokenizer reads", total, raw.unit, raw.scale, self.quiet, note)
                tokenizer = train_new(data, self.size, chain([first], texts), line, amount)
                tokenizer.save(folder)
                write_json(folder / "made.json", {"sum": tokenizer_sum(folder)})
                self.overwrite.note(folder)
        check_vocabulary(data.tokenizer, tokenizer.vocab_size, self.asked_size)
        return tokenizer

    def trained_before(self, folder: Path):
        """The tokenizer of this folder; None if it is missing, damaged, or due for training again."""
        if not (folder / "tokenizer.json").is_file() or self.overwrite.is_due(folder, "tokenizer"):
            return None
        try:
            refuse_damage(folder, read_json(folder / "made.json", {"sum": int})["sum"])
            tokenizer = load_tokenizer(folder)
        except UserError as error:
            say(f"data: {error}; we train the tokenizer again", self.quiet)
            return None
        say(f"data: {folder} is current", self.quiet)
        return tokenizer


def train_new(data: DataSettings, size: int, texts: Iterable[str], line: ProgressLine,
              amount: Callable[[int], float] = float):
    """Train the tokenizer of the settings. `line` shows how much text it has read, `amount(bytes)`, then its merges."""

    def show(phase: str, done: int, total: int) -> None:
        if phase == "count":
            line.show(amount(done))
            return
        if line.what != "tokenizer merges":
            line.close()
            line.what, line.unit, line.scale = "tokenizer merges", "", 1
            line.restart(done)
        line.total = total
        line.show(done)

    tokenizer = train_tokenizer(data.tokenizer, texts, size, data.tokenizer_pattern, max_bytes=data.tokenizer_bytes,
                                workers=data.workers, progress=show)
    line.close()
    return tokenizer


def find_source(data: DataSettings) -> tuple[Corpus, object, dict[str, list[Path]]]:
    """(corpus, its tokenizer or None if we must train one, its shards per split if it consists of token ids)"""
    tokenizer = None
    if data.tokenizer not in TRAINED:
        tokenizer = named_tokenizer(data.tokenizer)
    if data.mixture:
        need(not data.data_path and not data.val_path,
             f"mixture={data.mixture} excludes data_path= and val_path=: leave one or the other out")
        return corpus.open_mixture(data), tokenizer, {}
    parts = find_shards(data.data_path, data.val_path) if data.data_path else None
    if not parts:
        return corpus.open_corpus(data), tokenizer, {}
    if tokenizer is None:
        beside = parts.train[0].parent / "tokenizer.json"
        need(beside.is_file(), f"{data.data_path} holds token ids without their tokenizer: set "
                               "tokenizer=<its file>")
        tokenizer = load_tokenizer(beside)
    files = parts.train + parts.val
    for folder in {path.parent for path in files}:
        if (folder / "meta.json").is_file():
            TokenStream(folder, "val", tokenizer)  # shards of ours: refuses another tokenizer
    raw = Corpus(path_name(data.data_path), files, notes=parts.notes)
    return raw, tokenizer, {"val": parts.val, "train": parts.train}


def named_tokenizer(name: str):
    """A ready tokenizer: its file or folder, a run's, or an encoding of tiktoken."""
    path = find_path(name)
    need(name in TIKTOKEN or path.exists(),
         f"tokenizer={name} is none of {', '.join((*TRAINED, *TIKTOKEN))}, nor a file or folder that exists")
    if not path.exists() or holds_tokenizer(path):
        return load_tokenizer(name)
    from runtime.checkpoint import find_tokenizer  # loads torch, which takes a second

    return find_tokenizer(name)


# ---- what is current -------------------------------------------------------------------------------------------------


def content_hashes(sources: list, cache: Path, quiet: bool) -> list[str]:
    """A hash of each file's content. hashes.json in the cache keeps {path: [bytes, times, hash]}: we read a file again
    only if its size or times have changed."""
    notes, shape = cache / "hashes.json", {str: [Either(str, int)]}

    def unread(hashes: dict) -> list:
        return [[path, *state] for path, *state in sources if hashes.get(path, [])[:-1] != state]

    hashes = read_notes(notes, shape)
    if unread(hashes):
        with working(cache, quiet) as note:
            hashes = read_notes(notes, shape)  # another process may have read some
            files = unread(hashes)
            progress = ProgressLine("reading files", sum(size for _, size, *_ in files), "MB", 1e6, quiet, note)
            for path, *state in files:
                digest = hashlib.blake2b(digest_size=16)
                with reading(Path(path)), open(path, "rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
                        progress.add(len(block))
                hashes[path] = [*state, digest.hexdigest()]
            progress.close()
            write_json(notes, hashes)
    return [str(hashes[path][-1]) for path, *_ in sources]


def equal_files(raw: Corpus, hashes: list[str]) -> list[str]:
    """A note on a validation file that equals a training file."""
    trained = hashes[: len(raw.train_files)]
    for path, content in zip(raw.val_files, hashes[len(trained) :], strict=True):
        if content in trained:
            return [f"{path.name} is both training and validation text: a low loss on it proves nothing"]
    return []


def refuse_damage(folder: Path, expected: int | None) -> None:
    """UserError if the tokenizer that we saved there is damaged. Its roles may be edited."""
    if (folder / "tokenizer_config.json").exists():
        read_json(folder / "tokenizer_config.json")
    need(expected in (None, tokenizer_sum(folder)), f"{folder / 'tokenizer.json'} is damaged")


def tokenizer_sum(folder: Path) -> int:
    path = require_file(folder / "tokenizer.json")
    with reading(path):
        return zlib.crc32(path.read_bytes())


# ---- what the user sees ----------------------------------------------------------------------------------------------


def summary(folder: Path) -> str:
    """A table of a prepared folder's contents, and the beginning of its training text."""
    meta, tokenizer = read_meta(folder, PREPARED), load_tokenizer(folder)
    skipped = f", {meta['skipped']} files skipped as unreadable" if meta["skipped"] else ""
    lines = [f"{meta['name']}: {folder}{skipped}",
             f"tokenizer {meta['tokenizer']}, {meta['vocab_size']:,} entries", "",
             f"{'':8}{'documents':>12}{'MB':>12}{'tokens':>16}{'bytes/token':>14}{'unknown':>10}"]
    for split in ("train", "val"):
        part = meta["splits"][split]
        lines.append(f"{split:8}{part['documents']:>12,}{part['bytes'] / 1e6:>12,.2f}{part['tokens']:>16,}"
                     f"{part['bytes'] / part['tokens']:>14.2f}{part['unknown'] / part['tokens']:>10.2%}")
    begin = tokenizer.decode(TokenStream(folder, "train", tokenizer).read(0, 100).tolist())
    return "\n".join([*lines, *remarks(meta), "", "it begins: " + json.dumps(begin[:200], ensure_ascii=False)])


def remarks(meta: dict) -> list[str]:
    """The shares of a mixture, wanted and got; characters that were replaced; end-of-text markers within a line."""
    lines, markers, replaced = [], 0, 0
    for split, part in meta["splits"].items():
        markers, replaced = markers + part.get("markers", 0), replaced + part.get("replaced", 0)
        for name, mixed in part.get("mixture", {}).items():
            unit = "words" if "words" in mixed else "tokens"
            lines.append(f"{split}: {name} {mixed['share']:.1%} wanted, {mixed['got']:.1%} got, "
                         f"{mixed[unit]:,} {unit} in {mixed['passes']} passes")
            if mixed["passes"] > OFTEN:
                lines.append(f"{name} is small for its share: it comes {mixed['passes']} times; lower its weight or "
                             "mixture_size")
    if replaced:
        lines.append(f"{replaced:,} characters that the tokenizer lacks became U+FFFD")
    if markers:
        lines.append(f"{markers:,} times {SEPARATOR} within a line separates nothing and is learned as text")
    return lines


def only_tokenizer(inputs: list[str], s: Settings) -> str:
    """Train a tokenizer on all the text of files, folders and corpora, and write it to tokenizer_dir."""
    data, asked_size = s.part(DataSettings), size_asked_for(s)
    need(data.tokenizer in TRAINED, f"tokenizer_dir= trains a tokenizer: set tokenizer= to one of {', '.join(TRAINED)}")
    texts = chain.from_iterable(all_text(each, data.text_field) for each in inputs)
    line = ProgressLine("tokenizer reads", 0, "MB", 1e6)
    profile = nullcontext()
    if s.profile:
        data.workers, profile = 1, cProfile.Profile()
    with profile:
        tokenizer = train_new(data, size_to_train(s), texts, line)
    check_vocabulary(data.tokenizer, tokenizer.vocab_size, asked_size)
    folder = write_path(s.tokenizer_dir)
    with writing(folder, "; tokenizer_dir=<folder> names another"):
        tokenizer.save(folder)
    if s.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(12)
    return f"{folder / 'tokenizer.json'}: {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint}"


def all_text(name: str, text_field: str) -> Iterator[str]:
    """The text of a corpus of ours, or of a file or folder, without holding any out for validation."""
    if corpus.is_dataset(name):
        pieces = corpus.open_dataset(name, text_field).pieces("train")
    else:
        pieces = files_pieces(text_files(name), text_field)
    return (text for text, _ in pieces)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    inputs = list(takewhile(is_input, argv))
    argv = argv[len(inputs) :]
    if len(inputs) == 1 and corpus.is_dataset(inputs[0]):
        argv = [f"dataset={inputs[0]}", "data_path=", *argv]
    elif len(inputs) == 1:
        argv = [f"data_path={inputs[0]}", *argv]
    s = configure([DataSettings, ScriptSettings], argv, doc=__doc__)
    try:
        if s.tokenizer_dir:
            print(visible(only_tokenizer(inputs or [s.data_path or s.dataset], s)))
        else:
            need(len(inputs) < 2, f"{', '.join(inputs)}: several inputs need tokenizer_dir=; to train a model on "
                                  "several, set mixture=")
            print(visible(summary(prepare(s))))
    except KeyboardInterrupt:
        print("\ndata.py: interrupted; the same command resumes after the last whole shard", file=sys.stderr)
        return 130
    return 0


def is_input(arg: str) -> bool:
    """Whether an argument names text or a corpus, not a setting or a config file."""
    config = Path(arg).parent.name == "config" and arg.endswith(".py")
    return not (arg.startswith("-") or "=" in arg or config)


if __name__ == "__main__":
    run(main)
