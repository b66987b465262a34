"""Text -> tokenizer -> shards of token ids, once; later runs find them in the cache.

    python data.py stdlib                    # a corpus of data/: prepare it and show what came out
    python data.py my.txt VOCAB_SIZE=8192    # text of yours, a folder of it, or shards of token ids
    python data.py mixture="stdlib:0.7 my.txt:0.3"    # several, by their shares of the words: mixture.py
    python data.py my.txt more/ TOKENIZER=unigram TOKENIZER_DIR=out/tokenizer    # only a tokenizer; also --profile

    folder = prepare(settings)
    tokenizer = load_tokenizer(folder)
    stream = TokenStream(folder, "train", tokenizer)        # batches.py goes on from here

A prepared folder holds `train_00000.npy` ..., `val_00000.npy` ..., the tokenizer, and `meta.json`, which is written
last: a folder without it is not complete. Its name ends in a hash of all that decides which tokens come out: the
content of the files, the tokenizer, the settings. A change of any of these makes a new folder beside the old one. Sizes
and times spare us reading the files each time: what changes a file but none of these is not seen. A tokenizer that we
train has a folder of its own, so it outlives an interruption, and a change of shard_tokens.
"""

import runtime.screen  # isort: skip  # noqa: F401  (first: quiet Ctrl-C)

import cProfile
import hashlib
import json
import os
import pstats
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import chain, takewhile
from pathlib import Path
from types import SimpleNamespace

from configurator import UserError, cache_folder, configure, find_path, pick, write_path
from model import ModelConfig
from runtime.checkpoint import find_tokenizer
from runtime.files import Either, locked, read_json, require_file, working, write_json, writing
from runtime.screen import ProgressLine, run, say, visible
from text.batches import TokenStream
from text.corpus import TRAINED, DataSettings, RawCorpus, forced, import_dataset, is_dataset, open_corpus, open_dataset
from text.download import set_aside
from text.mixture import open_mixture, parse
from text.ranks import TIKTOKEN
from text.records import SEPARATOR, files_pieces, path_name, reading, text_files
from text.shards import FORMAT, PREPARED, count_shards, find_shards, read_meta, write_meta, write_split
from text.tokenizer import load_tokenizer, train_tokenizer

OFTEN = 4  # passes over a part of a mixture; more are worth a word


@dataclass
class OnlyTokenizer:
    tokenizer_dir: str = ""     # train a tokenizer on all of the text, write it to this folder, and prepare nothing
    profile: bool = False       # with tokenizer_dir: train in one process and show where the time goes


def prepare(s, quiet: bool = False, known=None) -> Path:
    """The folder of tokens that the settings ask for; made now, unless it is there and current.

    `s` holds DataSettings, `vocab_size`, `seq_len` and `source`. Several processes may call this at once: one of them
    works and the others wait. `known` is the tokenizer of a run that goes on: text that has changed since its start is
    encoded with it, and not with a new one.
    """
    # A checkpoint may be older than some of the settings.
    s = SimpleNamespace(**vars(s) | asdict(pick(DataSettings, vars(s))))
    folder = find_path(s.data_path)
    if s.data_path and (folder / "meta.json").is_file():  # it is such a folder itself
        meta = read_meta(folder, PREPARED)
        trained, entries = meta["trained"], meta["vocab_size"]
        if s.val_path:
            raise UserError(f"{folder} holds tokens with a validation part of their own: leave val_path out")
        if trained and s.source["vocab_size"] in ("environment", "command line") and s.vocab_size != entries:
            raise UserError(f"{folder} holds tokens of a vocabulary of {entries:,}: leave vocab_size out")
        if s.tokenizer not in TRAINED:
            TokenStream(folder, "val", existing_tokenizer(s))  # refuses another tokenizer
        elif s.source["tokenizer"] != "default" and trained and trained != s.tokenizer:
            raise UserError(f"{folder} has tokens of a {trained} tokenizer, not tokenizer={s.tokenizer}; leave it out")
    else:
        cache = cache_folder(s.cache_dir)
        again = Again(s, cache)
        put_downloads_aside(s, again, quiet)
        raw, tokenizer, shards = find_source(s)
        sources = raw.sources()
        hashes = content_hashes(sources, cache, quiet)
        raw.notes += equal_files(raw, hashes)
        decides = text_decides(raw, hashes, s)
        folder = token_folder(cache, raw.name, decides, tokenizer, s)
        if known and not tokenizer and not made_by(folder, known):
            tokenizer, folder = known, token_folder(cache, raw.name, decides, known, s)
        if is_current(folder, again, quiet):
            say(f"data: {folder} is current: downloads, tokenizer and tokens are there", quiet)
        else:
            with working(folder, quiet) as note:
                if not is_current(folder, again, quiet=True):
                    build(folder, raw, sources, decides, tokenizer, shards, again, s, quiet, note)
    meta = read_meta(folder, PREPARED)
    if meta["trained"] not in ("", "char"):
        check_vocabulary(meta["vocab_size"], s)
    for split, part in meta["splits"].items():
        if "lost" in part:
            say(f"data: in the beginning of {split}, {part['lost']}", quiet)
        if part["tokens"] < s.seq_len + 1:
            raise UserError(f"the {split} part of {meta['name']} has {part['tokens']:,} tokens, fewer than the "
                            f"seq_len + 1 = {s.seq_len + 1:,} of one row; give more text or a smaller seq_len")
    return folder


