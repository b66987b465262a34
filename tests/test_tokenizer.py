"""What all kinds of tokenizers promise; roles; characters; streaming decode."""

import json
import random
import re
from pathlib import Path

import pytest

import bpe
from bpe import BPETokenizer
from configurator import UserError
from text.pieces import PATTERNS
from text.tokenizer import ROLES, SPECIALS, StreamDecoder, Tokenizer
from text.tokenizer_files import load_tokenizer, tokenizer_from_dict, train_tokenizer

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
    document = BPETokenizer.train([], 256 + len(names), specials=names, workers=1).to_dict()["tokenizer"]
    return tokenizer_from_dict({"tokenizer": document, "config": config})


# ---- one interface ---------------------------------------------------------------------------------------------------


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
            for parts in ([text], iter(text)):  # also character by character
                assert [i for part in trained.encode_stream_to_numpy(parts, allow) for i in part.tolist()] == ids


def test_specials_in_text_are_plain_text_unless_allowed(trained):
    text = "a<|endoftext|><|im_start|>user\n<|endoftext"
    plain, special = trained.encode(text), trained.encode(text, allow_special=True)
    assert not set(plain) & set(trained.specials.values())
    assert special[1:3] == [trained.specials["<|endoftext|>"], trained.specials["<|im_start|>"]]
    assert trained.decode(plain) == trained.decode(special) == text


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
        return BPETokenizer(**parts | changes).fingerprint

    swapped = [gpt2.merges[1], gpt2.merges[0], *gpt2.merges[2:]]
    prints = [print_of(), print_of(merges=swapped), print_of(patterns=[PATTERNS["gpt4"]]), print_of(nfc=True),
              print_of(added=bpe.added_tokens({"<s>": 699})), print_of(ignore_merges=True)]
    assert len(set(prints)) == len(prints)
    assert print_of(config={"eos_token": "x"}, post={}) == prints[0]  # these decide about no id
    assert len({train_tokenizer("char", [text], 0).fingerprint for text in ("ab", "abc", "ba")}) == 2


def test_unknown_kind_is_refused():
    with pytest.raises(UserError, match="word"):
        train_tokenizer("word", TEXTS, 300)


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_surrogates_and_wrong_ids_are_refused(kind):
    tokenizer, broken = train_tokenizer(kind, TEXTS, 700, workers=1), "broken \udcff json"
    for use in (tokenizer.encode, lambda text: list(tokenizer.encode_stream_to_numpy([text])),
                lambda text: train_tokenizer(kind, [text], 700, workers=1)):
        with pytest.raises(UserError, match="lone surrogate, U\\+DCFF"):
            use(broken)
    for wrong in (tokenizer.vocab_size, -1):
        with pytest.raises(UserError, match=str(wrong)):
            tokenizer.decode([1, wrong])


@pytest.mark.parametrize("text, rate, first", [("abc", 0, ""), ("", 0, ""), ("ab漢字", 0.5, "漢"), ("漢", 1, "漢")])
def test_what_a_tokenization_loses_is_said_with_its_rate(text, rate, first):
    lost = train_tokenizer("char", ["abc"], 0).lost(text)
    assert lost == (rate, first)
    assert not rate or "U+6F22" in str(lost)


def test_stream_decoder_never_gives_half_a_character(trained):
    text = "né 世界 😀👨\u200d👩 नमस्ते" + TEXT
    for ids in (trained.encode(text), list(range(trained.vocab_size))):
        decoder = StreamDecoder(trained)
        parts = [decoder.push(i) for i in ids]
        assert "".join(parts) + decoder.flush() == trained.decode(ids)
    decoder = StreamDecoder(trained)
    assert "\ufffd" not in "".join(decoder.push(i) for i in trained.encode(text))


def test_stream_decoder_shows_an_unfinished_character_at_the_end_only(gpt2):
    tokenizer = gpt2
    rng = random.Random(0)
    for _ in range(100):  # any bytes
        ids = [gpt2.vocab[bytes([byte])] for byte in rng.choices([0x61, 0xC3, 0xA9, 0xE4, 0xF0, 0x9F, 0xFF], k=12)]
        decoder = StreamDecoder(tokenizer)
        assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids)
    ids = tokenizer.encode("\U0010fff0")[:-1]
    assert [decoder.push(i) for i in ids] == [""] * len(ids) and decoder.flush() == "\ufffd"


# ---- roles -----------------------------------------------------------------------------------------------------------


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
    tokenizer = with_specials("<a>", "</s>")
    tokenizer.save(tmp_path)
    load_tokenizer(tmp_path, roles={"eot": "<a>"}).save(tmp_path)
    assert load_tokenizer(tmp_path).role("eot") == tokenizer.specials["<a>"]
    assert load_tokenizer(tmp_path, roles={"eot": "</s>"}).role("eot") == tokenizer.specials["</s>"]


def test_a_missing_role_is_named():
    with pytest.raises(UserError, match="no eot token.*roles"):
        with_specials("<a>").needs("eot")
    with pytest.raises(UserError, match="<none>.*pad"):
        with_specials("<a>", pad_token="<none>").role("pad")


def test_the_unknown_token_is_not_the_end_of_text():
    gpt2 = with_specials("<|endoftext|>", unk_token="<|endoftext|>", eos_token="<|endoftext|>")
    assert gpt2.role("unk") is None and gpt2.role("eot") is not None


# ---- characters ------------------------------------------------------------------------------------------------------


def test_characters_have_ids_in_the_order_of_code_points(char):
    chars = sorted(set("".join(TEXTS)))
    assert char.encode("".join(chars)) == list(range(len(chars)))
    assert char.vocab_size == len(chars) + 7 and char.specials["<unk>"] == len(chars)
    assert train_tokenizer("char", reversed(TEXTS), 0, specials=list(char.specials)).fingerprint == char.fingerprint


def test_unseen_characters_are_unk(char):
    ids = char.encode("明月Ж")
    assert ids[2] == char.role("unk") and char.decode(ids) == "明月<unk>"
    assert char.role("unk") not in char.encode(CHINESE)


def test_specials_are_kept_whole_in_characters(char):
    ids = char.encode("[INST]明[/INST]月<|endoftext|>", allow_special=True)
    assert len(ids) == 5 and ids[0] == char.specials["[INST]"] and ids[4] == char.role("eot")
    assert len(char.encode("[INST]")) == 6


def test_vocab_size_keeps_the_most_frequent_characters():
    tokenizer = train_tokenizer("char", ["aaabbc", "xxx"], 7)  # <unk> and the four others leave room for two
    assert tokenizer.chars == ["a", "x"] and tokenizer.vocab_size == 7
    with pytest.raises(UserError, match="vocab_size=5"):
        train_tokenizer("char", ["abc"], 5)
    assert train_tokenizer("char", ["abc", "d"], 0, max_bytes=2).chars == ["a", "b"]


def test_characters_of_every_plane_round_trip():
    text = "a\x00\n\u0301\u2028\ufeff世😀\U0010fffd"
    tokenizer = tokenizer_from_dict(json.loads(json.dumps(train_tokenizer("char", [text], 0).to_dict())))
    assert tokenizer.decode(tokenizer.encode(text)) == text
