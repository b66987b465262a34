"""Files of fine-tuning data -> conversations, in the formats that people have.

    for conversation in read_examples("my.jsonl"):
        conversation     # [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

The content of a file decides how it is read, as corpus.py does it: JSON lines, a JSON array of records, the rows of a
.csv or .parquet file, text; each may be compressed. A record is of one of these kinds; FIELDS has their other
spellings:

    {"messages": [{"role": "user", "content": "Hi"}, ...]}                 OpenAI, TRL; ShareGPT's from and value, too
    {"instruction": ..., "input": ..., "output": ..., "history": [...]}    Alpaca; also prompt and completion
    {"conversation": [{"input": "Hi", "output": "Hello"}, ...]}            XTuner

A text file has these lines before the parts of each example. What is before the first one is its system text, and a
line `<|endoftext|>` ends an example:

    ### Instruction:
    ### Input:
    ### Response:

No field is dropped in silence: those that change the meaning and that we cannot learn are refused with file and line,
and the names of all others are counted in `notes`.
"""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from configurator import UserError
from text.chat import Message, split_turns
from text.records import SEPARATOR, SUFFIXES, file_records, list_files, record_text, text_blocks, text_kind

Conversation = list[Message]

# Part of a conversation: the names of its field. A record has at most one of them, unless they say the same.
FIELDS = {
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system", "system_prompt"),
    "history": ("history",),  # [[question, answer], ...], before the rest
    "user": ("instruction", "prompt", "question", "query"),
    "input": ("input", "context"),  # the text that an instruction is about
    "answer": ("output", "completion", "response", "answer"),
}
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
TURN = {"system": "system", "input": "user", "output": "assistant"}  # field of a turn: role of its message
LEARN = ("train", "training", "weight", "loss")  # of a message: whether it is learned
LEARN_ALL = LEARN[:3]  # of a record; its "loss" is a number that somebody measured
REFUSED = {"tools", "functions", "tool_calls", "function_call", "tool_call_id", "image", "images", "video", "videos",
           "audio", "audios", "chosen", "rejected", "kto_tag", "train_detail", "reasoning_content", "thinking",
           "segments", "prefix"}


def read_examples(path: str | Path, notes: Counter | None = None) -> Iterator[Conversation]:
    """The conversations of a file, or of the files of a folder; each ends with an answer.

    `notes` counts what a reader of the data should know. UserError with file and line for a record that is none.
    """
    notes = Counter() if notes is None else notes
    for file in example_files(path):
        kind = text_kind(file)
        if kind == "text":
            yield from text_examples(file, notes)
            continue
        for where, record in file_records(file, kind, "*"):
            yield checked(record_messages(record, where, notes), where, notes)


def example_files(path: str | Path) -> list[Path]:
    files = list_files(path, SUFFIXES)
    if not files:
        raise UserError(f"{path} holds no examples: none of its files ends in .jsonl, .json, .csv, .parquet or .txt")
    return files


# ---------------------------------------------------------------------------------------------------------------------
# Records


