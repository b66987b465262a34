"""Tokenizers in the folders of Hugging Face's models, with their chat template and stop tokens, read and written.

    tokenizer = read_hf_tokenizer(Path("SmolLM2-135M-Instruct"))
    tokenizer.stop_ids(), tokenizer.config.get("chat_template")
    write_hf_tokenizer(tokenizer, Path("exported"))         # what transformers.AutoTokenizer loads
    generation_config(tokenizer)                            # {"eos_token_id": [2, 0], ...}

Which file of a folder holds the tokenizer, `tokenizer_files` knows.
"""

import json
from collections.abc import Callable
from pathlib import Path

from bpe import BPETokenizer, added_tokens
from configurator import UserError, check, need, shown
from runtime.files import Either, read_json, replacing, require_file, write_json
from text.spm_json import spm_document
from text.tokenizer import CharTokenizer, Tokenizer
from text.tokenizer_files import load_tokenizer, tokenizer_from_dict

NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
LARGEST_TEMPLATE = 1 << 20  # bytes of a chat template; known ones have up to 30,000
STOPS = {"eos_token_id?": Either(int, [int], None)}
SAMPLING = {"do_sample?": Either(bool, None)} | dict.fromkeys(
    ("temperature?", "top_k?", "top_p?", "min_p?", "repetition_penalty?"), Either(float, None))
