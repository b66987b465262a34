"""Models of others as files: a Hugging Face folder or a GGUF file, read and written one tensor at a time.

    model = read_hf_folder(Path("SmolLM2-135M"))               # or read_gguf_model: settings and shapes, no tensor yet
    cfg, weights = load_weights(model)                         # {our name: LazyTensor}

    write_hf_folder(folder, cfg, weights, tokenizer, torch.bfloat16)
    write_gguf_model(path, cfg, weights, tokenizer, "Q8_0")

Every tensor of a file is used once and every parameter is filled; anything else is a sentence with the names.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from configurator import need, shown
from model import LanguageModel, ModelConfig, shapes_only
from runtime import checkpoint, gguf
from runtime.archive import LazyTensor, read_weights
from runtime.families import (
    ROPE_FACTORS,
    Family,
    Link,
    family_of,
    float8_blocks,
    links,
    read_gguf_meta,
    read_hf_config,
    rope_factors,
    stored_as,
    write_gguf_meta,
    write_hf_config,
)
from runtime.files import read_json, write_json, writing
from runtime.safetensors import NAMES, SafetensorsFile, write_safetensors
from text.tokenizer import Tokenizer
from text.tokenizer_gguf import read_tokenizer_meta, write_tokenizer_meta
from text.tokenizer_hf import generation_config, read_hf_tokenizer, write_hf_tokenizer

SCALE = "_scale_inv"  # behind the name of a float8 weight
HEAD = {False: "lm_head.weight", True: "output.weight"}  # in a Hugging Face file, in a GGUF file
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Buffers that old files hold, and that follow from the settings.
BUFFERS = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass
class ForeignModel:
    """A model in a file: what it is, and how to load its tensors."""

    where: Path  # for sentences
    family: Family
    cfg: ModelConfig
    shapes: dict[str, tuple[int, ...]]  # of each tensor, under the name that transformers or llama.cpp writes today
    load: Callable[[str], Tensor]  # as it is stored
    tokenizer: Tokenizer
    is_gguf: bool
    ignored: set[str] = field(default_factory=set)  # tensors that may be there and are not ours


# ---------------------------------------------------------------------------------------------------------------------
# Reading a Hugging Face folder


class PickledWeights:
    """pytorch_model.bin, with the interface of SafetensorsFile."""

    def __init__(self, path: Path):
        state = read_weights(path)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.load = state.__getitem__


def read_hf_folder(folder: Path) -> ForeignModel:
    """UserError for what is damaged, hostile, or a model that we cannot be."""
    where = folder / "config.json"
    config = read_json(where)
    family, cfg = read_hf_config(config, str(where))
    names, load = {}, {}
    for file in weight_files(folder):
        for name in file.shapes:
            ours = modern_name(family, name)
            need(ours not in names, f"{folder}: the tensor {shown(name, most=80)} is there twice")
            names[ours], load[ours] = file.shapes[name], partial(file.load, name)
    if blocks := float8_blocks(config):
        join_scales(folder, names, load, blocks)
    ignored = {name for name, shape in names.items()
               if BUFFERS.fullmatch(name) or is_extra_layer(family, cfg, name) or 0 in shape}
    return ForeignModel(folder, family, cfg, names, lambda name: load[name](), read_hf_tokenizer(folder),
                        is_gguf=False, ignored=ignored)


def join_scales(folder: Path, shapes: dict, load: dict, blocks: list[int]) -> None:
    """Take the scales of float8 weights out of both tables; a weight is loaded together with its own."""
    for name in [name for name in shapes if name.endswith(SCALE)]:
        weight, found = name.removesuffix(SCALE), shapes.pop(name)
        shape = shapes.get(weight, ())
        wanted = tuple(-(-size // side) for size, side in zip(shape, blocks, strict=False))
        need(len(shape) == 2 and found == wanted,
             f"{folder}: {shown(name, most=80)} is {found}, and a weight {shape} in blocks of {blocks} needs {wanted}")
        load[weight] = partial(scaled, load[weight], load.pop(name), blocks)


def scaled(load: Callable[[], Tensor], load_scales: Callable[[], Tensor], blocks: list[int]) -> Tensor:
    """float8 numbers, each times the scale of its block, in fp32."""
    weight, scales = load().float(), load_scales().float()
    rows, columns = (torch.arange(size) // side for size, side in zip(weight.shape, blocks, strict=True))
    return weight.mul_(scales[rows][:, columns])


def weight_files(folder: Path) -> Iterator[SafetensorsFile | PickledWeights]:
    """The files with a folder's weights: one, or those that an index lists."""
    path = next((folder / name for name in FILES if (folder / name).exists()), None)
    need(path, f"{folder} holds no weights: we look for {', '.join(FILES)}")
    if path.suffix != ".json":
        yield open_weights(path)
        return
    places = read_json(path, {"weight_map": {str: str}})["weight_map"]
    for name in sorted(set(places.values())):
        need(re.fullmatch(r"\w[\w.-]*\.(safetensors|bin)", name),
             f"{path} names a file {shown(name)}: we read .safetensors and .bin files beside it")
        file = open_weights(folder / name)
        listed = {tensor for tensor, place in places.items() if place == name}
        different = sorted(listed ^ file.shapes.keys())
        need(not different, f"{path} and {name} do not agree on where the tensor {shown(str(different[:1]))} is")
        yield file


