"""A reproduced table as Markdown, JSON and a picture."""

import json
import statistics
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dd2.evaluation.curve import curve_plot
from dd2.evaluation.plots import figure_png
from dd2.files import write_atomic
from dd2.provenance import read_versions
from dd2.records import read_record
from dd2.reproduce.rows import COLUMNS, Claim, Row, Table, value


@dataclass(frozen=True)
class Measured:
    """A number over seeds."""

    values: list[float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float:
        """Sample standard deviation over the seeds; 0 for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def shown(self, kind: str) -> str:
        """Mean ± sd."""
        spread = f" ± {format(self.sd, kind)}" if len(self.values) > 1 else ""
        return format(self.mean, kind) + spread


Results = dict[str, dict[str, Measured]]
"""Row label -> column -> numbers."""


def collect(table: Table, evaluations: dict[str, list[dict[str, Any]]]) -> Results:
    """Numbers of every row, from the evaluations of its runs, one per seed."""
    results: Results = {}
    for row in table.rows:
        results[row.label] = {}
        claimed = (claim.column for claim in table.claims)
        for column in dict.fromkeys((*table.columns, *claimed, "gap", "seconds", "floor", "worst")):
            values = [value(numbers, row.method, column) for numbers in evaluations[row.label]]
            known = [number for number in values if number is not None]
            if known:
                results[row.label][column] = Measured(known)
    return results


def verdict(claim: Claim, results: Results) -> dict[str, Any]:
    """Whether a claim is found again: the difference of the means must exceed the spread, the larger of the two deviations."""
    better, worse = results[claim.better][claim.column], results[claim.worse][claim.column]
    difference = (better.mean - worse.mean) * (1 if claim.higher else -1)
    spread = max(better.sd, worse.sd)
    found = difference > spread
    heading, kind = COLUMNS[claim.column]
    said = f"{heading} {better.shown(kind)} ({claim.better}) against {worse.shown(kind)} ({claim.worse})"
    if claim.at_most:
        share = results[claim.better]["seconds"].mean / results[claim.worse]["seconds"].mean
        found = found and share <= claim.at_most
        said += f", at {share:.2f} of its training seconds"
    return {"claim": claim.text, "found": found, "measured": said}


def curves_of(table: Table, evaluations: dict[str, list[dict[str, Any]]]) -> dict[str, list[list[dict[str, Any]]]]:
    """The distance at every checkpoint of stage 2: row label -> of each seed's run. Empty for tables without."""
    if not table.curves:
        return {}
    return {
        label: [[point for point in numbers["curve"] if point["stage"] == "csd"] for numbers in runs]
        for label, runs in evaluations.items()
    }


def provenances(runs: list[Path]) -> dict[str, str]:
    """Machines, threads, torch and commits of the runs of a table, later sessions included, each once."""
    first = [read_versions(run / "versions.json") for run in runs]
    found = [session for one in first for session in (one, *one.get("resumed", []))]
    return {key: ", ".join(sorted({str(one.get(key, "")) for one in found})) for key in ("machine", "threads", "torch", "commit")}


def write(
    folder: Path,
    name: str,
    table: Table,
    results: Results,
    made: dict[str, Any],
    curves: dict[str, list[list[dict[str, Any]]]],
) -> None:
    """Write NAME.md, NAME.json and NAME.png, and NAME_curve.png where there are curves.

    Args:
        folder: where to.
        name: of the files.
        table, results: what.
        made: bench, budget, seeds, machine, versions and command.
        curves: from `curves_of`.
    """
    verdicts = [verdict(claim, results) for claim in table.claims]
    folder.mkdir(parents=True, exist_ok=True)
    rows = {label: {column: asdict(number) for column, number in found.items()} for label, found in results.items()}
    content = {"title": table.title, **made, "rows": rows, "claims": verdicts}
    if curves:
        content["curves"] = curves
        floor, worst = (results[table.rows[0].label][key].mean for key in ("floor", "worst"))
        write_atomic(folder / f"{name}_curve.png", curve_plot(curves, floor, worst, "step"))
    write_atomic(folder / f"{name}.json", json.dumps(content, indent=2) + "\n")
    write_atomic(folder / f"{name}.png", _plot(table, results))
    write_atomic(folder / f"{name}.md", markdown(name, table, results, verdicts, made))


def write_index(folder: Path, bench: str) -> Path:
    """Write BENCH_tables.md: every page of a bench that is there, with its verdicts."""
    lines = [f"# The paper's tables on {bench}", ""]
    lines += ["Written by `dd2 reproduce`. A claim counts as found if the difference of the means over seeds exceeds the larger"]
    lines += ["deviation. Numbers, commands and machines are on the pages.", ""]
    for file in sorted(folder.glob(f"{bench}_*.json")):
        content = read_record(file, {"bench?": str}, "move it away: dd2 reproduce looks for its pages here")
        if content.get("bench") != bench or "claims" not in content:
            continue
        seeds = len(content["seeds"])
        lines += [f"**[{content['title']}]({file.stem}.md)** ({seeds} seed{'s' if seeds > 1 else ''})", ""]
        lines += [_said(entry) for entry in content["claims"]]
        lines.append("")
    index = folder / f"{bench}_tables.md"
    write_atomic(index, "\n".join(lines))
    return index


def _said(entry: dict[str, Any]) -> str:
    said = f"- {entry['claim']}: **{'found' if entry['found'] else 'not found'}** ({entry['measured']})."
    return _wrapped(said, subsequent_indent="  ")


def _wrapped(text: str, **how: Any) -> str:
    return textwrap.fill(text, 128, break_long_words=False, break_on_hyphens=False, **how)


def markdown(name: str, table: Table, results: Results, verdicts: list[dict[str, Any]], made: dict[str, Any]) -> str:
    """The page."""
    columns = [column for column in table.columns if any(column in found for found in results.values())]
    paper = f"paper ({table.paper})" if table.paper else "paper"
    heads = ["", "passes", *(COLUMNS[column][0] for column in columns), paper]
    lines = [f"# {table.title}, on {made['bench']}", "", _wrapped(f"`{made['command']}`"), "", _described(made), ""]
    lines += ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 2) + "---|"]
    lines += [f"| {row.label} | {row.steps} | {_cells(row, columns, results)} | {row.paper} |" for row in table.rows]
    lines += ["", *([_wrapped(table.note), ""] if table.note else [])]
    if verdicts:
        lines += ["What the paper claims, and what is found here:", "", *map(_said, verdicts), ""]
    lines += [f"![{table.title}]({name}.png)", ""]
    if "milliseconds" in columns:
        lines += [f"Milliseconds were measured on {made['measured on']}.", ""]
    if table.curves:
        lines += [
            "The generator's average at every checkpoint of stage 2, a line per seed:",
            "",
            f"![distance against steps]({name}_curve.png)",
            "",
        ]
    return "\n".join(lines)


