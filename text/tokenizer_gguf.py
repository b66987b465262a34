"""Tokenizers as GGUF files have them: byte-level BPE and SentencePiece's BPE in the metadata, read and written.

    tokenizer = read_tokenizer_meta(file.meta, "smollm2.gguf")
    meta = write_tokenizer_meta(tokenizer, vocab_size=4096)

For byte-level BPE, llama.cpp knows how text is cut by a name, `tokenizer.ggml.pre`; it has no file without one of them.
SentencePiece's models are protobuf messages: a few fields of them are all that GGUF has.
"""

import sys

from bpe import BPETokenizer, added_tokens, pre_tokenizer, read_names, spell
from configurator import UserError, need, shown
from runtime.files import mismatch
from text.pieces import CHINESE_AND_JAPANESE, DEEPSEEK, NEMO, PATTERNS
from text.spm_model import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_spm_model, write_spm_model
from text.tokenizer import Tokenizer, naming
from text.tokenizer_hf import added_names, check_ids, stop_tokens

# How a name of llama.cpp cuts, and whether a piece that is a token becomes that token even without merges.
CUTS = {
    "gpt-2": ([PATTERNS["gpt2"]], False),
    "smaug-bpe": ([PATTERNS["gpt4"]], False),
    "qwen2": ([PATTERNS["qwen2"]], False),
    "gpt-4o": ([PATTERNS["o200k"]], False),
    "smollm": ([r"\p{N}", PATTERNS["gpt2"]], False),
    "deepseek-coder": ([r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"], False),
    "deepseek-v3": ([r"\p{N}{1,3}", CHINESE_AND_JAPANESE, DEEPSEEK], False),
    "llama-bpe": ([PATTERNS["gpt4"]], True),
    "tekken": ([NEMO], True),
}
SAME_CUT = {  # further names of them
    "gpt-2": "mpt olmo phi-2 jais trillion exaone4 granite-docling gigachat a.x-4.0 mellum modern-bert",
    "smaug-bpe": "dbrx",
    "qwen2": "deepseek-r1-qwen stablelm2 megrez hunyuan solar-open kormo grok-2",
    "gpt-4o": "llama4 kanana2 minimax-m2",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "deepseek-v3": "hunyuan-dense joyai-llm",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
}
ALIASES = {alias: name for name, aliases in SAME_CUT.items() for alias in aliases.split()}
BEGINS = {"llama-bpe", "tekken"}  # names with a begin-of-text token, unless the file says that there is none
# What llama.cpp cuts in another way than the model's own files say.
CASES = "combining marks and capitals beyond ASCII"
INEXACT = {"gpt-4o": CASES, "tekken": CASES}
ROLES_OF_META = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
SHAPE = {"tokenizer.ggml.model": str, "tokenizer.ggml.tokens": [str]} | {f"tokenizer.{key}?": shape for key, shape in {
    "ggml.pre": str, "ggml.merges": [str], "ggml.token_type": [int], "ggml.scores": [float], "chat_template": str,
    "ggml.add_bos_token": bool, "ggml.add_space_prefix": bool,
    **{f"ggml.{key}": int for key in ("eot_token_id", "eom_token_id", *ROLES_OF_META.values())}}.items()}


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_tokenizer_meta(meta: dict, where: str) -> Tokenizer:
    """The tokenizer of a GGUF file, with its roles, stop tokens and chat template; UserError for kinds that we do not
    have."""
    wrong = mismatch(meta, SHAPE)
    need(not wrong, f"{where}: its tokenizer is not as GGUF has it: {wrong}")
    own = {key.removeprefix("tokenizer.").removeprefix("ggml."): value for key, value in meta.items()
           if key.startswith("tokenizer.")}
    tokens = own["tokens"]
    types = own.get("token_type") or [NORMAL] * len(tokens)
    used = [token for token, kind in zip(tokens, types, strict=False) if kind != UNUSED]
    need(len(types) == len(tokens) and len(set(used)) == len(used),
         f"{where}: its tokenizer has {len(tokens)} tokens, {len(tokens) - len(used) + len(set(used))} different ones, "
         f"and {len(types)} types")
    with naming(where):
        if own["model"] == "gpt2":
            tokenizer = read_bpe_meta(own, tokens, types)
        elif own["model"] == "llama":
            tokenizer = read_spm_meta(own, tokens, types)
        else:
            raise UserError(f"its tokenizer is a {shown(own['model'])}; of GGUF's we read gpt2 (byte-level BPE) and "
                            "llama (SentencePiece's BPE)")
        tokenizer.config.update(read_roles(own, tokenizer))
    return tokenizer


def read_bpe_meta(own: dict, tokens: list[str], types: list[int]) -> BPETokenizer:
    pre = own.get("pre", "default")
    pre = ALIASES.get(pre, pre)
    need(pre in CUTS, f"its tokenizer cuts text as {shown(pre)} does: we know the names that docs/convert.md lists")
    need(BYTE not in types, "its tokenizer is byte-level BPE and has tokens of the type for bytes")
    patterns, whole = CUTS[pre]
    vocab, added = {}, []
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind != UNUSED:
            vocab[token] = i
        if kind in (UNKNOWN, CONTROL):
            added += added_tokens({token: i})
        elif kind == USER_DEFINED:
            added += [entry | {"special": False} for entry in added_tokens({token: i})]
    names, pairs = read_names(vocab, list(map(split_merge, own.get("merges", []))), added)
    return BPETokenizer(names, pairs, patterns, added, whole, config={"add_bos_token": pre in BEGINS})


def split_merge(merge: str) -> list[str]:
    """ "Ġ c" -> ["Ġ", "c"]: at the first space behind the first character, which may be a space in old files."""
    at = merge.find(" ", 1)
    return [merge[:at], merge[at + 1 :]]


def read_roles(own: dict, tokenizer: Tokenizer) -> dict:
    """tokenizer_config.json: which tokens play which role, what else ends an answer, and the chat template."""
    names, config = added_names(tokenizer), {"add_bos_token": tokenizer.config["add_bos_token"]}
    if "add_bos_token" in own:
        config["add_bos_token"] = own["add_bos_token"]
    for role, key in ROLES_OF_META.items():
        if own.get(key) in names:
            config[f"{role}_token"] = names[own[key]]
    if config.get("bos_token") == config.get("eos_token") and not config["add_bos_token"]:
        config.pop("bos_token", None)  # as in GPT-2's files: nothing begins a text
    stops = stop_tokens(tokenizer, [own.get(f"{end}_token_id") for end in ("eos", "eot", "eom")])
    if stops:
        config["stop_tokens"] = stops
    if own.get("chat_template"):
        config["chat_template"] = own["chat_template"]
    return config


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_tokenizer_meta(tokenizer: Tokenizer, vocab_size: int) -> dict:
    """The metadata of a tokenizer of ours, for a model with `vocab_size` entries; UserError where GGUF has no form."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    if isinstance(tokenizer, BPETokenizer):
        meta = write_bpe_meta(tokenizer, tokens, types)
    else:
        need(hasattr(tokenizer, "model"), "GGUF has no form of a character tokenizer: a Hugging Face folder has one")
        meta = write_spm_meta(tokenizer, tokens, types)
    need(len(set(tokens)) == len(tokens), "GGUF names unused tokens [PAD0], [PAD1] ..., and a token has such a name")
    meta |= {"tokens": tokens, "token_type": types, "add_bos_token": tokenizer.adds_bos(), "add_eos_token": False}
    meta = {f"tokenizer.ggml.{key}": value for key, value in (meta | write_roles(tokenizer)).items()}
    if tokenizer.config.get("chat_template"):
        meta["tokenizer.chat_template"] = tokenizer.config["chat_template"]
    again = read_tokenizer_meta(meta, "GGUF")
    check_ids(tokenizer, again.encode, "a GGUF file")
    return meta


def write_bpe_meta(tokenizer: BPETokenizer, tokens: list[str], types: list[int]) -> dict:
    """Fills in `tokens` and `types`; returns what else there is."""
    pre = name_of_cut(tokenizer)
    for token, i in tokenizer.vocab.items():
        tokens[i], types[i] = spell(token), NORMAL
    for entry in tokenizer.added:
        tokens[entry["id"]] = entry["content"]
        types[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    merges = [f"{spell(left)} {spell(right)}" for left, right in tokenizer.merges]
    return {"model": "gpt2", "pre": pre, "merges": merges}


def name_of_cut(tokenizer: BPETokenizer) -> str:
    """llama.cpp's name of how a tokenizer cuts text, with a line on stderr where it does not quite."""
    names = [name for name, cuts in CUTS.items() if cuts == (tokenizer.patterns, tokenizer.ignore_merges)]
    if not names and tokenizer.makes_every_token():
        names = [name for name, (patterns, _) in CUTS.items() if patterns == tokenizer.patterns]
    differs = list(map(INEXACT.get, names))
    if tokenizer.patterns == [PATTERNS["cl100k"]] and not tokenizer.ignore_merges:
        names, differs = ["smaug-bpe"], ["white space at the end of a text"]
    need(names, f"llama.cpp cuts text in no way that this tokenizer does: "
                f"{shown(str(pre_tokenizer(tokenizer.patterns)))}; a Hugging Face folder can hold it")
    if tokenizer.nfc:
        differs.append("accents that are not composed (NFC)")
    for what in filter(None, differs):
        print(f"llama.cpp gives other ids to {what}", file=sys.stderr)
    return names[0]


def write_roles(tokenizer: Tokenizer) -> dict:
    """Ids of roles. llama.cpp gives a file without them the id 11; what ends an answer is its eos."""
    ids = {key: tokenizer.role(role) for role, key in ROLES_OF_META.items()}
    end = tokenizer.role("eos")
    if end is None:
        end = tokenizer.needs("eot")
    if tokenizer.config.get("chat_template") and tokenizer.role("end_of_turn") is not None:
        end = tokenizer.role("end_of_turn")
    ids["eos_token_id"] = end
    if ids["bos_token_id"] is None:
        ids["bos_token_id"] = end
    others = [i for i in tokenizer.stop_ids() if i not in (end, tokenizer.role("pad"))]
    ids |= zip(("eot_token_id", "eom_token_id"), others, strict=False)
    return {key: i for key, i in ids.items() if i is not None}


# ---- SentencePiece ---------------------------------------------------------------------------------------------------


def read_spm_meta(own: dict, tokens: list[str], types: list[int]) -> Tokenizer:
    from text.spm import SentencePieceTokenizer

    scores = own.get("scores")
    need(scores and len(scores) == len(tokens), f"its {len(tokens)} tokens have {len(scores or [])} scores")
    need(all(0 < kind < 7 for kind in types), "a token is of no type that GGUF has")
    count = len(tokens)
    while count and types[count - 1] == UNUSED:  # what a model has beyond its tokenizer
        count -= 1
    pieces = zip(tokens[:count], scores, types, strict=False)
    model = write_spm_model(pieces, own.get("add_space_prefix", True))
    return SentencePieceTokenizer(model, {"add_bos_token": True})


def write_spm_meta(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> dict:
    """Fills in `tokens` and `types`; returns what else there is."""
    parts = read_spm_model(tokenizer.model)
    need(parts.kind == BPE, "llama.cpp cannot spell unknown characters of a unigram tokenizer in bytes: a Hugging Face "
                            "folder can hold it, TOKENIZER=bpe becomes GGUF")
    need(not parts.changes_text,
         "this tokenizer changes text before it cuts it, which llama.cpp does not: it cannot become a GGUF file")
    scores = [0.0] * len(tokens)
    for i, piece in enumerate(parts.pieces):
        tokens[i], scores[i], types[i] = piece
    for name, i in tokenizer.specials.items():
        if types[i] == UNUSED:
            tokens[i], types[i] = name, CONTROL
    return {"model": "llama", "scores": scores, "add_space_prefix": tokenizer.adds_space}