def token_folder(cache: Path, name: str, decides: list, tokenizer, s) -> Path:
    """Where the tokens of a text are kept; `tokenizer` is None if one is to be trained on it."""
    made = [tokenizer.fingerprint, tokenizer.role("eot")] if tokenizer else tokenizer_decides(s)
    made += ["replaced"] if s.replace_missing else []
    return cache / f"{name}-{cache_key(*decides, *made, s.shard_tokens)}"


def made_by(folder: Path, tokenizer) -> bool:
    """Whether the folder holds tokens of this tokenizer."""
    return (folder / "meta.json").is_file() and read_meta(folder)["tokenizer"] == tokenizer.fingerprint


def find_source(s) -> tuple[RawCorpus, object, dict[str, list[Path]]]:
    """(corpus, its tokenizer or None if one is to be trained, its shards per split if it is made of token ids)"""
    parts = find_shards(s.data_path, s.val_path) if s.data_path else None
    if is_mixture(s):
        if s.val_path or s.source["dataset"] not in ("default", "checkpoint"):
            raise UserError(f"mixture={s.mixture} leaves no place for dataset= or val_path=; take those or it away")
        return open_mixture(s), None if s.tokenizer in TRAINED else existing_tokenizer(s), {}
    if not parts:
        return open_corpus(s), None if s.tokenizer in TRAINED else existing_tokenizer(s), {}
    beside = parts.train[0].parent / "tokenizer.json"
    if s.tokenizer in TRAINED and not beside.is_file():
        raise UserError(f"{s.data_path} holds token ids, and only their own tokenizer reads them: tokenizer=<its file>")
    tokenizer = load_tokenizer(beside) if s.tokenizer in TRAINED else existing_tokenizer(s)
    files = parts.train + parts.val
    for folder in {path.parent for path in files}:
        if (folder / "meta.json").is_file():
            TokenStream(folder, "val", tokenizer)  # shards of ours: refuses another tokenizer
    raw = RawCorpus(path_name(s.data_path), files, pieces=None, notes=parts.notes())
    return raw, tokenizer, {"train": parts.train, "val": parts.val}


def existing_tokenizer(s):
    """The tokenizer of a file or folder."""
    if s.tokenizer not in TIKTOKEN and not find_path(s.tokenizer).exists():
        raise UserError(f"tokenizer={s.tokenizer} is none of {', '.join((*TRAINED, *TIKTOKEN))}, nor a file or "
                        "folder that exists")
    return find_tokenizer(s.tokenizer)