BEGIN_BY_DEFAULT = {"LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "GemmaTokenizerFast"}


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_hf_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model's folder. Its config has the chat template as one string, and the stop tokens."""
    files = load_tokenizer(folder).to_dict()
    files["config"] = complete_config(folder, files["config"])
    tokenizer = tokenizer_from_dict(files, str(folder))
    config = tokenizer.config
    for key in NAMED:  # a config may name tokens that the tokenizer lacks: to transformers, they are new ones
        name = token_name(config.get(key))
        if name is not None and len(tokenizer.encode(name, allow_special=True)) != 1:
            del config[key]
    stops = stop_tokens(tokenizer, read_stops(folder))
    if stops:
        config["stop_tokens"] = stops
    if sampling := read_sampling(folder):
        config["sampling"] = sampling
    return tokenizer


def token_name(entry: str | dict | None) -> str | None:
    if isinstance(entry, dict):
        return entry["content"]
    return entry


def complete_config(folder: Path, config: dict) -> dict:
    """tokenizer_config.json with what older folders have in files of their own."""
    config = dict(config)
    for key, entry in read_if_there(folder / "special_tokens_map.json", dict).items():
        if key in NAMED:
            config.setdefault(key, entry)
    if not config.get("added_tokens_decoder"):
        added = read_if_there(folder / "added_tokens.json", {str: int})
        if added:
            config["added_tokens_decoder"] = {str(i): {"content": name} for name, i in added.items()}
    if config.get("tokenizer_class") in BEGIN_BY_DEFAULT:
        config.setdefault("add_bos_token", True)
    template = read_chat_template(folder, config.pop("chat_template", None))
    if template:
        config["chat_template"] = template
    return config


def read_if_there(path: Path, shape: dict | type) -> dict:
    if not path.exists():
        return {}
    return read_json(path, shape)


def read_chat_template(folder: Path, entry: str | list | None) -> str | None:
    """chat_template.jinja, else the entry of tokenizer_config.json: a text, or a list of which "default" is meant."""
    path = folder / "chat_template.jinja"
    if path.exists():
        size = require_file(path).stat().st_size
        need(size <= LARGEST_TEMPLATE, f"{path} has {size:,} bytes: no chat template has so many")
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None
    if isinstance(entry, list):
        named = {each["name"]: each["template"] for each in entry}
        entry = named.get("default", next(iter(named.values()), None))
    size = len(entry or "")
    need(size <= LARGEST_TEMPLATE, f"the chat template in {folder} has {size:,} characters: none has so many")
    return entry


def read_stops(folder: Path) -> list[int]:
    """The ids that end an answer: generation_config.json says it, or else config.json."""
    for name in ("generation_config.json", "config.json"):
        found = read_if_there(folder / name, STOPS).get("eos_token_id")
        if isinstance(found, int):
            found = [found]
        if found:
            return found
    return []


def read_sampling(folder: Path) -> dict:
    """{"temperature": 0.6, "top_k": 20, ...}: how a model's makers sample from it, if generation_config.json says so;
    UserError if we cannot."""
    from generate import SamplingSettings

    path = folder / "generation_config.json"
    found = read_if_there(path, SAMPLING)
    if not found.get("do_sample"):  # then transformers ignores the others
        return {}
    given = {name.strip("?") for name in SAMPLING if found.get(name.strip("?")) is not None}
    return {name: check(SamplingSettings, name, found[name], str(path)) for name in sorted(given - {"do_sample"})}


def stop_tokens(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The names of the ids that are special or added tokens: ordinary text ends no answer (a config.json without an
    eos_token_id means 2, whatever token that is)."""
    names = added_names(tokenizer)
    return [names[i] for i in dict.fromkeys(ids) if i in names]


def added_names(tokenizer: Tokenizer) -> dict[int, str]:
    """{id: name} of the special tokens, and of what else was added to the vocabulary."""
    ids = dict(tokenizer.specials)
    if isinstance(tokenizer, BPETokenizer):
        ids |= tokenizer.added_ids
    return {i: name for name, i in ids.items()}


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_hf_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer into a model's folder, for transformers.AutoTokenizer. UserError for what has no form there,
    and, where the package `tokenizers` is installed, for a file to which it gives other ids."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for key in NAMED:
        i = tokenizer.role(key.removesuffix("_token"))
        if i is None and key == "eos_token":
            i = tokenizer.role("eot")
        if i is not None:
            config[key] = tokenizer.decode_bytes([i]).decode()
    if tokenizer.config.get("chat_template"):
        config["chat_template"] = tokenizer.config["chat_template"]
    model = None
    if isinstance(tokenizer, BPETokenizer):
        document = tokenizer.to_dict()["tokenizer"]
    elif isinstance(tokenizer, CharTokenizer):
        document = char_document(tokenizer)
    else:
        document, model = spm_document(tokenizer), tokenizer.model
        config["add_bos_token"] = tokenizer.adds_bos()
        if "legacy" in tokenizer.config:
            config["legacy"] = tokenizer.config["legacy"]
    if tokenizer.adds_bos():
        document["post_processor"] = document["post_processor"] or begin_with(config["bos_token"],
                                                                              tokenizer.role("bos"))
    check_with_tokenizers(tokenizer, document)
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "tokenizer.json", document)
    if model:  # which we read rather than tokenizer.json, and so does llama.cpp's converter
        with replacing(folder / "tokenizer.model") as file:
            file.write(model)


HARD_TEXTS = (
    "", " ", "  a  b\r\n\n\tc   ", "it's IT'S don't 12345 3.14 x1y2", "def f(x):\n    return [x,  2]\n",
    "déjà vu Straße İ ﬁ — “quote”…", "世界。你好ひらがな 안녕 नमस्ते ไทย שלום مرحبا Привет",
    "👩\u200d👩\u200d👧 🇩🇪 ❤️", "\u00a0\u3000\u200b\ufeff\x00\x07\x85", "a" * 33 + " " * 33 + "=" * 33, "http://a.b/c?d=e&f",
    "<|im_start|>user\n<|im_end|>", "<s>[INST] a [/INST]</s>", "<|endoftext|> <0x0A>Ġ▁x")


def check_ids(tokenizer: Tokenizer, encode: Callable[[str, bool], list[int]], what: str) -> None:
    """UserError if `encode` (text, whether names of special tokens mean these) gives ids that differ from ours."""
    for text in HARD_TEXTS:
        text, _ = tokenizer.repaired(text)
        for special in (False, True):
            need(encode(text, special) == tokenizer.encode(text, allow_special=special),
                 f"{what} would give other ids than ours to {shown(text)}: this tokenizer cannot leave so")


def check_with_tokenizers(tokenizer: Tokenizer, document: dict) -> None:
    try:
        import tokenizers
    except ImportError:
        return
    theirs = tokenizers.Tokenizer.from_str(json.dumps(document))

    def encode(text: str, special: bool) -> list[int]:
        theirs.encode_special_tokens = not special
        return theirs.encode(text, add_special_tokens=False).ids

    if tokenizer.config.get("legacy") is not False or not tokenizer.adds_space:
        check_ids(tokenizer, encode, "tokenizers")


def begin_with(token: str, i: int) -> dict:
    """The post-processor that puts a token before every text."""
    return {"type": "TemplateProcessing", "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}},
            "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 0}}]}


def char_document(tokenizer: CharTokenizer) -> dict:
    """The tokenizer.json of a character tokenizer: every character is a word."""
    vocab = {char: i for i, char in enumerate(tokenizer.chars)} | tokenizer.specials
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added_tokens(tokenizer.specials),
            "normalizer": None, "post_processor": None, "decoder": {"type": "Fuse"},
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated",
                              "invert": False},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}}


def generation_config(tokenizer: Tokenizer) -> dict:
    """generation_config.json: what ends an answer, and how to sample, as the model came or as we do by default."""
    from generate import SamplingSettings

    default, stops = SamplingSettings(), tokenizer.stop_ids()
    sampling = tokenizer.config.get("sampling") or {"temperature": default.temperature, "top_p": default.top_p}
    first = {tokenizer.role("eos"), tokenizer.role("eot")} & set(stops)  # before padding and further tokens
    return {"bos_token_id": tokenizer.role("bos"), "eos_token_id": [*sorted(first), *(set(stops) - first)],
            "pad_token_id": tokenizer.role("pad"), "do_sample": True, **sampling}
