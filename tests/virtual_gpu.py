"""A GPU that is not there: tensors compute on the CPU and remember where they would be, so that mixing devices is an error.

On a machine without a GPU nothing else finds a tensor that was left behind. The rules are CUDA's: all tensors of an operation
are on one device, save 0-dim ones of the CPU and indices of the CPU; a generator belongs to the tensor that it fills; NumPy reads
the CPU alone. Values, and so training, are those of the CPU.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import WeakTensorKeyDictionary

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
WAITS = {"__bool__", "__float__", "__int__", "__index__", "item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique"}
"""Calls that look at values of a tensor, or whose result's shape depends on them."""
NEW_PARAMETER = torch.nn.Parameter.__new__


class Generator(torch.Generator):
    """A random generator that knows its virtual device."""

    def __new__(cls, device: torch.device | str = "cpu") -> "Generator":
        """A CPU generator in fact."""
        made = super().__new__(cls)
        made.virtual = torch.device(device)  # pyright: ignore[reportAttributeAccessIssue]
        return made

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The virtual one."""
        return self.virtual  # pyright: ignore[reportAttributeAccessIssue]


class VirtualGPU(TorchFunctionMode):
    """While it lasts, device="cuda" works; `operations` counts by device, and `waits` what a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.there = WeakTensorKeyDictionary()
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def device_of(self, tensor: Tensor) -> torch.device:
        """Where a tensor would be."""
        return GPU if tensor in self.there else tensor.device

    def mark(self, result: Any, device: torch.device) -> Any:
        """Say where the tensors of a result are."""
        for tensor in tensors_of(result):
            if device.type == "cuda":
                self.there[tensor] = True
            else:
                self.there.pop(tensor, None)
        return result

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Check the devices, compute on the CPU, and mark the result."""
        named = dict(kwargs or {})
        called = resolve_name(func) or getattr(func, "__name__", "")
        if called == "torch.Tensor.device.__get__":
            return self.device_of(args[0])
        if called == "torch.Tensor.is_cuda.__get__":
            return args[0] in self.there
        if called == "torch.Tensor.data.__set__":
            self.mark(args[0], self.device_of(args[1]))
        if called.endswith("__set__"):
            return func(*args, **named)
        name = called.removesuffix(".__get__").split(".")[-1]
        inputs = tensors_of((args, named))
        asked, args, named = self.redirected(name, args, named)
        here = asked or self.common(name, args, inputs)
        generator = named.get("generator")
        if isinstance(generator, Generator) and generator.device.type != here.type:
            raise RuntimeError(f"{name}: a {generator.device.type} generator for a {here.type} tensor")
        if name in ("numpy", "__array__") and here.type == "cuda":
            raise RuntimeError(f"{name} of a tensor on the GPU")
        if name in WAITS and any(self.device_of(tensor).type == "cuda" for tensor in inputs) and asked != GPU:
            self.waits[name] += 1
        result = func(*args, **named)
        self.operations[here.type] += 1
        if isinstance(result, Tensor) and args and result is args[0]:
            if not asked or asked == self.device_of(result):
                return result  # in place, or there already
            result = result.clone()
        return self.mark(result, here)

    def common(self, name: str, args: tuple, inputs: list[Tensor]) -> torch.device:
        """The one device of an operation's tensors.

        Raises:
            RuntimeError: there are several.
        """
        if name in ("copy_", "__deepcopy__", "_has_compatible_shallow_copy_type"):
            return self.device_of(args[0])
        if name in ("__getitem__", "__setitem__", "index_put_", "index_put", "index"):
            target = self.device_of(args[0])
            for tensor in inputs[1:]:
                if self.device_of(tensor).type == "cuda" and target.type == "cpu":
                    raise RuntimeError(f"{name}: a GPU tensor indexes or fills one of the CPU")
            if name.startswith("__set") and isinstance(args[-1], Tensor) and args[-1].ndim and self.device_of(args[-1]) != target:
                raise RuntimeError(f"{name}: value and target are on different devices")
            return target
        shaped = {self.device_of(tensor) for tensor in inputs if tensor.ndim}
        scalars = {self.device_of(tensor) for tensor in inputs if not tensor.ndim}
        devices = shaped or scalars or {CPU}
        if len(devices) > 1 or (shaped == {CPU} and GPU in scalars):
            shapes = [(tuple(t.shape), self.device_of(t).type) for t in inputs]
            raise RuntimeError(f"{name}: tensors on different devices, {shapes}")
        return next(iter(devices))

    def redirected(self, name: str, args: tuple, named: dict[str, Any]) -> tuple[torch.device | None, tuple, dict[str, Any]]:
        """The device that a call asks for, and the call with the CPU in its place."""
        asked = named.get("device")
        if asked is not None:
            named["device"] = real(asked)
        if name == "cpu":
            asked = CPU
        elif name == "to" and len(args) > 1 and isinstance(args[1], torch.device | str):
            asked, args = args[1], (args[0], real(args[1]), *args[2:])
        elif name == "to" and len(args) > 1 and isinstance(args[1], Tensor):
            asked = self.device_of(args[1])
        return (None if asked is None else torch.device(asked)), args, named

    def parameter(self, cls: type, data: Tensor | None = None, requires_grad: bool = True) -> Tensor:
        """A parameter where its data is; its construction is no operation."""
        made = NEW_PARAMETER(cls, data, requires_grad)
        return made if data is None else self.mark(made, self.device_of(data))


def real(device: torch.device | str) -> torch.device:
    """Where a tensor is in fact."""
    return CPU if torch.device(device).type == "cuda" else torch.device(device)


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for entry in value for tensor in tensors_of(entry)]
    if isinstance(value, dict):
        return [tensor for entry in value.values() for tensor in tensors_of(entry)]
    return []


@contextlib.contextmanager
def virtual_gpu() -> Iterator[VirtualGPU]:
    """A process with one GPU."""
    autocast = torch.autocast

    class Event:
        def __init__(self, **_: Any) -> None: ...
        def record(self) -> None: ...
        def elapsed_time(self, _: "Event") -> float:
            return 1.0

    def on_cpu(device: str, *arguments: Any, **named: Any) -> Any:
        return autocast("cpu", *arguments, **named)

    with (
        mock.patch("torch.Generator", Generator),
        mock.patch("torch.autocast", on_cpu),
        mock.patch.multiple(
            "torch.cuda",
            is_available=lambda: True,
            get_device_name=lambda device=None: "virtual",
            get_device_capability=lambda _: (8, 0),
            set_device=lambda _: None,
            synchronize=lambda *_: None,
        ),
        mock.patch("torch.cuda.Event", Event),
        VirtualGPU() as mode,
        mock.patch.object(torch.nn.Parameter, "__new__", lambda *given, **named: mode.parameter(*given, **named)),
    ):
        yield mode
