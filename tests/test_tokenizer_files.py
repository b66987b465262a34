"""Files of others: their ids are those of the libraries that wrote them, and what we cannot read is a sentence."""

import base64
import itertools
import json
import os
import random
import re
import time

import pytest
import requests
import tiktoken
import tiktoken.load
import tiktoken_ext.openai_public as openai
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import bpe
from bpe import BPETokenizer
from configurator import UserError
from test_bpe import MIXED, TEXTS, fuzz, hf_ids, train
from text import pieces
from text.merges import BYTES
from text.pieces import PATTERNS
from text.tokenizer import Unwritable
from text.tokenizer_files import (
    RANKS,
    TIKTOKEN,
    from_ranks,
    load_tokenizer,
    tiktoken_by_name,
    tokenizer_from_dict,
    train_tokenizer,
)

LAYOUTS = ["gpt2", "llama3", "nemo", "qwen2", "digits", "deepseek"]


def layout(name: str, vocab_size=600, **model) -> tokenizers.Tokenizer:
    """A small tokenizer with the parts that these models' tokenizer.json files have, made by `tokenizers`."""
    split = {"llama3": PATTERNS["gpt4"], "qwen2": PATTERNS["qwen2"], "nemo": pieces.NEMO}
    specials = {"gpt2": ["<|endoftext|>"], "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
                "nemo": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "qwen2": ["<|endoftext|>", "<|im_end|>"],
                "digits": ["<|endoftext|>"], "deepseek": ["<｜begin▁of▁sentence｜>"]}[name]
    hf = tokenizers.Tokenizer(models.BPE(**model))
    hf.decoder = decoders.ByteLevel()
    if name in split:
        steps = [pre_tokenizers.Split(tokenizers.Regex(split[name]), "isolated"),
                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        hf.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "digits":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        hf.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if name == "deepseek":  # three expressions, one after the other
        splits = [
            r"\p{N}{1,3}",
            r"[一-龥぀-ゟ゠-ヿ]+",
            r"[!-/:-@]?[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|\s*[\r\n]+|\s+",
        ]
        steps = [pre_tokenizers.Split(tokenizers.Regex(split), "isolated") for split in splits]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        hf.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if name == "qwen2":
        hf.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=specials, show_progress=False)
    hf.train_from_iterator(TEXTS, trainer)
    if name in ("llama3", "nemo"):  # files of these add begin-of-text; our encode does not
        bos = specials[0 if name == "llama3" else 1]
        hf.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, hf.token_to_id(bos))])
    hf.add_tokens(["<tool_call>", "self.x"])  # not special: always found
    return hf


def load_hf(hf: tokenizers.Tokenizer, **changes) -> BPETokenizer:
    document = json.loads(hf.to_str())
    document["model"] |= changes
    return tokenizer_from_dict({"tokenizer": document, "config": {}})


@pytest.fixture(scope="module")
def gpt2() -> BPETokenizer:
    return BPETokenizer.train(TEXTS, 700, "gpt2", specials=["<|endoftext|>"], workers=1)


def ranks_file(path, ranks: dict[bytes, int]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for token, i in ranks.items()))
    return path


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    return train_tokenizer("spbpe", ["abab cd\n" * 50], 290, workers=1).model


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return train(specials=[]).vocab


# ---- tokenizer.json --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merges_as", ["lists", "strings"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_others_load_with_identical_ids(name, merges_as, tmp_path):
    hf = layout(name)
    document = json.loads(hf.to_str())
    if merges_as == "strings":
        document["model"]["merges"] = [" ".join(merge) for merge in document["model"]["merges"]]
        document["model"]["ignore_merges"] = True
        hf = tokenizers.Tokenizer.from_str(json.dumps(document))
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    ours = load_tokenizer(tmp_path)
    ours.save(tmp_path / "again")
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
    for text in [*TEXTS, *fuzz(150, extra=(*ours.added_ids, "self.y"))]:
        for allow in (False, True):
            ids = hf_ids(hf, text, allow)
            assert ours.encode(text, allow) == ids == ours.encode_reference(text, allow)
            assert hf_ids(again, text, allow) == ids
    assert json.loads((tmp_path / "again" / "tokenizer.json").read_text("utf-8"))["post_processor"] == ours.post
    assert hf.encode("a").ids == again.encode("a").ids  # also what the post-processor adds


