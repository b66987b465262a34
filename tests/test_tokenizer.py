"""One interface over all kinds; files of others; roles; characters; streaming decode."""

import base64
import json
import os
import random
import re
from pathlib import Path

import pytest
import regex
import tiktoken
import tiktoken.load
import tiktoken_ext.openai_public as openai
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import bpe
from bpe import PATTERNS, SPECIALS, BPETokenizer
from configurator import UserError
from text import bpe_train
from text.ranks import KNOWN, TIKTOKEN
from text.tokenizer import (
    ROLES,
    CharTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    tokenizer_from_dict,
    train_tokenizer,
)

SOURCE = Path(re.__file__).read_text(encoding="utf-8")[:20_000]
TEXT = "it's  IT'S we'll 12345 3.14\n\n\tdéjà vu — 世界。你好 😀😀 नमस्ते \r\n  x = [1,  2]\n"
CHINESE = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。\n"
TEXTS = [SOURCE, TEXT * 5, CHINESE]


@pytest.fixture(scope="module", params=["bpe", "char"])
def trained(request) -> Tokenizer:
    return train_tokenizer(request.param, TEXTS, 700, workers=1)


@pytest.fixture(scope="module")
def gpt2() -> BPETokenizer:
    return BPETokenizer.train(TEXTS, 700, "gpt2", specials=["<|endoftext|>"], workers=1)


@pytest.fixture(scope="module")
def char() -> Tokenizer:
    return train_tokenizer("char", TEXTS, 0, specials=["[INST]", "[/INST]", *SPECIALS])


def with_specials(*names: str, **config) -> Tokenizer:
    codec = BPETokenizer.train([], 256 + len(names), specials=names, workers=1)
    return Tokenizer(BPETokenizer.from_dict(codec.to_dict() | {"config": config}))


# ---- one interface --------------------------------------------------------------------------------------------------


def test_round_trip_and_token_bytes(trained):
    for text in [*TEXTS, "", "<|endoftext|>"]:
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert b"".join(trained.token_bytes()[i] for i in ids) == text.encode() == trained.decode_bytes(ids)
    assert len(trained.token_bytes()) == trained.vocab_size
    assert all(trained.token_bytes()[i] == b"" for i in trained.specials.values())


def test_batch_stream_and_numpy_have_the_ids_of_encode(trained):
    texts = [*TEXTS, "", "a<|pad|>b"]
    for allow in (False, True):
        one_by_one = [trained.encode(text, allow) for text in texts]
        assert trained.encode_batch(texts, allow) == one_by_one
        assert [trained.encode_to_numpy(text, allow).tolist() for text in texts] == one_by_one
        for text, ids in zip(texts, one_by_one, strict=True):
            assert list(trained.encode_stream(iter(text), allow)) == ids  # character by character
            assert [i for part in trained.encode_stream_to_numpy([text], allow) for i in part.tolist()] == ids


def test_specials_in_text_are_plain_text_unless_allowed(trained):
    text = "a<|endoftext|>b"
    assert not set(trained.encode(text)) & set(trained.specials.values())
    assert trained.encode(text, allow_special=True)[1] == trained.role("eot")
    assert trained.decode(trained.encode(text)) == trained.decode(trained.encode(text, allow_special=True)) == text


