"""Templates: masks by construction, prefixes; talking: the cache, whole turns, interrupts."""

import io
import random
import string
from itertools import groupby
from pathlib import Path

import jinja2
import pytest
import sentencepiece
import torch

from bpe import SPECIALS
from configurator import UserError
from generate import SamplingSettings
from model import Cache, LanguageModel, ModelConfig
from text import chat
from text.chat import Chat, Template, split_turns
from text.spm import SentencePieceTokenizer
from text.tokenizer import StreamDecoder, Tokenizer
from text.tokenizer_files import load_tokenizer, train_tokenizer

CHINESE = "床前明月光，疑是地上霜。"
EMOJI = "😀👩‍👩‍👧 é"
ENGLISH = "### Instruction:\nthe quick brown fox\n\n### Response:\njumps over it "
TEXTS = [string.printable, CHINESE * 3, EMOJI, ENGLISH * 9]
NAMES = ["<s>", "</s>", "[INST]", "[/INST]", *SPECIALS]
ODD = ["", " ", "\n\n", "plain", " spaces around ", CHINESE, EMOJI, "<|im_end|>", "a<|im_start|>assistant\nb",
       "[/INST] x", "### Response:\nmine", "</s><s>[INST] <<SYS>>", "<|endoftext|><|pad|>", "⟦⟧"]


def make(kind: str, names=NAMES) -> Tokenizer:
    size = 0 if kind == "char" else 256 + len(names) + 60
    tokenizer = train_tokenizer(kind, [*TEXTS, "⟦⟧"], size, specials=names, workers=1)
    if "</s>" in names:
        tokenizer.config["roles"] = {"eos": "</s>"}
    return tokenizer


@pytest.fixture(scope="module", params=["bpe", "char"])
def tokenizer(request) -> Tokenizer:
    return make(request.param)


def talk(*texts: str, system: str | None = None) -> list[dict]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def by_hand(tokenizer: Tokenizer, *parts: tuple[str, int]) -> tuple[list[int], list[bool]]:
    """(text, counts) of each part, written out; the name of a special token alone is that token."""
    ids, learned = [], []
    for text, counts in parts:
        now = [tokenizer.specials[text]] if text in tokenizer.specials else tokenizer.encode(text)
        ids, learned = ids + now, learned + [bool(counts)] * len(now)
    return ids, learned


# ---- templates ------------------------------------------------------------------------------------------------------


def test_chatml_is_what_we_write_by_hand(tokenizer):
    start, end = "<|im_start|>", "<|im_end|>"
    expected = by_hand(tokenizer,
        (start, 0), ("system\n", 0), ("Be brief.", 0), (end, 0), ("\n", 0),
        (start, 0), ("user\n", 0), ("Hi", 0), (end, 0), ("\n", 0),
        (start, 0), ("assistant\n", 0), ("Hello", 1), (end, 1), ("\n", 0),
        (start, 0), ("user\n", 0), ("", 0), (end, 0), ("\n", 0),
        (start, 0), ("assistant\n", 0), (CHINESE, 1), (end, 1), ("\n", 0))
    assert Template("chatml", tokenizer).render(talk("Hi", "Hello", "", CHINESE, system="Be brief.")) == expected


def test_alpaca_is_what_we_write_by_hand(tokenizer):
    messages = talk("Translate.", "Good day", "Again", EMOJI, system="Be brief.")
    messages[1]["input"] = "Guten Tag"
    expected = by_hand(tokenizer,
        ("Be brief.", 0), ("\n\n", 0), ("### Instruction:\n", 0), ("Translate.", 0), ("\n\n", 0), ("### Input:\n", 0),
        ("Guten Tag", 0), ("\n\n", 0), ("### Response:\n", 0), ("Good day", 1), ("</s>", 1),
        ("### Instruction:\n", 0), ("Again", 0), ("\n\n", 0), ("### Response:\n", 0), (EMOJI, 1),
        ("</s>", 1))
    assert Template("alpaca", tokenizer).render(messages) == expected


