"""What was found, in sentences whose numbers and verdicts come from the runs."""

from collections.abc import Sequence
from typing import List, Tuple

from .intervals import Interval
from .results import BASELINE, METRIC, Study

SMALL = 5  # percent of METRIC: what is within it of something is as good as that
NOT_RUN = "not run"
LONGER = "trained three times as long"
FUNCTIONS = {
    "NL_gaussian": "Gaussian",
    "NL": "embedded Gaussian",
    "NL_dot_product": "dot product",
    "NL_concatenation": "concatenation",
}
PLACES = ("NL_2_blocks", "NL_4_blocks", "NL_res3", "NL_res2")
OPTIONS = ("NL_no_subsampling", "NL_conv_pool", "NL_no_scale", "NL_BN", "NL_GN")
OPTIONS += ("NL_reduction_1", "NL_reduction_4")


def findings(study: Study) -> str:
    """Five sentences; one whose rows are not there says so."""
    parts = (_gain, _convolutions, _attention, _functions, _options)
    sentences = "\n".join(f"{i}. {part(study)}" for i, part in enumerate(parts, start=1))
    return (
        f"{sentences}\n\nDifferences are in percent of {METRIC}, seed by seed, with their 95% t "
        "intervals in parentheses, which are not corrected for being many; one that includes 0 "
        "tells no difference."
    )


def _gain(study: Study) -> str:
    baseline, block = study.mean(BASELINE), study.mean("NL")
    if baseline is None or block is None:
        return _missing((BASELINE, "NL"))
    at = [[study.at_distance(row, i).mean for i in (0, -1)] for row in (BASELINE, "NL")]
    at.append([study.levels["chance"]["by_distance"][i]["AP50"] for i in (0, -1)])
    said = [f"{near:.1f} and {far:.1f}" for near, far in at]
    return (
        f"One block takes the {METRIC} from {baseline.mean:.1f} to {block.mean:.1f}, "
        f"{_signed(study.gain('NL'))}, where chance is {study.level('chance'):.1f} and all that "
        f"can be known gives {study.level('all'):.1f}; for the nearest and the farthest locks "
        f"{BASELINE} has {said[0]}, with the block {said[1]}, and chance is {said[2]}."
    )


def _convolutions(study: Study) -> str:
    rows = ("conv1x1", "conv3x3", "R50")
    if any(study.gain(row) is None for row in rows):
        return _missing(rows)
    said = ", ".join(f"{row} {_signed(study.gain(row))}" for row in rows)
    sentence = f"What more convolutions give over {BASELINE}: {said}"
    beaten = [row for row in rows if _is_above(study.gain("NL", row))]
    sentence += f"; the block is above {_list(beaten) or 'none of them'}, by the interval"
    rows = ("conv3x3", "R50", "NL")
    longer = {row: study.gain(f"{row}_long", f"{BASELINE}_long") for row in rows}
    if None in longer.values():
        return f"{sentence}."
    said = ", ".join(f"{row} {_signed(gain)}" for row, gain in longer.items())
    return f"{sentence}; {LONGER}: {said}."


def _attention(study: Study) -> str:
    rows = ("mean", "local", *FUNCTIONS)
    if any(study.gain(row) is None for row in rows):
        return _missing(rows)
    sentence = (
        f"Of the gain, the global average in place of the affinity gives "
        f"{_signed(study.gain('mean'))}, the identity {_signed(study.gain('local'))}; what "
        f"attention adds to the average: {_over_mean(study, '')}"
    )
    average = study.gain("mean_long", f"{BASELINE}_long")
    if average is None or any(study.mean(f"{row}_long") is None for row in FUNCTIONS):
        return f"{sentence}."
    return (
        f"{sentence}; {LONGER}, the average gives {_signed(average)}, and attention adds: "
        f"{_over_mean(study, '_long')}."
    )


def _over_mean(study: Study, suffix: str) -> str:
    """What the four functions have more than the mean, in the rows with a suffix."""
    gains = {title: study.gain(row + suffix, "mean" + suffix) for row, title in FUNCTIONS.items()}
    return ", ".join(f"{title} {_signed(gain)}" for title, gain in gains.items())


