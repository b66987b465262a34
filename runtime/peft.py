"""Adapters as the package peft stores them: a folder with adapter_config.json and adapter_model.safetensors.

    write_peft("out/smollm2-lora", "exported/adapter")              # an adapter run of ours -> such a folder
    read_peft("theirs/", "out/theirs", base="out/smollm2")          # and back, on the run that it belongs to

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight          (r, in)
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight          (out, r)
    base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector  (out,), DoRA only
    base_model.model.lm_head.weight                                         a whole tensor of modules_to_save

Names are those of runtime/families.py. One adapter on GPT-2's fused queries, keys and values holds three of ours, block
by block: A = [A_q; A_k; A_v], B = diag(B_q, B_k, B_v). In a model with experts, peft takes the names of the router and
of shared or dense layers for those of the experts, so adapters on these leave as whole tensors.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from configurator import UserError, find_path, need, pick, shown, write_path
from lora import LoraLinear, LoraSettings, adapted, fingerprint, inject, load_adapter, match_targets
from model import LanguageModel, ModelConfig, shapes_only
from runtime import checkpoint
from runtime.archive import read_weights
from runtime.families import Family, Link, family_of, links
from runtime.files import Either, read_json, write_json, writing
from runtime.safetensors import SafetensorsFile, write_safetensors

PREFIX = "base_model.model."
KINDS = {".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_magnitude_vector": "magnitude"}

# ---- names ----


def tables(cfg: ModelConfig) -> tuple[Family, dict[str, Link]]:
    """(family, {name of a weight of ours: its Link}) of a model, the head of a tied one included."""
    with shapes_only():
        names = list(LanguageModel(cfg).state_dict())
    family, found = family_of(cfg), {}
    for link in links(family, replace(cfg, tie_embeddings=False), names, gguf=False):
        link.theirs = [new_name(name) for name in link.theirs]
        found |= dict.fromkeys(link.ours, link)
    return family, found


def new_name(name: str) -> str:
    """Mixtral's experts have another name in transformers 5 than in its files, and peft takes that of the module."""
    return name.replace(".block_sparse_moe.", ".mlp.")


def linear_names(cfg: ModelConfig) -> list[str]:
    """Our modules that can have adapters."""
    with shapes_only():
        model = LanguageModel(cfg)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def means(target: str, module: str) -> bool:
    """How peft compares an entry of target_modules: 'q_proj' means model.layers.0.self_attn.q_proj"""
    return module == target or module.endswith("." + target)


def shorten(chosen: list[str], modules: list[str]) -> list[str]:
    """The shortest target_modules that mean the `chosen` of all modules and no others: their last parts, what follows
    the number of the layer, or the whole names."""
    last = [name.rpartition(".")[2] for name in chosen]
    behind = [re.split(r"\.\d+\.", name, maxsplit=1)[-1] for name in chosen]
    for targets in (last, behind):
        targets = sorted(set(targets))
        meant = {name for name in modules if any(means(target, name) for target in targets)}
        if meant == set(chosen):
            return targets
    return chosen


# ---- ours -> theirs ----


@dataclass
class Part:
    """An adapter in a file: rank and alpha of its own, and its tensors."""

    rank: int
    alpha: float
    tensors: dict[str, Tensor]  # by the end of their names