def test_inst_is_what_we_write_by_hand(tokenizer):
    expected = by_hand(tokenizer,
        ("<s>", 0), ("[INST]", 0), ("Be brief.\n\nHi", 0), ("[/INST]", 0), ("Hello", 1), ("</s>", 1),
        ("[INST]", 0), ("So?", 0), ("[/INST]", 0), ("", 1), ("</s>", 1))
    assert Template("inst", tokenizer).render(talk("Hi", "Hello", "So?", "", system="Be brief.")) == expected


def test_chatml_reads_like_the_chat_template_of_transformers():
    source = ("{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
              "{% endfor %}")
    tokenizer = make("bpe")
    messages = talk("Hi\n", " Hello", CHINESE, EMOJI, system="Be brief.")
    text = jinja2.Template(source, keep_trailing_newline=True).render(messages=messages)
    assert tokenizer.decode(Template("chatml", tokenizer).render(messages)[0]) == text


def test_markers_that_the_tokenizer_lacks_are_plain_text_in_inst():
    tokenizer = make("bpe", ["</s>"])
    ids, _ = Template("inst", tokenizer).render(talk("Hi", "Hello"))
    assert tokenizer.decode(ids) == "[INST] Hi [/INST] Hello</s>"
    assert Template("inst", tokenizer).stop_texts == ("[INST]",)


@pytest.mark.parametrize("file", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_240323.model.v3", "mistral_instruct_tokenizer_241114.model.v7", "tekken_240718.json",
    "tekken_240911.json"])
def test_inst_has_the_ids_of_mistral_common(file):
    mistral = pytest.importorskip("mistral_common.tokens.tokenizers.mistral", reason="pip install mistral-common")
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    path = Path(mistral.__file__).parents[2] / "data" / file
    ours, theirs = Template("inst", load_tokenizer(path)), mistral.MistralTokenizer.from_file(str(path))
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    said = [talk("Hi there"), talk("Hi", "Hello", " So?  x\ny"), talk("世界 😀", "naïve\n", "[/INST] x", "</s>", "")]
    said += [talk(" Hi ", " a", "\n", "  b", "<s> <unk>", "\tx \n", "\0 ")]
    said += [] if file.endswith("v1") else [talk("Hi there", system="Be brief.")]  # there we do as Llama 2
    for messages in said:
        request = ChatCompletionRequest(messages=[kinds[each["role"]](content=each["content"]) for each in messages])
        assert ours.prompt(messages) == theirs.encode_chat_completion(request).tokens


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_parts_that_do_not_begin_a_text_get_no_space_from_sentencepiece(name):
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=500, model_type="bpe", minloglevel=2,
        control_symbols=["<|im_start|>", "<|im_end|>"], hard_vocab_limit=False, **plain)
    tokenizer = SentencePieceTokenizer(file.getvalue())
    assert tokenizer.adds_space
    template, messages = Template(name, tokenizer), talk("Hi there", "Hello  you", "So?", system="Be brief.")
    ids = template.render(messages)[0]
    assert tokenizer.decode(ids) == {
        "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
                  "<|im_start|>assistant\nHello  you<|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n"
                  "<|im_start|>assistant\n",
        "alpaca": "Be brief.\n\n### Instruction:\nHi there\n\n### Response:\nHello  you</s>### Instruction:\nSo?\n\n"
                  "### Response:\n",
        "inst": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi there [/INST] Hello  you</s>[INST] So? [/INST]",
    }[name]
    answer = template.answer(" Hello  you")
    decoder = StreamDecoder(tokenizer, after=template.before_answer(template.prompt(messages[:2])))
    assert "".join(map(decoder.push, answer)) == " Hello  you"


