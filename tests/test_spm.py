"""SentencePiece against the package itself."""

import io
import json
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from configurator import UserError
from text import spm
from text.spm import SentencePieceTokenizer
from text.tokenizer import SPECIALS, StreamDecoder

SOURCE = Path(re.__file__).read_text(encoding="utf-8")[:20_000]
TEXT = "it's  IT'S we'll 12345 3.14\n\n\tdéjà vu — 世界。你好 😀😀 नमस्ते \r\n  x = [1,  2]\n"
CHINESE = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。\n"
TEXTS = [SOURCE, TEXT * 5, CHINESE * 3]
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}


def theirs(texts: Iterable[str] = TEXTS, **options) -> bytes:
    """A model trained by the package alone, line by line."""
    file = io.BytesIO()
    lines = (line for text in texts for line in text.split("\n"))
    options = {"vocab_size": 800, "minloglevel": 2, "hard_vocab_limit": False} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=file, **options)
    return file.getvalue()


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def llama(request) -> SentencePieceTokenizer:
    """As Llama 2: <unk>, <s>, </s>, byte fallback, a space before the text, runs of spaces."""
    return SentencePieceTokenizer(theirs(model_type=request.param, allow_whitespace_only_pieces=True, **IDENTITY))


@pytest.fixture(scope="module", params=spm.KINDS)
def trained(request) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train(TEXTS, 800, request.param, workers=1)


@pytest.fixture(scope="module", params=["llama unigram", "llama bpe", "unigram", "spbpe"])
def codec(request) -> SentencePieceTokenizer:
    if request.param in spm.KINDS:
        return SentencePieceTokenizer.train(TEXTS, 800, request.param, workers=1)
    return SentencePieceTokenizer(theirs(model_type=request.param.split()[1], **IDENTITY))


def fuzz(n: int, alphabet: str = "") -> list[str]:
    rng = random.Random(0)
    chars = list(alphabet or "aeinrst  \n\t\r.,()=_'09é世明月😀\u0301\u200d\u00a0\u3000\x00\ufeffЖ\U0010fffdﬁ")
    words = [*chars, " the", "return", "    ", "déjà", "<s>", "<|im_end|>", "<0x0A>", "<unk>"]
    return ["".join(rng.choices(words, k=rng.randrange(30))) for _ in range(n)]


def processor(codec: SentencePieceTokenizer) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=codec.model)


# ---- ids and bytes --------------------------------------------------------------------------------------------------


def test_ids_are_those_of_sentencepiece(codec):
    encode = processor(codec).encode
    for text in [*TEXTS, "", " ", "\n", *fuzz(1500)]:
        assert codec.encode(text) == encode(text)


def test_text_is_decoded_as_by_sentencepiece_and_exactly(codec):
    decode = processor(codec).decode
    for text in [*TEXTS, "", " ", "  a ", "\n", *fuzz(1500)]:
        ids = codec.encode(text)
        assert codec.decode_bytes(ids).decode() == text == decode(ids)


def test_the_sign_that_stands_for_a_space_is_kept_too(codec):
    for text in ("▁", "a▁b", "▁ a", " ▁▁ ", *fuzz(300, "▁ a世\n")):
        for allow in (False, True):
            assert codec.decode_bytes(codec.encode(text, allow)).decode() == text


def test_unknown_characters_become_their_bytes(codec):
    ids = codec.encode("a\U0001fae8")[-4:]
    assert [processor(codec).id_to_piece(i) for i in ids] == ["<0xF0>", "<0x9F>", "<0xAB>", "<0xA8>"]
    assert [codec.token_bytes()[i] for i in ids] == [b"\xf0", b"\x9f", b"\xab", b"\xa8"]


def test_token_bytes_sum_to_the_text_and_to_the_space_that_the_model_adds(codec):
    sizes = codec.token_bytes()
    added = processor(codec).encode("a", out_type=str)[0].startswith("▁")
    assert len(sizes) == codec.vocab_size and not any(sizes[i] for i in codec.specials.values())
    for text in [*TEXTS, *fuzz(300)]:
        assert b"".join(sizes[i] for i in codec.encode(text)) == (b" " if added and text else b"") + text.encode()