def text_decides(raw: RawCorpus, hashes: list[str], s) -> list:
    """All that decides which documents come out: the files' content, and how their names say it is to be read."""
    kinds = ["".join(path.suffixes[-2:]).lower() for path in raw.files]
    mixture = [s.mixture, s.mixture_unit, s.mixture_size] if is_mixture(s) else []
    corpus = "" if s.data_path else s.dataset
    return [FORMAT, hashes, kinds, raw.val_files, corpus, s.val_share, s.text_field, s.bin_dtype, *mixture]


def content_hashes(sources: list, cache: Path, quiet: bool) -> list[str]:
    """A hash of each file's content. Files are read again only when size or times say that they may have changed; which
    file had which hash is kept in the cache."""

    def known() -> dict:
        try:
            return read_json(cache / "hashes.json", {str: [Either(str, int)]})
        except UserError:  # not there, or damaged: then we read the files
            return {}

    def find(hashes: dict) -> list[str | None]:
        noted = [hashes.get(path, ()) for path, *_ in sources]
        return [str(each[-1]) if each[:-1] == state else None for (_, *state), each in zip(sources, noted, strict=True)]

    found = find(known())
    if None not in found:
        return found
    with working(cache, quiet) as note:
        hashes = known()
        unread = [source for source, each in zip(sources, find(hashes), strict=True) if each is None]
        progress = ProgressLine("reading files", sum(size for _, size, *_ in unread), "MB", 1e6, quiet, note)
        done = 0
        for path, *state in unread:
            digest = hashlib.blake2b(digest_size=16)
            with reading(Path(path)), open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    done += len(block)
                    progress.show(done)
            hashes[path] = [*state, digest.hexdigest()]
        progress.close()
        write_json(cache / "hashes.json", hashes)
        return find(hashes)


def equal_files(raw: RawCorpus, hashes: list[str]) -> list[str]:
    """What to say of files for validation that have the content of one to train on."""
    n_train = len(hashes) - raw.val_files
    found = zip(raw.files[n_train:], hashes[n_train:], strict=True)
    same = [path.name for path, content in found if content in hashes[:n_train]]
    return [f"{same[0]} is both training and validation text: a low loss on it will prove nothing"] if same else []


def tokenizer_decides(s) -> list:
    """All that decides, beside the documents, which tokenizer comes out of the training."""
    return [s.tokenizer, wanted_vocabulary(s), s.tokenizer_pattern, s.tokenizer_bytes]


def cache_key(*decides) -> str:
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]


def is_mixture(s) -> bool:
    return bool(s.mixture and not s.data_path)


OWN_ID = uuid.uuid4().hex


def launch_id() -> str:
    """The same for all processes that one torchrun starts, and another for each start."""
    if not os.environ.get("TORCHELASTIC_RUN_ID"):
        return OWN_ID
    launcher = os.getppid()
    try:  # a number may have belonged to another process before; with the time of its start it has not
        began = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # not Linux
        began = ""
    where = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "GROUP_RANK")]
    return "-".join([*where, str(launcher), began])


class Again:
    """What `overwrite` makes again. The launch decides, no clock: whatever one of its processes has made again is noted
    in the cache, and the others take it as it is, however late they come."""

    def __init__(self, s, cache: Path):
        self.stages, self.path, self.launch = forced(s.overwrite), cache / ".overwritten.json", launch_id()
        self.is_set = bool(self.stages)

    def noted(self) -> list[str]:
        try:
            content = read_json(self.path, {"launch": str, "done": [str]}) if self.path.exists() else {}
        except UserError:  # damaged: nothing was noted
            content = {}
        return content["done"] if content.get("launch") == self.launch else []

    def is_due(self, what: str | Path, stage: str) -> bool:
        return stage in self.stages and str(what) not in self.noted()

    def note(self, what: str | Path) -> None:
        if self.is_set:
            with locked(self.path.with_name(".overwritten.lock"), busy=lambda note: None):
                write_json(self.path, {"launch": self.launch, "done": [*self.noted(), str(what)]})