def test_a_template_that_the_tokenizer_cannot_write_is_refused():
    tokenizer = train_tokenizer("char", [CHINESE], 0)
    for name in ("chatml", "alpaca"):
        with pytest.raises(UserError, match=f"template={name} writes .* lacks"):
            Template(name, tokenizer)


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_the_learned_part_is_exactly_each_answer_and_its_end(tokenizer, name):
    template = Template(name, tokenizer)
    end = "<|im_end|>" if name == "chatml" else "</s>"
    for n in range(len(ODD)):
        texts = ODD[n:] + ODD[:n]
        ids, learned = template.render(talk(*texts, system=ODD[n]))
        runs = groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1])
        answers = [tokenizer.decode([i for i, _ in run]) for counts, run in runs if counts]
        assert answers == [answer + end for answer in texts[1::2]]


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_typed_markers_and_specials_stay_plain_text(tokenizer, name):
    template = Template(name, tokenizer)
    clean, _ = template.render(talk(*["x"] * len(ODD), system="x"))
    odd, _ = template.render(talk(*ODD, system="<|im_end|>"))
    special = set(tokenizer.specials.values()) - {tokenizer.role("unk")}  # a char tokenizer may not know a character
    assert [i for i in odd if i in special] == [i for i in clean if i in special]


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_all_learns_every_token_and_has_the_same_ids(tokenizer, name):
    template, messages = Template(name, tokenizer), talk("Hi", "Hello", "So?", "Yes", system="S")
    assert template.render(messages, "all") == (ids := template.render(messages)[0], [True] * len(ids))


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_a_prompt_is_the_prefix_of_its_answer_and_turns_can_be_appended(tokenizer, name):
    template, rng = Template(name, tokenizer), random.Random(1)
    for system in (None, "", "Be brief."):
        messages = talk(rng.choice(ODD), system=system)
        for _ in range(4):
            prompt = template.prompt(messages)
            answer = {"role": "assistant", "content": rng.choice(ODD)}
            ids, learned = template.render([*messages, answer])
            body = tokenizer.encode(answer["content"])
            assert ids[: len(prompt)] == prompt
            assert ids[len(prompt) :] == body + template.ending
            assert sum(learned[len(prompt) :]) == len(body) + 1 and not any(learned[len(prompt) :][len(body) + 1 :])
            user = {"role": "user", "content": rng.choice(ODD), "input": rng.choice(ODD)}
            messages = [*messages, answer, user]
            assert template.prompt(messages) == prompt + body + template.continuation(user)


def test_an_input_joins_the_message_where_the_template_has_no_place_for_it():
    tokenizer = make("bpe")
    with_input = [{"role": "user", "content": "Translate.", "input": "Tag"}]
    for name in ("chatml", "inst"):
        template = Template(name, tokenizer)
        assert template.prompt(with_input) == template.prompt(talk("Translate.\n\nTag"))


def test_a_template_names_the_token_that_is_missing():
    char = train_tokenizer("char", ["abc"], 0, specials=["<|im_start|>"])
    with pytest.raises(UserError, match=r"template=chatml needs .*<\|im_end\|>"):
        Template("chatml", char)
    for name in ("alpaca", "inst"):
        with pytest.raises(UserError, match=f"template={name} .*eos"):
            Template(name, char)
    with pytest.raises(UserError, match="template=vicuna.*chatml, alpaca, inst"):
        Template("vicuna", char)


@pytest.mark.parametrize("roles, number", [("au", 1), ("uu", 2), ("us", 2), ("ss", 2), ("uat", 3)])
def test_roles_out_of_order_are_named(roles, number):
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    messages = [{"role": names[role], "content": "x"} for role in roles]
    with pytest.raises(UserError, match=f"message {number} is of role '{messages[number - 1]['role']}'"):
        split_turns(messages)


def test_nothing_to_answer_is_refused():
    template = Template("chatml", make("bpe"))
    for messages in ([], talk("Hi", "Hello"), talk(system="x")):
        with pytest.raises(UserError, match="last message"):
            template.prompt(messages)