def test_saved_tokenizer_is_the_same_after_loading(trained, tmp_path):
    trained.save(tmp_path)
    through_json = tokenizer_from_dict(json.loads(json.dumps(trained.to_dict())))
    for other in (load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.json"), through_json):
        assert other.fingerprint == trained.fingerprint and re.fullmatch("[0-9a-f]{16}", other.fingerprint)
        assert other.to_dict() == trained.to_dict() and other.specials == trained.specials
        assert {name: other.role(name) for name in ROLES} == {name: trained.role(name) for name in ROLES}
        assert other.encode(TEXT) == trained.encode(TEXT)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_fingerprint_tells_tokenizers_apart(gpt2):
    def print_of(**changes) -> str:
        parts = {name: getattr(gpt2, name) for name in ("vocab", "merges", "patterns", "added", "ignore_merges", "nfc")}
        return Tokenizer(BPETokenizer(**parts | changes)).fingerprint

    swapped = [gpt2.merges[1], gpt2.merges[0], *gpt2.merges[2:]]
    prints = [print_of(), print_of(merges=swapped), print_of(patterns=[PATTERNS["gpt4"]]), print_of(nfc=True),
              print_of(added=bpe.added_tokens(["<s>"], 699)), print_of(ignore_merges=True)]
    assert len(set(prints)) == len(prints)
    assert print_of(config={"eos_token": "x"}, post={}) == prints[0]  # these decide about no id
    assert len({train_tokenizer("char", [text], 0).fingerprint for text in ("ab", "abc", "ba")}) == 2


def test_unknown_kind_is_refused():
    with pytest.raises(UserError, match="word"):
        train_tokenizer("word", TEXTS, 300)


def test_stream_decoder_never_gives_half_a_character(trained):
    text = "né 世界 😀👨\u200d👩 नमस्ते" + TEXT
    for ids in (trained.encode(text), list(range(trained.vocab_size))):
        decoder = StreamDecoder(trained)
        parts = [decoder.push(i) for i in ids]
        assert "".join(parts) + decoder.flush() == trained.decode(ids)
    decoder = StreamDecoder(trained)
    assert "\ufffd" not in "".join(decoder.push(i) for i in trained.encode(text))


def test_stream_decoder_shows_an_unfinished_character_at_the_end_only(gpt2):
    tokenizer = Tokenizer(gpt2)
    rng = random.Random(0)
    for _ in range(100):  # any bytes
        ids = [gpt2.vocab[bytes([byte])] for byte in rng.choices([0x61, 0xC3, 0xA9, 0xE4, 0xF0, 0x9F, 0xFF], k=12)]
        decoder = StreamDecoder(tokenizer)
        assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids)
    ids = tokenizer.encode("\U0010fff0")[:-1]
    assert [decoder.push(i) for i in ids] == [""] * len(ids) and decoder.flush() == "\ufffd"


# ---- roles ----------------------------------------------------------------------------------------------------------


def test_our_tokenizers_have_the_roles_that_training_and_chat_need(trained):
    specials = trained.specials
    assert trained.role("eot") == trained.role("eos") == trained.needs("eot") == specials["<|endoftext|>"]
    assert trained.role("pad") == specials["<|pad|>"] and trained.role("end_of_turn") == specials["<|im_end|>"]
    assert trained.role("bos") is None
    assert trained.role("unk") == specials.get("<unk>")


@pytest.mark.parametrize("specials, config, expected", [
    (["<unk>", "<s>", "</s>"], {}, {"eot": "</s>", "eos": "</s>", "bos": "<s>", "unk": "<unk>", "pad": None}),
    (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], {"eos_token": "<|eot_id|>"},
     {"eot": "<|end_of_text|>", "eos": "<|eot_id|>", "bos": "<|begin_of_text|>", "end_of_turn": "<|eot_id|>"}),
    (["<|endoftext|>", "<|im_end|>"], {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "pad_token": None},
     {"eot": "<|endoftext|>", "eos": "<|im_end|>", "pad": None}),
    (["</s>", "<end>"], {"roles": {"eot": "<end>"}}, {"eot": "<end>", "eos": "</s>"}),
    (["<|user|>", "<|eot_id|>"], {}, {"end_of_turn": "<|eot_id|>", "eot": None}),
    (["[PAD]", "[UNK]"], {"pad_token": "a"}, {"pad": "a", "unk": "[UNK]"}),
])
def test_roles_are_found_by_config_and_by_known_names(specials, config, expected):
    tokenizer = with_specials(*specials, **config)
    for role, token in expected.items():
        assert tokenizer.role(role) == (None if token is None else tokenizer.encode(token, allow_special=True)[0])


def test_a_name_in_the_vocabulary_that_is_not_special_plays_no_role():
    document = with_specials("<s>").to_dict()
    document["tokenizer"]["added_tokens"][0]["special"] = False
    assert tokenizer_from_dict(document).role("bos") is None


def test_a_role_can_be_set_and_is_saved(tmp_path):
    codec = with_specials("<a>", "</s>").codec
    Tokenizer(codec, roles={"eot": "<a>"}).save(tmp_path)
    assert load_tokenizer(tmp_path).role("eot") == codec.specials["<a>"]
    assert load_tokenizer(tmp_path, roles={"eot": "</s>"}).role("eot") == codec.specials["</s>"]