def record_messages(record, where: str, notes: Counter) -> Conversation:
    """A record of any kind -> messages."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a record with a list of messages, or with instruction and output")
    refuse_fields(record, where)
    for name in LEARN_ALL:
        if record.get(name) is not None and not wants_learning(record[name], name, where):
            raise UserError(f"{where} has {name}={record[name]!r} for all of it: take the record out")
    field = {part: field_of(record, names, where) for part, names in FIELDS.items()}
    used = {name for name in field.values() if name}
    if field["messages"] and (filled(record, field["messages"]) or not field["answer"]):
        messages = said(record[field["messages"]], where, notes)
        if filled(record, field["history"]) or filled(record, field["user"]) and filled(record, field["answer"]):
            raise UserError(f"{where} has both {field['messages']} and {field['history'] or field['answer']}: it says "
                            "its conversation twice, and we cannot know which one counts")
        used = {field["messages"], field["system"]}
    elif field["user"] and isinstance(record[field["user"]], list):  # of messages, and so is the answer: TRL
        before = said(record[field["user"]], where, notes)
        messages = [each | {"learn": False} if each["role"] == "assistant" else each for each in before]
        messages += said(record.get(field["answer"]), where, notes, len(before))
        used = {field["user"], field["answer"], field["system"]}
    elif field["answer"] and (field["user"] or field["input"]):
        messages = [*history(record, field["history"], where), *question_and_answer(record, field, where)]
    else:
        has = f"; it has {', '.join(record)}" if record else ""
        raise UserError(f"{where}: expected a record with a list of messages, or with instruction and output{has}")
    if filled(record, field["system"]):
        text = record_text(record, field["system"], where)
        if messages and messages[0]["role"] == "system":
            raise UserError(f"{where} has a field {field['system']} and a message of that role: leave one of them out")
        messages = [{"role": "system", "content": text}, *messages]
    used.update(LEARN_ALL)
    notes.update(f"field {name} is not read" for name in record if name not in used and filled(record, name))
    return messages


def filled(record: dict, name: str | None) -> bool:
    return name is not None and record[name] not in (None, "", [], {})


def field_of(record: dict, names: tuple[str, ...], where: str) -> str | None:
    """Which of these names the record uses; UserError if it uses two of them to say different things."""
    present = [name for name in names if name in record]
    used = [name for name in present if filled(record, name)]
    if any(record[name] != record[used[0]] for name in used):
        raise UserError(f"{where} has {' and '.join(used)}, which mean the same to us: leave one of them out")
    return next(iter(used or present), None)


def refuse_fields(record: dict, where: str) -> None:
    for name in record:
        if name in REFUSED and filled(record, name) and record[name] != "[]":
            raise UserError(f"{where} has {name}, which we cannot learn: take the field or the record out")
    if isinstance(record.get("label"), bool):  # a rated answer, which may be a bad one
        raise UserError(f"{where} has label={record['label']}, a rating: keep the good answers, without the field")


def question_and_answer(record: dict, field: dict, where: str) -> Conversation:
    user = {"role": "user", "content": ""}
    if field["user"]:
        user["content"] = record_text(record, field["user"], where)
    if filled(record, field["input"]):
        about = record_text(record, field["input"], where)
        user["input" if user["content"].strip() else "content"] = about
    return [user, {"role": "assistant", "content": record_text(record, field["answer"], where)}]


def history(record: dict, name: str | None, where: str) -> Conversation:
    """[[question, answer], ...] -> messages"""
    messages: Conversation = []
    for number, pair in enumerate(record[name] or [] if name else [], 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(f"{where}: entry {number} of {name} is not [question, answer]")
        texts = [record_text({name: text}, name, where) for text in pair]
        messages += [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
    return messages


def said(parts, where: str, notes: Counter, before: int = 0) -> Conversation:
    """The messages of a list; `before`: how many of the record came before it."""
    if not isinstance(parts, list):
        raise UserError(f"{where}: expected a list of messages, found a {type(parts).__name__}")
    if parts and all(isinstance(part, dict) and "output" in part for part in parts):
        turns = [turn(part, f"{where}: turn {number}", notes) for number, part in enumerate(parts, 1)]
        parts = list(chain.from_iterable(turns))
    return [message(part, f"{where}: message {number}", notes) for number, part in enumerate(parts, before + 1)]


def turn(part: dict, where: str, notes: Counter) -> list[dict]:
    """{"input": "Hi", "output": "Hello"} -> the two messages, perhaps with a system text before them."""
    refuse_fields(part, where)
    notes.update(f"field {name} of turns is not read" for name in part if name not in TURN and filled(part, name))
    return [{"role": role, "content": part[name]} for name, role in TURN.items() if name in part and part[name] != ""]


def message(part, where: str, notes: Counter) -> Message:
    """One entry of a list of messages; "learn": False if it says that it is not to be learned."""
    names = {}
    if isinstance(part, dict):
        refuse_fields(part, where)
        spellings = {"role": ("role", "from"), "content": ("content", "value")}
        names = {key: field_of(part, each, where) for key, each in spellings.items()}
    if not names or None in names.values():
        raise UserError(f"{where} needs a role and a content")
    role = ROLES.get(record_text(part, names["role"], where).strip().lower())
    if role is None:
        raise UserError(f"{where} is of role {part[names['role']]!r}; we know {', '.join(ROLES)}")
    found = {"role": role, "content": content_text(part, names["content"], where)}
    used = {*names.values(), *LEARN}
    if role == "user" and "input" in part and filled(part, "input"):
        found["input"] = record_text(part, "input", where)
        used.add("input")
    wishes = {wants_learning(part[name], name, where) for name in LEARN if part.get(name) is not None}
    if len(wishes) > 1:
        raise UserError(f"{where} says both that it is learned and that it is not")
    if True in wishes and role != "assistant":
        raise UserError(f"{where} wants to be learned, but is no answer: leave that out; learn=all learns prompts, too")
    if False in wishes and role == "assistant":
        found["learn"] = False
    notes.update(f"field {name} of messages is not read" for name in part if name not in used and filled(part, name))
    return found


def content_text(part: dict, name: str, where: str) -> str:
    """A text, or OpenAI's list of parts, [{"type": "text", "text": "Hi"}]."""
    content = part[name]
    if isinstance(content, list) and all(isinstance(each, dict) and each.get("type") == "text" for each in content):
        return "".join(record_text(each, "text", where) for each in content)
    return record_text(part, name, where)