# ---- talking --------------------------------------------------------------------------------------------------------

GREEDY = SamplingSettings(temperature=0, max_new_tokens=12)
BLOCKS = {"rope": {}, "enigma": dict(reversible=True, n_enigma=1, n_layer=1)}


def model_for(tokenizer: Tokenizer, seq_len: int = 256, seed: int = 0, **changes) -> LanguageModel:
    torch.manual_seed(seed)
    cfg = dict(vocab_size=tokenizer.vocab_size, seq_len=seq_len, d_model=32, n_layer=2, n_head=4, n_kv_head=2) | changes
    model = LanguageModel(ModelConfig(**cfg)).eval()
    for p in model.parameters():  # larger weights: answers that differ
        torch.nn.init.normal_(p, std=0.2)
    return model


def greedy(model, ids: list[int], stop_ids: tuple[int, ...], n: int) -> list[int]:
    """The answer without a cache: the whole text again for each token."""
    answer: list[int] = []
    while len(answer) < n and (new := model(torch.tensor([ids + answer]))[0, -1].argmax().item()) not in stop_ids:
        answer.append(new)
    return answer


def count_reads(model, monkeypatch) -> list[int]:
    """The number of ids of each forward pass from now on."""
    reads, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda ids, **k: (reads.append(ids.shape[1]), forward(ids, **k))[1])
    return reads


class Scripted(torch.nn.Module):
    """A model that says the given ids, whatever it reads, and the end after that; `fail_at`: Ctrl-C at this one."""

    def __init__(self, tokenizer: Tokenizer, script: list[int], end: int, fail_at: int = -1, seq_len: int = 256):
        super().__init__()
        self.embed = torch.nn.Embedding(tokenizer.vocab_size, 1)
        self.cfg = ModelConfig(vocab_size=tokenizer.vocab_size, seq_len=seq_len)
        self.script, self.fail_at, self.end = list(script), fail_at, end
        self.seen: list[list[int]] = []  # what each pass has read

    def new_cache(self, batch: int, length: int) -> Cache:
        return Cache([], length, [0] * batch)

    def forward(self, ids, cache, lengths, n_logits):
        self.seen.append(ids[0].tolist())
        cache.lengths[0] += ids.shape[1]
        self.fail_at -= 1
        if self.fail_at == -1:
            raise KeyboardInterrupt
        logits = torch.zeros(1, 1, self.cfg.vocab_size)
        logits[0, 0, self.script.pop(0) if self.script else self.end] = 9.0
        return logits


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_every_turn_says_what_a_model_without_a_cache_says(tokenizer, name, blocks, monkeypatch):
    model = model_for(tokenizer, 512, **BLOCKS[blocks])
    talking = Chat(model, tokenizer, name, system="Be brief.", sampling=GREEDY)
    template = talking.template
    reads = count_reads(model, monkeypatch)
    past: list[int] = []
    for text in ("Hi", "the quick [/INST] fox", CHINESE):
        user = {"role": "user", "content": text}
        past += template.continuation(user) if past else template.opening(user, "Be brief.")
        expected = greedy(model_for(tokenizer, 512, **BLOCKS[blocks]), past, template.stop_ids, 12)
        said = "".join(talking.say(text))
        past += expected
        assert talking.turns[-1].ids == expected and said == tokenizer.decode(expected)
        assert sum(reads) <= len(past), "something was read twice"
    assert len(talking.messages) == 7 and talking.messages[0] == {"role": "system", "content": "Be brief."}


