"""dd2 plan's memory against the real peak of a process that trains: networks with random weights, on a CPU.

    python benchmarks/plan_memory.py

Each case is a process that builds the networks and runs two iterations of stage 2, optimisers included. It runs twice: once the
profiler adds up what tensors hold at most, which is what is planned; once the system tells by how much the process grew at most,
with the libraries' buffers and what malloc keeps. Writes benchmarks/results/plan_memory.json and the table in docs/scale.md.
"""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from dd2.commands.bench import peak_of_process, peak_of_tensors
from dd2.commands.needs import needs
from dd2.commands.plan_config import PlanConfig
from dd2.method.config import CSDConfig, MatchConfig, NetworksConfig
from dd2.method.networks import networks_over_codes, starting_networks
from dd2.method.recipe import csd_stage
from dd2.student import HeadConfig, Student
from dd2.teachers.code import CodeTeacher
from dd2.teachers.filtering import Sampling
from dd2.teachers.llamagen import LlamaGenConfig, llamagen_teacher
from dd2.teachers.var import var_teacher
from dd2.teachers.var_blocks import VARConfig
from dd2.tokenizers.autoencoder import VQConfig
from dd2.tokenizers.multiscale import MultiScaleConfig, MultiScaleTokenizer
from dd2.tokenizers.vq import VQTokenizer
from dd2.training.layers import prepare_layers
from dd2.training.samples import TeacherSamples

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
SMALL = {"channels": 8, "multipliers": (1, 1, 1, 1, 1), "z_channels": 8, "groups": 4, "image_size": 256}
CASES = {
    "tiny batch": {"family": "llamagen", "batch": 2, "d": "sid", "recompute": True},
    "llamagen": {"family": "llamagen", "batch": 8, "d": "sid"},
    "llamagen, recompute": {"family": "llamagen", "batch": 8, "d": "sid", "recompute": True},
    "llamagen, dmd, 4 draws": {"family": "llamagen", "batch": 8, "d": "dmd", "generator_draws": 4},
    "var, guided": {"family": "var", "batch": 4, "d": "sid"},
    "var, guided, recompute": {"family": "var", "batch": 4, "d": "sid", "recompute": True},
    "llamagen, codes, matched": {"family": "llamagen", "batch": 8, "d": "dmd", "generator_draws": 4, "codes": True},
    "var, guided, codes, matched": {"family": "var", "batch": 4, "d": "dmd", "generator_draws": 4, "codes": True},
}
MATCHED = MatchConfig(weight=1.0, projections=64, reference=600, prime=64)


def build(family: str) -> CodeTeacher:
    """A teacher of width 384 with full-length sequences."""
    if family == "llamagen":
        tokenizer = VQTokenizer(VQConfig(codebook_size=4096, code_dim=8, **SMALL))  # pyright: ignore[reportArgumentType]
        sizes = LlamaGenConfig(depth=8, width=384, heads=6, rows=16, columns=16)
        return llamagen_teacher(sizes, tokenizer)
    scales = MultiScaleConfig(codebook_size=1024, code_dim=32, **SMALL)  # pyright: ignore[reportArgumentType]
    return var_teacher(VARConfig(depth=6, width=384, heads=6), MultiScaleTokenizer(scales))


def config_of(case: dict) -> PlanConfig:
    """The configuration of a case, in float32 on one process."""
    sampling = Sampling(cfg_scale=1.5) if case["family"] == "var" else Sampling()
    csd = CSDConfig(
        k=1,
        batch=case["batch"],
        accumulate=1,
        generator_draws=case.get("generator_draws", 1),
        d=case["d"],
        sampling=sampling,
        validation=0,
        match=MATCHED if "codes" in case else MatchConfig(),
    )
    kinds = NetworksConfig(generator="codes", guidance="codes") if "codes" in case else NetworksConfig()
    config = replace(PlanConfig(), head=HeadConfig(depth=3, width=384), csd=csd, networks=kinds)
    return replace(config, loop=replace(config.loop, recompute=case.get("recompute", False)))


def train(case: dict) -> None:
    """Two iterations of stage 2."""
    config = config_of(case)
    teacher = build(case["family"]).eval().requires_grad_(False)
    teacher.standardise()
    student = Student.from_teacher(teacher, config.head) if config.networks.need_stage1 else None
    networks = starting_networks(config.csd, student, None, networks_over_codes(config.networks, teacher))
    del student
    ids = torch.randint(len(teacher.codebook), (MATCHED.reference, teacher.order.n), generator=torch.Generator().manual_seed(0))
    samples = TeacherSamples(teacher, ids, torch.arange(len(ids)) % 4)
    stage = csd_stage(networks, teacher, samples, config.csd)
    for network in (networks.generator, networks.guidance):
        prepare_layers(network.backbone, config.loop.recompute, compiled=False)
    for index in range(2):
        for update in stage.updates:
            update.optimizer.zero_grad(set_to_none=True)
            loss, _ = update.loss(torch.Generator().manual_seed(index))
            loss.backward(inputs=update.parameters)
            update.optimizer.step()
        stage.after(index)


def grown(case: dict) -> float:
    """Bytes by which this process grows at most, with the libraries' buffers."""
    before = peak_of_process(lambda: None, CPU)
    return peak_of_process(lambda: train(case), CPU) - before


MEASURES = {"tensors": lambda case: peak_of_tensors(lambda: train(case), CPU), "resident": grown}


def main() -> None:
    """Measure every case in a process of its own and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=MEASURES, default="tensors", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(MEASURES[arguments.measure](CASES[arguments.case]))
        return
    rows = []
    lines = ["| case | planned | tensors | planned / tensors | growth of the process |", "|---|---:|---:|---:|---:|"]
    for name, case in CASES.items():
        planned = needs(config_of(case), build(case["family"]).to("meta")).total
        row = {"case": name, "planned": planned}
        for measure in MEASURES:
            command = [sys.executable, __file__, "--case", name, "--measure", measure]
            row[measure] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        rows.append(row)
        cells = [f"{row[key] / 1e9:.2f} GB" for key in ("planned", "tensors", "resident")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {planned / row['tensors']:.2f} | {cells[2]} |")
        print(lines[-1], flush=True)
    results = {"torch": str(torch.__version__), "threads": torch.get_num_threads(), "rows": rows}
    (ROOT / "benchmarks" / "results" / "plan_memory.json").write_text(json.dumps(results, indent=2) + "\n")
    page = ROOT / "docs" / "scale.md"
    marked = re.compile(r"(<!-- plan_memory -->\n).*?(<!-- /plan_memory -->)", re.DOTALL)
    page.write_text(marked.sub(lambda match: match[1] + "\n".join(lines) + "\n" + match[2], page.read_text()))


if __name__ == "__main__":
    main()
