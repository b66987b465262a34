"""Sharded training: each process holds its rows of every parameter, gradient and moment.

    model = sharded(machine, cfg, weights)           # a LanguageModel; its parameters are DTensors
    model(ids, targets).sum().backward()             # every pass is a collective: all processes make it, or none

The engine is PyTorch's `fully_shard` (FSDP, arXiv 2304.11277; the third stage of ZeRO, arXiv 1910.02054). Each block is
a unit: its rows are gathered just before its forward or backward pass, and freed after it; its gradients are averaged
over the processes as they are scattered. Embedding and head, which may be tied, are a unit of their own. So a process
holds 1 / n of the state, a block, and the embeddings.

A model is never whole in any process: it is built without memory, and its rows are filled one parameter at a time, from
a file or with the random numbers that one process would draw.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

import lora
from model import LanguageModel, ModelConfig, NoDraws
from runtime.archive import Joined
from runtime.device import Machine
from runtime.rank_files import Shapes, own_rows, rows_of_rank


def sharded(machine: Machine, cfg: ModelConfig, weights: dict | None = None, adapters: lora.LoraSettings | None = None,
            drawn: bool = True) -> LanguageModel:
    """A model that is divided over the processes. `weights` are whole tensors, mapped from a file, or fresh if None;
    with `drawn`, the random numbers of these are drawn even so, as by a model that is not sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nobody changes losses in place
    own = WholeDraws(machine)
    kind = LanguageModel if weights else Unfilled
    with without_memory(), own if drawn else NoDraws():
        model = kind(cfg)
    if adapters:
        with NoDraws():
            lora.inject(model, adapters)
            lora.narrow(model, machine.dtype)
    sizes, names = (machine.world_size // machine.parts, machine.parts), ("copies", "parts")
    if machine.parts == machine.world_size:
        sizes, names = sizes[1:], names[1:]
    mesh = init_device_mesh(machine.device.type, sizes, mesh_dim_names=names)
    # Blocks are gathered in the dtype of their products: autocast would keep rounded copies of all for the backward
    # pass. Embeddings, which begin the stream, stay fp32, and so do routers: a rounded one chooses other experts.
    dtype = torch.float32 if cfg.n_expert else machine.dtype
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # Whole only during a pass: what stayed would miss a later change of its rows, as by a moving average.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, "probe")
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=machine.device)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        if weights:
            fill(model, weights, machine)
        else:
            with own:
                LanguageModel.init_weights(model)
        for name, module in lora.adapted(model).items():
            with own:
                module.reset()
            if module.lora_magnitude is not None:  # of the exact rows, not of rounded ones
                exact = rows_of(weights, f"{name}.weight", module.base.weight, machine)
                module.lora_magnitude.to_local().copy_(lora.row_norms(exact))
    return model


@contextmanager
def without_memory() -> Iterator[None]:
    """Parameters created inside have shapes but no memory; buffers, which are small, have theirs."""

    def replace(module: nn.Module, name: str, p: nn.Parameter | None) -> nn.Parameter | None:
        if p is None or p.is_meta:  # the second name of a tied one
            return p
        return nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)

    hook = register_module_parameter_registration_hook(replace)
    try:
        yield
    finally:
        hook.remove()


class Unfilled(LanguageModel):
    """Its constructor draws no initial weights: they have no memory yet."""

    def init_weights(self) -> None:
        pass


class WholeDraws(TorchFunctionMode):
    """Random initialisation draws the numbers of the whole tensor, as one process would, and keeps our rows of them. A
    tensor without memory keeps none, so that the next one gets its own numbers."""

    def __init__(self, machine: Machine):
        super().__init__()
        self.machine = machine

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") not in NoDraws.names:
            return function(*args, **kwargs)
        tensor, *rest = args or [kwargs.pop("tensor")]
        whole = function(torch.empty(tensor.shape), *rest, **kwargs)
        if not tensor.is_meta:
            first, last = rows_of_rank(len(whole), self.machine.part, self.machine.parts)
            tensor.to_local().copy_(whole[first:last])
        return tensor


def rows_of(weights: dict[str, Tensor | Joined], name: str, like: Tensor, machine: Machine) -> Tensor:
    """Our rows of one of these whole weights; UserError unless it is shaped like this sharded tensor."""
    return own_rows({name: weights[name]}, {name: tuple(like.shape)}, machine.part, machine.parts)[name]


@torch.no_grad()
def fill(model: LanguageModel, weights: dict[str, Tensor | Joined], machine: Machine) -> None:
    """Copy our rows of whole weights. A base has them under the names from before its adapters."""
    for name, p in model.named_parameters():
        key = name.replace(".base.", ".")
        if key in weights:
            p.to_local().copy_(rows_of(weights, key, p, machine))
    for name, buffer in model.named_buffers():
        if name in weights:
            buffer.copy_(weights[name])


def own_part(state: dict, shapes: Shapes, machine: Machine) -> dict:
    """The state of a run with our rows of the optimizer's tensors and of the averaged weights."""
    cut = partial(own_rows, shapes=shapes, rank=machine.part, world_size=machine.parts)
    if "optimizer" in state:
        state = state | {"optimizer": cut(state["optimizer"])}
    if state.get("ema"):
        state = state | {"ema": state["ema"] | {"weights": cut(state["ema"]["weights"])}}
    return state
