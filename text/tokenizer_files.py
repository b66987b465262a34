"""Train or load a tokenizer of any kind, and read the files of other programs.

    tokenizer = load_tokenizer("my_tokenizer")      # a file or folder: its content says which kind it is
    tokenizer = load_tokenizer("cl100k_base")       # OpenAI's encoding, by tiktoken
    tokenizer = train_tokenizer("bpe", documents, vocab_size=4096)

Byte-level BPE of others comes as Hugging Face's tokenizer.json, as GPT-2's vocab.json with merges.txt, or as ranks:
files of tiktoken (OpenAI's; Llama 3's tokenizer.model) and Mistral's tekken.json. SentencePiece's models are in `spm`.
"""

import base64
import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path

import regex

import bpe
from bpe import BPETokenizer, added_tokens, cached_numbers
from configurator import UserError, find_path, need
from runtime.files import Either, read_json, require_file
from text.corpus import TRAINED
from text.merges import BYTES, encode_piece
from text.pieces import CUTTABLE, PATTERNS, ids_of
from text.tokenizer import (
    LARGEST_ID,
    SPECIALS,
    CharTokenizer,
    Tokenizer,
    check_files,
    check_shape,
    config_for,
    naming,
    read_config,
)

# tiktoken's encodings that we know by name, and our equivalent PATTERNS. tiktoken's own have possessive quantifiers,
# which Hugging Face's tokenizers reads differently.
TIKTOKEN = {"gpt2": "gpt2", "r50k_base": "gpt2", "p50k_base": "gpt2", "cl100k_base": "cl100k", "o200k_base": "o200k"}


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int, pattern: str = "gpt2",
                    specials: Iterable[str] = SPECIALS, max_bytes: int = 0, workers: int = 0,
                    progress: Callable | None = None) -> Tokenizer:
    """Train a tokenizer, one of TRAINED, on documents; see their `train`. Only BPE uses `pattern`."""
    need(kind in TRAINED, f"a tokenizer of kind {kind} cannot be trained, only {', '.join(TRAINED)}")
    if kind == "bpe":
        return BPETokenizer.train(texts, vocab_size, pattern, specials, max_bytes, workers, progress)
    if kind == "char":
        return CharTokenizer.train(texts, vocab_size, specials, max_bytes)
    from text.spm import SentencePieceTokenizer  # loads a package that only these kinds need

    return SentencePieceTokenizer.train(texts, vocab_size, kind, specials, max_bytes, workers, progress)


def load_tokenizer(path: str | Path, pattern: str = "", roles: dict[str, str] | None = None) -> Tokenizer:
    """Read a tokenizer: a file, a folder that holds one, or tiktoken's encoding by name. For that of a run or a
    checkpoint, see `runtime.checkpoint.find_tokenizer`.

    We recognise a file by its content, not by its name. vocab.json and ranks do not say how to split text: `pattern`, a
    key of PATTERNS, does. The default is GPT-2's for vocab.json; for ranks see RANKS. `roles`: {role: name of its
    token}, overrides the file.
    """
    need(not pattern or pattern in PATTERNS, f"pattern={pattern} is none of {', '.join(PATTERNS)}")
    name, path = str(path), find_path(path)
    if name in TIKTOKEN and not path.exists():
        tokenizer = tiktoken_by_name(name)
    else:
        tokenizer = read_tokenizer(path, pattern)
    if roles:
        tokenizer.config["roles"] = (tokenizer.config.get("roles") or {}) | roles
    return tokenizer


def read_tokenizer(path: Path, pattern: str) -> Tokenizer:
    if path.is_dir():
        file = tokenizer_file(path)
    else:
        file = require_file(path)
    need(file, f"{path} holds no tokenizer.json, tokenizer.model, tekken.json, vocab.json or .tiktoken file")
    kind = kind_of(file)
    need(kind != "checkpoint", f"{file} is a checkpoint: a tokenizer's file is expected here")
    if kind == "sentencepiece":
        from text.spm import SentencePieceTokenizer

        return SentencePieceTokenizer.load(file)
    if kind == "ranks":
        with naming(file):
            return read_ranks(file, pattern)
    document = read_json(file)
    if file.name.endswith("vocab.json") or document and set(map(type, document.values())) == {int}:
        return read_gpt2(file, document, PATTERNS[pattern or "gpt2"])
    if "config" in document and "vocab" in document:
        with naming(file):
            return read_tekken(document)
    return tokenizer_from_dict({"tokenizer": document, "config": read_config(file)}, str(file))


def holds_tokenizer(path: Path) -> bool:
    """Whether a file or folder is a tokenizer, and not a checkpoint or a run, which have theirs inside."""
    if path.is_dir():
        return tokenizer_file(path) is not None
    return path.is_file() and kind_of(path) != "checkpoint"


