"""SentencePiece's models as Hugging Face's tokenizer.json, written and read.

    document = spm_document(tokenizer)          # what tokenizers gives the same ids to
    read_spm_json(document, steps, merges, {})  # SentencePiece's BPE, as in the folders of Llama 2
"""

import re
import sys
from operator import itemgetter

from bpe import MODEL, added_tokens
from configurator import need, shown
from text.pieces import LONGEST, ids_of
from text.spm import SPACE, SentencePieceTokenizer
from text.spm_model import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_spm_model,
    round_score,
    write_spm_model,
)
from text.tokenizer import Tokenizer, template_steps

# ---- writing ---------------------------------------------------------------------------------------------------------

NEVER = -1e6  # the score of a piece that Unigram finds in no text


def spm_document(tokenizer: Tokenizer) -> dict:
    """The tokenizer.json of a SentencePiece model. Its tokens have a space where SentencePiece has ▁: so a ▁ in a text
    is no space, as with us."""
    parts = read_spm_model(tokenizer.model)
    kinds = {kind for _, _, kind in parts.pieces}
    need(not parts.changes_text, "this tokenizer changes text before it cuts it, and we write only such that do not")
    need(BYTE in kinds and UNUSED not in kinds,
         "we write a SentencePiece tokenizer only if it has tokens for bytes and no unused ones")
    names, scores, normal = [], [], {}
    added = added_tokens(tokenizer.specials)
    for i, (text, score, kind) in enumerate(parts.pieces):
        if kind in (NORMAL, USER_DEFINED):
            text = text.replace(SPACE, " ")
        if kind == NORMAL:
            normal[text] = score
        if kind == USER_DEFINED:
            added += [entry | {"special": False} for entry in added_tokens({text: i})]
        names.append(text)
        scores.append(score if kind == NORMAL else NEVER)
    alone = {text for text in normal if len(text) == 1}
    need(alone.issuperset("".join(normal)), "a token of this tokenizer has a character that is no token itself")
    unknown = next(i for i, piece in enumerate(parts.pieces) if piece[2] == UNKNOWN)
    splits, normalizer, decoders = [], None, [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if tokenizer.adds_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    if tokenizer.adds_space and tokenizer.config.get("legacy") is False:
        splits.append({"type": "Metaspace", "replacement": " ", "prepend_scheme": "first", "split": False})
        say_differs("a text that begins with a space")
    elif tokenizer.adds_space:
        normalizer = {"type": "Prepend", "prepend": " "}
        if USER_DEFINED in kinds:
            say_differs(f"a text behind {shown(next(text for text, _, kind in parts.pieces if kind == USER_DEFINED))}")
    if parts.kind == BPE:
        model = MODEL | {"unk_token": names[unknown], "fuse_unk": True, "byte_fallback": True,
                         "vocab": ids_of(names), "merges": spm_merges(normal)}
    else:
        model = {"type": "Unigram", "unk_id": unknown, "vocab": list(zip(names, scores, strict=True)),
                 "byte_fallback": True}
        # It would find "<0x0A>" in a text that has no other way to write "<": cut there.
        foreign = set("".join(names)) - set("".join(normal))
        if foreign:
            pattern = "[" + "".join(map(re.escape, sorted(foreign))) + "]"
            splits.append({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
        if any(score != round_score(score) for score in normal.values()):
            say_differs("some long runs of one character")
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer,
            "pre_tokenizer": sequence_of("pretokenizers", splits), "post_processor": None,
            "decoder": sequence_of("decoders", decoders), "model": model}


def say_differs(what: str) -> None:
    print(f"transformers gives other ids to {what}", file=sys.stderr)


def sequence_of(key: str, steps: list[dict]) -> dict | None:
    return {"type": "Sequence", key: steps} if steps else None


def spm_merges(scores: dict[str, float]) -> list[list[str]]:
    """SentencePiece joins the two neighbours whose joint piece has the highest score: {"a": -3, "b": -4, "ab": -1} ->
    [["a", "b"]]. Of pairs that make one piece, the one with the longer left part is met first, from left to right."""
    merges = []
    for piece in sorted(scores, key=scores.get, reverse=True):
        for at in range(len(piece) - 1, 0, -1):
            if piece[:at] in scores and piece[at:] in scores:
                merges.append([piece[:at], piece[at:]])
    return merges


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_spm_json(document: dict, steps: list[dict], merges: list[tuple[str, str]], config: dict) -> Tokenizer:
    """A tokenizer.json whose model is BPE with byte_fallback, where a space is ▁ (or a space, in ours). `steps` of its
    normalizer and pre-tokenizer."""
    schemes = [scheme_of(step) for step in steps]
    if "first" in schemes:
        config = {"legacy": False} | config
    begins = any("SpecialToken" in step for step in template_steps(document)[:1])
    config = {"add_bos_token": begins} | config
    model, special, scores = document["model"], {}, {}
    ids = dict(model["vocab"])
    for token in document.get("added_tokens") or []:
        ids[token["content"]], special[token["content"]] = token["id"], token["special"]
    for place, pair in enumerate(merges):
        scores.setdefault("".join(pair), -float(place))
    pieces, normal = [], {}
    for name, i in sorted(ids.items(), key=itemgetter(1)):
        need(i == len(pieces), f"its vocabulary has no token, or two, with the id {len(pieces)}")
        need(len(name) <= LONGEST, f"its token {i} has {len(name):,} characters, and we read up to {LONGEST:,}")
        kind = kind_of_token(name, special.get(name), model.get("unk_token"))
        score = scores.get(name, -float(len(merges)))
        if kind == NORMAL:
            normal[name] = score
        pieces.append((name.replace(" ", SPACE), score, kind))
    # SentencePiece joins whatever makes a token, the one of the highest score first.
    need(sorted(merges) == sorted(map(tuple, spm_merges(normal))) and is_falling([scores["".join(p)] for p in merges]),
         "it is BPE with byte_fallback and merges that SentencePiece does not have: take the tokenizer.model")
    kinds = {kind for _, _, kind in pieces}
    need({UNKNOWN, BYTE} <= kinds, "it is BPE with byte_fallback, and has no unk_token or no tokens for bytes")
    return SentencePieceTokenizer(write_spm_model(pieces, bool({"always", "first"} & set(schemes))), config)


def scheme_of(step: dict) -> str:
    """Where a step of a normalizer or pre-tokenizer puts a space: always, first, or never."""
    if step in ({"type": "Prepend", "prepend": SPACE}, {"type": "Prepend", "prepend": " "}):
        return "always"
    if step == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}:
        return "never"
    known = step["type"] == "Metaspace" and step.get("replacement") in (SPACE, " ") and not step.get("split", True)
    need(known, f"it needs the step {shown(step['type'])}, which we do not support: take the tokenizer.model")
    return step.get("prepend_scheme", "always")


def kind_of_token(name: str, special: bool | None, unknown: str | None) -> int:
    """`special`: None for a token that is not an added one."""
    if name == unknown:
        return UNKNOWN
    if special is not None:
        return CONTROL if special else USER_DEFINED
    return BYTE if re.fullmatch("<0x[0-9A-F]{2}>", name) else NORMAL


def is_falling(numbers: list[float]) -> bool:
    return numbers == sorted(numbers, reverse=True)