def _functions(study: Study) -> str:
    if any(study.mean(row) is None for row in FUNCTIONS):
        return _missing(tuple(FUNCTIONS))
    sentence = f"The four pairwise functions lie {_spread(study, '')}"
    if any(study.mean(f"{row}_long") is None for row in FUNCTIONS):
        return f"{sentence}."
    return f"{sentence}; {LONGER}, {_spread(study, '_long')}."


def _spread(study: Study, suffix: str) -> str:
    """Of the four functions, in the rows with a suffix."""
    means = {row: study.mean(row + suffix).mean for row in FUNCTIONS}
    best, worst = max(means, key=means.get), min(means, key=means.get)
    gains = {row: study.gain(row + suffix, "NL" + suffix) for row in FUNCTIONS if row != "NL"}
    ends = [(gain.low, gain.high) for gain in gains.values() if gain.low is not None]
    if any(low > SMALL or high < -SMALL for low, high in ends):
        verdict = "does not hold here"
    elif len(ends) == len(gains) and all(-SMALL < low <= high < SMALL for low, high in ends):
        verdict = "holds here"
    else:
        verdict = "is not settled by so few seeds"
    said = ", ".join(f"{FUNCTIONS[row]} {_signed(gain)}" for row, gain in gains.items())
    return (
        f"between {means[worst]:.1f} ({FUNCTIONS[worst]}) and {means[best]:.1f} "
        f"({FUNCTIONS[best]}), over the embedded Gaussian: {said}; so the paper's "
        f'"hardly differ" {verdict}'
    )


def _options(study: Study) -> str:
    gains = {row: study.gain(row, "NL") for row in (*PLACES, *OPTIONS)}
    groups = {"more": [], "less": [], "no difference told": []}
    alone, missing = [], []
    for row, gain in gains.items():
        if gain is None:
            missing.append(row)
        elif gain.low is None:
            alone.append(f"{row} {gain.mean:+.1f}")
        elif gain.excludes_zero:
            groups["more" if gain.mean > 0 else "less"].append(f"{row} {gain.mean:+.1f}")
        else:
            groups["no difference told"].append(f"{row} {gain.mean:+.1f}")
    said = [f"{what}: {_list(rows)}" for what, rows in groups.items() if rows]
    if alone:
        said.append(f"with one seed, so without an interval: {_list(alone)}")
    if missing:
        said.append(f"{NOT_RUN}: {_list(missing)}")
    asleep, all_runs = _asleep(study)
    return (
        f"Of the other numbers, places and options, over NL, {'; '.join(said)}; of all {all_runs} "
        f"runs with a block that sees the whole image, these (seeds) ended less than {SMALL} above "
        f"chance: {_list(asleep) or 'none'}; that is what did not work: the block had not woken "
        "by then."
    )


def _asleep(study: Study) -> Tuple[List[str], int]:
    """Rows with attention, or the mean, with the seeds that are not above chance; all runs."""
    rows = [row.name for row in study.rows if row.name.startswith(("NL", "mean"))]
    limit = study.level("chance") + SMALL
    asleep, all_runs = [], 0
    for row in rows:
        values = study.values(row)
        seeds = ", ".join(str(seed) for seed, value in values.items() if value < limit)
        if seeds:
            asleep.append(f"{row} ({seeds})")
        all_runs += len(values)
    return asleep, all_runs


def _signed(gain: Interval) -> str:
    """Such as ``+3.1 (+1.0 to +5.2)``."""
    if gain.low is None:
        return f"{gain.mean:+.1f} (one seed, no interval)"
    return f"{gain.mean:+.1f} ({gain.low:+.1f} to {gain.high:+.1f})"


def _is_above(gain: Interval) -> bool:
    return gain is not None and gain.excludes_zero and gain.mean > 0


def _missing(rows: Sequence[str]) -> str:
    return f"Not run, or not all of it: {_list(list(rows))}."


def _list(items: List[str]) -> str:
    return ", ".join(items)
