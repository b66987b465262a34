"""Greedy decoding with the same weights in ours, transformers and llama.cpp, which take turns."""

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.llama_cpp import FOLDER, LlamaCpp
from benchmarks.timing import TINY, limits
from bpe import BPETokenizer
from configurator import ROOT, Settings, UserError, need
from generate import SamplingSettings, generate, stream
from inference import speed_up, weight_bytes
from model import LanguageModel, ModelConfig
from runtime import checkpoint
from runtime.archive import LazyTensor
from runtime.device import MachineSettings, choose_machine
from runtime.files import optional
from runtime.foreign import write_gguf_model, write_hf_folder
from text.tokenizer import Tokenizer

SHAPES = {
    "gpt2": dict(vocab_size=50257, seq_len=1024, d_model=768, n_layer=12, n_head=12, n_kv_head=12, ffn="gelu",
                 bias=True, norm="layernorm", norm_eps=1e-5, qk_norm=False, position="learned"),
    "smollm2": dict(vocab_size=49152, seq_len=8192, d_model=576, n_layer=30, n_head=9, n_kv_head=3, d_ff=1536,
                    ffn="swiglu", norm_eps=1e-5, qk_norm=False, rope_theta=1e5),
}
FORMATS = {"float32": (torch.float32, ""), "bfloat16": (torch.bfloat16, ""), "int8": (torch.bfloat16, "int8"),
           "int4": (torch.bfloat16, "int4")}
Decode = Callable[[list[list[int]], int], tuple[list[float], list[list[int]]]]


@dataclass
class Candidate:
    size: int  # bytes of all weights
    decode: Decode  # (prompts, n) -> (the time at the start and after each of n steps, n new ids of each row)
    most_rows: int = 8


@torch.inference_mode()
def bench_generate(s: Settings, argv: list[str]) -> dict:
    """One row behind a prompt of 512 tokens, and eight rows behind 64 tokens each."""
    machine, name, (length, new) = choose_machine(s.part(MachineSettings)), s.model or "gpt2", (512, 33)
    if s.smoke:
        length, new = 64, 5
    top, (model, tokenizer) = limits(machine, s.smoke), model_of_name(name, s.smoke)
    model.to(machine.device)
    length = min(length, model.cfg.seq_len - new)
    ids = ids_of_our_files(tokenizer)
    alone, together = [ids[:length]], [ids[i * length :][: length // 8] for i in range(8)]
    candidates = {}
    for kind, (dtype, quant) in FORMATS.items():
        candidates[f"ours {kind}"] = ours(copy.deepcopy(model).to(dtype), quant)
    print(f"{name}: {length} tokens of prompt, {new - 1} steps, median of {s.repeats}; 8 rows of {length // 8}")
    with tempfile.TemporaryDirectory() as folder:
        candidates |= peers(model, tokenizer, Path(folder), alone)
        one = measure(candidates, alone, new, s.repeats)
        eight = measure({kind: c for kind, c in candidates.items() if c.most_rows > 1}, together, new, s.repeats)
    rows, share, expected = {}, share_read(model), one["ours float32"]["ids"][0]
    for kind, found in one.items():
        read = candidates[kind].size * share
        rows[kind] = {"ms": found["ms"], "% spread": found["% spread"], "first_ms": found["first_ms"],
                      "floor_ms": read / top["bandwidth"] * 1e3, "mb": read / 1e6,
                      "same_ids": same_beginning(expected, found["ids"][0]) / new}
        if kind in eight:
            rows[kind]["tokens_per_s_of_8"] = 8e3 / eight[kind]["ms"]
    print_rows(rows)
    return {"model": name, "limits": top, "rows": rows}


def measure(candidates: dict[str, Candidate], prompts: list[list[int]], new: int, repeats: int) -> dict[str, dict]:
    """{candidate: {'ms' of a step, its '% spread' over the turns, 'first_ms', 'ids'}}; a first turn does not count."""
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    ids = {}
    for _ in range(1 + repeats):
        for name, candidate in candidates.items():
            times, ids[name] = candidate.decode(prompts, new)
            first, *steps = [(b - a) * 1e3 for a, b in pairwise(times)]
            turns[name].append((first, statistics.median(steps)))
    found = {}
    for name, counted in turns.items():
        firsts, steps = zip(*counted[1:], strict=True)
        ms = statistics.median(steps)
        found[name] = {"ms": ms, "% spread": (max(steps) - min(steps)) / ms * 100, "ids": ids[name],
                       "first_ms": statistics.median(firsts)}
    return found


def print_rows(rows: dict[str, dict]) -> None:
    """A line for each candidate, then one for each of ours with its speed relative to each peer's, which it adds."""
    print(f"{'':<18} {'MB':>6} {'ms/token':>9} {'spread':>7} {'floor, ms':>10} {'first token, ms':>16} "
          f"{'8 rows, tokens/s':>17} {'same ids':>9}")
    for name, row in rows.items():
        eight = row.get("tokens_per_s_of_8", math.nan)
        print(f"{name:<18} {row['mb']:>6.0f} {row['ms']:>9.2f} {row['% spread']:>6.0f}% {row['floor_ms']:>10.2f} "
              f"{row['first_ms']:>16.1f} {eight:>17.1f} {row['same_ids']:>9.0%}", flush=True)
    others = [name for name in rows if not name.startswith("ours")]
    for name in [name for name in rows if name not in others]:
        row, parts = rows[name], []
        for peer in others:
            row[f"x {peer}"] = rows[peer]["ms"] / row["ms"]
            first = row["first_ms"] / rows[peer]["first_ms"]
            parts.append(f"{row[f'x {peer}']:.2f} x {peer} (first token {first:.2f} x its time)")
        print(f"{name}: {', '.join(parts)}")


# ---- what is decoded -------------------------------------------------------------------------------------------------


def model_of_name(name: str, smoke: bool) -> tuple[LanguageModel, Tokenizer]:
    """A model in float32, of a run or with random weights, and a tokenizer for it; "" is the newest run."""
    if name not in SHAPES:
        model, tokenizer, _ = checkpoint.load_model(checkpoint.find(name))
        return model.eval(), tokenizer
    shape = SHAPES[name]
    if smoke:
        shape = shape | TINY | {"d_ff": 0}
    torch.manual_seed(0)
    tokenizer = BPETokenizer.train([(ROOT / "bpe.py").read_text(encoding="utf-8")], 512, workers=1)
    return LanguageModel(ModelConfig(**shape)).eval(), tokenizer


def ids_of_our_files(tokenizer: Tokenizer) -> list[int]:
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))[:4])
    return tokenizer.encode(text)


