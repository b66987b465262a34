"""Tokenizers in folders of Hugging Face's models: transformers loads ours with equal ids; what theirs say is found."""

import json
import random

import pytest
import tokenizers
import transformers

from configurator import UserError
from test_bpe import TEXTS, fuzz, train
from test_spm import IDENTITY
from test_spm import theirs as theirs_spm
from test_tokenizer_files import layout
from text.spm import SentencePieceTokenizer
from text.spm_json import spm_document
from text.spm_model import change_scores, round_score
from text.tokenizer import SPECIALS, CharTokenizer
from text.tokenizer_files import load_tokenizer, train_tokenizer
from text.tokenizer_hf import begin_with, generation_config, read_hf_tokenizer, write_hf_tokenizer

HARD = [*fuzz(300, extra=(*SPECIALS, "<|im_start|>user\n")), "", " "]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def folder_of(tmp_path, name="llama3", **files):
    """A model's folder with a tokenizer of `layout` and these JSON files; its special tokens are ids 0, 1, 2."""
    layout(name).save(str(tmp_path / "tokenizer.json"))
    for file, content in files.items():
        (tmp_path / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


# ---- writing


@pytest.mark.parametrize("kind", ["gpt2", "gpt4", "qwen2", "cl100k", "o200k", "char", "spbpe", "unigram"])
def test_transformers_loads_what_we_write_with_equal_ids(kind, tmp_path):
    if kind in ("char", "spbpe", "unigram"):
        ours = train_tokenizer(kind, TEXTS, 0 if kind == "char" else 700, workers=1)
    else:
        ours = train(700, kind)
    ours.config["chat_template"] = TEMPLATE
    write_hf_tokenizer(ours, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD:
        assert theirs.encode(text) == ours.encode(text, allow_special=True)
        assert kind == "char" or theirs.encode(text, split_special_tokens=True) == ours.encode(text)
    assert len(theirs) == ours.vocab_size and theirs.chat_template == TEMPLATE
    assert theirs.eos_token_id == ours.role("eos") and theirs.pad_token_id == ours.role("pad")
    assert theirs.bos_token is None and theirs.unk_token_id == ours.role("unk")
    ids = ours.encode("it's 12, naïve.")
    assert theirs.decode(ids).strip() == ours.decode(ids)


@pytest.mark.parametrize("options", [
    dict(model_type="bpe"), dict(model_type="unigram"), dict(model_type="unigram", add_dummy_prefix=False),
    dict(model_type="bpe", add_dummy_prefix=False, user_defined_symbols=["<tool>", "▁▁▁"]),
    dict(model_type="unigram", add_dummy_prefix=False, user_defined_symbols=["<tool>"]),
])
def test_a_sentencepiece_model_of_others_leaves_with_equal_ids(options, tmp_path):
    """Unigram's scores are rounded, as in our own: otherwise a run of one character has several best splits."""
    model = theirs_spm(["the cat is a hat", *TEXTS[1:]], allow_whitespace_only_pieces=True, **IDENTITY, **options)
    ours = SentencePieceTokenizer(change_scores(model, round_score), {"add_bos_token": True})
    write_hf_tokenizer(ours, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*HARD, *fuzz(300, 1, ("<tool>", "<0x0A>", "<s>", "</s>", "xx" * 20, "=-" * 20))]:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, allow_special=True)
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ours.encode(text)
    assert theirs.encode("a") == [ours.role("bos"), *ours.encode("a")]
    again = read_hf_tokenizer(tmp_path)
    assert again.fingerprint == ours.fingerprint and again.adds_bos()


def test_a_unigram_that_lacks_the_characters_of_its_own_names_leaves_with_equal_ids(tmp_path):
    ours = train_tokenizer("unigram", ["the cat is a hat " * 9], 300, workers=1)
    write_hf_tokenizer(ours, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("<0x0A>", "a<0x0A> 0x0A", "<|im_end|> x <unk>", "<<||>>"):
        assert theirs.encode(text, split_special_tokens=True) == ours.encode(text)
        assert theirs.encode(text) == ours.encode(text, allow_special=True)


@pytest.mark.parametrize("config, options, what", [
    ({"legacy": False}, {}, "begins with a space"),
    ({}, dict(user_defined_symbols=["<tool>"]), "behind <tool>"),
    ({}, dict(model_type="unigram"), "long runs"),
    ({}, {}, ""),
])
def test_where_transformers_gives_other_ids_a_line_says_so(config, options, what, tmp_path, capsys):
    model = theirs_spm(**{"model_type": "bpe", "allow_whitespace_only_pieces": True} | IDENTITY | options)
    write_hf_tokenizer(SentencePieceTokenizer(model, config), tmp_path)
    said = capsys.readouterr().err
    assert what in said and bool(said) == bool(what)


@pytest.mark.parametrize("options, what", [
    (dict(model_type="bpe"), "changes text before it cuts it"),
    (IDENTITY | dict(byte_fallback=False), "tokens for bytes"),
])
def test_a_sentencepiece_model_without_a_form_there_is_a_sentence(options, what, tmp_path):
    with pytest.raises(UserError, match=what):
        write_hf_tokenizer(SentencePieceTokenizer(theirs_spm(**options)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_to_which_tokenizers_gives_other_ids_is_refused(tmp_path, monkeypatch):
    ours = train(300)
    monkeypatch.setattr(ours, "encode", lambda text, allow_special: [0])
    with pytest.raises(UserError, match="tokenizers would give other ids"):
        write_hf_tokenizer(ours, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_we_write_comes_back(tmp_path):
    ours = train(400)
    ours.config |= {"chat_template": TEMPLATE, "stop_tokens": ["<|im_start|>"]}
    write_hf_tokenizer(ours, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation_config(ours)), encoding="utf-8")
    again = read_hf_tokenizer(tmp_path)
    assert again.fingerprint == ours.fingerprint and again.stop_ids() == ours.stop_ids()
    assert again.config["chat_template"] == TEMPLATE
    assert {role: again.role(role) for role in ("bos", "eos", "pad")} == {
        role: ours.role(role) for role in ("bos", "eos", "pad")}


def test_a_begin_token_is_added_where_the_files_say_it(tmp_path):
    ours = load_tokenizer(folder_of(tmp_path, "llama3"))
    assert ours.adds_bos() and not train(300).adds_bos()
    for post in (ours.post, None):
        ours.post, ours.config = post, {"add_bos_token": True}
        write_hf_tokenizer(ours, tmp_path / "out")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        assert theirs.encode("a") == [ours.role("bos"), *ours.encode("a")]


def test_generation_ends_at_every_stop_token_and_the_end_of_a_text_is_the_first():
    ours = train(400)
    found = generation_config(ours)
    assert found["eos_token_id"] == [396, 397, 399] and found["bos_token_id"] is None and found["pad_token_id"] == 397
    assert transformers.GenerationConfig(**found).eos_token_id == found["eos_token_id"]


# ---- reading


def llama2_json(tokenizer: SentencePieceTokenizer) -> dict:
    """As in the folders of Llama 2: spaces are ▁."""
    document = spm_document(tokenizer)
    model = document["model"]
    model["vocab"] = {name.replace(" ", "▁"): i for name, i in model["vocab"].items()}
    model["merges"] = [[part.replace(" ", "▁") for part in pair] for pair in model["merges"]]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    document["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    return document


@pytest.fixture(scope="module")
def llama2() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(theirs_spm(TEXTS, model_type="bpe", allow_whitespace_only_pieces=True, **IDENTITY),
                                  {"add_bos_token": True})


def test_sentencepiece_without_its_model_is_read_from_tokenizer_json(llama2, tmp_path):
    document = llama2_json(llama2) | {"post_processor": begin_with("<s>", 1)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    ours, theirs = read_hf_tokenizer(tmp_path), tokenizers.Tokenizer.from_str(json.dumps(document))
    for text in HARD:
        if "▁" not in text:  # which is a space there
            assert ours.encode(text, allow_special=True) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.adds_bos() and ours.role("unk") == 0 and ours.specials == llama2.specials


@pytest.mark.parametrize("legacy", [None, False])
def test_what_transformers_saves_of_our_sentencepiece_comes_back(legacy, llama2, tmp_path):
    """It leaves tokenizer.model out."""
    ours = SentencePieceTokenizer(llama2.model, {"legacy": legacy} if legacy is False else {})
    write_hf_tokenizer(ours, tmp_path / "ours")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "tokenizer.model").exists()
    again = read_hf_tokenizer(tmp_path / "theirs")
    for text in HARD:
        assert again.encode(text, allow_special=True) == ours.encode(text, allow_special=True)
    assert again.config.get("legacy") == legacy and not again.adds_bos()


@pytest.mark.parametrize("change, what", [
    (lambda d: d["model"]["merges"].sort(), "merges that SentencePiece does not have"),
    (lambda d: d["model"]["merges"].pop(), "merges that SentencePiece does not have"),
    (lambda d: d["model"].update(unk_token=None), "no unk_token"),
    (lambda d: d["model"]["vocab"].update({"zz": 10**6}), "no token, or two, with the id"),
    (lambda d: d["model"]["vocab"].update({"z" * 10**6: len(d["model"]["vocab"])}), "has 1,000,000 characters"),
    (lambda d: d.update(normalizer={"type": "NFKC"}), "needs the step NFKC"),
    (lambda d: d.update(normalizer={"type": "Prepend", "prepend": 5}), "needs the step Prepend"),
])
def test_a_tokenizer_json_that_is_no_sentencepiece_is_a_sentence(change, what, llama2, tmp_path):
    document = llama2_json(llama2)
    change(document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(UserError, match=what):
        read_hf_tokenizer(tmp_path)


@pytest.mark.parametrize("where", ["generation_config", "config"])
@pytest.mark.parametrize("stops, names", [(2, ["<|eot_id|>"]), ([2, 1, 2], ["<|eot_id|>", "<|end_of_text|>"])])
def test_stop_tokens_come_from_the_files_of_the_model(where, stops, names, tmp_path):
    folder = folder_of(tmp_path, tokenizer_config={"eos_token": "<|end_of_text|>"}, **{where: {"eos_token_id": stops}})
    tokenizer = read_hf_tokenizer(folder)
    assert tokenizer.config["stop_tokens"] == names and tokenizer.stop_ids() == (1, 2)


def test_generation_config_is_stronger_than_config(tmp_path):
    folder = folder_of(tmp_path, generation_config={"eos_token_id": 0}, config={"eos_token_id": 2})
    assert read_hf_tokenizer(folder).config["stop_tokens"] == ["<|begin_of_text|>"]


@pytest.mark.parametrize("found, kept", [
    ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": None}, {"temperature": 0.6, "top_k": 20}),
    ({"do_sample": True, "temperature": 1, "max_length": 20}, {"temperature": 1.0}),
    ({"temperature": 0.6, "top_k": 20}, {}),  # transformers does not sample then
])
def test_how_the_makers_of_a_model_sample_comes_along_and_leaves_again(found, kept, tmp_path):
    tokenizer = read_hf_tokenizer(folder_of(tmp_path, generation_config=found))
    assert tokenizer.config.get("sampling", {}) == kept
    written = generation_config(tokenizer)
    assert {name: written[name] for name in written.keys() & {"temperature", "top_k", "top_p"}} == (
        kept or {"temperature": 0.8, "top_p": 0.95})


def test_ordinary_text_ends_no_answer(tmp_path):
    """A config.json of transformers without an end token means 2, and a file may name ids that do not exist."""
    folder = folder_of(tmp_path, "gpt2", generation_config={"eos_token_id": [2, 10**9, -1]})
    assert "stop_tokens" not in read_hf_tokenizer(folder).config


@pytest.mark.parametrize("entry", [TEMPLATE, [{"name": "tool_use", "template": "x"},
                                              {"name": "default", "template": TEMPLATE}]])
def test_the_chat_template_is_that_of_the_config_or_of_its_own_file(entry, tmp_path):
    folder = folder_of(tmp_path, tokenizer_config={"chat_template": entry})
    assert read_hf_tokenizer(folder).config["chat_template"] == TEMPLATE
    (folder / "chat_template.jinja").write_text("own", encoding="utf-8")
    assert read_hf_tokenizer(folder).config["chat_template"] == "own"


def test_a_folder_without_a_template_and_stop_tokens_has_none(tmp_path):
    config = read_hf_tokenizer(folder_of(tmp_path)).config
    assert not config.keys() & {"chat_template", "stop_tokens"}


def test_tokens_that_a_config_names_and_the_tokenizer_lacks_have_no_role(tmp_path):
    folder = folder_of(tmp_path, tokenizer_config={"pad_token": {"content": "[PAD]"}, "eos_token": "<|eot_id|>"})
    tokenizer = read_hf_tokenizer(folder)
    assert tokenizer.role("pad") is None and tokenizer.role("eos") == 2


def test_older_folders_name_their_tokens_in_files_of_their_own(tmp_path):
    folder = folder_of(tmp_path, special_tokens_map={"eos_token": "<|eot_id|>", "additional_special_tokens": ["x"]})
    assert read_hf_tokenizer(folder).role("eos") == 2


def test_a_folder_with_a_sentencepiece_model_is_read_by_that(tmp_path):
    """The tokenizer.json of Llama 2 and Mistral is not byte-level, and leaves out what their model says."""
    model = train_tokenizer("spbpe", TEXTS, 700, workers=1)
    (tmp_path / "tokenizer.model").write_bytes(model.model)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "byte_fallback": True}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|tool|>": 700}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 700}))
    tokenizer = read_hf_tokenizer(tmp_path)
    assert tokenizer.encode(TEXTS[1]) == model.encode(TEXTS[1]) and tokenizer.adds_bos()
    assert tokenizer.specials["<|tool|>"] == 700 and 700 in tokenizer.stop_ids()


@pytest.mark.parametrize("file, content, what", [
    ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id is a str"),
    ("generation_config.json", "[1]", "a list"),
    ("generation_config.json", '{"do_sample": true, "top_k": 0.5}', "top_k=0.5"),
    ("generation_config.json", '{"do_sample": true, "temperature": -1}', "temperature=-1 "),
    ("config.json", '{"eos_token_id": [true]}', "expected int"),
    ("tokenizer_config.json", '{"chat_template": {"a": 1}}', "chat_template"),
    ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}', "chat_template is a list"),
    ("tokenizer_config.json", '{"stop_tokens": [1]}', "stop_tokens"),
    ("special_tokens_map.json", "{", "JSON"),
    ("chat_template.jinja", "\udcff", "UTF-8"),
    ("chat_template.jinja", "x" * (1 << 20) + "x", "no chat template has so many"),
])
def test_whatever_is_wrong_in_the_files_beside_a_tokenizer_is_one_sentence(file, content, what, tmp_path):
    folder = folder_of(tmp_path, "gpt2")
    (folder / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=what) as error:
        read_hf_tokenizer(folder)
    assert "\n" not in str(error.value)


# ---- stop ids, and ids without a token


def test_stop_ids_are_those_of_the_roles_and_of_the_config():
    ours = train(400)
    assert ours.stop_ids() == (396, 397, 399)  # <|endoftext|>, <|pad|>, <|im_end|>
    ours.config["stop_tokens"] = ["<|im_start|>"]
    assert ours.stop_ids() == (396, 397, 398, 399)
    ours.config["stop_tokens"] = ["<|none|>"]
    with pytest.raises(UserError, match=r"<\|none\|>.*no such token"):
        ours.stop_ids()
    assert CharTokenizer("ab", ["<unk>"]).stop_ids() == ()


def test_stop_tokens_and_templates_do_not_change_the_fingerprint():
    ours = train(400)
    before = ours.fingerprint
    ours.config |= {"stop_tokens": ["<|im_start|>"], "chat_template": "x"}
    assert train(400).fingerprint == before == type(ours).from_dict(ours.to_dict()).fingerprint


def test_unused_ids_are_holes_and_what_a_model_has_beyond():
    ours = train(400)
    assert ours.unused_ids(400) == [] and ours.unused_ids(403) == [400, 401, 402]
    token = random.Random(0).choice(sorted(ours.vocab))
    ours._bytes.pop(ours.vocab[token])
    assert ours.unused_ids(400) == [ours.vocab[token]]