def write_peft(run_path: str, target: str, lora_base: str = "") -> str:
    """Write the adapters of a run into the new folder `target`, for PeftModel to put on the exported base. `lora_base`
    says where the base is: as a checkpoint of ours, or as the folder into which it was exported. Returns what to tell.
    """
    path, folder = checkpoint.find(run_path), write_path(target)
    need(not folder.exists() or folder.is_dir() and not any(folder.iterdir()),
         f"{folder} is there already; name a new folder")
    exported = is_exported(lora_base)
    state, saved, base, adapters = checkpoint.load_parts(path, "" if exported else lora_base, "disk")
    need(adapters, f"{path} holds no adapters: without them it is exported as a whole model")
    settings, cfg = pick(LoraSettings, saved), pick(ModelConfig, saved)
    family, found = tables(cfg)
    modules = adapted(adapted_model(saved, base, adapters))
    parts, whole = {}, {}
    for name, module in modules.items():
        link = found[f"{name}.weight"]
        theirs = link.theirs[0].removesuffix(".weight")
        if cfg.n_expert and ".ffn." in name:
            whole[theirs] = {".weight": module.weight.detach()} | beside(theirs, found, base)
        elif theirs not in parts:
            parts[theirs] = join_parts(family, link, modules, base, settings.lora_rs)
    every = {name.removesuffix(".weight") for link in found.values() for name in link.theirs}
    config = write_config(settings, parts, list(whole), sorted(every), family.gguf == "gpt2")
    was = Path(state["base"]["path"]).parent
    place = find_path(lora_base) if exported else folder.resolve().with_name(f"{was.name}-hf")  # not the run itself
    config["base_model_name_or_path"] = str(place.resolve())
    tensors = {}
    for name, ends in ({name: part.tensors for name, part in parts.items()} | whole).items():
        for end, tensor in ends.items():
            tensors[PREFIX + name + end] = (tuple(tensor.shape), torch.float32, lambda tensor=tensor: tensor)
    with writing(folder):
        write_safetensors(folder / "adapter_model.safetensors", tensors)
        write_json(folder / "adapter_config.json", config)
    words = f"{folder}: {len(parts) + len(whole)} matrices, for the base in {place}"
    if not is_exported(str(place)):
        words += f", which is not there yet: python convert.py {was} {place}"
    return words


def beside(module: str, found: dict[str, Link], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base's other tensors of a module that is saved whole, by the end of their names: a router may have a bias."""
    others = {}
    for name, link in found.items():
        if link.theirs[0].rpartition(".")[0] == module and not name.endswith(".weight"):
            others[link.theirs[0].removeprefix(module)] = base[name]
    return others


def is_exported(folder: str) -> bool:
    """Whether a folder holds a Hugging Face model."""
    return bool(folder) and (write_path(folder) / "config.json").is_file()


def adapted_model(saved: dict, base: dict[str, Tensor], adapters: dict[str, Tensor]) -> LanguageModel:
    """A model with adapters that is only looked at: its weights are the tensors of `base` themselves."""
    with shapes_only():
        model = LanguageModel(pick(ModelConfig, saved))
    model.load_state_dict(base, assign=True)
    inject(model, pick(LoraSettings, saved))
    load_adapter(model, adapters)
    return model


def join_parts(family: Family, link: Link, modules: dict[str, LoraLinear], base: dict, rs: bool) -> Part:
    """The adapters of one tensor of theirs: one of ours, or those of q, k and v that are there."""
    names = [name.removesuffix(".weight") for name in link.ours]
    there = [modules[name] for name in names if name in modules]
    rank = sum(module.rank for module in there)
    alpha = there[0].scale * (math.sqrt(rank) if rs else rank)
    a = torch.cat([module.lora_a.detach() for module in there])
    rows = [base[name].shape[0] for name in link.ours]
    b, top, left = a.new_zeros(sum(rows), rank), 0, 0
    lengths = []  # of all rows, for DoRA
    for name, height in zip(names, rows, strict=True):
        if module := modules.get(name):
            b[top : top + height, left : left + module.rank] = module.lora_b.detach()
            left += module.rank
        top += height
        if module and module.lora_magnitude is not None:
            lengths.append(module.lora_magnitude.detach())
        else:  # without an adapter, rows keep their lengths
            lengths.append(base[f"{name}.weight"].float().norm(dim=1))
    tensors = {".lora_A.weight": a, ".lora_B.weight": in_rows(family, link, b)}
    if there[0].lora_magnitude is not None:
        tensors[".lora_magnitude_vector"] = in_rows(family, link, torch.cat(lengths))
    return Part(rank, alpha, tensors)


def in_rows(family: Family, link: Link, tensor: Tensor) -> Tensor:
    """Rows in the order in which the file has those of the weight. GPT-2's weights are (in, out), its adapters not."""
    if family.gguf == "gpt2":
        return tensor
    return link.out([tensor])[0].contiguous()


def write_config(settings: LoraSettings, parts: dict[str, Part], whole: list[str], every: list[str],
                 fused: bool) -> dict:
    """adapter_config.json, without its base."""
    need(parts, "these adapters are beside experts only, and peft needs one more: train with lora_targets=all")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": settings.lora_rank,
              "lora_alpha": plain(settings.lora_alpha), "lora_dropout": settings.lora_dropout,
              "use_rslora": settings.lora_rs, "use_dora": settings.lora_dora,
              "target_modules": shorten(list(parts), every), "rank_pattern": {}, "alpha_pattern": {},
              "modules_to_save": whole or None, "fan_in_fan_out": fused, "bias": "none", "init_lora_weights": True,
              "inference_mode": True}
    for name, part in parts.items():
        if part.rank != settings.lora_rank:
            config["rank_pattern"][re.escape(name)] = part.rank
            config["alpha_pattern"][re.escape(name)] = plain(part.alpha)
    return config


