"""Full-size models with random weights on a CPU: does everything run, how long does it take, how much memory?

    python benchmarks/full_size.py var_d16|llamagen_l|mar_b|llamagen_t2i_xl [--batch 1] [--lean]

Runs what users run, by the packaged configuration: teacher sampling (guided; KV-cached, or a MAR in 8 AR steps), one-step
sampling with decoding, one update of the regression on the generator's own tokens, and one stage-2 iteration (one guidance and
one generator update, AdamW included; no matching of whole images). Writes benchmarks/results/full_size_NAME.json. The pictures
are noise. A text-conditional model gets random features of a caption.

--lean is for models whose iteration does not fit into memory otherwise: no average of the generator (which no update reads),
AdamW's state of one network at a time (each makes its first step in any case), and layers computed again in the backward pass.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from dd2.checkpoints.foreign import parameters
from dd2.checkpoints.released import RELEASED
from dd2.commands.distill_config import DistillConfig
from dd2.config import load_config
from dd2.method.networks import copied_student, networks_over_codes, starting_networks
from dd2.method.recipe import csd_stage, regress_stage
from dd2.sampling import one_step
from dd2.teachers.code import CodeTeacher
from dd2.teachers.conditions import CaptionLabels
from dd2.text.captions import Captions
from dd2.training.layers import prepare_layers
from dd2.training.samples import TeacherSamples

MODELS = ("var_d16", "llamagen_l", "mar_b", "llamagen_t2i_xl")
WORDS = 12
"""Of the caption."""
MAR_STEPS = {"ar_steps": 8, "diffusion_steps": 25}


def main() -> None:
    """Run everything once and write seconds and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lean", action="store_true")
    arguments = parser.parse_args()
    batch = arguments.batch
    # A few sequences are no reference to match.
    changes = ["--csd.batch", str(batch), "--csd.accumulate", "1", "--csd.k", "1", "--csd.match.weight", "0"]
    config = load_config(DistillConfig, arguments.model, changes)
    rows: dict[str, float] = {}

    def timed(name: str, work: Callable[[], object]) -> object:
        start = time.perf_counter()
        result = work()
        rows[name] = time.perf_counter() - start
        print(f"{name:32} {rows[name]:8.1f} s   peak {peak_gib():5.1f} GiB", flush=True)
        return result

    torch.manual_seed(0)
    teacher = RELEASED[arguments.model]().eval().requires_grad_(False)
    sampling = config.tune.sampling
    if isinstance(teacher, CodeTeacher):
        teacher.standardise()
    else:
        sampling = replace(sampling, **MAR_STEPS)
    if isinstance(sizes := teacher.conditions, CaptionLabels):
        captions = Captions(torch.randn(batch * WORDS, sizes.channels), torch.full((batch,), WORDS), sizes.length)
        teacher.conditions = CaptionLabels(sizes.length, sizes.channels, captions)
    labels = teacher.conditions.default_labels(torch.arange(batch))
    cond = teacher.conditions(labels)
    tokens = timed("teacher sampling", lambda: teacher.sample(cond, sampling, range(batch)))
    assert isinstance(tokens, torch.Tensor)
    student = copied_student(teacher, config.networks) if config.networks.need_stage1 else None
    networks = starting_networks(config.csd, student, None, networks_over_codes(config.networks, teacher))
    del student
    if arguments.lean:
        networks.ema = networks.generator
        for network in (networks.generator, networks.guidance):
            assert isinstance(network, nn.Module)
            prepare_layers(network, recompute=True, compiled=False)
    timed("one-step sampling and decoding", lambda: teacher.decode(one_step(networks.generator, cond, range(batch)), cond))
    samples = TeacherSamples(teacher, teacher.stored(tokens), labels)
    random = torch.Generator().manual_seed(0)
    ode = config.regress.ode if isinstance(teacher, CodeTeacher) else None
    stages = [csd_stage(networks, teacher, samples, config.csd, ode=ode)]
    if isinstance(teacher, CodeTeacher):
        regress = replace(config.regress, batch=batch, accumulate=1, own_share=1.0)
        stages.insert(0, regress_stage(networks, teacher, samples, None, regress, config.csd.sampling))
    for stage in stages:
        for update in stage.updates:

            def step(update=update) -> None:
                loss, _ = update.loss(random)
                loss.backward(inputs=update.parameters)
                update.optimizer.step()
                update.optimizer.zero_grad(set_to_none=True)
                if arguments.lean:
                    update.optimizer.state.clear()

            timed(f"{'regression' if stage.name == 'regress' else update.name} update", step)
    stages[-1].after(0)
    sizes = {
        "teacher": [parameter for part in teacher.stored_parts.values() for parameter in part.parameters()],
        "student": list(networks.generator.parameters()),
        "tokenizer": list(teacher.tokenizer.parameters()),
    }
    result = {
        "model": arguments.model,
        "batch": batch,
        "lean": arguments.lean,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": {name: parameters(tuple(p.shape) for p in part) for name, part in sizes.items()},
        "seconds": rows,
        "peak_gib": peak_gib(),
    }
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"full_size_{arguments.model}.json").write_text(json.dumps(result, indent=2) + "\n")


def peak_gib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
