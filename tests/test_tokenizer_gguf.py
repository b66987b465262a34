"""Tokenizers in GGUF's metadata: what we write comes back, and llama.cpp and tokenizers give the same ids."""

import pytest
import tokenizers
import transformers
from tokenizers import pre_tokenizers

from bpe import BPETokenizer
from configurator import UserError
from model import LanguageModel, ModelConfig
from runtime.families import family_of, links, write_gguf_meta
from runtime.gguf import GGUFFile, Tensor, write_gguf
from test_bpe import TEXTS, fuzz, train
from test_spm import IDENTITY, theirs
from text import tokenizer_gguf
from text.pieces import PATTERNS
from text.spm import SentencePieceTokenizer
from text.tokenizer import SPECIALS
from text.tokenizer_files import train_tokenizer
from text.tokenizer_gguf import ALIASES, CUTS, INEXACT, read_tokenizer_meta, write_tokenizer_meta

# Not "'ſ", the long s, a contraction to everybody's expressions but llama.cpp's; nor ▁, which is a space there.
HARD = [text.replace("ſ", "s").replace("▁", " ") for text in fuzz(800, extra=SPECIALS)]
TEMPLATE = "{{ messages }}"


def bpe_of(cut: str) -> BPETokenizer:
    """A tokenizer that cuts text so, with tokens that no merge makes: those of whole pieces."""
    made, (patterns, whole) = train(600), CUTS[cut]
    vocab = made.vocab | {b" hello": 600, b" 1234": 601, "世界".encode(): 602}
    return BPETokenizer(vocab, made.merges, patterns, made.added, whole, config=dict(made.config))


def spm_of(**options) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(theirs(model_type="bpe", allow_whitespace_only_pieces=True, **IDENTITY, **options))


SPM = {"llama": {}, "no space": dict(add_dummy_prefix=False, user_defined_symbols=["<tool>"])}


@pytest.mark.parametrize("cut", CUTS)
def test_what_we_write_of_byte_level_bpe_comes_back(cut):
    ours = bpe_of(cut)
    ours.config |= {"chat_template": TEMPLATE, "stop_tokens": ["<|im_start|>"], "add_bos_token": False}
    meta = write_tokenizer_meta(ours, ours.vocab_size + 5)
    again = read_tokenizer_meta(meta, "a.gguf")
    assert again.fingerprint == ours.fingerprint and again.stop_ids() == ours.stop_ids()
    assert again.config["chat_template"] == TEMPLATE and not again.adds_bos() and again.role("bos") is None
    assert again.unused_ids(ours.vocab_size + 5) == [*range(603, 608)]
    assert meta["tokenizer.ggml.eos_token_id"] == ours.role("end_of_turn")  # what ends an answer


@pytest.mark.parametrize("name", SPM)
def test_what_we_write_of_sentencepiece_comes_back(name):
    ours = spm_of(**SPM[name])
    again = read_tokenizer_meta(write_tokenizer_meta(ours, ours.vocab_size + 5), "a.gguf")
    for text in HARD:
        assert again.encode(text, allow_special=True) == ours.encode(text, allow_special=True)
    assert again.vocab_size == ours.vocab_size and again.adds_space == ours.adds_space
    assert {role: again.role(role) for role in ("bos", "eos", "unk")} == {
        role: ours.role(role) for role in ("bos", "eos", "unk")}


def test_a_begin_token_is_added_where_the_file_says_it_or_llama_cpp_does():
    meta = write_tokenizer_meta(bpe_of("llama-bpe"), 603)
    assert not read_tokenizer_meta(meta, "a.gguf").adds_bos()
    del meta["tokenizer.ggml.add_bos_token"]
    assert read_tokenizer_meta(meta, "a.gguf").adds_bos()
    assert not read_tokenizer_meta(meta | {"tokenizer.ggml.pre": "qwen2"}, "a.gguf").adds_bos()