def share_read(model: LanguageModel) -> float:
    """The share of the weights that a step reads: of tables of embeddings one row, of experts those of a token."""
    counts = model.count_parameters()
    read = counts["active"]
    if model.position is not None:
        read -= model.position.weight.numel()
    if not model.cfg.tie_embeddings:
        read -= model.embed.weight.numel()
    return read / counts["total"]


def same_beginning(a: list[int], b: list[int]) -> int:
    """How many ids are the same up to the first that differs: [1, 2, 3], [1, 2, 4] -> 2"""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


# ---- who decodes -----------------------------------------------------------------------------------------------------


def ours(model: LanguageModel, quant: str) -> Candidate:
    speed_up(model, quant)

    def decode(prompts, n):
        times, new = [time.perf_counter()], []
        for tokens in stream(model, prompts, SamplingSettings(temperature=0, max_new_tokens=n)):
            new.append(tokens)
            times.append(time.perf_counter())
        return times, list(map(list, zip(*new, strict=True)))

    return Candidate(weight_bytes(model), decode)


def peers(model: LanguageModel, tokenizer: Tokenizer, folder: Path, prompts: list[list[int]]) -> dict[str, Candidate]:
    """Those that are here; a line says how to get the others."""
    found, device = {}, model.embed.weight.device
    try:
        theirs = as_transformers(model, tokenizer, folder / "hf").to(device)
    except UserError as error:
        print(f"without transformers: {error}")
    else:
        found["transformers bf16"] = transformers(theirs, model, prompts)
    if device.type != "cpu" or not FOLDER.exists():
        print("without llama.cpp, with which we compare on a CPU: `python tests/peers.py` fetches it for Linux")
        return found
    llama = LlamaCpp(FOLDER)
    for kind in ("F16", "Q8_0"):
        write_gguf_model(folder / f"{kind}.gguf", model.cfg, lazy_weights(model), tokenizer, kind)
        found[f"llama.cpp {kind.lower()}"] = llama_cpp(llama, folder / f"{kind}.gguf")
    return found


def lazy_weights(model: LanguageModel) -> dict[str, LazyTensor]:
    return {name: LazyTensor(tuple(each.shape), each.float) for name, each in model.state_dict().items()}


def as_transformers(model: LanguageModel, tokenizer: Tokenizer, folder: Path):
    """The same model in Hugging Face's classes, in float32; its files, with the tokenizer's, are in `folder`."""
    theirs = optional("transformers", "transformers", "this comparison")
    theirs.utils.logging.disable_progress_bar()
    write_hf_folder(folder, model.cfg, lazy_weights(model), tokenizer, torch.float32)
    return theirs.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def transformers(peer, model: LanguageModel, prompts: list[list[int]]) -> Candidate:
    """In bfloat16, with its cache. In float32 it must first write what ours does, or the comparison means nothing."""
    peer.generation_config = type(peer.generation_config)(pad_token_id=0)  # greedy; nothing ends a row

    def decode(prompts, n):
        ids = torch.tensor(prompts, device=peer.device)
        times = [time.perf_counter()]

        def tick(ids, scores):
            ids[:, -1].tolist()  # as who streams them would; on a GPU they are there only then
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        found = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, stopping_criteria=[tick])
        return times, found[:, ids.shape[1] :].tolist()

    short = [prompt[:16] for prompt in prompts]
    same = decode(short, 5)[1] == generate(model, short, SamplingSettings(temperature=0, max_new_tokens=5))
    need(same, "in float32, transformers does not write the tokens that ours does: there is nothing to compare")
    peer.to(torch.bfloat16)
    return Candidate(weight_bytes(peer), decode)


def llama_cpp(llama: LlamaCpp, file: Path) -> Candidate:
    """Alone: many rows would need its batches."""
    peer, threads = llama.load(file, n_ctx=1024), torch.get_num_threads()

    def decode(prompts, n):
        (part,), new = prompts, []
        with peer.reader(threads) as read:
            times = [time.perf_counter()]
            for _ in range(n):
                part = [int(read(part).argmax())]
                new += part
                times.append(time.perf_counter())
        return times, [new]

    return Candidate(file.stat().st_size, decode, most_rows=1)
