"""docs/RESULTS.md: the study's tables, figures and findings, from its records alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import List, Optional

from tabulate import tabulate

from ...data.synthetic_hard import MAX_DISTANCE, SAME_COLOUR
from ..intervals import Interval
from .figures import CURVES_FIGURE, DISTANCE_FIGURE, draw_curves, draw_distance
from .findings import findings
from .results import BASELINE, METRIC, Study

COMMAND = "tools/reproduce.py synthetic"
NOT_RUN = "not run"
METRICS = ("locks AP50", "locks AP", "keys AP50", "bbox/AP", "bbox/AP50", "bbox/AP75")

# The tables: title, text, rows.
TABLES = (
    (
        "Controls",
        "The same place, start and training. `mean` and `local` are the block with its affinity "
        "replaced by the global average and by the identity; `conv1x1` and `conv3x3` are two "
        "residual convolutions with the parameters of the block; R50 is deeper instead.",
        ("R18", "NL", "mean", "local", "conv1x1", "conv3x3", "R50"),
    ),
    (
        "Pairwise functions",
        "One block at the paper's place (its Table 2a). NL is the embedded Gaussian.",
        ("R18", "NL_gaussian", "NL", "NL_dot_product", "NL_concatenation"),
    ),
    (
        "Number and place",
        "Its Tables 2b and 2c. 2 blocks: both residual blocks of res4; 4: those of res3 too. NL is "
        "one block in res4.",
        ("R18", "NL", "NL_2_blocks", "NL_4_blocks", "NL_res3", "NL_res2"),
    ),
    (
        "Options",
        "NL has `pool_conv` sub-sampling, the scale, no norm, and reduction 2.",
        ("NL", "NL_no_subsampling", "NL_conv_pool", "NL_no_scale", "NL_BN", "NL_GN")
        + ("NL_reduction_1", "NL_reduction_4"),
    ),
)


def write_page(records: Path, page: Path) -> None:
    """Write the page, and its figures beside it.

    Args:
        records: the folder of the records and levels.json.
        page: such as docs/RESULTS.md.
    """
    study = Study.read(records)
    draw_distance(study, page.parent / DISTANCE_FIGURE)
    draw_curves(study, page.parent / CURVES_FIGURE)
    page.write_text(markdown(study))


def markdown(study: Study) -> str:
    sections = [
        "# What a non-local block gives, and what more convolutions do not",
        f"Written by `{COMMAND}` from [results/synthetic](results/synthetic), one file for each "
        f"run; `{COMMAND} --no-training` writes it again from these alone.",
        *("## What was found", findings(study)),
        *("## The task", _task(study)),
        *_tables(study),
        *("## Distance", _distance(study)),
        *("## Curves", f"![training and validation curves]({CURVES_FIGURE})"),
        *("## Cost", _cost(study)),
        *("## Every run that was started", _runs(study)),
        *("## Full-size training on a GPU", f"{NOT_RUN.capitalize()}."),
    ]
    return "\n\n".join(sections) + "\n"


def _task(study: Study) -> str:
    levels = [
        [title, *(f"{study.level(name, metric):.1f}" for metric in METRICS[:3])]
        for name, title in (
            ("chance", "knows nothing of it: chance"),
            ("colours", "knows which colours the keys have, not which key has which"),
            ("all", "knows it"),
        )
    ]
    text = (
        "Images of [two keys and two locks](../nl_detectron/data/synthetic_hard.py), round and "
        "square, among clutter and distractors, at changing scale. A lock's class is its shape "
        "and the colour of the key of the same shape, which is up to "
        f"{MAX_DISTANCE} pixels away; in {SAME_COLOUR:.0%} of the images both keys have one colour "
        "on purpose. "
        "What the evaluator gives detectors that find every box, know every key and the shape of "
        "every lock, by what they know of the colour of a lock's key:"
    )
    how = (
        f"The result that counts, chosen before the runs, is **{METRIC}**: in percent, the mean "
        "over the classes of locks. Per seed, R18 (of a quarter of the usual width, to res4) is "
        "trained from scratch; from its weights every row goes on, itself included, for the same "
        "number of iterations with the same images. R50 has a beginning of its own, as long."
    )
    return "\n\n".join([text, _table(levels, ["the detector", *METRICS[:3]]), how])


def _tables(study: Study) -> List[str]:
    sections = []
    for title, text, names in TABLES:
        rows = []
        for name in names:
            seeds = len(study.finished[name]) or NOT_RUN
            cells = [_mean(study.mean(name, metric)) for metric in METRICS]
            rows.append([name, seeds, *cells])
        gains = []
        for name in names:
            if name == BASELINE:
                continue
            over = [_difference(study.gain(name, BASELINE))]
            over.append("" if name == "NL" else _difference(study.gain(name, "NL")))
            gains.append([name, *over])
        titles = [metric.replace("bbox/", "box ") for metric in METRICS]
        sections += [
            f"## {title}",
            f"{text} Mean over seeds ± standard deviation.",
            _table(rows, ["", "seeds", *titles]),
            f"{METRIC}, difference seed by seed: mean, and its 95% t interval.",
            _table(gains, ["", f"over {BASELINE}", "over NL"]),
        ]
    return sections


def _distance(study: Study) -> str:
    ranges = [(b["low"], b["high"], b["images"]) for b in study.levels["all"]["by_distance"]]
    rows = []
    for name in ("R18", "R50", "NL", "mean"):
        cells = [NOT_RUN] * len(ranges)
        if study.finished[name]:
            cells = [_mean(study.at_distance(name, i)) for i in range(len(ranges))]
        rows.append([name, *cells])
    headers = [f"{low} to {high} px ({images} images)" for low, high, images in ranges]
    return "\n\n".join(
        [
            "AP50 of the locks by the gap between a lock and its key. The vertical lines are how "
            "far beyond a box its features can depend on anything, in theory, without a block.",
            f"![AP50 of the locks by distance]({DISTANCE_FIGURE})",
            _table(rows, ["", *headers]),
        ]
    )


def _cost(study: Study) -> str:
    rows = []
    for row in study.rows:
        runs = list(study.finished[row.name].values())
        if not runs:
            rows.append([row.name, *[NOT_RUN] * 6])
            continue
        first = runs[0]
        norms = [sum(v**2 for v in run["out_norms"].values()) ** 0.5 for run in runs]
        rows.append(
            [
                row.name,
                f"{first['parameters']:,}",
                f"{first['multiply_adds'] / 1e6:,.1f}",
                f"{sum(run['seconds_per_iteration'] for run in runs) / len(runs):.3f}",
                f"{max(run['max_memory_mib'] for run in runs):,.0f}",
                ", ".join(f"{norm:.2f}" for norm in norms) if first["out_norms"] else "",
                first["config_hash"],
            ]
        )
    headers = ["", "parameters", "M multiply-adds", "s/iter", "MiB", "norm at the end", "config"]
    text = (
        "Multiply-adds of one image, with the 1000 boxes that detectron2's defaults classify. "
        "Seconds were measured beside other work on the machine, and compare nothing. The norm is "
        "that of what starts at zero, by seed: a block whose norm stays near zero sleeps."
    )
    return "\n\n".join([text, _table(rows, headers)])


def _runs(study: Study) -> str:
    rows = []
    for record in study.records:
        environment = record.get("environment", {})
        rows.append(
            [
                record["row"],
                record["seed"],
                record["state"],
                record["config_hash"],
                record["start"] or "",
                f"{record['core_seconds']:.0f}",
                environment.get("commit", ""),
            ]
        )
    hours = sum(record["core_seconds"] for record in study.records) / 3600
    facts = sorted(
        {
            f"{e['device']}, torch {e['torch']}, detectron2 {e['detectron2']}"
            for e in (record.get("environment") for record in study.records)
            if e
        }
    )
    text = f"{len(rows)} runs, {hours:.2f} hours of one core in all; {'; '.join(facts)}."
    started = {record["row"] for record in study.records}
    missing = [row.name for row in study.rows if row.name not in started]
    if missing:
        text += f" {NOT_RUN.capitalize()}: {', '.join(missing)}."
    headers = ["row", "seed", "state", "config", "began with", "core-seconds", "commit"]
    return "\n\n".join([text, _table(rows, headers)])


def _mean(value: Optional[Interval]) -> str:
    if value is None:
        return NOT_RUN
    deviation = "" if value.deviation is None else f" ± {value.deviation:.1f}"
    return f"{value.mean:.1f}{deviation}"


def _difference(value: Optional[Interval]) -> str:
    if value is None:
        return NOT_RUN
    ends = "" if value.low is None else f" ({value.low:+.1f} to {value.high:+.1f})"
    return f"{value.mean:+.1f}{ends}"


def _table(rows: Sequence[list], headers: Sequence[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)
