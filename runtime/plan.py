"""The plan of a run, before it costs anything: its memory by parts, FLOPs, time, and the devices that would hold it.

    python train.py config/gpt2.py DRY_RUN=1                       # builds, prepares and writes nothing
    torchrun --nproc_per_node=8 train.py config/gpt2.py DRY_RUN=1  # the same with the share of each of eight processes

Memory is counted by `runtime/ledger.py`. What needs several devices is arithmetic; docs/scaling.md compares with runs.
"""

import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path

import torch

from configurator import Settings
from lora import LoraSettings, inject
from model import LanguageModel, ModelConfig, shapes_only
from optim import Optimizer, OptimSettings
from runtime import checkpoint
from runtime.device import PEAK_FLOPS, Machine, choose_dtype, memory, peak_memory
from runtime.ledger import Demand, build, sum_bytes
from runtime.log import Progress
from runtime.resume import HERE, MUST, adopt, follow, read_part
from runtime.run import base_of, take_over
from text.corpus import forced

# GB (10^9 bytes) by the names of PEAK_FLOPS, from the same data sheets. The cards have up to 7 % more, which the CUDA
# context and holes between tensors take.
MEMORY = {"T4": 16, "RTX 4090": 24, "L40S": 48, "A100": 80, "H100": 80, "H200": 141, "B200": 180}
UTILISATION = 0.4  # share of the peak FLOP/s that training reaches: an assumption, as is the price
DOLLARS = 2.0  # of a device for an hour
TOKENS_PER_PARAMETER = 20  # the best use of compute (Chinchilla, arXiv 2203.15556)
LARGEST_TIMED = 2e8  # parameters of a model that we build to measure the speed
SAVING = "CHECKPOINT_ACTIVATIONS=1"


def show_plan(s: Settings, out_dir: Path, machine: Machine, plan_steps: Callable) -> int:
    """Print the plan of a run; `plan_steps` is train's. Returns the exit code."""
    complete(s, out_dir, machine)
    plan = plan_steps(s, machine.world_size, Progress())
    if not machine.is_main:
        return 0
    rows, accumulates = plan.micro_batch, plan.per_rank > plan.micro_batch
    if s.task == "grpo":
        rows *= s.group_size
    program, speed = program_bytes(machine), tokens_per_second(s, plan, machine)
    variants = {"as set": s}
    if not s.reversible and not s.checkpoint_activations:
        variants[SAVING] = copy(s)
        variants[SAVING].checkpoint_activations = True
    here, gpus = {}, {}
    for name, each in variants.items():
        here[name] = Demand(each, rows, accumulates, machine.dtype, machine.on_cuda)
        gpus[name] = Demand(each, rows, accumulates, torch.bfloat16, gpu=True)
    with shapes_only():
        model = build(s, machine.dtype)
    machine.print(describe_length(s, plan, model))
    machine.print(describe_memory(s, here, rows, model, program, machine))
    machine.print(describe_sharing(s, gpus, rows, machine.world_size))
    machine.print(describe_devices(s, here, gpus, plan, model.flops_per_token(), speed, program, machine))
    return 0


def complete(s: Settings, out_dir: Path, machine: Machine) -> None:
    """Complete the settings as the run would, but read only settings: of the run in out_dir, else of its base."""
    state = None
    if "train" not in forced(s.overwrite):
        state = checkpoint.load_newest(out_dir, machine.print, "meta")
    if state:
        machine.print(f"resume   the run in {out_dir}")
        saved = checkpoint.saved_settings(state, out_dir, s.parts)
        adopt(s, saved, MUST)
        follow(s, saved, read_part(state, "config", dict), s.source.keys() - MUST - HERE, machine.print)
        s.set("vocab_size", saved["vocab_size"], "checkpoint")
    elif s.task != "pretrain" or s.use_lora or s.init_from not in ("auto", "scratch"):
        path = base_of(s)
        machine.print(f"init     from {path}")
        saved = checkpoint.saved_settings(checkpoint.load(path, "meta"), path, s.parts)
        take_over(s, saved, machine.print)
        s.set("vocab_size", saved["vocab_size"], "checkpoint")
    for part in s.parts:  # refuses wrong settings
        s.part(part)
    machine.dtype, machine.reason = choose_dtype(s.dtype, machine.device)


# ---- what this machine tells -----------------------------------------------------------------------------------------


def program_bytes(machine: Machine) -> float:
    """Of this process: Python, torch and what its first products bring, before any tensor of size."""
    ids = torch.zeros(1, 64, dtype=torch.int64)
    LanguageModel(ModelConfig(vocab_size=64, seq_len=64, n_layer=1))(ids, ids).sum().backward()
    return peak_memory(machine) * 1e9