def kind_of(path: Path) -> str:
    """json, checkpoint, ranks, or sentencepiece: the kind of a tokenizer's file, from its first bytes."""
    try:
        with open(path, "rb") as file:
            begin = file.read(4096)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if begin.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"[") or path.suffix == ".json":
        return "json"
    if begin.startswith(b"PK") or path.suffix == ".pt":
        return "checkpoint"
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", begin) or path.suffix == ".tiktoken":
        return "ranks"
    return "sentencepiece"


def tokenizer_file(folder: Path) -> Path | None:
    """The tokenizer's file in a folder, None if there is none. A SentencePiece model goes before its tokenizer.json,
    which lacks parts of it; tokenizer.json goes before ranks, which lack its special tokens."""
    found = {"sentencepiece": [], "ranks": [], "json": [], "checkpoint": []}
    for path in [*sorted(folder.glob("*.model*")), *sorted(folder.glob("*.tiktoken"))]:
        if path.is_file() and path.name[0] != ".":
            found[kind_of(path)].append(path)
    for kind in ("sentencepiece", "ranks"):
        if len(set(map(Path.read_bytes, found[kind]))) > 1:
            names = ", ".join(path.name for path in found[kind][:4])
            raise UserError(f"{folder} holds several tokenizers: {names}; name the file that you mean")
    known = map(folder.joinpath, ("tokenizer.json", "tekken.json", "vocab.json"))
    return next(filter(Path.is_file, [*found["sentencepiece"], *known, *found["ranks"]]), None)


def tokenizer_from_dict(d: dict | str, source: str = "this tokenizer") -> Tokenizer:
    """Inverse of `to_dict` for every kind, and for tokenizer.json of other programs; `d` may be JSON text. A UserError
    names `source`."""
    with naming(source):
        if isinstance(d, str):
            try:
                d = json.loads(d)
            except (ValueError, RecursionError) as error:
                raise UserError(f"it cannot be read as JSON: {error}") from None
        check_files(d, dict)
        document = d["tokenizer"]
        if document.get("type") == "char":
            check_shape(document, {"chars": str, "specials": [str]})
            return CharTokenizer(document["chars"], document["specials"], d["config"])
        if document.get("type") != "sentencepiece":
            return read_tokenizer_json(document, d["config"])
    from text.spm import SentencePieceTokenizer

    return SentencePieceTokenizer.from_dict(d, source)


# ---- Hugging Face's tokenizer.json -----------------------------------------------------------------------------------

STEP = Either({"type": str}, None)
FOREIGN = {"model": dict, "added_tokens?": Either([bpe.ADDED], None), "normalizer?": STEP, "pre_tokenizer?": STEP,
           "decoder?": STEP, "post_processor?": Either(dict, None)}
FOREIGN_MODEL = {"vocab": {str: int}, "merges": list, "ignore_merges?": Either(bool, None)}
FOREIGN_SPLIT = {"pattern": Either({"Regex": str}, {"String": str}), "behavior": str, "invert": bool}


def read_tokenizer_json(document: dict, config: dict) -> Tokenizer:
    """Any tokenizer.json. A UserError names a feature that we lack. We ignore its settings for truncating and padding,
    which only describe how a program called `tokenizers`."""
    need("model" in document, "not a tokenizer.json: it has no model")
    check_shape(document, FOREIGN)
    model, added = document["model"], document.get("added_tokens") or []
    kind = model.get("type")
    refuse(kind not in (None, "BPE"), f"a {kind} model")
    check_shape(model, FOREIGN_MODEL, "model")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        refuse(model.get(key), f"{key}={model.get(key)}")
    normalizers = steps_of(document, "normalizer", "normalizers")
    steps = steps_of(document, "pre_tokenizer", "pretokenizers")
    pairs = list(map(read_merge, model["merges"]))
    refuse_other_ids(added, model["vocab"])
    if model.get("byte_fallback") and not model.get("ignore_merges"):  # SentencePiece's BPE, as in Llama 2
        from text.spm_json import read_spm_json

        return read_spm_json(document, normalizers + steps, list(map(tuple, pairs)), config)
    refuse(model.get("byte_fallback"), "byte_fallback with ignore_merges")
    for step in normalizers:
        refuse(step["type"] != "NFC", f"the normalizer {step['type']}")
    decoders = steps_of(document, "decoder", "decoders")
    refuse(len(decoders) != 1 or decoders[0]["type"] != "ByteLevel", "a decoder other than ByteLevel")
    *splits, last = steps or [{"type": "nothing"}]
    patterns = list(map(split_pattern, splits))
    refuse(last["type"] in ("nothing", "Split", "Digits"), "pre-tokenizing without ByteLevel")
    refuse(last["type"] != "ByteLevel" or last.get("add_prefix_space", True), pre_tokenizer_of(last))
    if last.get("use_regex", True):
        patterns.append(PATTERNS["gpt2"])
    vocab, merges = bpe.read_names(model["vocab"], pairs, added)
    return BPETokenizer(vocab, merges, patterns or [r"[\s\S]+"], added, bool(model.get("ignore_merges")),
                        nfc=len(normalizers) > 0, config=config, post=document.get("post_processor"))