@pytest.mark.parametrize("name", ["trained", *LAYOUTS])
def test_stream_has_the_ids_of_the_whole_text(name, monkeypatch):
    tokenizer = train() if name == "trained" else load_hf(layout(name))
    monkeypatch.setattr(pieces, "CHUNK", 150)
    names = (*tokenizer.added_ids, "<tool", "_call>", "<|end", "word", " other", ", ")
    groups = [group for group in fuzz(800, seed=1, extra=names) if len(group) < 80]
    rng = random.Random(0)
    for _ in range(150):
        text = " word".join(rng.choices(groups, k=30))  # so there is a safe cut before CHUNK characters are over
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.choice([0, 3, 200])))
        parts = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        for allow in (False, True):
            assert [i for ids in tokenizer.encode_stream_to_numpy(parts, allow) for i in ids.tolist()] == \
                tokenizer.encode(text, allow)


def test_mistral_end_of_text_is_found():
    ours = load_hf(layout("nemo"))
    assert [ours.role(name) for name in ("unk", "bos", "eos", "eot")] == [0, 1, 2, 2]


def test_ids_in_any_order_with_added_tokens_in_the_middle():
    hf = layout("gpt2")
    document = json.loads(hf.to_str())
    names = list(document["model"]["vocab"]) + ["<|mid|>"]
    random.Random(0).shuffle(names)
    ids = {name: 2 * i + 5 for i, name in enumerate(names)}  # with holes
    document["model"]["vocab"] = ids
    document["added_tokens"] = [token | {"id": ids[token["content"]]} for token in document["added_tokens"]
                                if token["content"] in ids]
    document["added_tokens"].append(document["added_tokens"][0] | {"content": "<|mid|>", "id": ids["<|mid|>"]})
    document["added_tokens"].sort(key=lambda token: token["id"])
    hf = tokenizers.Tokenizer.from_str(json.dumps(document))
    ours = tokenizer_from_dict({"tokenizer": document, "config": {}})
    assert ours.vocab_size == max(ids.values()) + 1 == len(ours.token_bytes())
    for text in [*TEXTS, *fuzz(100, extra=tuple(ours.added_ids))]:
        for allow in (False, True):
            assert ours.encode(text, allow) == hf_ids(hf, text, allow)
            assert ours.decode(ours.encode(text, allow)) == text


def odd_tokenizer(ignore_merges: bool, extra: list[str], merges: list[str]) -> tuple:
    """(tokenizers', ours): bytes, some merges, and tokens that no merge makes."""
    pairs = [tuple(merge.split(" ")) for merge in merges]
    names = dict.fromkeys([*map(bpe.spell, BYTES), *map("".join, pairs), *extra])
    model = models.BPE({name: i for i, name in enumerate(names)}, pairs, ignore_merges=ignore_merges)
    hf = tokenizers.Tokenizer(model)
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return hf, load_hf(hf)


def test_any_vocabulary_has_the_ids_of_tokenizers():
    """Random merges: tokens made twice, tokens out of reach, tokens without merges, with and without ignore_merges."""
    rng, with_core = random.Random(0), 0
    for trial in range(300):
        tokens, merges = ["a", "b", "c"], []
        for _ in range(rng.randint(1, 12)):
            merge = rng.choices(tokens, k=2)
            if " ".join(merge) not in merges:
                merges.append(" ".join(merge))
                tokens.append("".join(merge))
        rng.shuffle(merges)
        extra = ["".join(rng.choices("abc", k=rng.randint(2, 6))) for _ in range(rng.randint(0, 3))]
        hf, ours = odd_tokenizer(trial % 2 == 0, extra, merges)
        with_core += ours._known is not None
        words = ["".join(rng.choices("abc", k=rng.randint(1, 12))) for _ in range(40)] + tokens + extra
        for word in words:
            assert ours.encode(word) == hf_ids(hf, word) == ours.encode_reference(word), (merges, extra, word)
    assert 200 < with_core < 300  # both ways were taken


