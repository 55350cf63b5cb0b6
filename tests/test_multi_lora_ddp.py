"""Data-parallel training over gloo (DDP, FSDP2) in which one process sees no token of an adapter."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lyra_ops import LoraRouting, integrations
from lyra_ops.nn import MultiLoraLinear

IDS = torch.tensor([[0, 1, -1], [0, 0, 0]])  # by process: the second has nothing for adapter 1; nobody for adapter 2


class Own(nn.Module):
    """Two layers, so that a gradient that never comes would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        adapters = {"image": (3, 2.0), "speech": (5, 0.25), "both": (2, 1.0)}
        self.layers = nn.ModuleList(MultiLoraLinear(nn.Linear(8, 8, dtype=torch.float64), adapters) for _ in range(2))
        for layer in self.layers:
            for b in layer.lora_B.values():
                nn.init.normal_(b)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        routing = LoraRouting(ids, self.layers[0].bank())
        for layer in self.layers:
            x = layer(x, routing).relu()
        return x


class Peft(nn.Module):
    """The same of peft's layers, one of the adapters with DoRA."""

    def __init__(self) -> None:
        import peft

        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        for name, rank in {"image": 3, "speech": 5, "both": 2}.items():
            options = {"target_modules": ["0", "2"], "init_lora_weights": False, "use_dora": name == "both"}
            config = peft.LoraConfig(r=rank, **options)
            if name == "image":
                self.model = peft.get_peft_model(self.model, config, adapter_name=name)
            else:
                self.model.add_adapter(name, config)
        self.double()
        for name, p in self.named_parameters():
            p.requires_grad_("lora_" in name)
        self.routed = integrations.apply_multi_lora(self.model)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        with self.routed.route(ids):
            return self.model(x)


def inputs() -> Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module, rank: int) -> list[Tensor]:
    for _ in range(2):  # the second step hangs or fails if the first left a gradient out
        model.zero_grad()
        model(inputs()[rank], IDS[rank]).square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]


def process(rank: int, folder: str, kind: type[nn.Module], parallel: Callable[[nn.Module], nn.Module]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    # The parallel model must be gone before its group is: the last to hold a group ends gloo's threads, and where that
    # is a DDP model it waits for them with the interpreter's lock, which they may need to end (seen in torch 2.13).
    torch.save(train(parallel(kind()), rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize(
    ("kind", "parallel"), [(Own, DistributedDataParallel), (Peft, DistributedDataParallel), (Peft, sharded)]
)
def test_an_adapter_that_one_process_does_not_see(
    tmp_path: Path, kind: type[nn.Module], parallel: Callable[[nn.Module], nn.Module]
) -> None:
    if kind is Peft:
        pytest.importorskip("peft")
        pytest.importorskip("transformers")
    tests, path = str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([tests, *sys.path, path])  # for the processes that are spawned
    try:
        torch.multiprocessing.spawn(process, args=(str(tmp_path), kind, parallel), nprocs=2)
    finally:
        os.environ["PYTHONPATH"] = path
    model = kind()
    loss = sum(model(x, ids).square().sum() for x, ids in zip(inputs(), IDS)) / 2  # both take the mean
    loss.backward()
    want = [p.grad for p in model.parameters() if p.requires_grad]
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), want)