def refuse(wrong: object, what: str) -> None:
    need(not wrong, f"it needs {what}, which we do not support: we read only byte-level BPE and SentencePiece's")


def steps_of(document: dict, section: str, inner: str) -> list[dict]:
    """A section is null, one step, or a sequence of steps."""
    step = document.get(section)
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    check_shape(step, {inner: [{"type": str}]}, section)
    return step[inner]


def split_pattern(step: dict) -> str:
    """The regular expression of a pre-tokenizer."""
    if step["type"] == "Digits" and step.get("individual_digits"):
        return r"\p{N}"
    if step["type"] == "Digits":
        return r"\p{N}+"
    refuse(step["type"] != "Split", pre_tokenizer_of(step))
    check_shape(step, FOREIGN_SPLIT, "a Split")
    pattern = step["pattern"].get("Regex") or regex.escape(step["pattern"]["String"])
    isolated = step["behavior"] == "Isolated" and not step["invert"]
    # Removing text that does not match is the same, if the pattern matches every text.
    kept = step["behavior"] == "Removed" and step["invert"] and pattern in CUTTABLE
    refuse(not (isolated or kept), pre_tokenizer_of(step))
    return pattern


def pre_tokenizer_of(step: dict) -> str:
    return f"the pre-tokenizer {json.dumps(step)[:200]}"


def read_merge(merge: str | list[str]) -> list[str]:
    """ "Ġ c" (old files) or ["Ġ", "c"] (new ones) -> ["Ġ", "c"]. In files a space shows as Ġ, so split is safe."""
    if isinstance(merge, str):
        merge = merge.split(" ")
    if not (isinstance(merge, list) and len(merge) == 2 and isinstance(merge[0], str) and isinstance(merge[1], str)):
        raise UserError(f"a merge cannot be read: {str(merge)[:50]!r} is not two tokens")
    return merge


def refuse_other_ids(added: list[dict], vocab: dict[str, int]) -> None:
    """Hugging Face's tokenizers gives an added token that is not in the vocabulary the next id, whatever the file says:
    UserError if the two differ."""
    known = {}
    for token in added:
        name, free = token["content"], max(len(vocab) - 1, *known.values(), 0) + 1
        expected = known.setdefault(name, vocab.get(name, free))
        need(token["id"] == expected,
             f"the added token {name} has the id {token['id']}, where tokenizers gives it {expected}: add it to the "
             "vocabulary with its id")


# ---- GPT-2's vocab.json and merges.txt -------------------------------------------------------------------------------


def read_gpt2(path: Path, names: dict[str, int], pattern: str) -> BPETokenizer:
    """vocab.json: {spelled token: id}; merges.txt: "left right" on each line, after a line with a version."""
    config = read_config(path)
    merges_file = path.with_name(path.name.replace("vocab.json", "merges.txt"))
    need(merges_file != path and merges_file.exists(), f"{path} needs its merges.txt beside it")
    try:
        lines = require_file(merges_file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{merges_file} cannot be read as UTF-8 text: {error}") from None
    with naming(path):
        check_shape(names, {str: int})
        pairs = [read_merge(line) for line in lines if line and not line.startswith("#version")]
        made = set(map("".join, pairs)).union(map(bpe.spell, BYTES))
        # A token that no merge makes cannot come from text, so it is special; transformers lists more in the config.
        added = added_tokens({name: i for name, i in names.items() if name not in made})
        for i, token in (config.get("added_tokens_decoder") or {}).items():
            need(i.isdecimal() and len(i) < 9, f"{i[:50]!r} in added_tokens_decoder is not an id")
            check_shape(token, {"content": str, "special": bool}, "added_tokens_decoder")
            if token["content"] not in names:
                added.append(token | {"id": int(i)})
        vocab, merges = bpe.read_names(names, pairs, added)
        return BPETokenizer(vocab, merges, [pattern], added, config=config)


# ---- ranks: tiktoken's encodings by name and its files, Mistral's tekken.json ----------------------------------------

LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
           "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
           *(f"<|reserved_special_token_{n}|>" for n in range(3, 248))]
