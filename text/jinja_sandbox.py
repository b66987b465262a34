"""A process that renders the chat template of somebody else's model, and can be stopped.

    sandbox = Sandbox("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", {"eos_token": "</s>"})
    sandbox.render([([{"role": "user", "content": "Hi"}], True)])  ->  ["Hi</s>"]

A template is a program in the language jinja. jinja2's sandbox keeps it from Python's objects, but not from counting to
10**10**10 or from building a string of 10 GB, and no thread in Python can be stopped in the middle of either. So it
runs in a process of its own, which has a limit of memory and of time and can write no file.

This file is that process, too: `python -m text.jinja_sandbox SECONDS` reads lines of JSON and answers with such lines.
"""

import json
import subprocess
import sys
from contextlib import suppress

from configurator import UserError, need, shown
from runtime.workers import LineProcess

SECONDS = 20  # of a request; a rendering takes milliseconds
MEMORY = 1 << 30  # bytes of the process
MOST_TEXT = 1 << 26  # characters of all texts of an answer, and its bytes are at most 12 times as many
MOST_TEMPLATE = 1 << 20  # characters; the longest that we know has 30,000


class Sandbox:
    """A template with the names that it may write, as {"bos_token": "<s>", ...}. The process starts when needed."""

    def __init__(self, template: str, names: dict[str, str], seconds: int = SECONDS):
        need(len(template) <= MOST_TEMPLATE, f"the model's chat template has {len(template):,} characters, and the "
             f"longest that we take has {MOST_TEMPLATE:,}: choose another template")
        self.seconds, hello = seconds, {"template": template, "names": names}
        self.process = LineProcess("text.jinja_sandbox", str(seconds), seconds=seconds, hello=hello,
                                   most=16 * MOST_TEXT, stderr=subprocess.DEVNULL)

    def render(self, jobs: list[tuple[list[dict], bool]], day: str = "") -> list[str | UserError]:
        """A text, or what is wrong, for each (messages, whether the beginning of an answer comes last). The template
        takes `day`, as "2025-01-01", for today's date; without it, the clock's."""
        request = {"jobs": [{"messages": messages, "add_generation_prompt": begins} for messages, begins in jobs],
                   "day": day}
        answer = self.process.ask(request)
        need(answer, f"the model's chat template did not end within {self.seconds} seconds and {MEMORY >> 20} MB: "
                     "choose another template")
        need("error" not in answer, f"the model's chat template cannot be used: {answer.get('error')}")
        return [read_answer(each) for each in answer["texts"]]


def read_answer(found: dict) -> str | UserError:
    if "text" in found:
        return found["text"]
    return UserError(f"the model's chat template refuses: {shown(found['error'], most=100)}")


# ---- inside the process ---------------------------------------------------------------------------------------------


def serve(seconds: int) -> None:
    """Answer requests until there are no more; the first brings the template."""
    template, problem, clock = None, "", {}
    limit_process()
    for line in sys.stdin.buffer:
        limit_time(seconds)
        request = json.loads(line)
        if "template" in request:
            try:
                template = compile_template(request["template"], clock).render
                names = request["names"]
            except Exception as error:
                problem = describe_error(error)
        answer = {"error": problem}
        if template:
            clock["day"] = request["day"]
            answer = {"texts": render_jobs(template, names, request["jobs"])}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def compile_template(text: str, clock: dict):
    """As transformers does it: the same environment, names and tags. clock["day"], if any, is today."""
    from datetime import datetime

    import jinja2
    from jinja2 import ext, nodes, sandbox

    version = [int(part) for part in jinja2.__version__.split(".")[:3]]
    if version < [3, 1, 6]:
        raise ValueError(f"jinja2 {jinja2.__version__} has known holes: pip install -U jinja2")

    class Generation(ext.Extension):
        """{% generation %} ... {% endgeneration %} marks what is learned; here it is text like any other."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """Without names such as __class__, by which an object could pass for another."""

        def __init__(*args, **kwargs):  # without a name for the first, so that a template can use every name
            fields = dict(*args[1:], **kwargs)
            need(not any(str(name).startswith("_") for name in fields), "a namespace takes no name that begins with _")
            jinja2.utils.Namespace.__init__(args[0], fields)

        def __setitem__(self, name, value):
            need(not str(name).startswith("_"), "a namespace takes no name that begins with _")
            super().__setitem__(name, value)

    def make_dict(*args, **kwargs):
        return dict(*args, **kwargs)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def strftime_now(form):
        now = datetime.now()
        if clock["day"]:
            now = datetime.fromisoformat(clock["day"])
        return now.strftime(form)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now, "dict": make_dict,
                            "namespace": Namespace}
    return environment.from_string(text)


def render_jobs(template, names: dict, jobs: list[dict]) -> list[dict]:
    """{"text": ...} or {"error": ...} of each."""
    answers, room = [], MOST_TEXT
    for job in jobs:
        try:
            text = template(**names, **job, tools=None, documents=None)
            room -= len(text)
            if room < 0:
                raise ValueError(f"it writes more than {MOST_TEXT >> 20} million characters")
            answers.append({"text": text})
        except Exception as error:
            answers.append({"error": describe_error(error)})
    return answers


def describe_error(error: Exception) -> str:
    """One line."""
    text = " ".join(str(error)[:1000].split())
    return text[:200] or type(error).__name__


def limit_process() -> None:
    """No core file, no other file, no more memory than MEMORY; Windows has only the parent's clock."""
    with suppress(ImportError):
        import resource

        for limit, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_AS, MEMORY)):
            with suppress(OSError, ValueError):  # a lower limit is there already
                resource.setrlimit(limit, (most, most))


def limit_time(seconds: int) -> None:
    """The system ends this process when it has computed for so long from now on, even if its parent is gone."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds + 1, most))


if __name__ == "__main__":
    serve(int(sys.argv[1]))
