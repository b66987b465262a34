"""Files of fine-tuning data -> conversations, from all common formats.

    for conversation in read_examples("my.jsonl"):
        conversation     # [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

A file is recognised by its content, as in records.py: JSON lines, a JSON array of records, the rows of a .csv or
.parquet file, text; each may be compressed. A record has one of these forms; FIELDS lists other spellings:

    {"messages": [{"role": "user", "content": "Hi"}, ...]}                 OpenAI, TRL; also ShareGPT's from and value
    {"instruction": ..., "input": ..., "output": ..., "history": [...]}    Alpaca; also prompt and completion
    {"conversation": [{"input": "Hi", "output": "Hello"}, ...]}            XTuner

A record of preferences is {"prompt": ..., "chosen": ..., "rejected": ...} (`read_pairs`), each a text, a message or a
list of messages; without prompt, the other two are whole conversations that begin alike.

A text file has these lines before the parts of each example. Text before the first one is the system text, and a line
`<|endoftext|>` ends an example:

    ### Instruction:
    ### Input:
    ### Response:

No field is dropped silently: a field that changes the meaning and that we cannot learn is refused with file and line,
and `notes` counts the names of all others that we do not read.
"""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from configurator import UserError, need
from text.chat import Message, split_turns
from text.records import SEPARATOR, SUFFIXES, file_records, list_files, record_text, text_kind, text_lines

Conversation = list[Message]
Pair = list[Conversation]  # a better and a worse answer: [chosen, rejected], conversations that begin alike

# Part of a conversation: the names of its field. A record has at most one of them, unless their values are equal.
FIELDS = {
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system", "system_prompt"),
    "history": ("history",),  # [[question, answer], ...], before the rest
    "user": ("instruction", "prompt", "question", "query"),
    "input": ("input", "context"),  # the text that an instruction is about
    "answer": ("output", "completion", "response", "answer"),
}
MESSAGE_FIELDS = {"role": ("role", "from"), "content": ("content", "value"), "input": ("input",)}
TURN = {"system": "system", "input": "user", "output": "assistant"}  # field of a turn: role of its message
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
LEARN = ("train", "training", "weight", "loss")  # of a message: whether we learn it
LEARN_ALL = LEARN[:3]  # of a record, whose "loss" is a measured number
REFUSED = {"tools", "functions", "tool_calls", "function_call", "tool_call_id", "image", "images", "video", "videos",
           "audio", "audios", "chosen", "rejected", "kto_tag", "train_detail", "reasoning_content", "thinking",
           "segments", "prefix"}
EXPECTED = "expected a record with a list of messages, or with instruction and output"


def read_examples(*paths: str | Path, notes: Counter | None = None) -> Iterator[Conversation]:
    """The conversations of files, and of the files of folders; each ends with an answer.

    `notes` counts remarks about the data. UserError with file and line for a record that is no conversation.
    """
    notes = Counter() if notes is None else notes
    for file in chain.from_iterable(map(example_files, paths)):
        kind = text_kind(file)
        if kind == "text":
            yield from text_examples(file, notes)
            continue
        for where, record in file_records(file, kind):
            need(isinstance(record, dict), f"{where}: {EXPECTED}")
            yield checked(record_messages(record, where, notes), where, notes)


def example_files(path: str | Path) -> list[Path]:
    files = list_files(path, SUFFIXES)
    need(files, f"{path} holds no examples: none of its files ends in .jsonl, .json, .csv, .parquet or .txt")
    return files


def common_start(conversations: list[Conversation]) -> Conversation:
    """The messages that all begin with."""
    count = 0
    for messages in zip(*conversations, strict=False):
        if any(message != messages[0] for message in messages):
            break
        count += 1
    return conversations[0][:count]