def test_ignore_merges_takes_a_whole_piece_first():
    merges, extra = ["a b", "ab c"], ["bcd", "cab"]
    assert [len(odd_tokenizer(True, extra, merges)[1].encode(text)) for text in ("bcd", "bcdd", "cab")] == [1, 4, 1]
    assert [len(odd_tokenizer(False, extra, merges)[1].encode(text)) for text in ("bcd", "bcdd", "cab")] == [3, 4, 2]


def test_a_very_long_token_is_no_trouble():
    tokens = ["a" * 2**k for k in range(14)]
    merges = [f"{token} {token}" for token in tokens[:-1]]
    hf, ours = odd_tokenizer(False, [], merges)
    began = time.process_time()
    assert ours.encode("a" * 20_000) == hf_ids(hf, "a" * 20_000) == ours.encode_reference("a" * 20_000)
    assert time.process_time() - began < 60


def test_pattern_that_leaves_gaps_keeps_the_text():
    hf = layout("gpt2")
    hf.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(r"[a-z]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    ours = load_hf(hf)
    for text in [MIXED, *fuzz(100)]:
        assert ours.encode(text) == hf_ids(hf, text) == ours.encode_reference(text)
        assert ours.decode(ours.encode(text)) == text


def test_a_split_pattern_that_does_not_end_is_refused(monkeypatch):
    monkeypatch.setattr(pieces, "PATIENCE", 0.2)
    hf = layout("gpt2")
    hf.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(r"(a|aa)+$"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    with pytest.raises(UserError, match="does not end"):
        load_hf(hf).encode("a" * 60 + "b")


def test_a_split_that_keeps_what_matches_is_the_same_as_isolating(gpt2):
    document = train_tokenizer("bpe", TEXTS, 600, "gpt4", workers=1).to_dict()
    expected = tokenizer_from_dict(document).encode(TEXTS[0])
    document["tokenizer"]["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    assert tokenizer_from_dict(document).encode(TEXTS[0]) == expected


def test_nfc_only_if_the_file_asks_for_it():
    assert train(300).decode(train(300).encode("e\u0301")) == "e\u0301"
    qwen = load_hf(layout("qwen2"))
    assert qwen.decode(qwen.encode("e\u0301")) == "\u00e9"


def test_text_with_a_byte_that_the_vocabulary_lacks_is_refused():
    alphabet = [name for name in map(bpe.spell, BYTES) if name != bpe.spell(b"\x04")]
    hf = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(alphabet)}, []))
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ours = load_hf(hf)
    assert ours.encode("abc") == hf_ids(hf, "abc")
    for encode in (ours.encode, ours.encode_reference):
        with pytest.raises(UserError, match=r"lacks the bytes \[4\]"):
            encode("abc\x04")
    with pytest.raises(Unwritable, match=r"U\+0004 at character 4"):
        ours.encode("abc\x04")
    assert ours.repaired("abc\x04d\x04") == ("abc\ufffdd\ufffd", 2) and ours.repaired("abc") == ("abc", 0)


def changed(document: dict, change: dict) -> dict:
    """{"model.type": "Unigram"} changes the type of the model."""
    for name, value in change.items():
        *way, last = name.split(".")
        part = document
        for key in way:
            part = part[key]
        part[last] = value
    return document


@pytest.mark.parametrize("change, what", [
    ({"model": {"type": "Unigram", "vocab": []}}, "Unigram model"),
    ({"model": {"type": "WordPiece", "vocab": {}}}, "WordPiece model"),
    ({"model.byte_fallback": True}, "the step ByteLevel"), ({"model.dropout": 0.1}, "dropout"),
    ({"model.end_of_word_suffix": "</w>"}, "end_of_word_suffix"),
    ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
    ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}}, "normalizer Strip"),
    ({"decoder": {"type": "Metaspace"}}, "decoder"), ({"decoder": None}, "decoder"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"), ({"pre_tokenizer": None}, "ByteLevel"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
])
def test_what_a_file_needs_and_we_lack_is_named(change, what):
    document = changed(json.loads(layout("gpt2").to_str()), change)
    with pytest.raises(UserError, match=f"x/tokenizer.json: it needs.*{what}"):
        tokenizer_from_dict({"tokenizer": document, "config": {}}, "x/tokenizer.json")