def open_weights(path: Path) -> SafetensorsFile | PickledWeights:
    if path.suffix == ".bin":
        return PickledWeights(path)
    return SafetensorsFile(path)


def modern_name(family: Family, name: str) -> str:
    """Files of a model without its head, and the published ones of GPT-2, lack a prefix that others have."""
    prefix = family.rows[0][1].partition(".")[0]
    if name.startswith((f"{prefix}.", "lm_head.")):
        return name
    return f"{prefix}.{name}"


def is_extra_layer(family: Family, cfg: ModelConfig, name: str) -> bool:
    """Whether it belongs to DeepSeek's layers behind the last one, which predict a second token."""
    number = re.match(r"model\.layers\.(\d{1,9})\.", name)
    return family.model_type == "deepseek_v3" and number is not None and int(number[1]) >= cfg.n_layer


# ---------------------------------------------------------------------------------------------------------------------
# Reading a GGUF file


def read_gguf_model(path: Path) -> ForeignModel:
    """UserError for what is damaged, hostile, or a model that we cannot be."""
    files = gguf.open_gguf(path)
    meta, places = files[0].meta, {}
    for file in files:
        twice = places.keys() & file.shapes.keys()
        need(not twice, f"{path}: {more(twice, 'two of its parts have ')}")
        places |= dict.fromkeys(file.shapes, file)
    shapes, factors = {name: file.shapes[name] for name, file in places.items()}, None
    if ROPE_FACTORS in shapes:
        need(len(shapes[ROPE_FACTORS]) == 1 and shapes[ROPE_FACTORS][0] <= 1 << 16,
             f"{path}: {ROPE_FACTORS} has the shape {shapes[ROPE_FACTORS]}")
        factors = places[ROPE_FACTORS].load(ROPE_FACTORS)
    family, cfg = read_gguf_meta(meta, shapes, factors, str(path))
    return ForeignModel(path, family, cfg, shapes, lambda name: places[name].load(name),
                        read_tokenizer_meta(meta, str(path)), is_gguf=True, ignored={ROPE_FACTORS})


# ---------------------------------------------------------------------------------------------------------------------
# The weights of either


def load_weights(model: ForeignModel, say: Callable[[str], None] = print) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """(settings, weights of ours), after a check of all names and shapes; whether numbers are finite shows when they
    are loaded. A head that differs from the embedding it should be tied to makes them two."""
    cfg, shapes, where = model.cfg, model.shapes, model.where
    check_sizes_claimed(model)
    with shapes_only():
        wanted = LanguageModel(cfg).state_dict()
    found = links(model.family, cfg, wanted, model.is_gguf)
    known = {name for each in found for name in each.theirs}
    head = HEAD[model.is_gguf]
    spare = head in shapes and cfg.tie_embeddings
    missing, surplus = known - shapes.keys(), shapes.keys() - known - model.ignored - {head if spare else ""}
    need(not missing, f"{where} lacks the tensor {min(missing, default='')}{more(surplus, '; it has ')}")
    need(not surplus, f"{where} has tensors that a {model.family.model_type} of its settings does not have: "
                      f"{more(surplus, '')}")
    for each in found:
        for name, tensor in zip(each.theirs, each.out([wanted[ours] for ours in each.ours]), strict=True):
            check_shape_of(model, name, tuple(tensor.shape))
    if spare:
        check_shape_of(model, head, tuple(wanted["embed.weight"].shape))
    weights = {}
    for each in found:
        for number, name in enumerate(each.ours):
            weights[name] = LazyTensor(tuple(wanted[name].shape), partial(incoming, model, each, number))
    if spare and not torch.equal(load_float(model, head), weights["embed.weight"].load()):
        say(f"{where} should have one matrix for embedding and head, and has two: we keep both")
        cfg.tie_embeddings = False
        weights["head.weight"] = LazyTensor(weights["embed.weight"].shape, partial(load_float, model, head))
    if cfg.tie_embeddings:
        weights["head.weight"] = weights["embed.weight"]
    return cfg, weights


def incoming(model: ForeignModel, link: Link, number: int) -> Tensor:
    return link.back([load_float(model, name) for name in link.theirs])[number]