@pytest.mark.parametrize("alias", ALIASES)
def test_another_name_of_a_cut_is_read_as_that(alias):
    meta = write_tokenizer_meta(bpe_of(ALIASES[alias]), 603)
    again = read_tokenizer_meta(meta | {"tokenizer.ggml.pre": alias}, "a.gguf")
    assert again.fingerprint == read_tokenizer_meta(meta, "a.gguf").fingerprint


def test_whole_pieces_do_not_matter_if_merges_make_every_token():
    """As in Mistral's tekken.json, where nothing says how pieces become tokens."""
    made = train(600)
    ours = BPETokenizer(made.vocab, made.merges, *CUTS["tekken"][:1], made.added, config=made.config)
    assert write_tokenizer_meta(ours, 600)["tokenizer.ggml.pre"] == "tekken"
    vocab = made.vocab | {b" hello": 600}
    with pytest.raises(UserError, match="cuts text in no way"):
        write_tokenizer_meta(BPETokenizer(vocab, made.merges, *CUTS["tekken"][:1], made.added, config=made.config), 601)


def test_a_tokenizer_that_would_come_back_with_other_ids_is_refused(monkeypatch):
    monkeypatch.setattr(tokenizer_gguf, "name_of_cut", lambda tokenizer: "gpt-2")
    with pytest.raises(UserError, match="a GGUF file would give other ids"):
        write_tokenizer_meta(train(700, "gpt4"), 700)


@pytest.mark.parametrize("make, what", [
    (lambda: train_tokenizer("char", TEXTS, 0), "no form of a character tokenizer"),
    (lambda: train_tokenizer("unigram", TEXTS, 600, workers=1), "unknown characters of a unigram tokenizer"),
    (lambda: BPETokenizer(train(300).vocab, train(300).merges, [r"\w+"], train(300).added), "cuts text in no way"),
    (lambda: SentencePieceTokenizer(theirs(model_type="bpe")), "changes text before it cuts it"),
])
def test_what_gguf_has_no_form_of_is_a_sentence(make, what):
    tokenizer = make()
    with pytest.raises(UserError, match=what):
        write_tokenizer_meta(tokenizer, tokenizer.vocab_size)


@pytest.mark.parametrize("pattern, nfc, what", [("cl100k", False, "at the end of a text"), ("o200k", False, "capitals"),
                                                ("qwen2", True, "NFC"), ("gpt2", False, "")])
def test_where_llama_cpp_cuts_in_another_way_a_line_says_so(pattern, nfc, what, capsys):
    made = train(300)
    write_tokenizer_meta(BPETokenizer(made.vocab, made.merges, [PATTERNS[pattern]], made.added, nfc=nfc,
                                      config=made.config), 300)
    said = capsys.readouterr().err
    assert what in said and bool(said) == bool(what)


@pytest.mark.parametrize("change, what", [
    ({"tokens": None}, "has no tokenizer.ggml.tokens"),
    ({"tokens": [1]}, "is a int"),
    ({"model": "t5"}, "is a t5"),
    ({"pre": "default"}, "cuts text as default does"),
    ({"token_type": [1, 1]}, "2 types"),
    ({"token_type": [6] * 300}, "of the type for bytes"),
    ({"tokens": ["a"] * 300}, "1 different"),
    ({"merges": ["nospace"]}, "merge"),
    ({"merges": ["zzz qqq"]}, "merge"),
    ({"merges": 3}, "expected list"),
    ({"eos_token_id": "x"}, "expected int"),
    ({"add_bos_token": 1}, "expected bool"),
    ({"model": "llama"}, "0 scores"),
    ({"model": "llama", "scores": [0.0] * 300, "token_type": [9] * 300}, "no type"),
    ({"model": "llama", "scores": [0.0] * 300, "token_type": [1] * 300}, "not a SentencePiece model"),
])
def test_a_foreign_header_with_anything_wrong_is_one_sentence(change, what):
    meta = write_tokenizer_meta(train(300), 300) | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    meta = {key: value for key, value in meta.items() if value is not None}
    with pytest.raises(UserError, match=what) as error:
        read_tokenizer_meta(meta, "a.gguf")
    assert str(error.value).startswith("a.gguf: ") and "\n" not in str(error.value)