def test_added_token_whose_id_tokenizers_would_not_take_is_refused(gpt2):
    document = json.loads(json.dumps(gpt2.to_dict()))
    added = document["tokenizer"]["added_tokens"]
    last = added[-1]["id"]
    del document["tokenizer"]["model"]["vocab"][added[-1]["content"]]
    assert tokenizer_from_dict(document).added_ids == gpt2.added_ids
    added[-1]["id"] = last + 5
    their = tokenizers.Tokenizer.from_str(json.dumps(document["tokenizer"]))
    assert their.token_to_id(added[-1]["content"]) == last
    with pytest.raises(UserError, match=f"has the id {last + 5}, where tokenizers gives it {last}: add it"):
        tokenizer_from_dict(document)


def test_added_token_with_stripping_is_refused():
    hf = layout("gpt2")
    hf.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    with pytest.raises(UserError, match="<mask>.*lstrip"):
        load_hf(hf)


# ---- GPT-2's files ---------------------------------------------------------------------------------------------------


def write_gpt2_files(folder, codec: BPETokenizer, specials: dict[str, int]) -> None:
    names = {bpe.spell(token): i for token, i in codec.vocab.items()} | specials
    merges = "".join(f"{bpe.spell(left)} {bpe.spell(right)}\n" for left, right in codec.merges)
    (folder / "vocab.json").write_text(json.dumps(names), encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")


def test_gpt2_files_have_the_ids_of_tiktoken(gpt2, tmp_path):
    write_gpt2_files(tmp_path, gpt2, gpt2.specials)
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(str(tmp_path / "merges.txt"), str(tmp_path / "vocab.json"))
    theirs = tiktoken.Encoding("t", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens=gpt2.specials)
    ours = load_tokenizer(tmp_path)
    assert ours.fingerprint == gpt2.fingerprint == load_tokenizer(tmp_path / "vocab.json").fingerprint
    assert ours.specials == {"<|endoftext|>": 699} and ours.role("eot") == 699
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)


def test_qwen_tokens_of_the_config_are_found_beside_gpt2_files(tmp_path, gpt2):
    write_gpt2_files(tmp_path, gpt2, {})
    end = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "special": True}
    config = {"added_tokens_decoder": {"700": end}, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    ours = load_tokenizer(tmp_path, "qwen2")
    assert ours.specials == {"<|im_end|>": 700} and ours.role("eot") == 700 and ours.vocab_size == 701


def test_gpt2_vocabulary_without_merges_file_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="merges.txt"):
        load_tokenizer(tmp_path)


# ---- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_tiktoken_file_has_the_ids_of_tiktoken_and_of_tokenizers(pattern, tmp_path):
    ranks = BPETokenizer.train(TEXTS, 700, pattern, specials=[], workers=1).vocab
    order = sorted(ranks, key=ranks.get)
    rng = random.Random(0)
    made_up = [token for token in ("世界😀".encode(), b"retu", b" selfie", b"xyz") if token not in ranks]
    for at in (0, 300, 500):  # tokens out of reach and tokens in an odd order, as in merged vocabularies
        order.insert(at + rng.randrange(100), made_up.pop())
    (tmp_path / "x.tiktoken").write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(order)))
    ranks = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "x.tiktoken"))
    theirs = tiktoken.Encoding("t", pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={})
    ours = load_tokenizer(tmp_path, pattern)
    ours.save(tmp_path / "saved")
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert ours.role("eot") == len(order)
    for text in [*TEXTS, "世界😀 世界😀😀", " selfie selfies xyz xyzz return"]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids == hf.encode(text).ids == ours.encode_reference(text)


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_a_file_of_ranks_is_cut_as_the_encoding_of_its_name(name, ranks, tmp_path):
    ours = load_tokenizer(ranks_file(tmp_path / f"{name}.tiktoken", ranks))
    assert ours.patterns == [PATTERNS[name.removesuffix("_base")]]