def test_model_without_byte_fallback_has_unk():
    tokenizer = SentencePieceTokenizer(theirs(["abc abd"], vocab_size=20, model_type="bpe"))
    assert tokenizer.role("unk") == 0 and tokenizer.decode(tokenizer.encode("abcж")) == "abc<unk>"
    assert tokenizer.lost("abcж") == (0.25, "ж") and tokenizer.lost("abc").rate == 0


def test_surrogates_and_wrong_ids_are_refused(codec):
    for mistake in (lambda: codec.encode("\udcff"), lambda: codec.decode_bytes([codec.vocab_size]),
                    lambda: codec.decode_bytes([0, -1])):
        with pytest.raises(UserError):
            mistake()


# ---- batches and streams --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 64, spm.CHUNK])
@pytest.mark.parametrize("allow", [False, True])
def test_batch_and_stream_have_the_ids_of_encode(codec, chunk, allow, monkeypatch):
    monkeypatch.setattr(spm, "CHUNK", chunk)
    special = next(iter(codec.specials))
    texts = [SOURCE[:3000], TEXT * 3, CHINESE * 3, f"the {special} end{special} of" * 40, "a" * 300, "", *fuzz(50)]
    one_by_one = [codec.encode(text, allow) for text in texts]
    assert codec.encode_batch(texts, allow, threads=2) == one_by_one
    for text, ids in zip(texts, one_by_one, strict=True):
        parts = re.findall(r"[\s\S]{1,5}", text)
        for pieces in (text, parts, [text]):
            assert [i for part in codec.encode_stream_to_numpy(pieces, allow) for i in part.tolist()] == ids
        assert codec.encode_to_numpy(text, allow).dtype == np.uint32
        assert codec.decode_bytes(ids).decode() == text


@pytest.mark.parametrize("prefix", [False, True])
def test_cutting_a_long_text_changes_no_id(prefix, monkeypatch):
    codec = SentencePieceTokenizer(theirs(model_type="bpe", add_dummy_prefix=prefix, **IDENTITY))
    monkeypatch.setattr(spm, "CHUNK", 200)
    assert max(map(len, codec._chunks(TEXTS))) < 300
    for text in TEXTS:
        assert codec.encode(text) == processor(codec).encode(text)


def test_streams_are_read_as_they_are_needed(codec, monkeypatch):
    monkeypatch.setattr(spm, "CHUNK", 100)
    read = []
    texts = (read.append(i) or "a word " for i in range(10_000))
    next(codec.encode_stream_to_numpy(texts))
    assert len(read) < 40


def test_special_tokens_are_not_cut_by_chunks(trained, monkeypatch):
    added = {"900": {"content": "[/quoth]"}}
    codec = SentencePieceTokenizer(trained.model, {"added_tokens_decoder": added})
    text = "x <|im_start|>y[/quoth] z" * 3
    for chunk in range(12, 40):  # an end of a chunk would fall on each character
        monkeypatch.setattr(spm, "CHUNK", chunk)
        found = [i for i in codec.encode(text, allow_special=True) if i in codec.specials.values()]
        assert found == [codec.specials["<|im_start|>"], 900] * 3


def test_runs_of_unknown_characters_are_not_cut_by_chunks(monkeypatch):
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "vocab_size": 20}
    codec = SentencePieceTokenizer(theirs(["abc abd"], model_type="bpe", **options))
    text = "abдждж cabжд" * 20
    for chunk in range(6, 20):
        monkeypatch.setattr(spm, "CHUNK", chunk)
        assert codec.encode(text) == processor(codec).encode(text)


def test_models_that_normalise_get_their_text_in_one(monkeypatch):
    codec = SentencePieceTokenizer(theirs(model_type="bpe", normalization_rule_name="nmt_nfkc", byte_fallback=True))
    monkeypatch.setattr(spm, "CHUNK", 20)
    for text in [TEXT, *fuzz(200)]:
        ids = processor(codec).encode(text.replace("▁", ""))
        assert codec.encode(text) == ids == np.concatenate([*codec.encode_stream_to_numpy(text)]).tolist()


def test_decoding_id_by_id_needs_only_the_id_before(codec):
    for text in [TEXT, " a", *fuzz(100)]:
        ids, out = codec.encode(text, allow_special=True), b""
        for before, i in zip([[], *([i] for i in ids)], ids, strict=False):
            out += codec.decode_bytes([*before, i])[len(codec.decode_bytes(before)) :]
        assert out.decode() == text


