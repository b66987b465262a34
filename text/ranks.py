"""Tokenizers given as ranks: tiktoken's encodings by name, its files (OpenAI's, Llama 3's), Mistral's tekken.json.

    codec = tiktoken_by_name("cl100k_base")
    codec = read_ranks(Path("tokenizer.model"))
    codec = read_tekken(Path("tekken.json"), read_json("tekken.json"))

Such a file has no merges. tiktoken joins two neighbours if the result has a rank, so the merge that makes a token is
the last pair when the token itself is encoded; a token without one is found as a whole piece only.
"""

import base64
import binascii
import hashlib
from pathlib import Path

import tiktoken_ext.openai_public as openai

import bpe
from bpe import PATTERNS, SPECIALS, BPETokenizer
from configurator import UserError
from runtime.files import Either, require_file

# The encodings that we know by name, and which of PATTERNS cuts text as theirs does. Theirs have possessive
# quantifiers, which Hugging Face's tokenizers reads as something else.
TIKTOKEN = {"gpt2": "gpt2", "r50k_base": "gpt2", "p50k_base": "gpt2", "cl100k_base": "cl100k", "o200k_base": "o200k"}

_END = "<|endoftext|>"
_FILL_IN = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
_LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
          "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
          "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
          *(f"<|reserved_special_token_{n}|>" for n in range(3, 248))]
# A file of ranks names no special tokens. Which encoding it is shows in its number of ranks and the largest of them.
KNOWN = {
    (50256, 50255): ("gpt2", {_END: 50256}),
    (50280, 50280): ("gpt2", {_END: 50256}),  # p50k: runs of spaces behind the special token
    (100256, 100255): ("cl100k", {_END: 100257, **_FILL_IN, "<|endofprompt|>": 100276}),
    (199998, 199997): ("o200k", {_END: 199999, "<|endofprompt|>": 200018}),
    (128000, 127999): ("gpt4", {name: 128000 + i for i, name in enumerate(_LLAMA)}),  # Llama 3.1 and later
}


def tiktoken_by_name(name: str) -> BPETokenizer:
    """OpenAI's encoding, from tiktoken's cache or, the first time, over the network."""
    if name not in TIKTOKEN:
        raise UserError(f"{name} is none of tiktoken's encodings that we know: {', '.join(TIKTOKEN)}")
    try:
        parts = getattr(openai, name)()
    except (OSError, ValueError):  # all network errors of requests are OSErrors; ValueError: a damaged download
        raise UserError(f"tiktoken cannot get its file of {name} from its cache or the network; on a machine that is "
                        "online, fetch it once and set TIKTOKEN_CACHE_DIR to its folder here") from None
    return from_ranks(parts["mergeable_ranks"], PATTERNS[TIKTOKEN[name]], parts["special_tokens"])


def read_ranks(path: Path, pattern: str = "") -> BPETokenizer:
    """Lines of base64, space, rank. `pattern`: a key of PATTERNS, if it is not that of the encoding."""
    try:
        rows = [line.split() for line in require_file(path).read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a file of tiktoken ranks: {error}") from None
    if not ranks:
        raise UserError(f"{path} cannot be read as a file of tiktoken ranks: it is empty")
    last = max(ranks.values())
    ours = {name: last + 1 + i for i, name in enumerate(SPECIALS)}
    known, specials = KNOWN.get((len(ranks), last), (TIKTOKEN.get(path.stem, "gpt4"), ours))
    with bpe.naming(path):
        return from_ranks(ranks, PATTERNS[pattern or known], specials)


TEKKEN = {
    "config": {"pattern": str, "default_vocab_size": int, "default_num_special_tokens": int},
    "vocab": list,
    "special_tokens?": Either([{"rank": int, "token_str": str}], None),
}
# What the tekken.json of Mistral's third template does not list.
_TEKKEN = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
           "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
           "[SUFFIX]"]


def read_tekken(path: Path, document: dict) -> BPETokenizer:
    """Mistral's tekken.json: special tokens have the first ids, and a rank is an id behind them."""
    with bpe.naming(path):
        return _from_tekken(document)


def _from_tekken(document: dict) -> BPETokenizer:
    bpe.require(document, TEKKEN)
    config, names = document["config"], dict(enumerate(_TEKKEN))
    if document.get("special_tokens"):
        names = {token["rank"]: token["token_str"] for token in document["special_tokens"]}
    first = config["default_num_special_tokens"]
    if not max(names) < first < config["default_vocab_size"] <= bpe.LARGEST_ID:
        raise UserError(f"default_num_special_tokens={first} and default_vocab_size={config['default_vocab_size']} do "
                        f"not go together with a special token of rank {max(names)}")
    specials = {names.get(i, f"<SPECIAL_{i}>"): i for i in range(first)}
    try:
        ranks = {base64.b64decode(token["token_bytes"], validate=True): first + token["rank"]
                 for token in document["vocab"][: config["default_vocab_size"] - first]}
    except (binascii.Error, KeyError, TypeError, ValueError) as error:
        raise UserError(f"an entry of vocab has no rank, or no token_bytes in base64: {error!r}") from None
    return from_ranks(ranks, config["pattern"], specials)


def from_ranks(ranks: dict[bytes, int], pattern: str, specials: dict[str, int]) -> BPETokenizer:
    if set(map(type, ranks.values())) != {int} or b"" in ranks:
        raise UserError("a token is empty, or its rank is no whole number")
    tokens = sorted(ranks, key=ranks.get)

    def meeting(token: bytes) -> int:
        """Where the last pair of a token meets; 0 for a byte, -1 where no pair makes it."""
        parts = bpe.join_pairs(token, lambda pair: ranks.get(pair[0] + pair[1]), until=2)
        if len(parts) == 2:
            return len(parts[0])
        return -1 if len(parts) > 2 else 0

    def cut() -> list[int]:
        return [meeting(token) for token in tokens]

    content = hashlib.sha256(b"ranks" + b"".join(b"%d " % len(token) + token for token in tokens)).hexdigest()[:32]
    cuts = bpe.remembered(content, cut) if len(ranks) > bpe.MANY else cut()
    merges = [(token[:at], token[at:]) for token, at in zip(tokens, cuts, strict=True) if at > 0]
    added = [bpe.added_tokens([name], i)[0] for name, i in specials.items()]
    return BPETokenizer(ranks, merges, [pattern], added, -1 in cuts, config=bpe.config_for(specials))