def test_ids_of_roles_that_do_not_exist_or_are_text_play_no_role():
    meta = write_tokenizer_meta(train(300), 300)
    meta |= {"tokenizer.ggml.eos_token_id": 11, "tokenizer.ggml.eot_token_id": 10**9, "tokenizer.ggml.bos_token_id": -1}
    config = read_tokenizer_meta(meta, "a.gguf").config
    assert not config.keys() & {"eos_token", "bos_token", "stop_tokens"}


# ---- against llama.cpp and tokenizers


def write_model(path, tokenizer, vocab_size: int, **changes: str) -> None:
    cfg = ModelConfig(vocab_size=vocab_size, seq_len=64, d_model=32, n_layer=1, n_head=2, n_kv_head=2, d_ff=32,
                      ffn="swiglu", qk_norm=False)
    family, weights, tensors = family_of(cfg), LanguageModel(cfg).state_dict(), []
    for link in links(family, cfg, weights, True):
        for name, tensor in zip(link.theirs, link.out([weights[ours] for ours in link.ours]), strict=True):
            tensors.append(Tensor(name, tuple(tensor.shape), "F32", lambda tensor=tensor: tensor))
    meta = write_gguf_meta(family, cfg) | write_tokenizer_meta(tokenizer, vocab_size)
    write_gguf(path, meta | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}, tensors)


@pytest.mark.peers
@pytest.mark.parametrize("cut", CUTS)
def test_llama_cpp_cuts_as_its_name_says(cut, llama_cpp, tmp_path):
    """Where it only comes near (INEXACT), text in ASCII is cut equally."""
    ours = bpe_of(cut)
    write_model(tmp_path / "a.gguf", ours, 610)
    model, equal = llama_cpp.load(tmp_path / "a.gguf"), 0
    for text in HARD:
        for special in (False, True):
            same = model.tokenize(text, special) == ours.encode(text, allow_special=special)
            assert same or (cut in INEXACT and not text.isascii()), text
            equal += same
    assert equal > 0.9 * 2 * len(HARD)


@pytest.mark.peers
@pytest.mark.parametrize("alias", ALIASES)
def test_llama_cpp_cuts_alike_under_names_that_we_hold_for_one(alias, llama_cpp, tmp_path):
    ours = bpe_of(ALIASES[alias])
    write_model(tmp_path / "a.gguf", ours, 610, pre=alias)
    model = llama_cpp.load(tmp_path / "a.gguf")
    for text in HARD:
        assert model.tokenize(text) == ours.encode(text) or (ALIASES[alias] in INEXACT and not text.isascii()), text


@pytest.mark.peers
@pytest.mark.parametrize("name", SPM)
def test_llama_cpp_cuts_as_sentencepiece(name, llama_cpp, tmp_path):
    ours = spm_of(**SPM[name])
    write_model(tmp_path / "a.gguf", ours, ours.vocab_size + 5)
    model = llama_cpp.load(tmp_path / "a.gguf")
    for text in HARD:
        for special in (False, True):
            assert model.tokenize(text, special) == ours.encode(text, allow_special=special)


@pytest.mark.peers
def test_smollm2_has_the_ids_of_tokenizers_and_of_llama_cpp(llama_cpp, smollm2_gguf):
    """tokenizers: as transformers reads the file, but cut as SmolLM2's tokenizer.json does, digit by digit, which that
    reading leaves out."""
    ours = read_tokenizer_meta(GGUFFile(smollm2_gguf).meta, "smollm2")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    theirs = tokenizers.Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    theirs.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                    pre_tokenizers.ByteLevel(add_prefix_space=False)])
    model = llama_cpp.load(smollm2_gguf)
    for text in (text for text in HARD if not ours.repaired(text)[1]):  # it lacks some control characters
        for special in (False, True):
            theirs.encode_special_tokens = not special
            ids = ours.encode(text, allow_special=special)
            assert ids == model.tokenize(text, special) == theirs.encode(text, add_special_tokens=False).ids, text
    assert ours.decode(ours.stop_ids()) == "<|endoftext|><|im_end|>" and "im_start" in ours.config["chat_template"]