def test_a_missing_role_is_named():
    with pytest.raises(UserError, match="no eot token.*roles"):
        with_specials("<a>").needs("eot")
    with pytest.raises(UserError, match="<none>.*pad"):
        with_specials("<a>", pad_token="<none>").role("pad")


# ---- files of others ------------------------------------------------------------------------------------------------


def test_mistral_file_loads_and_its_end_of_text_is_found(tmp_path):
    hf = tokenizers.Tokenizer(models.BPE())
    hf.decoder = decoders.ByteLevel()
    hf.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(bpe_train._NEMO), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<SPECIAL_{i}>" for i in range(5, 20))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    hf.train_from_iterator(TEXTS, trainer)
    hf.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    hf.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    prompt = "<s>[INST] Write 1+1 [/INST] 2</s>"
    assert ours.encode(prompt, allow_special=True) == hf.encode(prompt, add_special_tokens=False).ids
    assert [ours.role(name) for name in ("unk", "bos", "eos", "eot")] == [0, 1, 2, 2]


def test_gpt2_files_have_the_ids_of_tiktoken(gpt2, tmp_path):
    names = {bpe.spell(token): i for token, i in gpt2.vocab.items()} | gpt2.specials
    merges = "".join(f"{bpe.spell(left)} {bpe.spell(right)}\n" for left, right in gpt2.merges)
    (tmp_path / "vocab.json").write_text(json.dumps(names), encoding="utf-8")
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(str(tmp_path / "merges.txt"), str(tmp_path / "vocab.json"))
    theirs = tiktoken.Encoding("t", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens=gpt2.specials)
    ours = load_tokenizer(tmp_path)
    assert ours.fingerprint == Tokenizer(gpt2).fingerprint == load_tokenizer(tmp_path / "vocab.json").fingerprint
    assert ours.specials == {"<|endoftext|>": 699} and ours.role("eot") == 699
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)


def test_qwen_tokens_of_the_config_are_found_beside_gpt2_files(tmp_path, gpt2):
    (tmp_path / "vocab.json").write_text(json.dumps({bpe.spell(t): i for t, i in gpt2.vocab.items()}), "utf-8")
    merges = "".join(f"{bpe.spell(left)} {bpe.spell(right)}\n" for left, right in gpt2.merges)
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    end = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "special": True}
    config = {"added_tokens_decoder": {"700": end}, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    ours = load_tokenizer(tmp_path, "qwen2")
    assert ours.specials == {"<|im_end|>": 700} and ours.role("eot") == 700 and ours.vocab_size == 701


def test_gpt2_vocabulary_without_merges_file_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="merges.txt"):
        load_tokenizer(tmp_path)


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
        assert ours.encode(text) == ids == hf.encode(text).ids == ours.codec.encode_reference(text)


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_pieces_of_tiktoken_files_are_those_of_the_package(name, monkeypatch, tmp_path):
    """Its pattern as installed, with the bytes as vocabulary: no network."""
    ranks = BPETokenizer.train(TEXTS, 700, "gpt4", specials=[], workers=1).vocab
    monkeypatch.setattr(openai, "load_tiktoken_bpe", lambda *args, **options: ranks)
    theirs = getattr(openai, name)()["pat_str"]
    lines = "".join(f"{base64.b64encode(token).decode()} {i}\n" for token, i in ranks.items())
    (tmp_path / f"{name}.tiktoken").write_text(lines)
    ours = load_tokenizer(tmp_path).codec
    assert ours.patterns == [PATTERNS[name.removesuffix("_base")]]
    core = tiktoken.Encoding("t", pat_str=theirs, mergeable_ranks=ranks, special_tokens={})
    rng = random.Random(0)
    for _ in range(6000):
        text = "".join(rng.choices("aZé1世\u0301'sLl.!/ \n\r\t\u3000\x85ſ😀", k=rng.randrange(16)))
        assert regex.findall(ours.patterns[0], text) == regex.findall(theirs, text)
        assert ours.encode(text) == core.encode(text)
    ours.save(tmp_path)
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert all(hf.encode(text).ids == ours.encode(text) for text in [*TEXTS, "1234567", "a \n ", "a\n\n "])


