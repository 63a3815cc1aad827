"""Tensor parallelism: a converted model shared out among processes, by the plan that transformers has for it.

A layer that the plan calls "colwise" computes a range of its outputs on each process, and the "rowwise" layer behind
it, in the same parent, reads just those and adds up the processes' results. Attention is cut between heads;
transformers' code takes the number of heads from the shape of what the layers return.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from torch import nn

from grinqh.errors import InputError
from grinqh.fusion import FusedPart
from grinqh.linear import GrinqhLinear
from grinqh.model import model_config, packed_layers
from grinqh.sharded import InputShard, OutputShard
from grinqh.sharding import Range, common_step, cut, shard_inputs, shard_outputs, take_inputs, take_outputs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["shard_inputs", "shard_outputs", "tensor_parallel"]

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

COLWISE, ROWWISE = "colwise", "rowwise"
GATHERED = ("colwise_gather_output", "colwise_rep")  # every process gets all outputs
# Input and output are the same on all processes: a whole layer does what is asked.
REPLICATED = ("replicate", "replicated_with_grad_allreduce", "rowwise_rep", "rowwise_split_input")


def tensor_parallel(model: Model, group: ProcessGroup | None = None) -> Model:
    """Keeps of a converted model's layers what this process is to compute, in place.

    Every process calls it with the same model, and from then on makes the same calls with the same inputs; each
    gets the whole result. `set_bits` and `read_stats` give what they give on a whole model. Layers that the plan does
    not name, and those beside layers that are not packed, stay whole on every process. A model that was shared out
    cannot be saved, calibrated or set to an exact budget.

    Args:
        model: a converted transformers model, on any device; its `_tp_plan` says which layers are cut, and how.
        group: the processes; None for all of them.

    Returns:
        The model.

    Raises:
        InputError: torch.distributed is not initialised, a model without a plan, one that is shared out already, an
            exact budget (which no process could keep to: it is for all channels of a layer), or more processes than
            key heads or blocks of outputs. The model is then unchanged.
    """
    config, layers = model_config(model), packed_layers(model)
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError("torch.distributed is not initialised: call torch.distributed.init_process_group first")
    if any(layer.sharded for layer in layers.values()):
        raise InputError("the model is shared out already")
    if config.exact_budget or any(layer.budget is not None for layer in layers.values()):
        raise InputError(
            "exact_budget is True, must be False for tensor parallelism: a process sees only some of the channels "
            "that the budget is for"
        )
    plan: Mapping[str, str] = getattr(model, "_tp_plan", None) or {}
    if not plan:
        raise InputError(f"{type(model).__name__} has no tensor parallel plan (_tp_plan)")
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if world == 1:
        return model
    teams = list(_teams(model, plan))
    parts = [team.part(rank, world) for team in teams]
    heads = {
        name: cut(f"outputs of {name}", layer.out_features, layer.format.block, rank, world)
        for name, layer in layers.items()
        if plan.get(_generic(name)) in GATHERED
    }
    if not teams and not heads:
        raise InputError(f"{type(model).__name__}: the tensor parallel plan names no packed layers that can be cut")
    for team, part in zip(teams, parts, strict=True):
        _share_out(model, team, part, rank, group)
    for name, outputs in heads.items():
        layer = layers[name]
        tensors = take_outputs(layer.tensors, layer.format, [outputs])
        model.set_submodule(name, OutputShard(layer, tensors, group, gather_at=outputs[0]))
    _record(model, plan, teams, heads, world)
    return model


@dataclass
class _Team:
    """The layers of one parent that are cut at the same places: outputs of some are inputs of the others."""

    name: str  # of the parent
    head: int = 1  # outputs that stay together
    # Of each colwise layer by name: its outputs; several for one that was fused.
    outputs: dict[str, list[int]] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)  # of each rowwise layer
    blocks: dict[str, int] = field(default_factory=dict)  # of each colwise layer

    def parts(self) -> int:
        """Parts of one head each that the layers have in common: key heads, or single outputs.

        Raises:
            InputError: a layer that is not made of whole heads.
        """
        common = gcd(*(size for sizes in self.outputs.values() for size in sizes), *self.inputs.values())
        if common % self.head:
            sizes = {**self.outputs, **self.inputs}
            raise InputError(f"{self.name} cannot be cut between heads of {self.head}: its layers' sizes are {sizes}")
        return common // self.head

    def part(self, rank: int, world: int) -> Range:
        """The parts of a rank."""
        parts = self.parts()
        sizes = [(size, self.blocks[name]) for name, sizes in self.outputs.items() for size in sizes]
        step = common_step([size // parts for size, _ in sizes], [block for _, block in sizes])
        for name, fused in self.outputs.items():
            if any(size % self.blocks[name] for size in fused[:-1]):
                raise InputError(
                    f"{name} is fused of {fused} outputs, which must be multiples of its block, {self.blocks[name]}, "
                    "to be cut"
                )
        kind = "heads of keys" if self.head > 1 else "features"
        return cut(f"{kind} in {self.name}", parts, step, rank, world)


def _teams(model: nn.Module, plan: Mapping[str, str]) -> Iterator[_Team]:
    """The layers to be cut; parents some of whose layers cannot be, are left out."""
    named: dict[str, dict[str, str]] = {}  # by parent: the plan's style for each of its modules and parameters
    for name in [*dict(model.named_modules()), *dict(model.named_parameters())]:
        if style := plan.get(_generic(name)):
            named.setdefault(name.rpartition(".")[0], {})[name] = style
    whole: dict[str, list[str]] = {}  # what the plan would cut and is not, as plans name it
    for parent, styles in named.items():
        cuts = {name: style for name, style in styles.items() if style not in (*REPLICATED, *GATHERED)}
        packed = {name: _packed(model, name) for name in cuts}
        if not any(packed.values()):
            continue
        if None in packed.values() or set(cuts.values()) != {COLWISE, ROWWISE}:
            whole[_generic(parent)] = [f"{name.rpartition('.')[2]} {style}" for name, style in cuts.items()]
            continue
        yield _team(model, parent, cuts, {name: layer for name, layer in packed.items() if layer})
    for parent, planned in whole.items():
        logger.warning(
            "%s stays whole on every process: of what the plan cuts (%s) some is not packed, or cannot be cut",
            parent,
            ", ".join(planned),
        )


def _team(model: nn.Module, parent: str, cuts: Mapping[str, str], packed: Mapping[str, tuple[str, Any]]) -> _Team:
    module = model.get_submodule(parent)
    head = getattr(module, "head_dim", None)
    if head is None and "att" in type(module).__name__.lower():
        raise InputError(f"{parent} ({type(module).__name__}) has no head_dim, must have one to be cut between heads")
    team = _Team(parent, head or 1)
    for name, style in cuts.items():
        full, layer = packed[name]
        if style == ROWWISE:
            team.inputs[full] = layer.in_features
        else:
            part = model.get_submodule(name)
            team.outputs[full] = part.outputs.sizes if isinstance(part, FusedPart) else [layer.out_features]
            team.blocks[full] = layer.format.block
    return team


def _packed(model: nn.Module, name: str) -> tuple[str, GrinqhLinear] | None:
    """The packed layer, with its name, that a module is or is a part of."""
    owner, _, child = name.rpartition(".")
    module: Any = getattr(model.get_submodule(owner), child)
    if isinstance(module, FusedPart):
        name = f"{owner}.{module.outputs.name}"
        module = model.get_submodule(name)
    return (name, module) if isinstance(module, GrinqhLinear) else None


def _share_out(model: nn.Module, team: _Team, part: Range, rank: int, group: ProcessGroup | None) -> None:
    """Replaces a team's layers by what the rank keeps of them."""
    parts = team.parts()

    def of(size: int) -> Range:
        return part[0] * (size // parts), part[1] * (size // parts)

    for name, sizes in team.outputs.items():
        layer: Any = model.get_submodule(name)
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        ranges = [(start + of(size)[0], start + of(size)[1]) for start, size in zip(starts, sizes, strict=True)]
        tensors = take_outputs(layer.tensors, layer.format, ranges)
        sections = [end - first for first, end in ranges] if layer.sections else ()
        model.set_submodule(name, OutputShard(layer, tensors, group, sections=sections))
    for fused in model.get_submodule(team.name).children():
        if isinstance(fused, FusedPart):
            kept = [of(size) for size in team.outputs[f"{team.name}.{fused.outputs.name}"]]
            fused.out_features = kept[fused.index][1] - kept[fused.index][0]
            fused.outputs.sizes = [end - first for first, end in kept]
    for name, size in team.inputs.items():
        layer = model.get_submodule(name)
        tensors = take_inputs(layer.tensors, layer.format, of(size), bias=rank == 0)
        model.set_submodule(name, InputShard(layer, tensors, group))


def _record(model: Any, plan: Mapping[str, str], teams: list[_Team], heads: Mapping[str, Range], world: int) -> None:
    """Leaves in the model what was done, from which transformers knows the size of static caches."""
    parents = {_generic(team.name) for team in teams}
    cut_heads = {_generic(name) for name in heads}
    model._tp_size = world
    model._tp_plan = {
        key: style for key, style in plan.items() if key.rpartition(".")[0] in parents or key in cut_heads
    }


def _generic(name: str) -> str:
    """A name as plans have it: with * for numbers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