def checked(messages: Conversation, where: str, notes: Counter) -> Conversation:
    """The messages, if they are a conversation that ends with an answer. An empty answer is not learned, because it
    would teach the model to stop at once, and must not be the last."""
    try:
        split_turns(messages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    last = messages[-1]
    need(last["role"] == "assistant" and last["content"].strip(),
         f"{where} has no answer at its end: add one, or remove the example")
    for each in messages:
        if each["role"] == "assistant" and not each["content"].strip():
            each["learn"] = False
            notes["answer without text is not learned"] += 1
    return messages


# ---- records --------------------------------------------------------------------------------------------------------

class Fields:
    """The fields of a record or message by meaning, and which of them we have read."""

    def __init__(self, record: dict, where: str, spellings: dict[str, tuple[str, ...]]):
        self.record, self.where, self.read = record, where, set()
        self.name: dict[str, str] = {}  # meaning of a field -> its name here
        for name, value in record.items():
            if name in REFUSED - {*chain.from_iterable(spellings.values())} and is_filled(value) and value != "[]":
                hint = "TASK=dpo learns preferences" if name in ("chosen", "rejected") else "remove it or the record"
                raise UserError(f"{where} has {name}, which we cannot learn: {hint}")
        if isinstance(record.get("label"), bool):  # a rated answer, which may be a bad one
            raise UserError(f"{where} has label={record['label']}, a rating: keep good answers, without this field")
        for meaning, names in spellings.items():
            present = [name for name in names if name in record]
            filled = [name for name in present if is_filled(record[name])]
            need(all(record[name] == record[filled[0]] for name in filled),
                 f"{where} has {' and '.join(filled)}, which mean the same to us: remove one of them")
            if present:
                self.name[meaning] = (filled or present)[0]

    def __contains__(self, meaning: str) -> bool:
        return meaning in self.name

    def filled(self, meaning: str) -> bool:
        return meaning in self.name and is_filled(self.record[self.name[meaning]])

    def value(self, meaning: str):
        self.read.add(self.name.get(meaning))
        return self.record.get(self.name.get(meaning))

    def text(self, meaning: str) -> str:
        self.read.add(self.name[meaning])
        return record_text(self.record, self.name[meaning], self.where)

    def wants_learning(self, names: tuple[str, ...]) -> set[bool]:
        """Whether the record wants to be learned: true, 1 -> {True}; false, 0 -> {False}; nothing -> set()."""
        wishes = set()
        for name in names:
            self.read.add(name)
            value = self.record.get(name)
            if value is not None:
                need(isinstance(value, bool | int | float) and value in (0, 1), f"{self.where} has {name}={value!r}; "
                     "a message is learned (1, true) or not (0, false)")
                wishes.add(bool(value))
        return wishes

    def note_unread(self, notes: Counter, of: str = "") -> None:
        for name in self.record:
            if name not in self.read and is_filled(self.record[name]):
                notes[f"field {name}{of} is not read"] += 1


def is_filled(value) -> bool:
    return value not in (None, "", [], {})


def record_messages(record: dict, where: str, notes: Counter) -> Conversation:
    """A record of any kind -> messages."""
    fields = Fields(record, where, FIELDS)
    need(False not in fields.wants_learning(LEARN_ALL),
         f"{where} says that it must not be learned: remove the record")
    messages: Conversation = []
    if fields.filled("messages") or ("messages" in fields and "answer" not in fields):
        messages = message_list(fields.value("messages"), where, notes)
        for other in ("history", "answer"):
            twice = fields.filled(other) and (other == "history" or fields.filled("user"))
            need(not twice, f"{where} has both {fields.name['messages']} and {fields.name.get(other)}, two versions "
                            "of its conversation: remove one")
    elif isinstance(fields.value("user"), list):  # of messages, and so is the answer: TRL
        messages = message_list(fields.value("user"), where, notes)
        for each in messages:
            if each["role"] == "assistant":
                each["learn"] = False
        messages += message_list(fields.value("answer"), where, notes, before=len(messages))
    elif "answer" in fields and ("user" in fields or "input" in fields):
        messages = [*history(fields), question(fields), {"role": "assistant", "content": fields.text("answer")}]
    else:
        has = f"; it has {', '.join(record)}" if record else ""
        raise UserError(f"{where}: {EXPECTED}{has}")
    if fields.filled("system"):
        need(not messages or messages[0]["role"] != "system",
             f"{where} has a field {fields.name['system']} and a message of that role: remove one of them")
        messages.insert(0, {"role": "system", "content": fields.text("system")})
    fields.note_unread(notes)
    return messages


def question(fields: Fields) -> Message:
    """The message of an instruction and the text that it is about."""
    message = {"role": "user", "content": ""}
    if "user" in fields:
        message["content"] = fields.text("user")
    if fields.filled("input"):
        place = "input" if message["content"].strip() else "content"
        message[place] = fields.text("input")
    return message


def history(fields: Fields) -> Conversation:
    """[[question, answer], ...] -> messages"""
    messages: Conversation = []
    name, pairs = fields.name.get("history"), fields.value("history") or []
    need(isinstance(pairs, list), f"{fields.where}: {name} is not a list of [question, answer]")
    for number, pair in enumerate(pairs, 1):
        need(isinstance(pair, list) and list(map(type, pair)) == [str, str],
             f"{fields.where}: entry {number} of {name} is not [question, answer]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": record_text({name: text}, name, fields.where)})
    return messages


