"""The records of a study, by row and seed."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Dict, List, Optional

from ..evaluation.tables import Row
from .intervals import Interval, interval, paired
from .record import LEVELS, read_records
from .rows import TABLE

METRIC = "locks AP50"  # what the study is about; stated before its runs
BASELINE = "R18"


@dataclass(frozen=True)
class Study:
    """Everything that the page and the figures are made from.

    Attributes:
        records: of all runs that were started.
        levels: what chance and knowledge give, see :func:`.scores.levels`.
    """

    records: List[dict]
    levels: Dict[str, dict]

    @classmethod
    def read(cls, folder: Path) -> "Study":
        """
        Raises:
            FileNotFoundError: the folder has no levels.json.
        """
        return cls(read_records(folder), json.loads((folder / LEVELS).read_text()))

    @property
    def rows(self) -> List[Row]:
        """Those that are compared: without the warm-ups."""
        return [row for row in TABLE.rows if not is_warm_up(row.name)]

    @cached_property
    def finished(self) -> Dict[str, Dict[int, dict]]:
        """Row -> seed -> record."""
        result = {row.name: {} for row in TABLE.rows}
        for record in self.records:
            if record["state"] == "finished" and record["row"] in result:
                result[record["row"]][record["seed"]] = record
        return result

    def values(self, row: str, metric: str = METRIC) -> Dict[int, float]:
        """Seed -> value, in percent."""
        return {seed: value_of(record, metric) for seed, record in self.finished[row].items()}

    def mean(self, row: str, metric: str = METRIC) -> Optional[Interval]:
        return interval(list(self.values(row, metric).values()))

    def gain(self, row: str, over: str = BASELINE, metric: str = METRIC) -> Optional[Interval]:
        """Over the seeds that both have."""
        return paired(self.values(row, metric), self.values(over, metric))

    def at_distance(self, row: str, index: int, metric: str = "AP50") -> Optional[Interval]:
        """Of the locks in the images of one range of distance."""
        runs = self.finished[row].values()
        return interval([run["by_distance"][index][metric] for run in runs])

    def level(self, name: str, metric: str = METRIC) -> float:
        return value_of(self.levels[name], metric)


def is_warm_up(row: str) -> bool:
    return row.endswith("_warm_up")


def value_of(record: dict, metric: str) -> float:
    """Of a record or level: "locks AP50", or "bbox/AP" of metrics.json; in percent."""
    if "/" in metric:
        return record["metrics"][metric]
    group, name = metric.split()
    return record[group][name]