def put_downloads_aside(s, again: Again, quiet: bool) -> None:
    """Once for a launch: what the corpora have downloaded is fetched again where `overwrite` says so."""
    if "download" not in again.stages or s.data_path:
        return
    wanted = {name.partition(":")[2] for name in s.overwrite.replace(",", " ").split() if name.startswith("download:")}
    names = list(parse(s.mixture)) if is_mixture(s) else [s.dataset]
    if unknown := wanted - {name.partition(":")[0] for name in names}:
        raise UserError(f"overwrite={s.overwrite}: {min(unknown)} is no corpus of this run; it has {', '.join(names)}")
    for name in filter(is_dataset, names):
        corpus = name.partition(":")[0]
        module = import_dataset(corpus)
        if not hasattr(module, "downloads") or wanted and corpus not in wanted:
            continue
        with working(again.path.parent, quiet):
            if again.is_due(f"download {corpus}", "download"):
                for path in module.downloads():
                    set_aside(path)
                again.note(f"download {corpus}")


def is_current(folder: Path, again: Again, quiet: bool) -> bool:
    """True if the folder is complete and need not be made again."""
    if not (folder / "meta.json").is_file() or again.is_due(folder, "tokens"):
        return False
    try:
        meta = read_meta(folder, PREPARED)
        refuse_damage(folder, meta.get("tokenizer_sum"))
        if "home" not in meta:  # shards of ours
            for split in meta["splits"]:
                TokenStream(folder, split)
    except UserError as error:
        say(f"data: {str(error).partition(';')[0]}; the tokens are made again", quiet)
        return False
    return True


def refuse_damage(folder: Path, expected: int | None) -> None:
    """UserError if the files of the tokenizer that we saved there are not whole. Its roles may be edited."""
    if (folder / "tokenizer_config.json").exists():
        read_json(folder / "tokenizer_config.json")
    if expected not in (None, tokenizer_sum(folder)):
        raise UserError(f"{folder / 'tokenizer.json'} is damaged")


def tokenizer_sum(folder: Path) -> int:
    path = require_file(folder / "tokenizer.json")
    with reading(path):
        return zlib.crc32(path.read_bytes())


# ---------------------------------------------------------------------------------------------------------------------
# Making the folder


def build(folder: Path, raw: RawCorpus, sources: list, decides: list, tokenizer, shards: dict, again: Again, s,
          quiet: bool, note: Callable[[str], None]) -> None:
    """Fill the folder. Validation goes first, for then it shows at once if there is none."""
    (folder / "meta.json").unlink(missing_ok=True)
    if again.is_due(folder, "tokens"):
        (folder / "state.json").unlink(missing_ok=True)
    if hasattr(raw.module, "describe"):
        say(f"data: {raw.module.describe()}", quiet)
    say("\n".join(f"data: {note}" for note in filter(None, raw.notes)), quiet)
    trained = tokenizer is None
    tokenizer = tokenizer or make_tokenizer(raw, decides, again, s, quiet)
    if tokenizer.role("eot") is None:
        raise UserError(f"tokenizer={s.tokenizer} has no end-of-text token to put between documents")
    if is_mixture(s) and s.mixture_unit == "tokens":
        raw = open_mixture(s, lambda text: len(tokenizer.encode_to_numpy(tokenizer.repaired(text)[0])) + 1)
    splits = {}
    for split in ("val", "train"):
        if shards:
            progress = ProgressLine(f"reading {split}", 0, "MB", 1e6, quiet, note)
            splits[split] = count_shards(shards[split], tokenizer, s.bin_dtype, progress)
        else:
            splits[split] = write_split(folder, split, raw, tokenizer, s.shard_tokens, s.workers, quiet, note,
                                        s.replace_missing)
    if raw.sources() != sources:
        (folder / "state.json").unlink(missing_ok=True)
        raise UserError(f"the files of {raw.name} changed while we read them; start again")
    tokenizer.save(folder)
    meta = {"format": FORMAT, "name": raw.name, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.role("eot"),
            "tokenizer": tokenizer.fingerprint, "tokenizer_sum": tokenizer_sum(folder),
            "trained": s.tokenizer if trained else "", "splits": splits,
            "skipped": len(raw.skipped), "settings": asdict(pick(DataSettings, vars(s)))}
    if shards:  # they are not in the folder
        meta |= {"home": folder.stat().st_ino, "bin_ids": s.bin_dtype.replace("auto", "uint16")}
    write_meta(folder, meta)
    names = {name for part in splits.values() for name, _ in part["shards"]}
    for left_over in [folder / "state.json", *folder.glob("*.npy*")]:  # of runs that were killed
        if left_over.name not in names:
            left_over.unlink(missing_ok=True)
    for split in splits:
        TokenStream(folder, split, tokenizer)  # are they on the disk as we wrote them?
    again.note(folder)
    say("\n".join(f"data: {line}" for line in [*mixture_lines(meta), *marker_lines(meta)]), quiet)