def plain(alpha: float) -> float | int:
    """32.0 -> 32, as others write it"""
    return int(alpha) if alpha == int(alpha) else alpha


# ---- theirs -> ours ----

SHAPE = {"peft_type": str, "task_type?": Either(str, None), "r?": int, "lora_alpha?": float, "lora_dropout?": float,
         "use_rslora?": bool, "use_dora?": bool, "bias?": str, "target_modules?": Either([str], str, None),
         "exclude_modules?": Either([str], str, None), "layers_to_transform?": Either([int], int, None),
         "modules_to_save?": Either([str], None), "rank_pattern?": Either({str: int}, None),
         "alpha_pattern?": Either({str: float}, None), "fan_in_fan_out?": Either(bool, None),
         "init_lora_weights?": Either(str, bool, None), "ensure_weight_tying?": Either(bool, None)}
DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "bias": "none"}
# Of all other keys, only these change nothing of what adapters compute, or of what they are on.
HARMLESS = ["auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "layers_pattern",
            "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
            "runtime_config"]
STARTS = [True, False, None, "gaussian", "orthogonal", "eva"]  # init_lora_weights that leave the base as it is


class Adapter:
    """adapter_config.json and the tensors beside it, checked as far as it goes without the base."""

    def __init__(self, folder: Path):
        self.where = folder / "adapter_config.json"
        found = read_json(self.where, SHAPE)
        self.config = DEFAULTS | {key: value for key, value in found.items() if value is not None}
        self.check_config()
        self.file = folder / "adapter_model.safetensors"
        if not self.file.is_file() and (folder / "adapter_model.bin").is_file():
            self.file = folder / "adapter_model.bin"
            tensors = read_weights(self.file)
            self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            load = tensors.__getitem__
        else:
            file = SafetensorsFile(self.file)
            self.shapes, load = file.shapes, file.load
        self.load = lambda name: self.to_float(name, load(name))
        self.adapters: dict[str, dict[str, str]] = {}  # {module: {a, b or magnitude: name in the file}}
        self.bases: dict[str, str] = {}  # copies of the base's weights
        self.whole: dict[str, str] = {}  # {weight: name in the file}, of modules_to_save
        for name in self.shapes:
            self.sort(name)

    def check_config(self) -> None:
        config, where = self.config, self.where
        kind = config["peft_type"]
        need(kind == "LORA", f"{where}: peft_type is {shown(kind)}, and we have LORA only")
        need(config.get("task_type", "CAUSAL_LM") == "CAUSAL_LM",
             f"{where}: task_type is {shown(config.get('task_type'))}, and we have CAUSAL_LM only")
        need(config["bias"] == "none", f"{where}: bias is {shown(config['bias'])}, and ours stay as the base has them")
        for name in sorted(config.keys() - {key.rstrip("?") for key in SHAPE} - set(HARMLESS)):
            off = config[name] in (None, False, [])  # {} is a table of defaults
            need(off, f"{where}: {shown(name)} is set, which our adapters cannot say")
        start = config.get("init_lora_weights")
        need(start in STARTS, f"{where}: init_lora_weights is {shown(start)}, which changes the base; convert the "
                              "adapter to plain LoRA in peft first")
        for name, alpha in {"lora_alpha": config["lora_alpha"], **config.get("alpha_pattern", {})}.items():
            need(0 < alpha < 1e9, f"{where}: the alpha of {shown(name)} is {shown(str(alpha))}")
        for pattern in [*config.get("rank_pattern", {}), *config.get("alpha_pattern", {})]:
            self.check_pattern(pattern)

    def check_pattern(self, pattern: str) -> None:
        """Patterns are a stranger's: one that repeats within a repetition could be compared for hours."""
        repeats = re.findall(r"[*+{]", pattern)
        need(len(pattern) < 1000 and len(repeats) < 3 and not re.search(r"\)[*+{?]|\(\?[^:]|\\[1-9]", pattern),
             f"{self.where}: the pattern {shown(pattern)} repeats too much to be compared safely")
        try:
            re.compile(f"(.*\\.)?({pattern})$")
        except re.error as error:
            raise UserError(f"{self.where}: {shown(pattern)} is no pattern: {error}") from None

    def of_pattern(self, key: str, module: str, default: float) -> float:
        """What rank_pattern or alpha_pattern says of a module; the first that fits counts."""
        for pattern, value in self.config.get(key, {}).items():
            if re.match(f"(.*\\.)?({pattern})$", module):
                return value
        return default

    def sort(self, name: str) -> None:
        """Note what a tensor of the file is."""
        need(name.startswith(PREFIX), f"{self.file}: {shown(name)} does not begin with {PREFIX}")
        inner = new_name(name.removeprefix(PREFIX))
        for end, kind in KINDS.items():
            if inner.endswith(end):
                self.adapters.setdefault(inner.removesuffix(end), {})[kind] = name
                return
        need("lora_" not in inner, f"{self.file}: {shown(name, most=100)} ends with none of {', '.join(KINDS)}")
        if ".base_layer." in inner:
            self.bases[inner.replace(".base_layer.", ".")] = name
        else:
            self.whole[inner] = name

    def to_float(self, name: str, tensor: Tensor) -> Tensor:
        need(tensor.is_floating_point(), f"{self.file}: {shown(name, most=100)} is {tensor.dtype}, and no fraction")
        need(checkpoint.is_finite(tensor.float()), f"{self.file}: {shown(name, most=100)} is not finite (nan or inf)")
        return tensor

    def check_targets(self, modules: list[str]) -> None:
        """Compare the modules of the file with a list in target_modules. Of a pattern, or of "all-linear", the file
        says which ones it means."""
        targets, excluded = self.config.get("target_modules"), self.config.get("exclude_modules", [])
        for module in self.adapters:
            need(module not in self.skipped([module]),
                 f"{self.file}: {shown(module, most=80)} is of no layer in layers_to_transform")
            need(isinstance(excluded, str) or not any(means(target, module) for target in excluded),
                 f"{self.file}: {shown(module, most=80)} is in exclude_modules")
        if isinstance(targets, list):
            for module in self.adapters:
                need(any(means(target, module) for target in targets),
                     f"{self.file}: {shown(module, most=80)} is not in target_modules")
            if isinstance(excluded, list):
                kept = [module for module in modules if not any(means(target, module) for target in excluded)]
                meant = {module for module in kept if any(means(target, module) for target in targets)}
                missing = sorted(meant - self.adapters.keys() - self.skipped(kept))
                need(not missing, f"{self.file}: it lacks the adapter of {missing[:1]}, which target_modules names")
        for target in self.config.get("modules_to_save", []):
            need(any(means(target, name.rpartition(".")[0]) for name in self.whole),
                 f"{self.file}: it lacks {shown(target)}, which modules_to_save names")

    def skipped(self, modules: list[str]) -> set[str]:
        """Those of the layers that layers_to_transform leaves out."""
        wanted = self.config.get("layers_to_transform")
        if wanted in (None, []):
            return set()
        wanted = [wanted] if isinstance(wanted, int) else wanted
        numbers = {module: re.search(r"\.(\d+)\.", module) for module in modules}
        return {module for module, number in numbers.items() if not number or int(number[1]) not in wanted}


