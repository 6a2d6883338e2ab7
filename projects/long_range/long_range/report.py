"""Write the tables of the study into Markdown files, from the results alone."""

import json
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from scipy import stats
from tabulate import tabulate

from .scores import DISTANCES

METRICS = ("locks AP50", "locks AP", "keys AP50", "box AP")
FUNCTIONS = ("NL_gaussian", "NL_dot_product", "NL_concatenation")
BY_DISTANCE = ("chance", "colours", "R18", "R50", "mean", "NL", *FUNCTIONS)
BY_DISTANCE += tuple(f"{row}_long" for row in BY_DISTANCE[2:])
LONG = ("R18", "NL", *FUNCTIONS, "mean", "conv3x3", "R50")
OPTIONS = ("no_subsampling", "conv_pool", "no_scale", "BN", "GN", "reduction_1", "reduction_4")
# Name of a table -> its rows, and the rows that they are compared with.
COMPARISONS = {
    "controls": (("R18", "NL", "mean", "local", "conv1x1", "conv3x3", "R50"), ("R18", "NL")),
    "functions": (("R18", "NL", *FUNCTIONS), ("R18", "NL", "mean")),
    "places": (("R18", "NL", "NL_2_blocks", "NL_4_blocks", "NL_res3", "NL_res2"), ("R18", "NL")),
    "options": (("R18", "NL", *(f"NL_{option}" for option in OPTIONS)), ("R18", "NL")),
    "long": ([f"{row}_long" for row in LONG], ("R18_long", "NL_long", "mean_long")),
}

_table = partial(tabulate, tablefmt="github", disable_numparse=True)
Results = dict[str, dict[int, dict]]  # row -> seed -> line


def read_results(path: Path) -> Results:
    """Read the results of all runs from a JSON Lines file, which need not exist."""
    results = {}
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        results.setdefault(line["row"], {})[line["seed"]] = line
    return results


def write_tables(results: Results, path: Path) -> None:
    """Replace the text between ``<!-- table NAME -->`` and ``<!-- end -->`` in a file."""
    tables = {name: _comparison(results, *rows) for name, rows in COMPARISONS.items()}
    tables["distance"] = _by_distance(results)
    pattern = re.compile(r"(<!-- table (\w+) -->).*?(<!-- end -->)", re.DOTALL)
    path.write_text(pattern.sub(lambda m: f"{m[1]}\n\n{tables[m[2]]}\n\n{m[3]}", path.read_text()))


def difference(values: dict[int, float], baseline: dict[int, float]) -> str:
    """Return the mean difference over the seeds that both have, and its 95% t interval."""
    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    if len(differences) < 2:
        return f"{differences[0]:+.1f}" if differences else ""
    centre, error = mean(differences), stats.sem(differences)
    low, high = stats.t.interval(0.95, len(differences) - 1, loc=centre, scale=error)
    return f"{centre:+.1f} ({low:+.1f} to {high:+.1f})"


def _comparison(results: Results, rows: Iterable[str], references: Sequence[str]) -> str:
    def by_seed(row: str, metric: str) -> dict[int, float]:
        return {seed: line[metric] for seed, line in results.get(row, {}).items()}

    cells = []
    for row in filter(results.get, rows):
        means = [_mean(by_seed(row, metric).values()) for metric in METRICS]
        values, others = by_seed(row, METRICS[0]), [of for of in references if of != row]
        gains = {of: difference(values, by_seed(of, METRICS[0])) for of in others}
        norms = [f"{line['norm']:.2f}" for line in results[row].values() if line.get("norm")]
        cells.append([row, means[0], *map(gains.get, references), *means[1:], ", ".join(norms)])
    headers = ["", METRICS[0], *(f"over {of}" for of in references), *METRICS[1:]]
    return _table(cells, [*headers, "norm of the block"])


def _by_distance(results: Results) -> str:
    cells = []
    for row in filter(results.get, BY_DISTANCE):
        per_seed = [(line[METRICS[0]], *line["by distance"]) for line in results[row].values()]
        cells.append([row, *map(_mean, zip(*per_seed))])
    return _table(cells, ["", "all", *(f"{a} to {b} px" for a, b in zip(DISTANCES, DISTANCES[1:]))])


def _mean(values: Iterable[float]) -> str:
    values = list(values)
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
