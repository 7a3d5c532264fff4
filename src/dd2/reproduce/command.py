"""dd2 reproduce: the paper's tables at sizes that one machine can run."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dd2.errors import InputError
from dd2.files import writable_folder
from dd2.processes import say
from dd2.records import read_record
from dd2.reproduce.benches import Bench, open_bench
from dd2.reproduce.page import collect, curves_of, provenances, write, write_index
from dd2.reproduce.rows import Table
from dd2.reproduce.tables import TABLES, open_table
from dd2.reproduce.workshop import Cell, Workshop


@dataclass(frozen=True)
class ReproduceConfig:
    """Reproduce a table of the paper: 1, 2, 3, 4, 5, 7, 9, k (guidance updates), loss (SiD, SIM, DMD), latency (quality
    against it), recipe (what goes beyond the paper), or all.

    Everything is made once: runs are kept in OUT/BENCH under the hash of what made them, so that a second table uses the first
    one's teacher, stage 1 and generators, and an interrupted table goes on. Writes RESULTS/BENCH_tableN.md, .json and .png.
    """

    table: str = "all"
    """1, 2, 3, 4, 5, 7, 9, k, loss, latency, recipe, or all."""
    bench: str = "digits"
    """digits, digits_var (two CPU cores); fashion (the same in hours, and --images); fashion_var, cifar10, cifar10_var,
    imagenette64 and imagenette64_var (a GPU, and --images)."""
    budget: float = 0.0
    """Minutes of one DD2 distillation on the bench's machine; iterations of both methods scale with it. 0: the bench's own."""
    rows: tuple[str, ...] = ()
    """Labels of the rows to make, with the claims about them alone; none: all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A run of everything for each."""
    count: int = 10_000
    """Images per method of each evaluation."""
    images: str = ""
    """Real images of benches that need them: a folder or zip."""
    teacher: str = ""
    """A trained teacher's folder, instead of training the bench's own."""
    out: Path = Path("runs/reproduce")
    """Folder of the runs."""
    results: Path = Path("docs/results")
    """Folder of the pages."""
    dry_run: bool = False
    """Print what would be run, and how long it takes, and stop."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Refuse budgets and seeds without meaning."""
        if self.budget < 0 or not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise InputError("budget must not be negative, and seeds must be different numbers from 0")
        if self.count < 2:
            raise InputError(f"count must be at least 2, got {self.count}")


def reproduce(config: ReproduceConfig) -> None:
    """Make the runs that are missing, evaluate them, and write the pages."""
    bench = open_bench(config.bench, config.images, config.teacher)
    budget = config.budget or bench.minutes
    bench = bench.scaled(budget)
    tables = _tables(config, bench)
    workshop = Workshop(bench, config.out.resolve() / config.bench, config.count, config.device)
    cells = _cells(workshop, tables, config.seeds)
    say(_plan(workshop, cells, budget))
    if config.dry_run:
        return
    writable_folder(config.results, "results folder")
    for name, table in tables.items():
        _keep_whole(config, name, table)
    workshop.prepare()
    for index, cell in enumerate(cells):
        say(f"[{index + 1} of {len(cells)}] {cell}")
        workshop.run(cell)
    for name, table in tables.items():
        used = _cells(workshop, {name: table}, config.seeds)
        evaluations = {
            row.label: [workshop.evaluated(row.cell(seed), **_evaluation(name, table)) for seed in config.seeds]
            for row in table.rows
        }
        file = _page(config, name)
        made = _made(config, name, bench, budget, {cell.kind for cell in used}) | provenances(
            [*workshop.prepared_runs(), *map(workshop.folder, used)]
        )
        machines = {
            numbers["evaluation"].get("made", {}).get("machine", "a machine not recorded")
            for runs in evaluations.values()
            for numbers in runs
        }
        made["measured on"] = ", ".join(sorted(machines))
        write(config.results, file, table, collect(table, evaluations), made, curves_of(table, evaluations))
        say(f"wrote {config.results / file}.md")
    say(f"wrote {write_index(config.results, config.bench)}")


def _tables(config: ReproduceConfig, bench: Bench) -> dict[str, Table]:
    """The tables asked for, of the rows asked for."""
    names = list(TABLES) if config.table == "all" else [config.table]
    whole = {name: open_table(name, bench) for name in names}
    known = list(dict.fromkeys(row.label for table in whole.values() for row in table.rows))
    for label in config.rows:
        if label not in known:
            raise InputError(f"table {config.table} has no row {label!r}; its rows are {', '.join(map(repr, known))}")
    if not config.rows:
        return whole
    return {name: table for name, full in whole.items() if (table := full.of_rows(config.rows)).rows}