def read_peft(folder: str, target: str, base: str) -> str:
    """Make an adapter run of ours, in the new folder `target`, of the PEFT adapter in `folder` and of our run `base`,
    which it belongs to. Where modules_to_save or a changed head are in it, the new run keeps a changed base. Returns
    what to tell.
    """
    need(base, f"{folder} is an adapter: LORA_BASE=<run of ours> says what it is on; first convert its base, too")
    adapter, path, out = Adapter(find_path(folder)), checkpoint.find(base), write_path(target)
    need(not out.exists() or out.is_dir() and not any(out.iterdir()), f"{out} is there already; name a new folder")
    state = checkpoint.load(path, "disk")
    need(not state["base"], f"{path} holds adapters: `python convert.py {path.parent} MERGE=1` makes a base of them")
    saved = checkpoint.saved_settings(state, path, [ModelConfig, LoraSettings])
    weights = checkpoint.weights(state)
    checkpoint.check_weights(path, saved, weights)
    cfg = pick(ModelConfig, saved)
    replaced = read_whole(adapter, cfg, weights)
    if replaced:
        settle_head(adapter, saved, replaced)
    weights = weights | replaced
    settings, adapters = read_adapters(adapter, cfg, weights)
    saved |= vars(settings)
    new = {"format": checkpoint.FORMAT, "settings": json.dumps(saved), "config": "{}", "made_of": "{}", "init": "",
           "tokenizer": state["tokenizer"], "progress": {"step": 0, "best": math.inf}}
    with writing(out):
        if replaced:
            plain_settings = json.dumps(saved | vars(LoraSettings()))
            checkpoint.save(out / "base.pt", new | {"settings": plain_settings, "base": None, "model": weights})
        else:
            checkpoint.keep_base(path, out)
        origin = {"path": str(path.resolve()), "fingerprint": fingerprint(weights)}
        checkpoint.save(out / "best.pt", new | {"base": origin, "model": adapters})
    words = f"{out / 'best.pt'}: {'DoRA' if settings.lora_dora else 'LoRA'} rank {settings.lora_rank} on {base}"
    if replaced:
        words += f", of which it changes {', '.join(sorted(replaced)[:3])}"
    return words


