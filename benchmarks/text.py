"""Tokenizers against those of others: `bpe` trains them, `encode` encodes with them.

The text is the Python source on this machine, the standard library and installed packages, in the order of the paths:
no download, and no text twice. Each measurement has a process of its own, in turn, which reads the text itself.
The others are `tokenizers` and `sentencepiece`, if they are installed, and tiktoken.
"""

import hashlib
import importlib.util
import json
import os
import resource
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path

import numpy as np

import bpe
from configurator import Settings
from text.tokenizer_files import load_tokenizer

SAMPLE = 2_000_000  # bytes for the textbook's loop, which would take days for all
GROUP = 256  # documents that the encoders get at once: all of the 100 MB as Python objects would be many GB


def source_texts(mb: float) -> Iterator[str]:
    """The different .py files on this machine until `mb` MB are full."""
    size, seen = 0, set()
    folders = dict.fromkeys(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
    paths = [path for folder in folders for path in sorted(Path(folder).rglob("*.py"))]
    for path in paths:
        try:
            data = path.read_bytes()
            text = data.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if data and digest not in seen:
            seen.add(digest)
            size += len(data)
            yield text
        if size >= mb * 1e6:
            return


# ---------------------------------------------------------------------------------------------------------------------
# Variants: each runs in a process of its own and returns what we compare


def train_ours(mb: float, vocab_size: int, cores: int, folder: str) -> dict:
    phases, clock = {}, time.perf_counter()

    def progress(phase: str, done: int, total: int) -> None:
        phases[phase] = time.perf_counter() - clock

    codec = bpe.BPETokenizer.train(source_texts(mb), vocab_size, "gpt2", [], workers=cores, progress=progress)
    codec.save(folder)
    return {"read and count s": phases["count"], "merge s": phases["merge"] - phases["count"],
            "merges": [[bpe.spell(a), bpe.spell(b)] for a, b in codec.merges]}


def train_tokenizers(mb: float, vocab_size: int, cores: int, folder: str) -> dict:
    from tokenizers import Tokenizer as Rust
    from tokenizers import models, pre_tokenizers, trainers

    rust = Rust(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet)
    rust.train_from_iterator(source_texts(mb), trainer)
    merges = json.loads(rust.to_str())["model"]["merges"]
    return {"merges": [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]}


def train_sentencepiece(mb: float, vocab_size: int, cores: int, folder: str) -> dict:
    import sentencepiece

    lines = (line for text in source_texts(mb) for line in text.split("\n"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(Path(folder) / "sp"), model_type="bpe", vocab_size=vocab_size,
        num_threads=cores, byte_fallback=True, normalization_rule_name="identity", hard_vocab_limit=False,
        minloglevel=2)
    return {}


def train_sample(mb: float, vocab_size: int, cores: int, folder: str) -> dict:
    """The textbook's loop and ours, for a little text."""
    pieces = bpe.count_pieces(source_texts(mb), bpe.PATTERNS["gpt2"], max_bytes=SAMPLE, workers=1)
    pieces, merges, seconds = {bpe.utf8(piece): n for piece, n in pieces.items()}, [], []
    for learn in (bpe.learn_merges_textbook, bpe.learn_merges):
        clock = time.perf_counter()
        merges.append(learn(pieces, 60))
        seconds.append(time.perf_counter() - clock)
    return {"textbook s": seconds[0], "ours s": seconds[1], "same": merges[0] == merges[1]}


def encode_with(name: str) -> Callable:
    """A variant that encodes all texts in groups. Its seconds hold only that, not reading and checking."""

    def variant(mb: float, vocab_size: int, cores: int, folder: str) -> dict:
        texts = list(source_texts(mb))
        ours = load_tokenizer(folder)
        if name == "processes":
            with ProcessPoolExecutor(cores, initializer=_start, initargs=(folder,)) as pool:
                list(pool.map(_encode, ["start"] * cores))
                seconds, digest = _through(texts, lambda group: pool.map(_encode, group, chunksize=16))
        elif name == "threads":
            with ThreadPoolExecutor(cores) as pool:
                seconds, digest = _through(texts, lambda group: pool.map(ours.encode_to_numpy, group))
        elif name == "lists":
            seconds, digest = _through(texts, lambda group: ours.encode_batch(group, threads=cores))
        elif name == "tiktoken":
            import tiktoken

            core = tiktoken.Encoding("peer", pat_str=ours.patterns[0], special_tokens={},
                                     mergeable_ranks=ours.vocab)
            seconds, digest = _through(texts, lambda group: core.encode_ordinary_batch(group, num_threads=cores))
        else:
            from tokenizers import Tokenizer as Rust

            rust = Rust.from_file(str(Path(folder) / "tokenizer.json"))
            seconds, digest = _through(texts, lambda group: [each.ids for each in getattr(rust, name)(group)])
        return {"encode s": seconds, "ids": digest}

    return variant


def _through(texts: list[str], encode: Callable[[list[str]], Iterable]) -> tuple[float, str]:
    digest, seconds = hashlib.sha256(), 0.0
    list(encode(texts[:1]))  # what is made at the first call
    for start in range(0, len(texts), GROUP):
        clock = time.perf_counter()
        rows = list(encode(texts[start : start + GROUP]))
        seconds += time.perf_counter() - clock
        for row in rows:
            digest.update(np.asarray(row, np.uint32).tobytes())
    return seconds, digest.hexdigest()


def _start(folder: str) -> None:
    global _tokenizer
    _tokenizer = load_tokenizer(folder)


def _encode(text: str) -> np.ndarray:
    return _tokenizer.encode_to_numpy(text)


RUST = "tokenizers' encode_batch"
ENCODERS = {"ours, encode_batch": "lists", "ours, numpy by threads": "threads", "ours, numpy by processes": "processes",
            "tiktoken": "tiktoken", RUST: "encode_batch", f"{RUST}_fast": "encode_batch_fast"}
VARIANTS = {"ours": train_ours, "tokenizers": train_tokenizers, "sentencepiece": train_sentencepiece,
            "sample": train_sample}


def alone(name: str, mb: float, vocab_size: int, cores: int, folder: str) -> dict:
    """Run a variant in a process of its own: what it returns, with the seconds, CPU seconds and memory of all."""
    line = [sys.executable, "-m", "benchmarks.text", json.dumps([name, mb, vocab_size, cores, folder])]
    from benchmarks.timing import output_of  # and torch, which the process of a variant must not load

    printed = output_of(line, RAYON_NUM_THREADS=str(cores), TOKENIZERS_PARALLELISM="true")
    return json.loads(printed.splitlines()[-1])


def main() -> None:
    name, mb, vocab_size, cores, folder = json.loads(sys.argv[1])
    clock = time.perf_counter()
    found = (VARIANTS.get(name) or encode_with(ENCODERS[name]))(mb, vocab_size, cores, folder)
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    found["wall s"] = time.perf_counter() - clock
    found["CPU s"] = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    found["MB memory"] = (own_peak() + cores * children.ru_maxrss) / 1e3  # at most: pages that all share count often
    print(json.dumps(found))


def own_peak() -> int:
    """KB. On Linux ru_maxrss includes the peak of the process that started us, so we read our own."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1000 if sys.platform == "darwin" else 1)


# ---------------------------------------------------------------------------------------------------------------------


def _settings(s: Settings) -> tuple[float, int, int]:
    if s.smoke:
        return 0.2, 400, 2
    return s.text_mb, s.vocab_size if s.given("vocab_size") else 32_000, s.threads or os.cpu_count()


def _turns(names: list[str], repeats: int, *args) -> dict[str, list[dict]]:
    found = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            found[name].append(alone(name, *args))
    return found


def _medians(found: dict[str, list[dict]]) -> dict[str, dict]:
    medians = {}
    for name, results in found.items():
        numbers = [key for key, value in results[0].items() if isinstance(value, float)]
        row = {key: statistics.median(each[key] for each in results) for key in numbers}
        medians[name] = row | {"n": len(results)}
    return medians


def bench_bpe(s: Settings, argv: list[str]) -> dict:
    """Training of byte-level BPE: ours against `tokenizers`, the same text, pattern, cores and vocabulary."""
    mb, vocab_size, cores = _settings(s)
    size = sum(len(text.encode()) for text in source_texts(mb)) / 1e6
    names = ["ours", "tokenizers"] if importlib.util.find_spec("tokenizers") else ["ours"]
    with tempfile.TemporaryDirectory() as folder:
        found = _turns(names, s.repeats, mb, vocab_size, cores, folder)
        rows = _medians(found)
        if importlib.util.find_spec("sentencepiece"):
            rows |= _medians({f"sentencepiece, {mb / 10:g} MB":
                              [alone("sentencepiece", mb / 10, vocab_size, cores, folder)]})
        sample = alone("sample", mb, vocab_size, cores, folder)
    print(f"training of {vocab_size:,} entries on {size:.1f} MB of Python source, {cores} processes or threads")
    for name, row in rows.items():
        print(f"  {name:<22}" + "".join(f"{value:>9,.1f} {key}" for key, value in row.items()))
    verdict = "the same" if sample["same"] else "DIFFERENT"
    print(f"  a sample of {SAMPLE / 1e6:g} MB, 60 merges: textbook {sample['textbook s']:.1f} s, ours "
          f"{sample['ours s']:.2f} s, merges {verdict}")
    merges = [found[name][0]["merges"] for name in names]
    agree = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*merges, strict=False)))
    common = len({tuple(m) for m in merges[0]} & {tuple(m) for m in merges[-1]})
    if len(names) == 2:
        print(f"  the first {agree:,} merges are the same; {common:,} of {len(merges[0]):,} are in both")
    return {"rows": rows, "mb": size, "first_merges_that_agree": agree, "merges_in_both": common, "sample": sample}


def bench_encode(s: Settings, argv: list[str]) -> dict:
    """Encoding with one vocabulary, which we train: ours against `tokenizers` and tiktoken; all ids are compared."""
    mb, vocab_size, cores = _settings(s)
    size = sum(len(text.encode()) for text in source_texts(mb)) / 1e6
    names = [name for name in ENCODERS if not name.startswith(RUST) or importlib.util.find_spec("tokenizers")]
    with tempfile.TemporaryDirectory() as folder:
        alone("ours", min(mb, 20), vocab_size, cores, folder)
        found = _turns(names, s.repeats, mb, vocab_size, cores, folder)
    rows, reference = {}, found["tiktoken"][0]["ids"]
    print(f"encoding {size:.1f} MB of Python source by {cores} threads or processes, {vocab_size:,} entries")
    for name, row in _medians(found).items():
        rows[name] = {"MB/s": size / row["encode s"], "MB memory": row["MB memory"], "n": row["n"],
                      "same ids": all(each["ids"] == reference for each in found[name])}
    for name, row in rows.items():
        ratios = ""
        for peer, label in ((RUST, "tokenizers"), ("tiktoken", "tiktoken")):
            if peer in rows:
                ratios += f"{row['MB/s'] / rows[peer]['MB/s']:>6.2f} of {label}"
        verdict = "same ids" if row["same ids"] else "OTHER IDS"
        print(f"  {name:<30}{row['MB/s']:>8.1f} MB/s{ratios}{row['MB memory']:>9,.0f} MB memory  {verdict}")
    return {"rows": rows, "mb": size}


if __name__ == "__main__":
    main()
