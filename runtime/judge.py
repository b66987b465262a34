"""Rewards: a function of the user's, in a process of its own that can be stopped.

    judge = Judge("rewards.py:exact", seconds=10)
    judge.score([("2 + 3?", "5", "5"), ("2 + 3?", "6", "5")])  ->  [1.0, 0.0]

    def exact(question: str, answer: str, reference: str) -> float:     # in rewards.py
        return float(answer.strip() == reference)

A function that raises, takes too long, or returns no finite number gives no reward: NaN. It may call C code that no
signal and no thread can stop; so its process is killed, and the next answer has a new one. The limit is of time: the
function is a program of the user, with all rights of the user. Whatever it runs must be fit to run.

This file is that process, too: `python -m runtime.judge` reads lines of JSON and answers with such lines.
"""

import importlib.util
import json
import math
import os
import sys
from collections import Counter

from configurator import UserError, find_path, need, shown
from runtime.screen import tell
from runtime.workers import LineProcess, start_worker


class Judge:
    """`failures` counts why answers have no reward."""

    def __init__(self, reward: str, seconds: float):
        need(reward, "TASK=grpo needs REWARD=<file.py>:<function>, at every start")
        path, _, name = reward.rpartition(":")
        need(path and name.isidentifier(), f"reward={reward}: name a file and a function, REWARD=my_rewards.py:exact")
        found = find_path(path)
        need(found and found.is_file(), f"reward={reward}: there is no file {path}")
        hello = {"path": str(found.resolve()), "name": name}
        self.process = LineProcess("runtime.judge", seconds=seconds, hello=hello)
        self.failures: Counter[str] = Counter()
        self.late = f"takes more than {seconds:g} seconds, or ends its process"
        first = self.process.ask({})
        need(first is not None, f"reward={reward} {self.late} when it is imported")
        need("error" not in first, f"reward={reward} cannot be used: {shown(first.get('error'), most=100)}")

    def score(self, jobs: list[tuple[str, str, str]]) -> list[float]:
        """The reward of each (question, answer, reference)."""
        rewards = []
        for job in jobs:
            found = self.process.ask({"job": job}) or {"error": self.late}
            if "error" in found:
                self.failures[found["error"]] += 1
                if len(self.failures) <= 5 and self.failures[found["error"]] == 1:
                    tell(f"reward   {shown(found['error'], most=150)}: such an answer has no weight")
            rewards.append(found.get("reward", math.nan))
        return rewards


# ---- inside the process ---------------------------------------------------------------------------------------------


def judge_lines() -> None:
    """Answer requests until there are no more; the first brings the place of the function."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the function prints is no answer
    start_worker(None, os.getppid())
    function = None
    for line in sys.stdin.buffer:
        request, answer = json.loads(line), {}
        try:
            if "path" in request:
                function = load_function(request["path"], request["name"])
            if "job" in request:
                answer = {"reward": checked_reward(function(*request["job"]))}
        except BaseException as error:  # also SystemExit
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error)[:300].split())}"}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def load_function(path: str, name: str):
    sys.path.insert(0, os.path.dirname(path))
    spec = importlib.util.spec_from_file_location("reward_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise UserError(f"the file has no function {name}")
    return getattr(module, name)


def checked_reward(value) -> float:
    reward = float(value)
    if not math.isfinite(reward):
        raise ValueError(f"{reward} is no reward")
    return reward


if __name__ == "__main__":
    judge_lines()
