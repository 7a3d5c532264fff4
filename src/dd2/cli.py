"""The command line: `dd2 COMMAND [CONFIG.yaml] [--section.field value …]`."""

import importlib
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dd2.environment import prepare
from dd2.errors import InputError, Interrupted, NumericalError, PeerLost, TrainingFailed

USAGE_ERROR, FAILED, INTERRUPTED = 2, 1, 130
YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Command:
    """One command: the module, configuration class and function behind it, imported when it is called."""

    summary: str
    module: str
    config: str
    function: str

    def load(self) -> tuple[type, Callable[[Any], object]]:
        """The configuration class and the function."""
        module = importlib.import_module(f"dd2.{self.module}")
        return getattr(module, self.config), getattr(module, self.function)


COMMANDS = {
    "demo": Command("the whole method on the embedded digits, in minutes", "commands.demo", "DemoConfig", "demo"),
    "distill": Command("distil a teacher into a one-step generator", "commands.distill", "DistillConfig", "distill"),
    "dd1": Command("the baseline: distil a teacher by Distilled Decoding 1", "commands.dd1", "DD1RunConfig", "distil_dd1"),
    "sample": Command("draw images from a run: a grid, a folder of PNGs or an .npz", "commands.sample", "SampleConfig", "sample"),
    "evaluate": Command("numbers and pictures of a run, beside its teacher's", "commands.evaluate", "EvaluateConfig", "evaluate"),
    "plan": Command("does a distillation fit into memory, and how long does it take", "commands.plan", "PlanConfig", "plan"),
    "bench eq1": Command("time and memory of Eq. 1 beside plain torch", "commands.bench_eq1", "BenchEq1Config", "bench_eq1"),
    "bench sample": Command(
        "seconds per image of teacher and one step", "commands.bench_sample", "BenchSampleConfig", "bench_sample"
    ),
    "bench train": Command(
        "seconds and memory of a training iteration", "commands.bench_train", "BenchTrainConfig", "bench_train"
    ),
    "align-decoder": Command(
        "train a run's decoder so that its images match a reference",
        "commands.align_decoder",
        "AlignDecoderConfig",
        "align_decoder",
    ),
    "push": Command("put a generator on the Hugging Face Hub", "commands.push", "PushConfig", "push"),
    "serve": Command("a page in the browser, or a JSON endpoint", "commands.serve", "ServeConfig", "serve"),
    "export": Command("a generator to ship, from any checkpoint of a run", "commands.export", "ExportConfig", "export"),
    "report": Command("one page about evaluated runs", "commands.report", "ReportConfig", "report"),
    "reproduce": Command(
        "the paper's tables at sizes that one machine can run", "reproduce.command", "ReproduceConfig", "reproduce"
    ),
    "own-data": Command(
        "from a folder of images to a measured one-step generator", "own_data.command", "OwnDataConfig", "own_data"
    ),
    "reference": Command("statistics of real images, for dd2 evaluate", "commands.reference", "ReferenceConfig", "reference"),
    "convert var": Command("official VAR files to a teacher folder", "checkpoints.convert", "ConvertVarConfig", "convert_var"),
    "convert llamagen": Command(
        "official LlamaGen files to a teacher folder", "checkpoints.convert", "ConvertLlamaGenConfig", "convert_llamagen"
    ),
    "convert mar": Command("official MAR files to a teacher folder", "checkpoints.convert", "ConvertMarConfig", "convert_mar"),
    "adapt": Command(
        "give a LlamaGen teacher a continuous input layer (stage 0)", "commands.adapt", "AdaptRunConfig", "adapt_run"
    ),
    "text-features": Command(
        "encode captions for a text-conditional teacher", "commands.text_features", "TextFeaturesConfig", "text_features"
    ),
    "env": Command("versions, devices and paths, for a report of a fault", "commands.env", "EnvConfig", "env"),
    "completion": Command("what makes a shell complete all this", "completion", "CompletionConfig", "completion"),
    "inspect": Command("what a checkpoint is: family, sizes, flags, parameters", "commands.inspect", "InspectConfig", "inspect"),
    "train-tokenizer": Command(
        "train a tokenizer on your images", "commands.train_tokenizer", "TrainTokenizerConfig", "train_tokenizer"
    ),
    "train-teacher": Command(
        "train an AR teacher on their tokens", "commands.train_teacher", "TrainTeacherConfig", "train_teacher"
    ),
    "train-classifier": Command(
        "train a classifier of one's own images, a feature network for dd2 evaluate",
        "commands.train_classifier",
        "TrainClassifierConfig",
        "train_classifier",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, or 2 for bad input, 1 where numbers, memory, disk or another process failed, 130 after an interruption.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        prepare()
    try:
        return _run(arguments)
    except InputError as error:
        return _fail(str(error), USAGE_ERROR)
    except (NumericalError, TrainingFailed, PeerLost) as error:
        return _fail(str(error), FAILED)
    except Interrupted as stop:
        return _fail(str(stop), INTERRUPTED)
    except KeyboardInterrupt:
        return _fail("interrupted; what was saved is whole, run the same command again to go on", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; nothing more can be said, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    except (MemoryError, OSError, RuntimeError) as error:
        from dd2.resources import is_memory, memory_said, system_said

        if is_memory(error):
            return _fail(memory_said(error, _config_of(arguments)), FAILED)
        if isinstance(error, OSError):
            return _fail(system_said(error), FAILED)
        raise


def _config_of(arguments: Sequence[str]) -> type | None:
    """The configuration class of a command line, if it names a command."""
    command = COMMANDS.get(" ".join(arguments[:2])) or COMMANDS.get(arguments[0] if arguments else "")
    return command.load()[0] if command else None


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        from dd2 import __version__

        print(f"dd2 {__version__}")
        return 0
    name, *rest = arguments
    if rest and f"{name} {rest[0]}" in COMMANDS:
        name = f"{name} {rest.pop(0)}"
    if name not in COMMANDS:
        raise InputError(f"there is no command {name}; the commands are {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    config_class, function = command.load()

    from dd2.config import load_config, positional

    places = positional(config_class)
    leading = list(itertools.takewhile(lambda text: not text.startswith("-"), rest))
    # Where a command has fields without a flag, its configuration is told by its ending; so it is behind options.
    chosen = [text for text in leading if not places or (text.endswith(YAML) and not os.path.isdir(text))]
    chosen += [text for before, text in itertools.pairwise(rest) if _behind_options(before, text) and text not in leading]
    if len(chosen) > 1:
        raise InputError(f"unexpected argument {chosen[1]}; usage: {_usage(name, places)}")
    if chosen:
        rest.remove(chosen[0])
    try:
        config = load_config(config_class, chosen[0] if chosen else "", rest, f"dd2 {name}")
    except SystemExit:
        return 0
    function(config)
    return 0


def _behind_options(before: str, text: str) -> bool:
    """Whether a word is a configuration, and not the value of the flag before it."""
    return text.endswith(YAML) and not text.startswith("-") and (not before.startswith("-") or "=" in before)


def overview() -> str:
    """What `dd2 --help` prints."""
    width = max(map(len, COMMANDS))
    lines = ["dd2: one-step image generation from autoregressive models", ""]
    lines += [f"  dd2 {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "dd2 COMMAND --help lists a command's fields. A YAML file gives any of them; flags after it win:",
    ]
    lines += ["  dd2 distill configs/digits.yaml --csd.iterations 2000 --out runs/longer"]
    return "\n".join(lines)


def _usage(name: str, places: Sequence[str]) -> str:
    return f"dd2 {' '.join([name, *map(str.upper, places)])} [CONFIG.yaml] [--field value ...]"


def _fail(message: str, code: int) -> int:
    from dd2.processes import rank

    if rank() == 0 or code == FAILED:  # what is wrong for all is said once
        print(f"dd2: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