def test_llama_3_has_its_special_tokens_with_ranks_alone_too(ranks, tmp_path, monkeypatch):
    monkeypatch.setitem(RANKS, (700, 699), RANKS[128000, 127999])
    tokenizer = load_tokenizer(ranks_file(tmp_path / "tokenizer.model", ranks))
    assert tokenizer.role("bos") == 128000 and tokenizer.role("eot") == 128001
    assert tokenizer.role("end_of_turn") == 128009 and tokenizer.vocab_size == 128256


@pytest.mark.parametrize("name", TIKTOKEN)
def test_a_file_of_ranks_has_the_special_tokens_of_the_encoding_of_that_name(name, monkeypatch):
    monkeypatch.setattr(openai, "load_tiktoken_bpe", lambda *args, **options: {b"a": 0})
    monkeypatch.setattr(openai, "data_gym_to_mergeable_bpe_ranks", lambda *args, **options: {b"a": 0})
    assert (TIKTOKEN[name], getattr(openai, name)()["special_tokens"]) in RANKS.values()


def test_tekken_files_are_read(ranks, tmp_path):
    vocab = [{"rank": i, "token_bytes": base64.b64encode(token).decode()} for token, i in ranks.items()]
    config = {"pattern": PATTERNS["gpt4"], "default_vocab_size": 750, "default_num_special_tokens": 100}
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab}))
    tokenizer = load_tokenizer(tmp_path)
    theirs = tiktoken.Encoding("t", pat_str=PATTERNS["gpt4"], special_tokens={},
                               mergeable_ranks={token: i for token, i in ranks.items() if i < 650})
    for text in TEXTS:
        assert tokenizer.encode(text) == [i + 100 for i in theirs.encode(text)]
    assert tokenizer.vocab_size == 750 and tokenizer.role("bos") == 1 and tokenizer.specials["[INST]"] == 3


@pytest.mark.parametrize("name", TIKTOKEN)
def test_named_encoding_has_the_ids_of_tiktoken(name, ranks, monkeypatch):
    # Patterns and special tokens as the installed tiktoken has them, with ranks of ours: no network.
    monkeypatch.setattr(openai, "load_tiktoken_bpe", lambda *args, **options: ranks)
    monkeypatch.setattr(openai, "data_gym_to_mergeable_bpe_ranks", lambda *args, **options: ranks)
    parts = getattr(openai, name)() | {"explicit_n_vocab": None}
    encoding = tiktoken.Encoding(**parts)
    ours = tiktoken_by_name(name)
    assert ours.specials == parts["special_tokens"] and ours.vocab_size == encoding.n_vocab
    assert ours.role("eot") == encoding.eot_token
    rng, letters = random.Random(0), "aZé1世\u0301'sLl.!/ \n\r\t\u2003\u3000\x85ſ😀"
    for text in [*TEXTS, *fuzz(500), *("".join(rng.choices(letters, k=rng.randrange(16))) for _ in range(3000))]:
        ids = encoding.encode(text, disallowed_special=())
        assert ours.encode(text) == ids == ours.encode_reference(text)
    text = "a<|endoftext|>b"
    assert ours.encode(text, allow_special=True) == encoding.encode(text, allowed_special="all")
    assert BPETokenizer.from_dict(json.loads(json.dumps(ours.to_dict()))).encode(MIXED) == ours.encode(MIXED)


