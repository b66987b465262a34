"""Tokenizers as GGUF files have them: byte-level BPE in the metadata, read and written.

    tokenizer = read_tokenizer_meta(file.meta, "smollm2.gguf")
    meta = write_tokenizer_meta(tokenizer, vocab_size=4096)

llama.cpp knows how text is cut by a name, `tokenizer.ggml.pre`; it has no file without one of these names.
"""

from bpe import BPETokenizer, added_tokens, pre_tokenizer, read_names, spell
from configurator import need, shown
from runtime.files import Either, mismatch
from text.pieces import NEMO, PATTERNS
from text.tokenizer import Tokenizer, naming

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
# How a name of llama.cpp cuts, and whether a piece that is a token becomes that token even without merges.
CUTS = {
    "gpt-2": ([PATTERNS["gpt2"]], False),
    "smaug-bpe": ([PATTERNS["gpt4"]], False),  # the expression of llama-bpe without what else that name means
    "qwen2": ([PATTERNS["qwen2"]], False),
    "gpt-4o": ([PATTERNS["o200k"]], False),
    "smollm": ([r"\p{N}", PATTERNS["gpt2"]], False),
    "llama-bpe": ([PATTERNS["gpt4"]], True),
    "tekken": ([NEMO], True),
}
READ_ONLY = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "gpt-4": "smaug-bpe", "deepseek-r1-qwen": "qwen2"}
ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
SHAPE = {"tokenizer.ggml.model": str, "tokenizer.ggml.tokens": [str], "tokenizer.ggml.pre?": str,
         "tokenizer.ggml.merges?": [str], "tokenizer.ggml.token_type?": [int], "tokenizer.chat_template?": str,
         "tokenizer.ggml.eot_token_id?": int} | {f"tokenizer.ggml.{key}?": Either(int, None) for key in ROLES.values()}


def read_tokenizer_meta(meta: dict, where: str) -> Tokenizer:
    """The tokenizer of a GGUF file, with its roles and its chat template; UserError for kinds that we do not have."""
    own = {key: value for key, value in meta.items() if key.startswith("tokenizer.")}
    wrong = mismatch(own, SHAPE)
    need(not wrong, f"{where}: its tokenizer is not as GGUF has it: {wrong}")
    kind, pre = own["tokenizer.ggml.model"], own.get("tokenizer.ggml.pre", "default")
    need(kind == "gpt2", f"{where}: its tokenizer is a {shown(kind)}, and of GGUF's we read byte-level BPE (gpt2) only")
    pre = READ_ONLY.get(pre, pre)
    need(pre in CUTS, f"{where}: its tokenizer cuts text as {shown(pre)} does, and we know {', '.join(CUTS)}")
    patterns, whole = CUTS[pre]
    tokens = own["tokenizer.ggml.tokens"]
    types = own.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    need(len(types) == len(tokens) and len(set(tokens)) == len(tokens),
         f"{where}: its tokenizer has {len(tokens)} tokens, {len(set(tokens))} different ones, and {len(types)} types")
    with naming(where):
        vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}
        specials = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == CONTROL}
        added = added_tokens(specials)
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
            if kind == USER_DEFINED:
                added += [entry | {"special": False} for entry in added_tokens({token: i})]
        merges = [split_merge(merge) for merge in own.get("tokenizer.ggml.merges", [])]
        names, pairs = read_names(vocab, merges, added)
        return BPETokenizer(names, pairs, patterns, added, whole, config=config_of(own, tokens))


def split_merge(merge: str) -> list[str]:
    """ "Ġ c" -> ["Ġ", "c"]: at the first space behind the first character, which may be a space in old files."""
    at = merge.find(" ", 1)
    return [merge[:at], merge[at + 1 :]]


def config_of(own: dict, tokens: list[str]) -> dict:
    """tokenizer_config.json: which tokens play which role, and the chat template."""
    config = {}
    for role, key in ROLES.items():
        i = own.get(f"tokenizer.ggml.{key}")
        if i is not None and 0 <= i < len(tokens):
            config[f"{role}_token"] = tokens[i]
    if "tokenizer.chat_template" in own:
        config["chat_template"] = own["tokenizer.chat_template"]
    return config


def write_tokenizer_meta(tokenizer: Tokenizer, vocab_size: int) -> dict:
    """The metadata of a tokenizer of ours, for a model with `vocab_size` entries; UserError where GGUF has no form."""
    need(isinstance(tokenizer, BPETokenizer), "GGUF has no exact form of this tokenizer: only of byte-level BPE")
    names = [name for name, cuts in CUTS.items() if cuts == (tokenizer.patterns, tokenizer.ignore_merges)]
    if tokenizer.patterns == [PATTERNS["cl100k"]]:
        names = ["smaug-bpe"]  # differs at the end of a text, if that is white space
    need(names and not tokenizer.nfc, "llama.cpp knows no tokenizer that cuts text as this one: "
         f"{shown(str(pre_tokenizer(tokenizer.patterns)))}")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, i in tokenizer.vocab.items():
        tokens[i], types[i] = spell(token), NORMAL
    for entry in tokenizer.added:
        tokens[entry["id"]] = entry["content"]
        types[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    merges = [f"{spell(left)} {spell(right)}" for left, right in tokenizer.merges]
    meta = {"model": "gpt2", "pre": names[0], "tokens": tokens, "token_type": types, "merges": merges or [" "],
            "add_bos_token": False, "add_eos_token": False}
    for role, key in ROLES.items():
        if tokenizer.role(role) is not None:
            meta[key] = tokenizer.role(role)
    return {f"tokenizer.ggml.{key}": value for key, value in meta.items()}