def make_tokenizer(raw: RawCorpus, decides: list, again: Again, s, quiet: bool):
    """Train on the training documents, and on nothing else; or take the one that was trained so before."""
    key = cache_key(*decides, *tokenizer_decides(s))
    folder = cache_folder(s.cache_dir) / f"{raw.name}-tokenizer-{key}"
    with working(folder, quiet) as note:
        tokenizer = None
        if (folder / "tokenizer.json").is_file() and not again.is_due(folder, "tokenizer"):
            try:
                refuse_damage(folder, read_json(folder / "made.json", {"sum": int})["sum"])
                tokenizer = load_tokenizer(folder)
                say(f"data: {folder} is current", quiet)
            except UserError as error:
                say(f"data: {error}; the tokenizer is trained again", quiet)
        if tokenizer is None:
            texts = (text for text, _ in raw.pieces("train"))
            first = next(texts, None)
            if first is None:
                raise UserError(f"{raw.name} holds no text to train on")
            say(f"data: training a {s.tokenizer} tokenizer on {raw.name}", quiet)
            tokenizer = train_tokenizer(s.tokenizer, chain([first], texts), wanted_vocabulary(s), s.tokenizer_pattern,
                                        max_bytes=s.tokenizer_bytes, workers=s.workers,
                                        progress=training_progress(raw, s.tokenizer_bytes, quiet, note))
            tokenizer.save(folder)
            write_json(folder / "made.json", {"sum": tokenizer_sum(folder)})
            again.note(folder)
    check_vocabulary(tokenizer.vocab_size, s)
    return tokenizer


def training_progress(raw: RawCorpus, max_bytes: int, quiet: bool, note: Callable[[str], None]) -> Callable:
    """Shows how far the training of a tokenizer is: first it counts the text, then it merges."""
    whole = raw.size("train")
    limited = 0 < max_bytes < whole
    count = ProgressLine("tokenizer reads", max_bytes if limited else whole, raw.unit, raw.scale, quiet, note)
    merge = ProgressLine("tokenizer merges", 0, "", 1, quiet, note)

    def show(phase: str, done: int, total: int) -> None:
        if phase == "count":
            count.show(done if limited else raw.done(done))
            return
        if not merge.total:
            count.close()
            merge.restart(done)
        merge.total = total
        merge.show(done)
        if done >= total:
            merge.close()

    return show


def wanted_vocabulary(s) -> int:
    """Entries of the tokenizer to train; 0 = all characters, unless somebody asked for fewer."""
    return 0 if s.tokenizer == "char" and s.source["vocab_size"] == "default" else s.vocab_size


def check_vocabulary(size: int, s) -> None:
    """A vocabulary that somebody asked for does not silently become a smaller one."""
    if s.tokenizer != "char" and size < s.vocab_size and s.source["vocab_size"] != "default":
        raise UserError(f"vocab_size={s.vocab_size}, but this text gives {size} entries only; "
                        f"set vocab_size={size} or less, or give more text")