def test_damaged_tiktoken_file_is_named(tmp_path):
    for damage in ("IQ== 0\nIg==", "not base64! 1\n", "IQ== one"):
        (tmp_path / "x.tiktoken").write_text(damage)
        with pytest.raises(UserError, match="x.tiktoken"):
            load_tokenizer(tmp_path)


def test_missing_files_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "x.tiktoken"):
        with pytest.raises(UserError, match=re.escape(str(path))):
            load_tokenizer(path)


def test_the_unknown_token_is_not_the_end_of_text():
    gpt2 = with_specials("<|endoftext|>", unk_token="<|endoftext|>", eos_token="<|endoftext|>")
    assert gpt2.role("unk") is None and gpt2.role("eot") is not None


@pytest.mark.parametrize("text, rate, first", [("abc", 0, ""), ("", 0, ""), ("ab漢字", 0.5, "漢"), ("漢", 1, "漢")])
def test_what_a_tokenization_loses_is_said_with_its_rate(text, rate, first):
    lost = train_tokenizer("char", ["abc"], 0).lost(text)
    assert lost == (rate, first)
    assert not rate or "U+6F22" in str(lost)


# ---- characters -----------------------------------------------------------------------------------------------------


def test_characters_have_ids_in_the_order_of_code_points(char):
    chars = sorted(set("".join(TEXTS)))
    assert char.encode("".join(chars)) == list(range(len(chars)))
    assert char.vocab_size == len(chars) + 7 and char.specials["<unk>"] == len(chars)
    assert train_tokenizer("char", reversed(TEXTS), 0, specials=list(char.specials)).fingerprint == char.fingerprint


def test_unseen_characters_are_unk_and_counted(char):
    ids = char.encode("明月Ж")
    assert ids[2] == char.role("unk") and char.unk_rate("明月Ж") == pytest.approx(1 / 3)
    assert char.unk_rate(CHINESE) == char.unk_rate("") == 0
    assert char.decode(ids) == "明月<unk>"


def test_specials_are_kept_whole_in_characters(char):
    ids = char.encode("[INST]明[/INST]月<|endoftext|>", allow_special=True)
    assert len(ids) == 5 and ids[0] == char.specials["[INST]"] and ids[4] == char.role("eot")
    assert len(char.encode("[INST]")) == 6


def test_vocab_size_keeps_the_most_frequent_characters():
    tokenizer = train_tokenizer("char", ["aaabbc", "xxx"], 7)  # <unk> and the four others leave room for two
    assert tokenizer.codec.chars == ["a", "x"] and tokenizer.vocab_size == 7
    with pytest.raises(UserError, match="vocab_size=5"):
        train_tokenizer("char", ["abc"], 5)
    assert train_tokenizer("char", ["abc", "d"], 0, max_bytes=2).codec.chars == ["a", "b"]


def test_characters_of_every_plane_round_trip():
    text = "a\x00\n\u0301\u2028\ufeff世😀\U0010fffd"
    tokenizer = tokenizer_from_dict(json.loads(json.dumps(train_tokenizer("char", [text], 0).to_dict())))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_surrogates_and_wrong_ids_are_refused_by_characters_too(char):
    for mistake in (lambda: char.encode("\udcff"), lambda: CharTokenizer.train(["\udcff"]),
                    lambda: char.decode([char.vocab_size]), lambda: char.decode([-1])):
        with pytest.raises(UserError):
            mistake()


def ranks_file(path, ranks: dict[bytes, int]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for token, i in ranks.items()))
    return path


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    return train_tokenizer("spbpe", ["abab cd\n" * 50], 290, workers=1).codec.model


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.model.v3", "spiece.model", "whatever"])
def test_a_model_of_sentencepiece_is_known_by_its_content(name, sentencepiece_model, tmp_path):
    (tmp_path / name).write_bytes(sentencepiece_model)
    assert load_tokenizer(tmp_path / name).codec.model == sentencepiece_model
    if "model" in name:
        assert load_tokenizer(tmp_path).codec.model == sentencepiece_model


