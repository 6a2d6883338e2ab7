"""What was found, in sentences whose numbers and verdicts come from the runs."""

from collections.abc import Sequence
from typing import List

from ..intervals import Interval
from .results import BASELINE, METRIC, Study

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
    return "\n".join(f"{i}. {part(study)}" for i, part in enumerate(parts, start=1))


def _gain(study: Study) -> str:
    baseline, block = study.mean(BASELINE), study.mean("NL")
    if baseline is None or block is None:
        return _missing((BASELINE, "NL"))
    last = len(study.levels["all"]["by_distance"]) - 1
    near, far = (study.at_distance(BASELINE, i).mean for i in (0, last))
    block_near, block_far = (study.at_distance("NL", i).mean for i in (0, last))
    return (
        f"One block takes the {METRIC} from {baseline.mean:.1f} to {block.mean:.1f}, "
        f"{_verdict(study.gain('NL'))}, where chance is {study.level('chance'):.1f} and all that "
        f"can be known gives {study.level('all'):.1f}; from the nearest locks to the farthest "
        f"{BASELINE} goes from {near:.1f} to {far:.1f}, and with the block it goes from "
        f"{block_near:.1f} to {block_far:.1f}."
    )


def _convolutions(study: Study) -> str:
    rows = ("conv1x1", "conv3x3", "R50")
    if any(study.gain(row) is None for row in rows):
        return _missing(rows)
    said = ", ".join(f"{row} {_verdict(study.gain(row))}" for row in rows)
    sentence = f"What more convolutions give over {BASELINE}: {said}"
    beaten = [row for row in rows if _is_above(study.gain("NL", row))]
    return f"{sentence}; the block is above {_list(beaten) or 'none'} of them by its interval."


def _attention(study: Study) -> str:
    rows = ("NL", "mean", "local")
    if any(study.gain(row) is None for row in rows):
        return _missing(rows)
    return (
        f"Of the gain, the global average in place of the affinity gives "
        f"{_verdict(study.gain('mean'))}, the identity {_verdict(study.gain('local'))}; what "
        f"attention adds to the average is {_verdict(study.gain('NL', 'mean'))}."
    )


def _functions(study: Study) -> str:
    if any(study.mean(row) is None for row in FUNCTIONS):
        return _missing(tuple(FUNCTIONS))
    means = {row: study.mean(row).mean for row in FUNCTIONS}
    best, worst = max(means, key=means.get), min(means, key=means.get)
    differ = [row for row in FUNCTIONS if row != "NL" and _excludes(study.gain(row, "NL"))]
    holds = "does not hold here" if differ else "is not contradicted here"
    return (
        f"The four pairwise functions lie between {means[worst]:.1f} ({FUNCTIONS[worst]}) and "
        f"{means[best]:.1f} ({FUNCTIONS[best]}); by their intervals "
        f"{_list([FUNCTIONS[row] for row in differ]) or 'none'} differ from the embedded Gaussian, "
        f'so the paper\'s "hardly differ" {holds}.'
    )


def _options(study: Study) -> str:
    gains = {row: study.gain(row, "NL") for row in (*PLACES, *OPTIONS)}
    there = {row: gain for row, gain in gains.items() if gain is not None}
    better = [f"{row} {gain.mean:+.1f}" for row, gain in there.items() if _is_above(gain)]
    worse = [f"{row} {gain.mean:+.1f}" for row, gain in there.items() if _is_below(gain)]
    same = [row for row, gain in there.items() if not _excludes(gain)]
    sentence = (
        f"Of the other numbers, places and options, against NL by their intervals, "
        f"{_list(better) or 'none'} gave more, {_list(worse) or 'none'} less, and "
        f"{_list(same) or 'none'} made no difference that {_seeds(there.values())} show"
    )
    missing = [row for row in gains if row not in there]
    return sentence + (f"; not run: {_list(missing)}." if missing else ".")


def _verdict(gain: Interval) -> str:
    """Such as ``+3.1 (+1.0 to +5.2)``, and whether that is a difference."""
    if gain.low is None:
        return f"{gain.mean:+.1f} (one seed, no interval)"
    text = f"{gain.mean:+.1f} ({gain.low:+.1f} to {gain.high:+.1f})"
    return text if gain.excludes_zero else f"{text}, no difference that can be told"


def _excludes(gain: Interval) -> bool:
    return gain is not None and gain.excludes_zero


def _is_above(gain: Interval) -> bool:
    return _excludes(gain) and gain.mean > 0


def _is_below(gain: Interval) -> bool:
    return _excludes(gain) and gain.mean < 0


def _seeds(gains: Sequence[Interval]) -> str:
    counts = sorted({gain.count for gain in gains})
    return f"{' or '.join(map(str, counts)) or 'no'} seeds"


def _missing(rows: Sequence[str]) -> str:
    return f"Not run, or not all of it: {_list(list(rows))}."


def _list(items: List[str]) -> str:
    return ", ".join(items)