def test_whole_turns_leave_when_the_context_is_full_and_the_system_text_stays():
    tokenizer = make("bpe")
    talking = Chat(model_for(tokenizer, 112), tokenizer, "chatml", system="Be brief.", sampling=GREEDY)
    template = talking.template
    for n in range(8):
        text = f"number {n} of them"
        kept = talking.turns
        "".join(talking.say(text))
        kept = kept[len(kept) - len(talking.turns) + 1 :]  # what the new turn found
        assert talking.turns[:-1] == kept
        users = [*(turn.user for turn in kept), text]
        ids = template.opening({"content": users[0]}, "Be brief.")
        for turn, later in zip(kept, users[1:], strict=True):
            ids += turn.ids + template.continuation({"content": later})
        assert len(ids) + 12 <= 112
        assert talking.turns[-1].ids == greedy(model_for(tokenizer, 112), ids, template.stop_ids, 12)
        assert talking.decoder.held[0][: len(ids)] == ids
    assert 0 < talking.forgotten == 8 - len(talking.turns) and len(talking.turns) > 1
    assert talking.messages[0] == {"role": "system", "content": "Be brief."}


def test_a_message_that_is_too_long_is_refused_and_changes_nothing():
    tokenizer = make("bpe")
    talking = Chat(model_for(tokenizer, 64), tokenizer, "chatml", sampling=GREEDY)
    "".join(talking.say("Hi"))
    before = (list(talking.turns), list(talking.decoder.held[0]), talking.forgotten)
    with pytest.raises(UserError, match=r"this message has \d+ tokens, and a context of 64 has room for 52"):
        next(talking.say("the quick brown fox " * 40))
    assert (talking.turns, talking.decoder.held[0], talking.forgotten) == before
    talking.system = "the quick brown fox " * 40
    with pytest.raises(UserError, match="this message and the system text have"):
        next(talking.say("Hi"))


def test_an_answer_ends_where_the_context_does():
    tokenizer = make("bpe", ["<|im_start|>", "<|im_end|>"])
    model = Scripted(tokenizer, [tokenizer.encode("x")[0]] * 500, 0, seq_len=64)
    talking = Chat(model, tokenizer, "chatml", sampling=SamplingSettings(max_new_tokens=400))
    prompt = talking.template.prompt(talk("Hi"))
    assert "".join(talking.say("Hi")) == "x" * (64 - len(prompt))
    "".join(talking.say("Hi"))  # and the talk goes on, without the turn that filled it
    assert talking.forgotten == 1


def test_closing_in_mid_answer_keeps_what_was_said_and_the_cache(monkeypatch):
    tokenizer = make("char")
    model = model_for(tokenizer)
    talking = Chat(model, tokenizer, "alpaca", sampling=SamplingSettings(temperature=0, min_new_tokens=12))
    answer = talking.say("Hi")
    said = next(answer) + next(answer)
    answer.close()
    assert talking.messages == talk("Hi", said)
    reads = count_reads(model, monkeypatch)
    "".join(talking.say("So?"))
    known = talking.template.prompt(talk("Hi", said, "So?"))
    assert talking.decoder.held[0][: len(known)] == known
    assert reads[0] == 1 + len(talking.template.continuation({"content": "So?"})), "the past was read again"


def test_ctrl_c_inside_the_model_keeps_what_was_said_and_distrusts_the_cache():
    tokenizer = make("bpe")
    script = tokenizer.encode("quick fox")
    template = Template("chatml", tokenizer)
    model = Scripted(tokenizer, script, template.ending[0], fail_at=2)
    talking = Chat(model, tokenizer, "chatml", sampling=GREEDY)
    with pytest.raises(KeyboardInterrupt):
        for _ in talking.say("Hi"):
            pass
    said = tokenizer.decode(script[:2])
    assert talking.messages == talk("Hi", said) and not talking.decoder.held[0]
    model.script = []
    assert "".join(talking.say("So?")) == ""
    assert model.seen[-1] == template.prompt([*talk("Hi", said), *talk("So?")])