def tokens_per_second(s: Settings, plan, machine: Machine) -> float | None:
    """Tokens/s of a process, from some seconds of one block of each kind, the head and the update, which are scaled by
    FLOPs and parameters. None if these alone are large."""
    cfg = s.part(ModelConfig)
    dense = min(1, cfg.n_dense)
    cut = replace(cfg, n_enigma=min(1, cfg.n_enigma), n_dense=dense, n_layer=min(dense + 1, cfg.n_layer))
    with shapes_only():
        whole = LanguageModel(cfg)
        if LanguageModel(cut).count_parameters()["total"] > LARGEST_TIMED:
            return None
    model = LanguageModel(cut)
    if s.use_lora:
        inject(model, s.part(LoraSettings))
    model.to(machine.device).train()
    optimizer = Optimizer(model, s.part(OptimSettings))
    ids = torch.randint(cut.vocab_size, (1, cut.seq_len), device=machine.device)
    x = torch.randn(1, cut.seq_len, cut.d_model, device=machine.device, requires_grad=True)

    def blocks(tokens: int) -> None:
        with machine.autocast():
            embedded, place = model.embed_at(ids[:, :tokens])
            y = model.norm(model.through_blocks(embedded, place, None))
        y.float().sum().backward()

    def head(tokens: int) -> None:
        with machine.autocast():
            nats = model.nats(x[:, :tokens], ids[:, :tokens], None)
        nats.sum().backward()

    T = min(64, cut.seq_len)
    T = max(T, min(cut.seq_len, int(T * 0.3 / seconds_of(lambda: blocks(T), machine))))
    tokens, seconds = plan.per_rank * s.seq_len, 0.0
    in_head = 6 * cut.d_model * cut.vocab_size
    deep = (whole.flops_per_token() - in_head) / (model.flops_per_token(T) - in_head)
    for part, scale in ((blocks, deep), (head, 1.0)):
        long, half = seconds_of(lambda part=part: part(T), machine), seconds_of(lambda part=part: part(T // 2), machine)
        each = max(0.0, long - half) / (T - T // 2)
        a_pass = long - each * T  # whatever its tokens: the gradient of the embedding, for one
        seconds += tokens * each * scale + plan.per_rank // plan.micro_batch * a_pass
    deeper = beside_tables(whole) / beside_tables(model)
    seconds += seconds_of(lambda: optimizer.step(1e-3), machine) * max(1.0, deeper)
    return tokens / seconds


def beside_tables(model: LanguageModel) -> int:
    counts = model.count_parameters()
    return counts["total"] - counts["embedding"]


def seconds_of(function: Callable[[], None], machine: Machine) -> float:
    """Seconds of a call, after a first one: the mean over 0.15 seconds or more."""
    function()
    begin, count, seconds = time.perf_counter(), 0, 0.0
    while seconds < 0.15:
        function()
        if machine.on_cuda:
            torch.cuda.synchronize(machine.device)
        count, seconds = count + 1, time.perf_counter() - begin
    return seconds / count


# ---- what is printed -------------------------------------------------------------------------------------------------


def describe_length(s: Settings, plan, model: LanguageModel) -> str:
    counts, flops, tokens = model.count_parameters(), model.flops_per_token(), plan.samples * s.seq_len
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    per_step = plan.sequences * s.seq_len
    lines = [f"model    {counts['total']:,} parameters, {beside_tables(model):,} without embeddings, "
             f"{counts['active']:,} active per token, {trained:,} trained"]
    if s.source["vocab_size"] != "checkpoint":
        lines.append(f"         vocab_size={s.vocab_size} as set; the tokenizer of the data may have fewer entries")
    if s.task != "pretrain":
        lines.append("         once it has read its examples, a run fits batch_size and max_steps to them, unless set")
    if s.task == "grpo":
        lines.append(f"         a pass has {s.group_size} answers to each question; to sample them takes more time")
    lines.append(f"steps    {plan.max_steps:,} of {per_step:,} tokens, {short(tokens)} tokens in all; "
                 f"{short(flops * per_step)} FLOPs a step, {short(flops * tokens)} in all")
    if s.task == "pretrain" and not s.use_lora:
        best = TOKENS_PER_PARAMETER * counts["total"]
        lines.append(f"         {TOKENS_PER_PARAMETER} tokens a parameter (Chinchilla, arXiv 2203.15556) would be "
                     f"{short(best)}: the run has {tokens / best:.2g} times as many")
    return "\n".join(lines)


def describe_memory(s: Settings, here: dict[str, Demand], rows: int, model: LanguageModel, program: float,
                    machine: Machine) -> str:
    dtype = str(machine.dtype).removeprefix("torch.")
    words = ["weights", f"moments of {s.optimizer}", "average of the weights", "gradients",
             "working copies of the update", "activations kept for the backward pass", "logits of the head",
             "most at once in the forward", "most at once in the backward", "most at once in the update"]
    columns, parts = [[f"         {each}" for each in words]], 1
    if machine.shards:
        parts = machine.parts
    for each in here.values():
        lasting, passing = each.lasting, each.at(rows, machine.shards)
        lasts = lasting.weights, lasting.moments, lasting.average, lasting.gradients, lasting.update
        most = each.most(rows, machine.parts, machine.shards)
        columns.append([gb(size / parts) for size in lasts])
        columns[-1] += map(gb, (passing.activations, passing.head - passing.activations, *most.values()))
    lines = [[f"memory   GB of a process; a pass of {rows} x {s.seq_len} tokens, {dtype}", *here],
             *zip(*columns, strict=True)]
    with shapes_only():
        states = filter(None, model.new_cache(1, s.seq_len).states())
    cache = sum_bytes(tensor for state in states for tensor in vars(state).values())
    more = f"         decoding: {gb(cache)} for the cache of a text of {s.seq_len} tokens"
    if machine.device.type == "cpu":
        more += (f"\n         the program itself: {gb(program)}, as this process; the holes of its heap come on top: "
                 "docs/scaling.md")
    return f"{side_by_side(lines)}\n{more}"


def describe_sharing(s: Settings, gpus: dict[str, Demand], rows: int, world_size: int) -> str:
    worlds = sorted({1, 8, 64, 1000, world_size})
    lines = [[f"sharing  GB of a GPU by number of processes, {rows} x {s.seq_len} tokens each, bfloat16",
              *(f"{n:,}" for n in worlds)]]
    for name, each in gpus.items():
        for words, shards in (("a copy each (DDP)", False), ("SHARD=1", True)):
            values = [max(each.most(rows, n, shards).values()) for n in worlds]
            lines.append([f"         {words}, {name}", *map(gb, values)])
    return side_by_side(lines)


def describe_devices(s: Settings, here: dict[str, Demand], gpus: dict[str, Demand], plan, flops: float,
                     speed: float | None, program: float, machine: Machine) -> str:
    """The largest batch_size of each device, its speed, and its hours for the whole run."""
    tokens, each_row = plan.samples * s.seq_len, 1
    if s.task == "grpo":
        each_row = s.group_size
    if s.reversible or s.checkpoint_activations:
        flops *= 4 / 3  # the forward pass runs twice
    lines = [["devices  and the largest batch_size they hold", "GB", *here, "+ SHARD=1 on 8", "tokens/s", "hours"]]

    def add(name: str, room: float, demands: dict[str, Demand], eight: str, rate: float | None) -> float:
        sizes = [str(each.largest(room) // each_row) for each in demands.values()]
        known, hours = ["-", "-"], 0.0
        if rate:
            hours = tokens / rate / 3600
            known = [f"{rate:,.0f}", f"{hours:,.3g}"]
        lines.append([f"         {name}", f"{room / 1e9:.0f}", *sizes, eight, *known])
        return hours

    room = memory(machine.device) - program  # for one process
    add("this machine, measured", room, here, "-", speed)
    hours = {}
    for name, size in MEMORY.items():
        eight = gpus[list(gpus)[-1]].largest(size * 1e9, 8, shards=True) // each_row
        hours[name] = add(name, size * 1e9, gpus, str(eight), UTILISATION * PEAK_FLOPS[name] / flops)
    return (f"{side_by_side(lines)}\n"
            f"         hours: one device, as set, at an assumed {UTILISATION:.0%} of its peak FLOP/s in bfloat16; N "
            f"devices take 1/N at best\n"
            f"cost     at an assumed {DOLLARS:g} $ an hour: {hours['H100']:,.3g} H100 hours x {DOLLARS:g} $ = "
            f"{hours['H100'] * DOLLARS:,.3g} $")


def gb(size: float) -> str:
    """Bytes as GB: 1234567890 -> '1.23'"""
    return f"{size / 1e9:,.3g}"


def short(number: float) -> str:
    """10_000_000_000 -> '10 billion'; 2.5e21 -> '2.5e+21'"""
    for size, name in ((1e9, " billion"), (1e6, " million")):
        if size <= number < 1000 * size:
            return f"{number / size:.3g}{name}"
    return f"{number:.3g}"


def side_by_side(lines: list) -> str:
    """Columns side by side: the first to the left, numbers to the right."""
    first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(first), *map(str.rjust, line[1:], others)]) for line in lines)
