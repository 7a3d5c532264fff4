"""The one pass as a static graph that needs no dd2: torch.export's .pt2, or ONNX.

noise (B, n, C), standard normal    ┐
labels (B,) int64, or captions      ┴─▶ images (B, channels, H, W) float32 in [-1, 1]
"""

import contextlib
import io
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dd2 import __version__
from dd2.errors import InputError, NumericalError
from dd2.generator import Generator
from dd2.precision import autocast, name_of
from dd2.teachers.conditions import ClassLabels

Format = Literal["torch", "onnx"]

ENDINGS: dict[Format, str] = {"torch": ".pt2", "onnx": ".onnx"}

CHECKED = (1, 3)
"""Images of the checks; of the second number the graph is made."""

IN_FLOAT32 = ("LayerNormalization", "RMSNormalization", "Softmax", "ReduceMean", "Pow", "Sqrt", "Reciprocal")
"""Operations of ONNX that a graph in float16 takes in float32."""

LIMITS = {"float32": 1e-4, "bfloat16": 0.02, "float16": 0.02}
"""How far images in [-1, 1] may be from PyTorch's: at most in float32, on average in half precision, where a code may flip."""


class OnePass(nn.Module):
    """A generator as one function of tensors.

    Args:
        generator: on the CPU.
        dtype: the arithmetic of the graph; its inputs and outputs are float32.
    """

    def __init__(self, generator: Generator, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = generator.in_precision(dtype)
        self.dtype, self._generator = dtype, generator
        self.student, self.tokenizer, self.teacher = generator.student, generator.tokenizer, generator.teacher
        self.by_class = isinstance(generator.conditions, ClassLabels)

    def forward(self, noise: Tensor, condition: Tensor) -> Tensor:
        """Noise (B, n, C), and labels (B,) or features of captions (B, P, D), to images (B, channels, H, W) in [-1, 1]."""
        cond = self._generator.conditions(condition) if self.by_class else condition
        with autocast(noise.device, self.dtype):
            tokens = self.student.as_generator(noise, cond).float()
            return self._generator.decode(tokens, cond).float().clamp(-1, 1)

    @property
    def names(self) -> tuple[str, str]:
        """Of the inputs."""
        return ("noise", "labels" if self.by_class else "captions")

    def example(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Random inputs for so many images."""
        random, conditions = torch.Generator().manual_seed(seed), self._generator.conditions
        noise = torch.randn(count, *self.student.backbone.token_shape, generator=random)
        if isinstance(conditions, ClassLabels):
            return noise, torch.randint(conditions.num_classes, (count,), generator=random)
        return noise, torch.randn(conditions.empty(count, "cpu").shape, generator=random)

    def described(self) -> dict[str, Any]:
        """What a user of the graph needs to know; it is stored in the file."""
        generator = self._generator
        n, channels = self.student.backbone.token_shape
        return {
            "made_by": f"dd2 {__version__}",
            "inputs": {"noise": ["batch", n, channels], self.names[1]: ["batch", *self.example(1, 0)[1].shape[1:]]},
            "noise": "standard normal, float32",
            "images": ["batch", *generator.tokenizer.image_shape],
            "range": [-1, 1],
            "class_names": list(generator.conditions.class_names),
            "dtype": name_of(self.dtype),
        }


def write_graph(out: Path, generator: Generator, kind: Format, dtype: torch.dtype = torch.float32) -> float:
    """Write the file once it has been read back and compared with PyTorch on random inputs.

    Args:
        out: where to; large ONNX models put their weights into OUT.data beside it.
        generator: on the CPU.
        kind: "torch" or "onnx" (extra onnx).
        dtype: the arithmetic.

    Returns:
        The largest difference that was found in float32, the average one in half precision.

    Raises:
        InputError: the library is missing, or the network cannot be captured or run so.
        NumericalError: the graph computes something else; nothing was written.
    """
    if kind == "onnx":
        _need_onnx()
    # ONNX has no mixed types in one operation, which autocast makes: its graph is converted as a whole.
    one_pass = OnePass(generator, torch.float32 if kind == "onnx" else dtype).eval()
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        made = Path(scratch) / out.name
        with _quiet():
            try:
                _to_torch(one_pass, made) if kind == "torch" else _to_onnx(one_pass, made, half=dtype == torch.float16)
                computed = {"torch": _run_torch, "onnx": run_onnx}[kind](made)
                difference = _difference(one_pass, computed, average=dtype != torch.float32)
            except (InputError, NumericalError, MemoryError):
                raise
            except Exception as error:  # whatever the exporters and runtimes raise
                hint = "try --dtype float32" if dtype != torch.float32 else "--format folder ships it all the same"
                raise InputError(
                    f"no {kind} graph can be made of it in {name_of(dtype)} by torch {torch.__version__} ({_reason(error)}); "
                    f"{hint}, and a newer torch knows more"
                ) from error
        if not difference <= LIMITS[name_of(dtype)]:
            raise NumericalError(
                f"the {kind} graph's images differ from PyTorch's by {difference:.2g}, more than {LIMITS[name_of(dtype)]}; "
                "nothing was written"
            )
        for file in sorted(Path(scratch).iterdir(), key=lambda file: file == made):  # the weights beside it first
            file.replace(out.parent / file.name)
    return difference


def run_onnx(file: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """The function that an ONNX file computes, by onnxruntime on the CPU."""
    _need_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(noise: Tensor, condition: Tensor) -> Tensor:
        (images,) = session.run(None, dict(zip(names, (noise.numpy(), condition.numpy()), strict=True)))
        return torch.from_numpy(images)

    return run


def _run_torch(file: Path) -> Callable[[Tensor, Tensor], Tensor]:
    return torch.export.load(file).module()


def _batches(one_pass: OnePass) -> tuple[dict[int, Any], dict[int, Any]]:
    batch = torch.export.Dim("batch", min=1, max=2**16)
    return {0: batch}, {0: batch}


def _to_torch(one_pass: OnePass, out: Path) -> None:
    with torch.no_grad():
        program = torch.export.export(one_pass, one_pass.example(CHECKED[1], 0), dynamic_shapes=_batches(one_pass))
    torch.export.save(program, out, extra_files={"dd2.json": json.dumps(one_pass.described())})


def _to_onnx(one_pass: OnePass, out: Path, *, half: bool) -> None:
    with torch.no_grad():
        program = torch.onnx.export(
            one_pass,
            one_pass.example(CHECKED[1], 0),
            dynamo=True,
            dynamic_shapes=_batches(one_pass),
            input_names=list(one_pass.names),
            output_names=["images"],
            verbose=False,
        )
    if program is None:
        raise InputError("torch.onnx gave no program")
    described = one_pass.described() | ({"dtype": "float16"} if half else {})
    program.model.metadata_props["dd2"] = json.dumps(described)
    if not half:
        program.save(out)
        return
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    whole = [*DEFAULT_OP_BLOCK_LIST, *IN_FLOAT32]
    onnx.save(convert_float_to_float16(program.model_proto, keep_io_types=True, op_block_list=whole), out)


def _difference(one_pass: OnePass, computed: Callable[[Tensor, Tensor], Tensor], *, average: bool) -> float:
    found = []
    for count in CHECKED:
        inputs = one_pass.example(count, seed=count)
        with torch.no_grad():
            apart = (computed(*inputs) - one_pass(*inputs)).abs()
        found.append(float(apart.mean() if average else apart.max()))
    return max(found, key=lambda value: math.inf if math.isnan(value) else value)


def _reason(error: BaseException) -> str:
    """What is at the bottom of an exporter's pages, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f'--format onnx needs {error.name}: pip install "dd2[onnx]"') from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters talk of themselves at length."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
