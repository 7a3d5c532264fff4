"""How the processes of a job share training: whole copies (ddp) or sharded weights (fsdp2), and tensors that may be sharded."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from dd2.errors import InputError
from dd2.processes import connect, rank, sum_over_processes, world_size
from dd2.teachers.base import Backbone
from dd2.teachers.layers import layer_stacks
from dd2.training.stage import Update

N = TypeVar("N", bound=nn.Module)

Parallelism = Literal["ddp", "fsdp2"]


def local_micro_batches(update: Update) -> range:
    """The micro-batches of an optimiser step that this process computes.

    The random stream of a micro-batch is its number's, so the global batch (batch x accumulate) and its order are the same on
    any number of processes.

    Raises:
        InputError: they cannot be shared out evenly.
    """
    processes, accumulate = world_size(), update.accumulate
    if update.replicated:
        return range(accumulate)
    if accumulate % processes:
        raise InputError(
            f"accumulate {accumulate} of the {update.name} is no multiple of the {processes} processes: batch x accumulate is "
            "the global batch, and each process computes an equal share of its micro-batches; choose another accumulate (and "
            "batch)"
        )
    return range(rank(), accumulate, processes)


def shard(network: N, device: torch.device) -> N:
    """Shard a network's weights over all processes (FSDP2): its backbones layer by layer, then whatever stands beside them.

    Every unit gives its gathered weights back after each pass, so that optimisers and averages always find the shards.
    """
    for part in network.children():
        for backbone in (module for module in part.modules() if isinstance(module, Backbone)):
            shard_backbone(backbone, device)
        if not isinstance(part, Backbone):
            fully_shard(part, mesh=_mesh(device), reshard_after_forward=True)
    return network


def shard_backbone(backbone: Backbone, device: torch.device) -> None:
    """Shard a backbone; from then on all processes must call it together, equally often."""
    mesh = _mesh(device)
    for unit in (*(layer for stack in layer_stacks(backbone) for layer in stack), backbone):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    for method in ("next_features", "own_features", "told_features", "features_given", "head", "condition_features"):
        if hasattr(backbone, method):
            register_fsdp_forward_method(backbone, method)
    # Features are slices; nobody changes them in place, which is what the warning is about.
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")


def _mesh(device: torch.device) -> DeviceMesh:
    connect()
    return init_device_mesh(device.type, (world_size(),))


def sharded_units(modules: Iterable[nn.Module]) -> list[FSDPModule]:
    """The sharded parts of networks; none under ddp."""
    return [unit for module in modules for unit in module.modules() if isinstance(unit, FSDPModule)]


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over the processes; sharded ones have been already, in the backward pass."""
    sum_over_processes([p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)])


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered from all processes if it is sharded; all must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(full: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor, sharded as `reference` is."""
    if isinstance(reference, DTensor):
        return distribute_tensor(full.to(reference.device), reference.device_mesh, reference.placements)
    return full


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a network, gathered on every process."""
    if next(module.parameters(), None) is None:  # buffers alone, alike on every process
        return module.state_dict()
    state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def load_whole_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what `whole_state` gave, whatever the sharding on either side.

    Raises:
        RuntimeError: it belongs to another network.
    """
    # The library says nothing of missing tensors, and it changes the dictionary.
    if mismatched := module.state_dict().keys() ^ state.keys():
        raise RuntimeError(f"{len(mismatched)} tensors do not match, first {sorted(mismatched)[0]}")
    if next(module.parameters(), None) is None:
        module.load_state_dict(state)
        return
    set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True))