def wants_learning(value, name: str, where: str) -> bool:
    """true, 1 -> True; false, 0 -> False; UserError for what is in between."""
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise UserError(f"{where} has {name}={value!r}; a message is learned (1, true) or not (0, false)")
    return bool(value)


def checked(messages: Conversation, where: str, notes: Counter) -> Conversation:
    """The messages, if they are a conversation that ends with an answer. One without text, which would teach to end an
    answer at once, is not learned, and may not be the last."""
    try:
        split_turns(messages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise UserError(f"{where} has no answer at its end: add one, or remove the example")
    for each in messages:
        if each["role"] == "assistant" and not each["content"].strip():
            each["learn"] = False
            notes["answer without text is not learned"] += 1
    return messages


# ---------------------------------------------------------------------------------------------------------------------
# Text


HEADING = re.compile(r"### (Instruction|Input|Response):")
BEFORE = {"Instruction": ("",), "Input": ("Instruction",), "Response": ("Instruction", "Input")}


def text_examples(path: Path, notes: Counter) -> Iterator[Conversation]:
    """The blocks of a text file; blank lines around a part are no part of it."""
    parts: dict[str, list[str]] = {"": []}  # of this example; "" is what comes before its first heading
    start = 1
    text = "".join(text_blocks(path))
    for number, line in enumerate([*text.split("\n"), SEPARATOR], 1):
        name = found[1] if (found := HEADING.match(line)) else ""
        if line == SEPARATOR or (name == "Instruction" and "Response" in parts):
            if len(parts) > 1 or "".join(parts[""]).strip():
                yield block_messages(parts, f"{path}, line {start}", notes)
            parts, start = {"": []}, number
        if name:
            last = next(reversed(parts))
            if last not in BEFORE[name]:
                after = f"### {last}:" if last else "no ### Instruction:"
                raise UserError(f"{path}, line {number}: ### {name}: behind {after}, but an example is an Instruction, "
                                "perhaps an Input, and a Response")
            parts[name] = [line[found.end() :].strip()]
            start = number if name == "Instruction" else start
        elif line != SEPARATOR:
            parts[next(reversed(parts))].append(line)


def block_messages(parts: dict[str, list[str]], where: str, notes: Counter) -> Conversation:
    if "Response" not in parts:
        wrong = "no ### Response:" if len(parts) > 1 else "text without ### Instruction:"
        raise UserError(f"{where}: {wrong}")
    text = {name: re.sub(r"^\s*\n", "", "\n".join(lines)).rstrip() for name, lines in parts.items()}
    user = {"role": "user", "content": text["Instruction"]}
    if text.get("Input"):
        user["input"] = text["Input"]
    messages = [user, {"role": "assistant", "content": text["Response"]}]
    if text[""]:
        messages = [{"role": "system", "content": text[""]}, *messages]
    return checked(messages, where, notes)