def message_list(parts, where: str, notes: Counter, before: int = 0) -> Conversation:
    """The messages of a list; `before`: the number of the record's messages before it."""
    need(isinstance(parts, list), f"{where}: expected a list of messages, found a {type(parts).__name__}")
    if parts and all(isinstance(part, dict) and "output" in part for part in parts):
        turns, parts = parts, []
        for number, turn in enumerate(turns, 1):
            fields = Fields(turn, f"{where}: turn {number}", spellings={})
            fields.read.update(TURN)
            fields.note_unread(notes, " of turns")
            for name, role in TURN.items():
                if turn.get(name, "") != "":
                    parts.append({"role": role, "content": turn[name]})
    return [message(part, f"{where}: message {number}", notes) for number, part in enumerate(parts, before + 1)]


def message(part, where: str, notes: Counter) -> Message:
    """One entry of a list of messages; "learn": False if it says that it must not be learned."""
    fields = Fields(part if isinstance(part, dict) else {}, where, MESSAGE_FIELDS)
    need("role" in fields and "content" in fields, f"{where} needs a role and a content")
    role = ROLES.get(fields.text("role").strip().lower())
    need(role, f"{where} has the role {fields.value('role')!r}; we know {', '.join(ROLES)}")
    content = fields.value("content")
    if isinstance(content, list) and all(isinstance(each, dict) and each.get("type") == "text" for each in content):
        content = "".join(record_text(each, "text", where) for each in content)  # OpenAI's list of parts
    else:
        content = fields.text("content")
    found = {"role": role, "content": content}
    if role == "user" and fields.filled("input"):
        found["input"] = fields.text("input")
    wishes = fields.wants_learning(LEARN)
    need(len(wishes) < 2, f"{where} says both that it is learned and that it is not")
    need(True not in wishes or role == "assistant",
         f"{where} wants to be learned, but is not an answer: remove that field, or set learn=all to learn prompts")
    if False in wishes and role == "assistant":
        found["learn"] = False
    fields.note_unread(notes, " of messages")
    return found


# ---- preferences -----------------------------------------------------------------------------------------------------

PAIR = {name: FIELDS[name] for name in ("system", "history", "user", "input", "messages")}
PAIR |= {"chosen": ("chosen",), "rejected": ("rejected",)}
HH = ("\n\nHuman:", "\n\nAssistant:")  # begin the messages of Anthropic's HH, a conversation in one text
EXPECTED_PAIR = "expected a record with prompt, chosen and rejected"


def read_pairs(*paths: str | Path, notes: Counter | None = None) -> Iterator[Pair]:
    """[chosen, rejected] of each record of files, and of the files of folders: conversations that differ in answers
    alone. Of these only the answers after their common beginning are learned.

    `notes` counts remarks about the data. UserError with file and line for a record that is no pair.
    """
    notes = Counter() if notes is None else notes
    for file in chain.from_iterable(map(example_files, paths)):
        kind = text_kind(file)
        need(kind != "text", f"{file} is plain text: preferences are records with prompt, chosen and rejected")
        for where, record in file_records(file, kind):
            pair = record_pair(record, where, notes)
            if pair[0] == pair[1]:
                notes["pair of equal answers is left out"] += 1
            else:
                yield pair