def _page(config: ReproduceConfig, name: str) -> str:
    return f"{config.bench}_{'table' if name.isdigit() else ''}{name}"


def _keep_whole(config: ReproduceConfig, name: str, table: Table) -> None:
    """Refuse to put a page of some rows in the place of one that has more."""
    file = config.results / f"{_page(config, name)}.json"
    if config.rows and file.is_file():
        there = read_record(file, {"rows": dict}, "move it away")["rows"]
        if lost := sorted(there.keys() - {row.label for row in table.rows}):
            raise InputError(f"{file} has rows that --rows leaves out ({', '.join(lost)}); give another --results")


def _evaluation(name: str, table: Table) -> dict[str, Any]:
    return {"speed": name in ("1", "latency"), "curve": table.curves, **table.evaluation}


def _cells(workshop: Workshop, tables: dict[str, Table], seeds: tuple[int, ...]) -> list[Cell]:
    """Every run that the tables need, once, seed by seed, what others build on first."""
    cells: dict[Path, Cell] = {}
    for seed in seeds:
        for table in tables.values():
            for row in table.rows:
                cell = row.cell(seed)
                for needed in (cell.stage1 if cell.kind == "dd2" else None, cell.continues, cell):
                    if needed is not None:
                        cells.setdefault(workshop.folder(needed), needed)
    return list(cells.values())


def _plan(workshop: Workshop, cells: list[Cell], budget: float) -> str:
    """What is there and what is missing, with a rough time on the bench's machine."""
    lines, total = [], 0.0
    if not workshop.prepared():
        lines.append("  first: tokenizer, teacher and classifier of the bench, as far as they are missing")
    for cell in cells:
        done = workshop.made(cell)
        minutes = 0.0 if done else _minutes(workshop.bench, cell, budget)
        total += minutes
        lines.append(f"  {'made' if done else f'{minutes:4.1f} min':8}  {cell}  ({workshop.folder(cell).name})")
    missing = sum(not workshop.made(cell) for cell in cells)
    head = (
        f"{len(cells)} runs, {missing} to make, about {total:.0f} minutes of training on the bench's machine, evaluations aside:"
    )
    return "\n".join([head, *lines])


def _minutes(bench: Bench, cell: Cell, budget: float) -> float:
    """Rough: stage 1 is a fifth of a distillation, a guidance update costs as much as a generator update, DD1 gets twice all."""
    if cell.kind == "dd1":
        return 2 * budget
    if cell.kind == "stage1":
        return budget / 5
    usual, changes = bench.distill.csd.k + 1, dict(cell.changes)
    if cell.continues is not None:
        return budget * 0.8 * (1 / 3 + 1 / 5)
    return budget * 0.8 * (changes.get("csd.k", usual - 1) + 1) / usual


def _made(config: ReproduceConfig, name: str, bench: Bench, budget: float, kinds: set[str]) -> dict[str, Any]:
    """What a page says of how it was made; `kinds` of its runs."""
    own, dd1 = bench.distill, bench.dd1
    iterations = {
        "dd2": f"{bench.paper.tune.iterations} iterations of stage 1 and {bench.paper.csd.iterations} of stage 2 (DD2)",
        "best": f"{own.regress.iterations} iterations of regression and {own.csd.iterations} of stage 2 (this library's recipe)",
        "dd1": f"{dd1.train.iterations} iterations on {dd1.pairs:,} pairs (DD1)",
        "stage1": f"{bench.paper.tune.iterations} iterations of stage 1",
    }
    if "dd2" in kinds:  # which says it
        kinds = kinds - {"stage1"}
    images = [Path(config.images).name] if config.images else []
    options = [("rows", config.rows), ("images", images), ("teacher", [config.teacher] if config.teacher else [])]
    return {
        "bench": config.bench,
        "budget": budget,
        "iterations": ", ".join(said for kind, said in iterations.items() if kind in kinds),
        "seeds": list(config.seeds),
        "count": config.count,
        "command": f"dd2 reproduce --table {name} --bench {config.bench} --budget {budget:g} --count {config.count} "
        f"--seeds {' '.join(map(str, config.seeds))}"
        + "".join(f" --{option} {shlex.join(words)}" for option, words in options if words),
    }
