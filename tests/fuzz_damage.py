"""Damage files of runs at random and use them: python tests/fuzz_damage.py 500 [SEED]

Each trial copies two small runs (one of them adapters) and their tokens, damages one file, resumes the run, and loads
its best model. It counts the results by file:

    recovered   a message, and the same bits at the end as without the damage
    said        one sentence, and no result
    harmless    no message, and the same bits at the end
    silent      no message, and other bits at the end: our fault
    traceback   our fault

In log.csv, numbers that changed into other numbers do not count.
"""

import contextlib
import io
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import plot
import train
from configurator import UserError
from conftest import tiny_run
from runtime import checkpoint
from test_train import same

KINDS = {  # the run that is used, and the file that is damaged
    "newest step": ("run", "run/step_00000004.pt"), "best": ("run", "run/best.pt"), "log": ("run", "run/log.csv"),
    "adapters": ("lora", "lora/step_00000004.pt"), "base": ("lora", "lora/base.pt"),
    "tokenizer": ("lora", "lora/tokenizer.json"), "its config": ("lora", "lora/tokenizer_config.json"),
    "tokens": ("run", "run-cache/*/train_00000.npy"), "val tokens": ("run", "run-cache/*/val_00000.npy"),
    "meta": ("run", "run-cache/*/meta.json"), "its tokenizer": ("run", "run-cache/*/tokenizer.json"),
}
RESULTS = ("recovered", "said", "harmless", "silent", "traceback")


def settings(folder: Path, name: str, steps: int) -> list[str]:
    more = {}
    if name == "lora":
        more["use_lora"] = 1
        if not (folder / name).exists():
            more["init_from"] = folder / "run"
    return tiny_run(folder / "text" / "words.txt", folder / name, max_steps=steps, eval_interval=2, eval_tokens=64,
                    schedule="constant", cache_dir=folder / f"{name}-cache", **more)


def make_runs(folder: Path) -> None:
    words = random.Random(0).choices("the quick brown fox jumps over a lazy dog and runs home".split(), k=3000)
    (folder / "text").mkdir(parents=True)
    (folder / "text" / "words.txt").write_text("\n".join(" ".join(words[i : i + 9]) for i in range(0, 3000, 9)))
    for name in ("run", "lora"):
        train.main(settings(folder, name, 4))


def damage(path: Path, chance: random.Random) -> str:
    """Change the file; returns how."""
    content = bytearray(path.read_bytes())
    place, how = chance.randrange(len(content)), chance.choice(["bit", "bit", "bit", "byte", "zeros", "cut", "tail",
                                                                "end", "twice", "empty", "gone"])
    if how == "bit":
        content[place] ^= 1 << chance.randrange(8)
    elif how == "byte":
        content[place] ^= chance.randrange(1, 256)
    elif how == "zeros":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    elif how == "cut":
        del content[place:]
    elif how == "tail":  # the end of a zip is its directory, most of which no checksum covers
        content[-chance.randrange(1, min(len(content), 3000))] ^= 1 << chance.randrange(8)
    elif how == "end":
        content += chance.randbytes(9)
    elif how == "twice":
        content[place:place] = content[place : place + 100]
    elif how == "empty":
        content.clear()
    path.write_bytes(content)
    if how == "gone":
        path.unlink()
    return how


def use(folder: Path, kind: str):
    """(the weights after using the runs there, what was printed)"""
    name, said = KINDS[kind][0], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        if kind == "log":
            plot.read_curves(folder / "run" / "log.csv")
        best = checkpoint.load_model(checkpoint.find(folder / name))[0].state_dict()
        train.main(settings(folder, name, 6))
        newest = checkpoint.load_newest(folder / name, lambda text: None)
    return {"best": best} | {name: newest[name] for name in ("model", "optimizer")}, said.getvalue()


def trial(whole: Path, folder: Path, kind: str, expected, chance: random.Random) -> tuple[str, str]:
    """(one of RESULTS, how the file was damaged)"""
    shutil.copytree(whole, folder)
    path = chance.choice(sorted(folder.glob(KINDS[kind][1])))
    how = damage(path, chance)
    try:
        got, said = use(folder, kind)
    except UserError:
        return "said", how
    except Exception:
        return "traceback", f"{how}\n{traceback.format_exc()}"
    finally:
        shutil.rmtree(folder)
    spoken = any(word in said for word in ("damaged", "cannot be read", "not a checkpoint", "was removed"))
    if not same(got, expected):
        return "silent", f"{how}, {said[-1000:]}"
    return "recovered" if spoken else "harmless", how


def fuzz(trials: int, seed: int = 0) -> dict[str, Counter]:
    """{kind of file: Counter of results}; the trials that failed are printed."""
    chance, counts = random.Random(seed), {kind: Counter() for kind in KINDS}
    with tempfile.TemporaryDirectory() as root, contextlib.chdir(root):
        whole = Path(root) / "at"
        with contextlib.redirect_stdout(io.StringIO()):
            make_runs(whole)
        copy = Path(root) / "copy"
        expected = {}
        for kind in KINDS:
            shutil.copytree(whole, copy)
            expected[kind], _ = use(copy, kind)
            shutil.rmtree(copy)
        for number in range(trials):
            kind = list(KINDS)[number % len(KINDS)]
            result, how = trial(whole, copy, kind, expected[kind], chance)
            counts[kind][result] += 1
            if result in ("silent", "traceback"):
                print(f"trial {number} of seed {seed}: {kind}, {result}: {how}")
    return counts


if __name__ == "__main__":
    counted = fuzz(*map(int, sys.argv[1:3]))
    print(f"{'':13}", *(f"{name:>10}" for name in RESULTS))
    for kind, counter in [*counted.items(), ("all", sum(counted.values(), Counter()))]:
        print(f"{kind:13}", *(f"{counter[name]:10}" for name in RESULTS))