# A file of ranks names no special tokens. Its number of ranks and its largest rank tell which encoding it is.
RANKS = {
    (50256, 50255): ("gpt2", {"<|endoftext|>": 50256}),
    (50280, 50280): ("gpt2", {"<|endoftext|>": 50256}),  # p50k: runs of spaces behind the special token
    (100256, 100255): ("cl100k", {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259,
                                  "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}),
    (199998, 199997): ("o200k", {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
    (128000, 127999): ("gpt4", ids_of(LLAMA_3, 128000)),  # Llama 3.1 and later
}


def tiktoken_by_name(name: str) -> BPETokenizer:
    """OpenAI's encoding, from tiktoken's cache or, the first time, over the network."""
    need(name in TIKTOKEN, f"{name} is not one of tiktoken's encodings that we know: {', '.join(TIKTOKEN)}")
    import tiktoken_ext.openai_public as openai

    try:
        parts = getattr(openai, name)()
    except (OSError, ValueError):  # all network errors of requests are OSErrors; ValueError: a damaged download
        raise UserError(f"tiktoken finds its file of {name} neither in its cache nor online: copy the cache of a "
                        "machine that is online, and set TIKTOKEN_CACHE_DIR to it") from None
    return from_ranks(parts["mergeable_ranks"], PATTERNS[TIKTOKEN[name]], parts["special_tokens"])


def read_ranks(path: Path, pattern: str = "") -> BPETokenizer:
    """Lines of base64, space, rank. `pattern`: a key of PATTERNS, if it is not that of the encoding."""
    try:
        rows = map(bytes.split, filter(None, path.read_bytes().splitlines()))
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
    except (OSError, ValueError) as error:
        raise UserError(f"it cannot be read as a file of tiktoken ranks: {error}") from None
    last = max(ranks.values(), default=0)
    known, specials = RANKS.get((len(ranks), last), (TIKTOKEN.get(path.stem, "gpt4"), None))
    if specials is None:
        specials = ids_of(SPECIALS, last + 1)
    return from_ranks(ranks, PATTERNS[pattern or known], specials)


TEKKEN = {
    "config": {"pattern": str, "default_vocab_size": int, "default_num_special_tokens": int},
    "vocab": [{"rank": int, "token_bytes": str}],
    "special_tokens?": Either([{"rank": int, "token_str": str}], None),
}
# Special tokens that the tekken.json of Mistral's third template does not list.
TEKKEN_SPECIALS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                   "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]",
                   "[PREFIX]", "[MIDDLE]", "[SUFFIX]"]


def read_tekken(document: dict) -> BPETokenizer:
    """Mistral's tekken.json: special tokens have the first ids, and a rank counts from the first id after them."""
    check_shape(document, TEKKEN)
    config, names = document["config"], dict(enumerate(TEKKEN_SPECIALS))
    if document.get("special_tokens"):
        names = dict(map(itemgetter("rank", "token_str"), document["special_tokens"]))
    first, size = config["default_num_special_tokens"], config["default_vocab_size"]
    need(max(names) < first < size <= LARGEST_ID,
         f"default_num_special_tokens={first} and default_vocab_size={size} do not fit a special token of "
         f"rank {max(names)}")
    specials = {names.get(i, f"<SPECIAL_{i}>"): i for i in range(first)}
    ranks = {}
    for token in document["vocab"][: size - first]:
        try:
            ranks[base64.b64decode(token["token_bytes"], validate=True)] = first + token["rank"]
        except ValueError as error:
            raise UserError(f"an entry of vocab has no token_bytes in base64: {error}") from None
    return from_ranks(ranks, config["pattern"], specials)


def from_ranks(ranks: dict[bytes, int], pattern: str, specials: dict[str, int]) -> BPETokenizer:
    """Ranks have no merges: two neighbours are joined if the result has a rank. So the merge of a token is the last
    pair left when we encode the token itself; a token without one is found only as a whole piece."""
    need(ranks and b"" not in ranks, "a token is empty, or there is none")
    tokens = sorted(ranks, key=ranks.get)

    def find_cuts() -> list[int]:
        """Where the last pair of each token meets; 0 for a byte, -1 if no pair makes it."""
        cuts = []
        for token in tokens:
            parts = encode_piece(token, lambda pair: ranks.get(pair[0] + pair[1]), until=2)
            if len(parts) == 2:
                cuts.append(len(parts[0]))
            elif len(token) == 1:
                cuts.append(0)
            else:
                cuts.append(-1)
        return cuts

    if len(ranks) > bpe.SLOW:
        sizes = (b"%d " % len(token) + token for token in tokens)
        cuts = cached_numbers(hashlib.sha256(b"ranks" + b"".join(sizes)).hexdigest()[:32], find_cuts)
    else:
        cuts = find_cuts()
    merges = [(token[:at], token[at:]) for token, at in zip(tokens, cuts, strict=True) if at > 0]
    return BPETokenizer(ranks, merges, [pattern], added_tokens(specials), ignore_merges=-1 in cuts,
                        config=config_for(specials))