def check_sizes_claimed(model: ForeignModel) -> None:
    """UserError if the settings need more numbers or tensors than the file has: we build nothing of that size then."""
    cfg, unfit = model.cfg, f"{model.where} does not fit its own settings:"
    checkpoint.check_claims(cfg, len(model.shapes), sum(map(math.prod, model.shapes.values())), unfit)
    experts = (cfg.n_layer - cfg.n_dense) * cfg.n_expert
    need(model.is_gguf or experts <= len(model.shapes), f"{unfit} they claim {experts} experts")


def more(names: set[str], begin: str) -> str:
    """{"b", "a", "c", "d"} -> "a, b, c and 1 more" """
    if not names:
        return ""
    text = ", ".join(shown(name, most=80) for name in sorted(names)[:3])
    if len(names) > 3:
        text += f" and {len(names) - 3} more"
    return begin + text


def check_shape_of(model: ForeignModel, name: str, wanted: tuple[int, ...]) -> None:
    found = model.shapes[name]
    need(found == wanted, f"{model.where}: the tensor {name} is {found}, and its settings need {wanted}")


def load_float(model: ForeignModel, name: str) -> Tensor:
    tensor = model.load(name)
    kind = NAMES.get(tensor.dtype, str(tensor.dtype))
    need(kind in ("F64", "F32", "F16", "BF16"),
         f"{model.where}: the tensor {name} is {kind}; we read weights of F32, F16 and BF16")
    tensor = tensor.float()
    need(checkpoint.is_finite(tensor), f"{model.where}: the tensor {name} is not finite (nan or inf)")
    return tensor


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_hf_folder(folder: Path, cfg: ModelConfig, weights: dict[str, LazyTensor], tokenizer: Tokenizer,
                    dtype: torch.dtype) -> None:
    """A folder that AutoModelForCausalLM and AutoTokenizer load; UserError for a model that transformers lacks."""
    family = family_of(cfg)
    config = write_hf_config(family, cfg) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    config |= {f"{role}_token_id": tokenizer.role(role) for role in ("bos", "eos", "pad")}
    tensors = {}
    for name, shape, load in outgoing(family, cfg, weights, is_gguf=False):
        kind = dtype
        if name.endswith("e_score_correction_bias"):  # which choose experts: a rounded one chooses others
            kind = torch.float32
        tensors[name] = (shape, kind, partial(rounded, name, load, kind))
    with writing(folder):
        write_safetensors(folder / "model.safetensors", tensors)
        write_hf_tokenizer(tokenizer, folder)
        write_json(folder / "generation_config.json", generation_config(tokenizer))
        write_json(folder / "config.json", config)  # the last: without it, the folder is no model


def rounded(name: str, load: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    tensor = load().to(dtype)
    need(checkpoint.is_finite(tensor), f"{name} has numbers that {str(dtype).removeprefix('torch.')} cannot hold: "
                                  "set DTYPE=bfloat16 or DTYPE=float32")
    return tensor


def outgoing(family: Family, cfg: ModelConfig, weights: dict[str, LazyTensor], is_gguf: bool
             ) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
    """(name, shape, function that gives it in fp32) of each tensor that a file has of these weights."""
    for each in links(family, cfg, weights, is_gguf):
        empty = [torch.empty(weights[name].shape, device="meta") for name in each.ours]
        for number, (name, tensor) in enumerate(zip(each.theirs, each.out(empty), strict=True)):
            yield name, tuple(tensor.shape), partial(one_of, each, weights, number)


def one_of(link: Link, weights: dict[str, LazyTensor], number: int) -> Tensor:
    return link.out([weights[name].load() for name in link.ours])[number].float()


FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # general.file_type


def write_gguf_model(path: Path, cfg: ModelConfig, weights: dict[str, LazyTensor], tokenizer: Tokenizer,
                     kind: str) -> None:
    """A file that llama.cpp runs; UserError for what it has no form of."""
    family = family_of(cfg)
    meta = write_gguf_meta(family, cfg) | {"general.type": "model", "general.name": path.stem,
                                           "general.file_type": FILE_TYPES[kind]}
    meta |= write_tokenizer_meta(tokenizer, cfg.vocab_size)
    tensors = []
    if cfg.rope_scaling == "llama3":
        tensors.append(gguf.Tensor(ROPE_FACTORS, (cfg.head_dim // 2,), "F32", partial(rope_factors, cfg)))
    for name, shape, load in outgoing(family, cfg, weights, is_gguf=True):
        stored = stored_as(name, shape, kind)
        if stored == "F16":
            load = partial(rounded, name, load, torch.float16)
        tensors.append(gguf.Tensor(name, shape, stored, load))
    others = [each.name for each in tensors if each.kind == "F16" != kind]
    if others:
        print(f"note: {len(others)} tensors are F16, as their rows are no whole blocks of {kind}: "
              f"{more(set(others), '')}")
    with writing(path.parent):
        gguf.write_gguf(path, meta, tensors)