def test_ranks_that_no_merge_reaches_are_whole_pieces(ranks):
    ranks = ranks | {b"xyzzy": 700}
    encoding = tiktoken.Encoding("t", pat_str=openai.r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    ours = from_ranks(ranks, PATTERNS["gpt2"], {})
    assert ours.encode("xyzzy xyzzyx") == encoding.encode("xyzzy xyzzyx") and 700 in ours.encode("xyzzy")


def test_unreachable_and_unknown_encodings_are_one_sentence(monkeypatch):
    def unreachable(*args, **options):
        raise requests.exceptions.ConnectionError("HTTPSConnectionPool(...)")

    monkeypatch.setattr(openai, "load_tiktoken_bpe", unreachable)
    with pytest.raises(UserError, match="^tiktoken finds its file of cl100k_base .*TIKTOKEN_CACHE_DIR"):
        tiktoken_by_name("cl100k_base")
    with pytest.raises(UserError, match="gpt5.*gpt2, r50k_base"):
        tiktoken_by_name("gpt5")


# ---- which file, and damaged ones ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.model.v3", "spiece.model", "whatever"])
def test_a_model_of_sentencepiece_is_known_by_its_content(name, sentencepiece_model, tmp_path):
    (tmp_path / name).write_bytes(sentencepiece_model)
    assert load_tokenizer(tmp_path / name).model == sentencepiece_model
    if "model" in name:
        assert load_tokenizer(tmp_path).model == sentencepiece_model


@pytest.mark.parametrize("name", ["tokenizer.model", "x.tiktoken", "ranks.txt"])
def test_ranks_are_known_by_their_content(name, ranks, gpt2, tmp_path):
    path = ranks_file(tmp_path / name, ranks)
    ids = load_tokenizer(path).encode(TEXTS[0])
    if name != "ranks.txt":
        assert load_tokenizer(tmp_path).encode(TEXTS[0]) == ids
    gpt2.save(tmp_path)  # has special tokens, which ranks do not have
    assert load_tokenizer(tmp_path).fingerprint == gpt2.fingerprint


def test_missing_files_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "x.tiktoken"):
        with pytest.raises(UserError, match=re.escape(str(path))):
            load_tokenizer(path)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("change", [
    {"model.vocab.a": -1}, {"model.vocab.a": "7"}, {"model.vocab.a": 10**9}, {"model.vocab.a": 1.5},
    {"model.vocab.a": None}, {"model.vocab.a": True}, {"model.vocab.b": 64}, {"model.vocab.世": 9999},
    {"model.vocab": []}, {"model.vocab": None}, {"model.vocab": {}}, {"model.merges": [["Ġ", "z"]]},
    {"model.merges": ["a b c"]},
    {"model.merges": None}, {"model.merges": {}}, {"model.merges": "ab"}, {"model.merges": [1]}, {"model.merges": [[]]},
    {"model.merges": [["a", 1]]}, {"model.merges": ["a"]}, {"model.merges": [None]}, {"model": []}, {"model": None},
    {"model.ignore_merges": "x"}, {"model.type": 7}, {"model.type": ""}, {"added_tokens": {}}, {"added_tokens": [5]},
    {"added_tokens": [{}]},
    {"added_tokens": [{"id": -1, "content": "<x>", "special": True}]},
    {"added_tokens": [{"id": 10**9, "content": "<x>", "special": True}]},
    {"added_tokens": [{"id": 500, "content": 7, "special": True}]},
    {"added_tokens": [{"id": 500, "content": "", "special": True}]},
    {"added_tokens": [{"id": 500, "content": "x", "special": "yes"}]},
    {"added_tokens": [{"id": 5, "content": "<x>", "special": True}]},
    {"added_tokens": [{"id": 500, "content": "\ud800", "special": True}]},
    {"pre_tokenizer": 5}, {"pre_tokenizer": {}}, {"pre_tokenizer": {"type": "Sequence"}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [1]}}, {"pre_tokenizer": {"type": "Split"}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(" * 10_000}, "behavior": "Isolated", "invert": False}},
    {"pre_tokenizer": {"type": "ByteLevel"}}, {"decoder": []}, {"decoder": {"type": 1}}, {"normalizer": "NFC"},
    {"post_processor": 1},
], ids=str)
def test_a_foreign_file_with_anything_wrong_is_one_sentence(change, tmp_path):
    document = changed(train_tokenizer("bpe", ["ab ab"], 262, workers=1).to_dict()["tokenizer"], change)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="run.pt"):  # and inside a checkpoint
        tokenizer_from_dict(json.dumps({"tokenizer": document, "config": {}}), "run.pt")