def _cells(row: Row, columns: list[str], results: Results) -> str:
    found = results[row.label]
    return " | ".join(found[column].shown(COLUMNS[column][1]) if column in found else "–" for column in columns)


def _described(made: dict[str, Any]) -> str:
    seeds = ", ".join(map(str, made["seeds"]))
    return _wrapped(
        f"Seeds {seeds}: mean ± standard deviation; a claim counts as found if the difference of the means exceeds the larger "
        f"deviation. {made['count']:,} images per method, as many of the teacher. Budget {made['budget']:g} minutes of the "
        f"bench's machine per DD2 distillation: {made['iterations']}. Made on {made['machine']}, "
        f"{made['threads']} threads a run, torch {made['torch']}, commit {made['commit'] or 'unknown'}."
    )


def _plot(table: Table, results: Results) -> bytes:
    """The main column, a bar per row."""
    from matplotlib.figure import Figure

    column = table.claims[0].column if table.claims else table.columns[0]
    shown = [row for row in table.rows if column in results[row.label]]
    figure = Figure(figsize=(7.5, 0.9 + 0.42 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    means = [results[row.label][column].mean for row in shown]
    colours = ["tab:blue" if "DD2" in row.label or column != "gap" else "0.6" for row in shown]
    axes.barh(
        [row.label for row in shown], means, xerr=[results[row.label][column].sd for row in shown], color=colours, capsize=3
    )
    for position, row in enumerate(shown):
        axes.plot(results[row.label][column].values, [position] * len(results[row.label][column].values), "k.", markersize=4)
    axes.invert_yaxis()
    axes.set_xlabel(COLUMNS[column][0])
    axes.set_title(table.title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    return figure_png(figure)