def test_text_that_goes_on_is_decoded_as_in_the_whole(codec):
    tokenizer = codec
    for text in [TEXT, " a b", *fuzz(100)]:
        ids = codec.encode(text, allow_special=True)
        for cut in range(len(ids)):
            prompt, rest = ids[:cut], ids[cut:]
            whole = tokenizer.decode_bytes(prompt) + tokenizer.decode_bytes(rest, after=prompt)
            assert whole.decode() == text
            decoder = StreamDecoder(tokenizer, after=prompt)
            streamed = "".join(map(decoder.push, rest)) + decoder.flush()
            assert streamed == tokenizer.decode(rest, after=prompt)
    prompt, rest = codec.encode("a  return"), codec.encode("a  return the the")
    assert tokenizer.decode(prompt) + tokenizer.decode(rest[len(prompt) :], after=prompt) == "a  return the the"


def test_stream_decoder_never_gives_half_a_character(trained):
    decoder = StreamDecoder(trained)
    parts = [decoder.push(i) for i in trained.encode(TEXT)]
    assert "".join(parts) + decoder.flush() == TEXT and "\ufffd" not in "".join(parts)


# ---- special tokens -------------------------------------------------------------------------------------------------


def test_specials_in_text_are_plain_text_unless_allowed(codec):
    for name, i in codec.specials.items():
        text = f"a{name}b {name}"
        assert not set(codec.encode(text)) & set(codec.specials.values())
        assert codec.encode(text, allow_special=True).count(i) == 2
        assert codec.encode(name, allow_special=True) == [i]
        assert codec.decode_bytes(codec.encode(text, allow_special=True)).decode() == text


def test_text_behind_a_special_token_starts_anew(llama):
    alone = llama.encode("the return")
    assert llama.encode("the return</s>the return", allow_special=True) == [*alone, llama.specials["</s>"], *alone]


def test_chatml_has_one_id_per_mark_and_the_roles_are_known(trained):
    tokenizer = trained
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n<|endoftext|>", allow_special=True)
    start, end = trained.specials["<|im_start|>"], trained.specials["<|im_end|>"]
    assert ids[0] == start and ids.count(end) == 1 and ids[-1] == tokenizer.role("eot")
    assert list(trained.specials) == ["<unk>", *SPECIALS]
    assert tokenizer.role("pad") == trained.specials["<|pad|>"] and tokenizer.role("end_of_turn") == end
    assert tokenizer.role("bos") is None and tokenizer.role("unk") not in tokenizer.encode("世Ж")


def test_roles_of_llama_are_found(llama):
    tokenizer = llama
    assert [tokenizer.role(name) for name in ("unk", "bos", "eos", "eot", "pad")] == [0, 1, 2, 2, None]


def test_tokens_that_the_config_adds_are_special(llama):
    config = {"added_tokens_decoder": {"1": {"content": "<s>"}, "5000": {"content": "<|im_end|>"}}}
    codec = SentencePieceTokenizer(llama.model, config)
    assert codec.vocab_size == 5001 and codec.encode("a<|im_end|>", allow_special=True)[-1] == 5000
    assert codec.token_bytes()[4000:] == [b""] * 1001 and codec.decode_bytes([5000]) == b"<|im_end|>"
    assert codec.fingerprint != llama.fingerprint


def test_user_defined_symbols_are_found_in_every_text():
    codec = SentencePieceTokenizer(theirs(model_type="bpe", user_defined_symbols=["[INST]"], **IDENTITY))
    assert codec.encode("a [INST] b") == processor(codec).encode("a [INST] b")
    assert "[INST]" not in codec.specials and b"[INST]" in codec.token_bytes()


# ---- files ----------------------------------------------------------------------------------------------------------