@pytest.mark.parametrize("name", ["tokenizer.model", "x.tiktoken", "ranks.txt"])
def test_ranks_are_known_by_their_content(name, gpt2, tmp_path):
    path = ranks_file(tmp_path / name, BPETokenizer.train(TEXTS, 700, "gpt4", specials=[], workers=1).vocab)
    ids = load_tokenizer(path).encode(TEXTS[0])
    if name != "ranks.txt":
        assert load_tokenizer(tmp_path).encode(TEXTS[0]) == ids
    gpt2.save(tmp_path)  # has special tokens, which ranks do not have
    assert load_tokenizer(tmp_path).fingerprint == Tokenizer(gpt2).fingerprint


def test_llama_3_has_its_special_tokens_with_ranks_alone_too(tmp_path, monkeypatch):
    ranks = BPETokenizer.train(TEXTS, 700, "gpt4", specials=[], workers=1).vocab
    monkeypatch.setitem(KNOWN, (700, 699), KNOWN[128000, 127999])
    tokenizer = load_tokenizer(ranks_file(tmp_path / "tokenizer.model", ranks))
    assert tokenizer.role("bos") == 128000 and tokenizer.role("eot") == 128001
    assert tokenizer.role("end_of_turn") == 128009 and tokenizer.vocab_size == 128256


@pytest.mark.parametrize("name", TIKTOKEN)
def test_a_file_of_ranks_has_the_special_tokens_of_the_encoding_of_that_name(name, monkeypatch):
    monkeypatch.setattr(openai, "load_tiktoken_bpe", lambda *args, **options: {b"a": 0})
    monkeypatch.setattr(openai, "data_gym_to_mergeable_bpe_ranks", lambda *args, **options: {b"a": 0})
    assert (TIKTOKEN[name], getattr(openai, name)()["special_tokens"]) in KNOWN.values()


def test_tekken_files_are_read(tmp_path):
    ranks = BPETokenizer.train(TEXTS, 700, "gpt4", specials=[], workers=1).vocab
    vocab = [{"rank": i, "token_bytes": base64.b64encode(token).decode()} for token, i in ranks.items()]
    config = {"pattern": PATTERNS["gpt4"], "default_vocab_size": 750, "default_num_special_tokens": 100}
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab}))
    tokenizer = load_tokenizer(tmp_path)
    theirs = tiktoken.Encoding("t", pat_str=PATTERNS["gpt4"], special_tokens={},
                               mergeable_ranks={token: i for token, i in ranks.items() if i < 650})
    for text in TEXTS:
        assert tokenizer.encode(text) == [i + 100 for i in theirs.encode(text)]
    assert tokenizer.vocab_size == 750 and tokenizer.role("bos") == 1 and tokenizer.specials["[INST]"] == 3


def test_a_split_that_keeps_what_matches_is_the_same_as_isolating(gpt2):
    document = train_tokenizer("bpe", TEXTS, 600, "gpt4", workers=1).to_dict()
    expected = tokenizer_from_dict(document).encode(TEXTS[0])
    document["tokenizer"]["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    assert tokenizer_from_dict(document).encode(TEXTS[0]) == expected


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("change", [
    {"model.vocab.a": -1}, {"model.vocab.a": "7"}, {"model.vocab.a": 10**9}, {"model.vocab.a": 1.5},
    {"model.vocab.a": None}, {"model.vocab.a": True}, {"model.vocab.b": 64}, {"model.vocab": []}, {"model.vocab": None},
    {"model.merges": None}, {"model.merges": {}}, {"model.merges": "ab"}, {"model.merges": [1]}, {"model.merges": [[]]},
    {"model.merges": [["a", 1]]}, {"model.merges": ["a"]}, {"model.merges": [None]}, {"model": []}, {"model": None},
    {"model.ignore_merges": "x"}, {"model.type": 7}, {"added_tokens": {}}, {"added_tokens": [5]},
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
    document = train_tokenizer("bpe", ["ab ab"], 262, workers=1).to_dict()["tokenizer"]
    for name, value in change.items():
        *way, last = name.split(".")
        part = document
        for key in way:
            part = part[key]
        part[last] = value
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
    ("vocab.json", "[1]"), ("tokenizer.json", '{"type": "sentencepiece"}'),
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
