"""docs/RESULTS.md: the study's tables, figures and findings, from its records alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import List, Optional

from tabulate import tabulate

from ..data.synthetic_hard import MAX_DISTANCE, SAME_COLOUR
from .figures import (
    CURVES_FIGURE,
    DISTANCE_FIGURE,
    DRAWN,
    EXAMPLES_FIGURE,
    draw_curves,
    draw_distance,
    draw_examples,
)
from .findings import NOT_RUN, findings
from .intervals import Interval
from .results import BASELINE, METRIC, Study
from .rows import TABLE

COMMAND = "tools/reproduce.py synthetic"
METRICS = ("locks AP50", "locks AP", "keys AP50", "bbox/AP", "bbox/AP50", "bbox/AP75")

# Title, text, rows, and those that the others are compared with.
SECTIONS = (
    (
        "Controls",
        "The same place, start and training. `mean` and `local` are the block with its affinity "
        "replaced by the global average and by the identity; `conv1x1` and `conv3x3` are two "
        "residual convolutions with the parameters of the block; R50 is deeper instead.",
        ("R18", "NL", "mean", "local", "conv1x1", "conv3x3", "R50"),
        (BASELINE, "NL"),
    ),
    (
        "Pairwise functions",
        "One block at the paper's place (its Table 2a). NL is the embedded Gaussian.",
        ("R18", "NL_gaussian", "NL", "NL_dot_product", "NL_concatenation"),
        (BASELINE, "NL", "mean"),
    ),
    (
        "Number and place",
        "Its Tables 2b and 2c. 2 blocks: both residual blocks of res4; 4: those of res3 too. NL is "
        "one block in res4.",
        ("R18", "NL", "NL_2_blocks", "NL_4_blocks", "NL_res3", "NL_res2"),
        (BASELINE, "NL"),
    ),
    (
        "Options",
        "NL has `pool_conv` sub-sampling, the scale, no norm, and reduction 2.",
        ("NL", "NL_no_subsampling", "NL_conv_pool", "NL_no_scale", "NL_BN", "NL_GN")
        + ("NL_reduction_1", "NL_reduction_4"),
        (BASELINE, "NL"),
    ),
    (
        "Longer",
        "The same for three times as many iterations. These rows were added when the first runs "
        "were there, of which some had not finished learning.",
        ("R18_long", "NL_long", "NL_gaussian_long", "NL_dot_product_long", "NL_concatenation_long")
        + ("mean_long", "conv3x3_long", "R50_long"),
        ("R18_long", "NL_long", "mean_long"),
    ),
)


def write_page(records: Path, page: Path) -> None:
    """Write the page, and its figures beside it.

    Args:
        records: the folder of the records and levels.json.
        page: such as docs/RESULTS.md.
    """
    study = Study.read(records)
    draw_examples(page.parent / EXAMPLES_FIGURE)
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
        "on purpose."
    )
    knowledge = (
        "What the evaluator gives detectors that find every box, know every key and the shape of "
        "every lock, by what they know of the colour of a lock's key:"
    )
    how = (
        f"The result that counts, chosen before the runs, is **{METRIC}**: in percent, the mean "
        "over the classes of locks. Per seed, R18 (of a quarter of the usual width, to res4) is "
        "trained from scratch; from its weights every row goes on, itself included, for the same "
        "number of iterations with the same images. R50 has a beginning of its own, as long. How "
        "hard the data are, the learning rate and the schedule were settled beforehand by trials "
        "of R18, NL and mean, which are not among these runs."
    )
    picture = f"![some of the images]({EXAMPLES_FIGURE})"
    table = _table(levels, ["the detector", *METRICS[:3]])
    return "\n\n".join([text, picture, knowledge, table, how])


def _tables(study: Study) -> List[str]:
    sections = []
    for title, text, names, references in SECTIONS:
        rows, gains = [], []
        for name in names:
            seeds = len(study.finished[name]) or NOT_RUN
            rows.append([name, seeds, *(_mean(study.mean(name, metric)) for metric in METRICS)])
            if name != references[0]:
                over = [_difference(study.gain(name, of)) for of in references if of != name]
                gains.append([name, *over])
        titles = [metric.replace("bbox/", "box ") for metric in METRICS]
        sections += [
            f"## {title}",
            f"{text} Mean over seeds ± standard deviation.",
            _table(rows, ["", "seeds", *titles]),
            f"{METRIC}, difference seed by seed: mean, and its 95% t interval.",
            _table(gains, ["", *(f"over {of}" for of in references)]),
        ]
    return sections


def _distance(study: Study) -> str:
    ranges = [(b["low"], b["high"], b["images"]) for b in study.levels["all"]["by_distance"]]
    rows = []
    for name in (*DRAWN, *(f"{name}_long" for name in DRAWN)):
        cells = [NOT_RUN] * len(ranges)
        if study.finished[name]:
            cells = [_mean(study.at_distance(name, i)) for i in range(len(ranges))]
        rows.append([name, *cells])
    headers = [f"{low} to {high} px ({images} images)" for low, high, images in ranges]
    return "\n\n".join(
        [
            "AP50 of the locks by the gap between a lock and its key. The vertical lines are how "
            "far beyond a box its features can depend on anything, in theory, without a block. "
            + _reach(study),
            f"![AP50 of the locks by distance]({DISTANCE_FIGURE})",
            _table(rows, ["", *headers]),
        ]
    )


def _reach(study: Study) -> str:
    """Whether the baseline has learnt what is within its reach."""
    near, longer = (study.at_distance(row, 0) for row in (BASELINE, f"{BASELINE}_long"))
    chance = study.levels["chance"]["by_distance"][0]["AP50"]
    if near is None or near.low is None:
        return ""
    if near.low > chance:
        text = f"Of the nearest locks {BASELINE} knows more than chance, {chance:.1f}."
    else:
        text = (
            f"Even of the nearest locks {BASELINE} knows no more than chance, {chance:.1f}: what "
            "is within its reach it has not learnt so soon either, so the lines are no limit seen "
            "here."
        )
    return text if longer is None else f"{text} Trained longer it has {_mean(longer)} there."


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
        "Parameters are of the whole model, multiply-adds of the backbone, on one image. Seconds "
        "were measured beside other work on the machine, and compare nothing. The norm is that of "
        "what starts at zero, by seed: a block whose norm stays near zero sleeps."
    )
    return "\n\n".join([text, _table(rows, headers)])


def _runs(study: Study) -> str:
    by_run = {(record["row"], record["seed"]): record for record in study.records}
    seeds = sorted({seed for _, seed in by_run})
    rows = []
    for seed in seeds:
        for row in TABLE.rows:
            record = by_run.get((row.name, seed))
            if record is None:
                rows.append([row.name, seed, NOT_RUN, "", row.start or "", "", ""])
                continue
            cells = [record["state"], record["config_hash"], record["start"] or ""]
            commit = record.get("environment", {}).get("commit", "")
            seconds = record["core_seconds"]
            cells.append("unknown" if seconds is None else f"{seconds:.0f}")
            rows.append([row.name, seed, *cells, commit])
    environments = [record["environment"] for record in study.records if "environment" in record]
    facts = {
        f"{e['device']}, torch {e['torch']}, detectron2 {e['detectron2']}" for e in environments
    }
    seconds = [r["core_seconds"] for r in study.records if r["core_seconds"] is not None]
    text = (
        f"{len(by_run)} runs on {'; '.join(sorted(facts))}; {sum(seconds) / 3600:.2f} hours of one "
        f"core in the {len(seconds)} whose time is known. A run that is started and not finished "
        "was stopped; the command goes on with it."
    )
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