def record_pair(record, where: str, notes: Counter) -> Pair:
    need(isinstance(record, dict) and record, f"{where}: {EXPECTED_PAIR}")
    fields = Fields(record, where, PAIR)
    need("chosen" in fields and "rejected" in fields, f"{where}: {EXPECTED_PAIR}; it has {', '.join(record)}")
    prompt: Conversation = []
    if isinstance(fields.value("user"), list):
        prompt = message_list(fields.value("user"), where, notes)
    elif fields.filled("user") or fields.filled("input"):
        prompt = [*history(fields), question(fields)]
    elif isinstance(record["chosen"], str | dict) and fields.filled("messages"):  # LLaMA-Factory
        prompt = message_list(fields.value("messages"), where, notes)
    pair = [answered(fields, name, prompt, notes) for name in ("chosen", "rejected")]
    if fields.filled("system"):
        for part in pair:
            need(part[0]["role"] != "system",
                 f"{where} has a field {fields.name['system']} and a message of that role: remove one of them")
            part.insert(0, {"role": "system", "content": fields.text("system")})
    fields.note_unread(notes)
    begin = len(common_start(pair))
    if pair[0] != pair[1]:
        rest = [part[begin]["role"] if len(part) > begin else "" for part in pair]
        need(rest == ["assistant"] * 2, f"{where}: chosen and rejected must first differ in an answer, but do so in "
                                        f"message {begin + 1}: give both the same prompt")
    for part in pair:
        for message in part[:begin]:
            if message["role"] == "assistant":
                message["learn"] = False
    return pair


def answered(fields: Fields, name: str, prompt: Conversation, notes: Counter) -> Conversation:
    """The conversation that ends with this answer, which is a text, the messages after the prompt, or all messages."""
    where, value = f"{fields.where}, {name}", fields.value(name)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        messages = message_list(value, where, notes)
    elif not prompt and str(value).startswith(HH[0]):
        messages = hh_messages(fields.text(name))
    else:
        messages = [{"role": "assistant", "content": fields.text(name)}]
    if messages and messages[0]["role"] == "assistant":
        need(prompt, f"{where} is an answer to nothing: add prompt")
        messages = [*map(dict, prompt), *messages]
    texts = {message["content"] for message in messages}
    need(all(message["content"] in texts for message in prompt), f"{where} has other messages than prompt: keep one")
    return checked(messages, where, notes)


def hh_messages(text: str) -> Conversation:
    """ "\\n\\nHuman: Hi\\n\\nAssistant: Hello" -> messages"""
    _, *parts = re.split("|".join(f"({mark})" for mark in HH), text)
    messages = []
    for human, _, content in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        role = "user" if human else "assistant"
        messages.append({"role": role, "content": content.strip()})
    return messages


# ---- text -----------------------------------------------------------------------------------------------------------

HEADING = re.compile(r"### (Instruction|Input|Response):")
BEFORE = {"Instruction": ("",), "Input": ("Instruction",), "Response": ("Instruction", "Input")}


def text_examples(path: Path, notes: Counter) -> Iterator[Conversation]:
    """The examples of a text file; blank lines around a part do not belong to it."""
    parts: dict[str, list[str]] = {"": []}  # of this example; "" is what comes before its first heading
    last, start = "", 1  # the newest part, and the line where the example starts
    for number, line in enumerate(chain(text_lines(path), [SEPARATOR]), 1):
        found = HEADING.match(line)
        name = found[1] if found else ""
        if line == SEPARATOR or (name == "Instruction" and "Response" in parts):
            if len(parts) > 1 or "".join(parts[""]).strip():
                yield checked(block_messages(parts, f"{path}, line {start}"), f"{path}, line {start}", notes)
            parts, last, start = {"": []}, "", number
        if name:
            after = f"### {last}:" if last else "no ### Instruction:"
            need(last in BEFORE[name], f"{path}, line {number}: ### {name}: after {after}, but an example is an "
                                       "Instruction, optionally an Input, and a Response")
            if name == "Instruction":
                start = number
            parts[name], last = [line[found.end() :].strip()], name
        elif line != SEPARATOR:
            parts[last].append(line)


def block_messages(parts: dict[str, list[str]], where: str) -> Conversation:
    need(len(parts) > 1, f"{where}: text without ### Instruction:")
    need("Response" in parts, f"{where}: no ### Response:")
    text = {name: re.sub(r"^\s*\n", "", "\n".join(lines)).rstrip() for name, lines in parts.items()}
    messages = [{"role": "user", "content": text["Instruction"]}, {"role": "assistant", "content": text["Response"]}]
    if text.get("Input"):
        messages[0]["input"] = text["Input"]
    if text[""]:
        messages.insert(0, {"role": "system", "content": text[""]})
    return messages