@pytest.mark.parametrize("d", [
    "", "{", DEEP, [], {}, {"tokenizer": []}, {"tokenizer": {}, "config": []}, {"tokenizer": {}, "config": {}},
    {"tokenizer": {"type": "char"}, "config": {}},
    {"tokenizer": {"type": "char", "chars": 5, "specials": []}, "config": {}},
    {"tokenizer": {"type": "char", "chars": "aa", "specials": ["<unk>"]}, "config": {}},
    {"tokenizer": {"type": "char", "chars": "a", "specials": ["<unk>", "<unk>"]}, "config": {}},
    {"tokenizer": {"type": "char", "chars": "a\ud800", "specials": ["<unk>"]}, "config": {}},
    {"tokenizer": {"type": "char", "chars": "a", "specials": [1]}, "config": {}},
    {"tokenizer": {"type": "sentencepiece", "model": 7}, "config": {}},
    {"tokenizer": {"type": "sentencepiece", "model": "%%%"}, "config": {}},
    {"tokenizer": {"type": "sentencepiece", "model": "AAAA"}, "config": {}},
    {"tokenizer": {"type": 5}, "config": {}},
    {"tokenizer": {"type": "char", "chars": "a", "specials": ["<unk>"]}, "config": {"roles": {"eot": 5}}},
    {"tokenizer": {"type": "char", "chars": "a", "specials": ["<unk>"]}, "config": {"eos_token": 5}},
], ids=lambda d: str(d)[:60])
def test_what_a_checkpoint_holds_instead_of_a_tokenizer_is_one_sentence(d):
    with pytest.raises(UserError, match="run.pt"):
        tokenizer_from_dict(d, "run.pt")


@pytest.mark.parametrize("i", ["x", "-1", str(10**9), "7.5"])
def test_ids_that_a_config_adds_are_bounded(i, sentencepiece_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {i: {"content": "<x>"}}}))
    with pytest.raises(UserError, match="added_tokens_decoder"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("change", [
    {"vocab": 5}, {"vocab": [5]}, {"vocab": [{"rank": 0}]}, {"vocab": [{"rank": "0", "token_bytes": "YQ=="}]},
    {"vocab": [{"rank": 0, "token_bytes": "%"}]}, {"vocab": [{"rank": 0, "token_bytes": ""}]}, {"vocab": []},
    {"vocab": [{"rank": -500, "token_bytes": "YQ=="}]}, {"vocab": [{"rank": 10**9, "token_bytes": "YQ=="}]},
    {"config": 5}, {"config": {"pattern": "("}}, {"special_tokens": [5]},
    {"special_tokens": [{"rank": 10**9, "token_str": "<x>"}]},
    {"config": {"pattern": "(", "default_vocab_size": 300, "default_num_special_tokens": 20}},
    {"config": {"pattern": "a", "default_vocab_size": 10**9, "default_num_special_tokens": 20}},
    {"config": {"pattern": "a", "default_vocab_size": 300, "default_num_special_tokens": 10**9}},
], ids=str)
def test_a_tekken_file_with_anything_wrong_is_one_sentence(change, tmp_path):
    vocab = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)]
    config = {"pattern": PATTERNS["gpt4"], "default_vocab_size": 300, "default_num_special_tokens": 20}
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab} | change))
    with pytest.raises(UserError, match="tekken.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name, content", [
    ("x.tiktoken", "YQ== -1\n"), ("x.tiktoken", "YQ== 1000000000\n"), ("x.tiktoken", "YQ== 0\nYg== 0\n"),
    ("x.tiktoken", "YQ== 0 1\n"), ("tokenizer.json", DEEP), ("tokenizer.json", "[]"), ("vocab.json", '{"a": "b"}'),
    ("best.pt", "PK"), ("x.model", "rubbish"), ("tekken.json", '{"config": {}, "vocab": {}}'),
    ("x.tiktoken", ""), ("tokenizer.json", '{"model": "x"}'), ("tokenizer.json", '{"type": "char"}'),
    ("vocab.json", "[1]"), ("tokenizer.json", '{"type": "sentencepiece"}'), ("tokenizer.json", '{"model": '),
    ("x.tiktoken", "IQ== 0\nIg=="), ("x.tiktoken", "not base64! 1\n"), ("x.tiktoken", "IQ== one"),
])
def test_files_that_are_no_tokenizer_are_a_sentence(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(UserError, match=re.escape(name)):
        load_tokenizer(tmp_path / name)


def test_a_pipe_is_no_tokenizer(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="a pipe"):
        load_tokenizer(tmp_path / "tokenizer.json")