def mixture_lines(meta: dict) -> list[str]:
    """What was asked for and what came: "train: gutenberg 40.0 % wanted, 40.1 % got, 1,203 words in 2 passes" """
    lines = []
    for split, part in meta["splits"].items():
        for name, mixed in part.get("mixture", {}).items():
            unit = "words" if "words" in mixed else "tokens"
            lines.append(f"{split}: {name} {mixed['share']:.1%} wanted, {mixed['got']:.1%} got, "
                         f"{mixed[unit]:,} {unit} in {mixed['passes']} passes")
            if mixed["passes"] > OFTEN:
                lines.append(f"{name} is small for its share: it comes {mixed['passes']} times; a smaller weight or "
                             "mixture_size repeats it less")
    return lines


def marker_lines(meta: dict) -> list[str]:
    """What was learned otherwise than it may look: end-of-text markers within a line, characters that were replaced."""
    markers, replaced = (sum(part.get(name, 0) for part in meta["splits"].values()) for name in ("markers", "replaced"))
    lines = []
    if replaced:
        lines.append(f"{replaced:,} characters that the tokenizer lacks are U+FFFD now")
    if markers:
        lines.append(f"{markers:,} times {SEPARATOR} within a line separates nothing and is learned as text")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# What the user sees


def summary(folder: Path) -> str:
    """A table of what a prepared folder holds, and how its training text begins."""
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
    lines += mixture_lines(meta) + marker_lines(meta)
    return "\n".join([*lines, "", "it begins: " + json.dumps(begin[:200], ensure_ascii=False)])


def only_tokenizer(inputs: list[str], s) -> str:
    """Train a tokenizer on all the text of files, folders and corpora, and write it where the user wants it."""
    if s.tokenizer not in TRAINED:
        raise UserError(f"tokenizer_dir= is for a tokenizer that is trained: tokenizer={', '.join(TRAINED)}")
    texts = (text for each in inputs for text in all_text(each, s))
    counted = ProgressLine("tokenizer reads", 0, "MB", 1e6)
    merged = ProgressLine("tokenizer merges")

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "count":
            counted.show(done)
        else:
            merged.total = total
            merged.show(done)

    workers = 1 if s.profile else s.workers
    with cProfile.Profile() if s.profile else nullcontext() as profile:
        tokenizer = train_tokenizer(s.tokenizer, texts, wanted_vocabulary(s), s.tokenizer_pattern,
                                    max_bytes=s.tokenizer_bytes, workers=workers, progress=progress)
    counted.close()
    merged.close()
    check_vocabulary(tokenizer.vocab_size, s)
    folder = write_path(s.tokenizer_dir)
    with writing(folder, "; tokenizer_dir=<folder> names another"):
        tokenizer.save(folder)
    if profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(12)
    return f"{folder / 'tokenizer.json'}: {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint}"


def all_text(name: str, s) -> Iterator[str]:
    """The text of a corpus of ours, or of a file or folder, without keeping any for validation."""
    if is_dataset(name):
        pieces = open_dataset(name, s.text_field).pieces("train")
    else:
        pieces = files_pieces(text_files(name), s.text_field)
    return (text for text, _ in pieces)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    inputs = list(takewhile(is_input, argv))
    argv = argv[len(inputs) :]
    if len(inputs) == 1 and is_dataset(inputs[0]):
        argv = [f"dataset={inputs[0]}", "data_path=", *argv]
    elif len(inputs) == 1:
        argv = [f"data_path={inputs[0]}", *argv]
    s = configure([ModelConfig, DataSettings, OnlyTokenizer], argv, doc=__doc__)
    try:
        if s.tokenizer_dir:
            print(visible(only_tokenizer(inputs or [s.data_path or s.dataset], s)))
        elif len(inputs) > 1:
            raise UserError(f"{', '.join(inputs)}: several inputs are for tokenizer_dir=; mixture= trains on several")
        else:
            print(visible(summary(prepare(s))))
    except KeyboardInterrupt:
        print("\ndata.py: interrupted; the same command goes on behind the last whole shard", file=sys.stderr)
        return 130
    return 0


def is_input(arg: str) -> bool:
    """Text or a corpus, and neither a setting nor a config file."""
    config = Path(arg).parent.name == "config" and arg.endswith(".py")
    return not (arg.startswith("-") or "=" in arg or config)


if __name__ == "__main__":
    run(main)