def read_whole(adapter: Adapter, cfg: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """{name of ours: weight} that replace those of the base; copies of the base's weights are compared with it."""
    family, found = tables(cfg)
    replaced, used = {}, set()
    for link in {id(link): link for link in found.values()}.values():
        for source in (adapter.bases, adapter.whole):
            names = [name for name in link.theirs if name in source]
            if not names:
                continue
            need(len(names) == len(link.theirs), f"{adapter.file}: it has {names[0]}, but not all that belongs to it")
            want = [tuple(tensor.shape) for tensor in link.out([weights[name] for name in link.ours])]
            for name, shape in zip(names, want, strict=True):
                key = source[name]
                need(adapter.shapes[key] == shape, f"{adapter.file}: {key} is {adapter.shapes[key]}, and the base has "
                                                   f"{shape}")
            tensors = link.back([adapter.load(source[name]) for name in names])
            used |= {source[name] for name in names}
            for name, tensor in zip(link.ours, tensors, strict=True):
                if source is adapter.whole:
                    replaced[name] = tensor.float().contiguous()
                else:
                    same = torch.equal(weights[name].to(tensor.dtype), tensor)
                    need(same, f"{adapter.file}: its {source[names[0]]} differs from the base, so it is on another one")
    unknown = sorted({*adapter.bases.values(), *adapter.whole.values()} - used)
    need(not unknown, f"{adapter.file}: {shown(str(unknown[:1]), most=100)} is nothing of a {family.model_type}")
    return replaced


def settle_head(adapter: Adapter, saved: dict, replaced: dict[str, Tensor]) -> None:
    """Where a tied head or embedding is replaced: one alone unties them, as peft copies the module that it trains."""
    ends = [name for name in ("embed.weight", "head.weight") if name in replaced]
    if not saved["tie_embeddings"] or not ends:
        return
    names = [name.rpartition(".")[2] for name in adapter.config.get("modules_to_save", [])]
    tied = adapter.config.get("ensure_weight_tying") and {"lm_head", "embed_tokens"} & set(names)  # not wte
    if {"lm_head", "embed_tokens", "wte"} & set(names) and not tied:
        saved["tie_embeddings"] = False
    else:
        replaced |= {"embed.weight": replaced[ends[0]], "head.weight": replaced[ends[0]]}


def read_adapters(adapter: Adapter, cfg: ModelConfig, weights: dict) -> tuple[LoraSettings, dict[str, Tensor]]:
    """(settings, adapters as lora.adapter_state has them). Ours have one rank and one scale: smaller ranks are filled
    with zeros, other scales go into B."""
    config, where = adapter.config, adapter.file
    family, found = tables(cfg)
    linear = linear_names(cfg)
    modules = {}  # {theirs: Link}
    for name in linear:
        link = found[f"{name}.weight"]
        modules[link.theirs[0].removesuffix(".weight")] = link
    need(adapter.adapters, f"{where}: it holds no adapter")
    for module in adapter.adapters:
        need(module in modules, f"{where}: {shown(module, most=80)} is no matrix that can be adapted in this "
                                f"{family.model_type}")
    adapter.check_targets(list(modules))
    ranks = {module: check_shapes(adapter, module, modules[module], weights) for module in adapter.adapters}
    rank = max(ranks.values())
    chosen = [name.removesuffix(".weight") for module in adapter.adapters for name in modules[module].ours]
    try:
        settings = LoraSettings(use_lora=True, lora_rank=rank, lora_alpha=float(config["lora_alpha"]),
                                lora_dropout=config["lora_dropout"], lora_rs=config["use_rslora"],
                                lora_dora=config["use_dora"], lora_targets=",".join(our_targets(chosen, linear)))
    except UserError as error:
        raise UserError(f"{adapter.where}: {error}") from None
    if any(part in name.split(".") for name in chosen for part in ("head", "router")):
        settings.lora_dropout = 0.0  # it cannot act there
    scale = scaling(settings.lora_alpha, rank, settings.lora_rs)
    state = {}
    for module, kinds in adapter.adapters.items():
        link, small = modules[module], ranks[module]
        alpha = adapter.of_pattern("alpha_pattern", module, config["lora_alpha"])
        factor = scaling(alpha, small, settings.lora_rs) / scale
        heights = [weights[name].shape[0] for name in link.ours]
        a, b = (adapter.load(kinds[kind]).float() for kind in "ab")
        a = torch.cat((a, a.new_zeros(rank - small, a.shape[1])))
        b = our_rows(family, link, b) * factor
        b = torch.cat((b, b.new_zeros(len(b), rank - small)), dim=1)
        pieces = {"lora_a": [a] * len(heights), "lora_b": b.split(heights)}
        if settings.lora_dora:
            length = our_rows(family, link, adapter.load(kinds["magnitude"]).float())
            pieces["lora_magnitude"] = length.split(heights)
        for key, tensors in pieces.items():
            for name, tensor in zip(link.ours, tensors, strict=True):
                state[f"{name.removesuffix('.weight')}.{key}"] = tensor.clone()
    return settings, state


def check_shapes(adapter: Adapter, module: str, link: Link, weights: dict[str, Tensor]) -> int:
    """The rank of an adapter, all of whose tensors are there and fit."""
    config, kinds = adapter.config, adapter.adapters[module]
    wanted = ["a", "b"]
    if config["use_dora"]:
        wanted.append("magnitude")
    need(sorted(kinds) == wanted, f"{adapter.file}: the adapter of {module} has {', '.join(sorted(kinds))}, "
                                          f"expected {', '.join(wanted)}")
    rank = adapter.of_pattern("rank_pattern", module, config["r"])
    need(0 < rank < 1 << 20, f"{adapter.where}: the rank of {module} is {shown(str(rank))}")
    out, into = sum(weights[name].shape[0] for name in link.ours), weights[link.ours[0]].shape[1]
    for kind, shape in {"a": (rank, into), "b": (out, rank), "magnitude": (out,)}.items():
        found = adapter.shapes[kinds[kind]] if kind in kinds else shape
        need(found == shape, f"{adapter.file}: {kinds.get(kind)} is {found}, expected {shape}")
    return rank


def our_rows(family: Family, link: Link, tensor: Tensor) -> Tensor:
    """The inverse of `in_rows`."""
    if family.gguf == "gpt2":
        return tensor
    return link.back([tensor])[0]


def our_targets(chosen: list[str], linear: list[str]) -> list[str]:
    """lora_targets that mean these modules and no others: 'q', 'v', or whole names"""
    last = sorted({name.rpartition(".")[2] for name in chosen})
    for targets in (["all"], ["all", "head"], last):
        if set(targets) <= {"all", *last} and match_targets(linear, targets) == set(chosen):
            return targets
    return sorted(chosen)


def scaling(alpha: float, rank: int, rs: bool) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA"""
    return alpha / (math.sqrt(rank) if rs else rank)