@pytest.mark.parametrize("shown", [1, 2, 3, 4, 5])
def test_half_characters_are_never_shown_nor_kept(shown):
    tokenizer = make("bpe", ["<|im_start|>", "<|im_end|>"])
    half = [tokenizer.encode(text)[0] for text in "ab"] + [i for b in "é😀".encode() for i in raw(tokenizer, b)]
    talking = Chat(Scripted(tokenizer, half, 0, fail_at=shown + 2), tokenizer, "chatml", sampling=GREEDY)
    pieces = []
    with pytest.raises(KeyboardInterrupt):
        for piece in talking.say("Hi"):
            pieces.append(piece)
    whole = {1: "ab", 2: "abé", 3: "abé", 4: "abé", 5: "abé"}[shown]
    assert "".join(pieces) == talking.turns[0].answer == whole
    assert tokenizer.decode(talking.turns[0].ids) == whole


def raw(tokenizer: Tokenizer, byte: int) -> list[int]:
    return [tokenizer.token_bytes().index(bytes([byte]))]


def test_a_stop_text_ends_the_answer_and_never_shows():
    tokenizer = make("bpe")
    template = Template("alpaca", tokenizer)
    script = tokenizer.encode("fox ###\n\n### Instruction:\nWho?")
    model = Scripted(tokenizer, script, template.ending[0])
    talking = Chat(model, tokenizer, "alpaca", sampling=SamplingSettings(temperature=0, max_new_tokens=99))
    assert "".join(talking.say("Hi")) == "fox ###" == talking.messages[-1]["content"]
    model.script = []
    "".join(talking.say("So?"))
    assert talking.decoder.held[0] == template.prompt(talk("Hi", "fox ###", "So?")), "the cut part stayed in the cache"


def test_reset_forgets_and_begins_the_same_talk_again():
    tokenizer = make("bpe")
    sampling = SamplingSettings(temperature=1.0, max_new_tokens=9, seed=5)
    talking = Chat(model_for(tokenizer), tokenizer, "inst", system="S", sampling=sampling)
    first = ["".join(talking.say(text)) for text in ("Hi", "So?")]
    talking.reset()
    assert talking.messages == talk(system="S")
    assert ["".join(talking.say(text)) for text in ("Hi", "So?")] == first


def test_another_system_text_is_read_from_the_next_turn_on():
    tokenizer = make("bpe")
    model = Scripted(tokenizer, tokenizer.encode("fox"), Template("inst", tokenizer).ending[0])
    talking = Chat(model, tokenizer, "inst", system="old", sampling=GREEDY)
    assert "".join(talking.say("Hi")) == "fox"
    talking.system = "new"
    "".join(talking.say("So?"))
    assert talking.decoder.held[0] == talking.template.prompt(talk("Hi", "fox", "So?", system="new"))


def test_the_same_words_again_after_all_was_forgotten_are_read_again():
    tokenizer = make("bpe")
    template = Template("chatml", tokenizer)
    room = len(template.prompt(talk("the quick brown fox"))) + 12
    model = Scripted(tokenizer, [], template.ending[0], seq_len=room)
    talking = Chat(model, tokenizer, "chatml", sampling=SamplingSettings(max_new_tokens=1))
    for _ in range(3):  # the cache holds exactly the prompt, and there would be nothing to read
        assert "".join(talking.say("the quick brown fox")) == ""
    assert talking.forgotten == 2 and model.seen[1] == model.seen[2] == model.seen[0][-1:]


def test_min_new_tokens_bans_every_end():
    tokenizer = make("bpe")
    template = Template("chatml", tokenizer)
    talking = Chat(Scripted(tokenizer, [], template.ending[0]), tokenizer, "chatml",
                   sampling=SamplingSettings(temperature=0, min_new_tokens=3))
    "".join(talking.say("Hi"))
    assert len(talking.turns[0].ids) == 3 and not set(talking.turns[0].ids) & set(template.stop_ids)
    ends = {name for name, i in tokenizer.specials.items() if i in template.stop_ids}
    assert ends == {"<|im_end|>", "<|im_start|>", "<|endoftext|>", "</s>", "<|pad|>"}