def test_saved_tokenizer_is_the_same_after_loading(codec, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(codec.model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(codec.config), encoding="utf-8")
    through_json = SentencePieceTokenizer.from_dict(json.loads(json.dumps(codec.to_dict())))
    for other in (through_json, SentencePieceTokenizer.load(tmp_path / "tokenizer.model")):
        assert other.to_dict() == codec.to_dict() and other.specials == codec.specials
        assert other.fingerprint == codec.fingerprint
        assert other.encode(TEXT) == codec.encode(TEXT)


def test_what_is_no_model_is_named(tmp_path):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(UserError, match=re.escape(str(path))):
        SentencePieceTokenizer.load(path)
    for content in (b"", b"IQ== 0\n", b"garbage"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="tokenizer.model is not a SentencePiece model"):
            SentencePieceTokenizer.load(path)


def test_models_with_spaces_behind_words_are_refused():
    with pytest.raises(UserError, match="treat_whitespace_as_suffix"):
        SentencePieceTokenizer(theirs(treat_whitespace_as_suffix=True))


def test_missing_package_is_one_sentence(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    for use in (lambda: SentencePieceTokenizer.train(["a"], 300), lambda: SentencePieceTokenizer(trained.model)):
        with pytest.raises(UserError, match=r"^[^.\n]*pip install sentencepiece$"):
            use()


# ---- training -------------------------------------------------------------------------------------------------------


def test_vocab_size_counts_everything(trained):
    names = [trained._first.id_to_piece(i) for i in range(trained.vocab_size)]
    assert len(names) == 800 and names[:5] == ["<unk>", *SPECIALS]
    assert names[5:261] == [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.mark.parametrize("kind", spm.KINDS)
def test_counted_words_teach_what_the_whole_text_teaches(kind):
    options = {"add_dummy_prefix": False, "allow_whitespace_only_pieces": True, "control_symbols": SPECIALS,
               "bos_id": -1, "eos_id": -1, "character_coverage": 1.0, "max_sentence_length": 10**6}
    text = SOURCE.replace("\n", " ")
    whole = SentencePieceTokenizer(theirs([text], model_type=spm.KINDS[kind], **options, **IDENTITY))
    ours = SentencePieceTokenizer.train([text], 800, kind, workers=1, coverage=1.0)
    assert ours.token_bytes() == whole.token_bytes() and ours.encode(text) == whole.encode(text)


@pytest.mark.parametrize("kind", spm.KINDS)
def test_training_depends_neither_on_processes_nor_on_the_run(kind):
    texts = [SOURCE * 120, *TEXTS]  # more than one batch
    made = [SentencePieceTokenizer.train(iter(texts), 800, kind, workers=workers).model for workers in (1, 1, 2)]
    assert made[0] == made[1] == made[2]


def test_runs_of_spaces_and_newlines_are_pieces(trained):
    pieces = set(trained.token_bytes())
    assert {b"    ", b"\n", b"\n\n"} <= pieces and not any(re.search(rb"\S ", piece) for piece in pieces)


@pytest.mark.parametrize("kind", spm.KINDS)
def test_long_lines_without_spaces_are_learned_from(kind):
    codec = SentencePieceTokenizer.train(["明月光疑是地上霜" * 1000], 300, kind, workers=1)
    assert "明月".encode() in b" ".join(codec.token_bytes())


def test_max_bytes_limits_the_text():
    made = [SentencePieceTokenizer.train(texts, 300, max_bytes=limit, workers=1).model
            for texts, limit in ((["abab abc" * 20, "xyz" * 20], 160), (["abab abc" * 20], 0))]
    assert made[0] == made[1]


def test_text_with_too_little_in_it_gives_fewer_tokens_and_says_so(capfd):
    for kind in spm.KINDS:
        codec = SentencePieceTokenizer.train(["hug pug hugs " * 9], 400, kind, workers=1)
        assert 261 < codec.vocab_size < 400
        assert f"pieces for only {codec.vocab_size} tokens, not for 400" in capfd.readouterr().err


@pytest.mark.parametrize("arguments, words", [
    ((TEXTS, 262), "vocab_size=262.*need [0-9]+"), ((TEXTS, 0), "vocab_size=0.*need"),
    ((TEXTS, 800, "word"), "word.*unigram and spbpe"), ((["", "\t"], 800), "no text"),
    ((["\udcff"], 800), "surrogate"),
])
def test_mistakes_in_training_are_named(arguments, words):
    with pytest.raises(UserError, match=words):
        SentencePieceTokenizer.train(*arguments, workers=1)
