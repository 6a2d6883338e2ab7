"""Training batches that can be had again: batch i depends on the seed and i alone."""

import itertools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError

STEP, IMAGE = range(2)  # what a seed is for


class TrainLoader:
    """The batches of ``build_detection_train_loader(cfg)``, from any iteration on.

    detectron2's own loader, with its sampler and its grouping by aspect ratio, gives the images of
    each batch, not yet read. Those of the iterations before ``start_iter`` are skipped, at some
    40000 images a second. Each image is then read and augmented with a seed of its own, so
    the number of workers does not matter. Before a batch is given out, the process is seeded for
    the step, so neither does what loading has drawn.

    Attributes:
        start_iter: the iteration to begin with; may be set until the first batch is asked for.
    """

    def __init__(self, cfg: CfgNode, mapper: Callable[[dict], dict]):
        """
        Args:
            cfg: the same in all processes; a negative SEED stands for a random one.
            mapper: from a dataset dict to what the model takes, as ``DatasetMapper``. It draws from
                the generators of Python, NumPy and torch.
        """
        self.start_iter = 0
        self._seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self._num_workers = cfg.DATALOADER.NUM_WORKERS
        self._mapped = _Mapped(mapper)
        seed_all_rng(self._seed)  # some of the samplers draw a seed of their own
        self._batches = build_detection_train_loader(cfg, mapper=_unmapped, num_workers=0)

    def __iter__(self) -> Iterator[list[dict]]:
        # A generator, so nothing of this is done before the first batch is asked for: the trainer
        # of detectron2's release 0.5 makes its iterator before it loads a checkpoint.
        loader = DataLoader(
            self._mapped,
            batch_sampler=self._seeded_batches(),
            num_workers=self._num_workers,
            collate_fn=_uncollated,
            worker_init_fn=ignore_signals,
        )
        for iteration, batch in enumerate(loader, self.start_iter):
            seed_all_rng(self._derived_seed(STEP, iteration, comm.get_rank()))
            yield batch

    def _seeded_batches(self) -> Iterator[list[tuple[dict, int]]]:
        if self.start_iter:
            logging.getLogger(__name__).info(f"Skipping the batches before {self.start_iter}")
        rank, processes = comm.get_rank(), comm.get_world_size()
        batches = itertools.islice(self._batches, self.start_iter, None)
        for iteration, batch in enumerate(batches, self.start_iter):
            # detectron2 deals the images out, one by one, to the processes. By this number an image
            # has the same seed however many there are, unless it was grouped by aspect ratio.
            positions = range(rank, rank + processes * len(batch), processes)
            seeds = [self._derived_seed(IMAGE, iteration, position) for position in positions]
            yield list(zip(batch, seeds))

    def _derived_seed(self, *purpose: int) -> int:
        sequence = np.random.SeedSequence(self._seed, spawn_key=purpose)
        return int(sequence.generate_state(1)[0])


def ignore_signals(worker_id: int) -> None:
    """``worker_init_fn`` of a DataLoader whose process ends in its own time on a signal.

    Ctrl-C, and many a cluster's SIGTERM, go to all processes of a job. Without its workers the main
    process could not finish the step. They end with it: when it fails, it sends them a SIGTERM of
    its own and waits for them, so that one has to be heeded.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


class _Mapped(Dataset):
    """Maps what the batch sampler hands over, which is not an index but a dataset dict itself."""

    def __init__(self, mapper: Callable[[dict], dict]):
        self._mapper = mapper

    def __getitem__(self, item: tuple[dict, int]) -> dict:
        dataset_dict, seed = item
        seed_all_rng(seed)
        return self._mapper(dataset_dict)


def _unmapped(dataset_dict: dict) -> dict:
    return dataset_dict


def _uncollated(batch: list[dict]) -> list[dict]:
    return batch


class ImageError(UserError):
    """An image, or what is annotated in it, cannot be used; the message names its file."""

    def __str__(self) -> str:
        # A DataLoader's worker hands its whole traceback over as the message; it ends in ours.
        return super().__str__().rstrip().rpartition(f"{__name__}.{ImageError.__name__}: ")[2]


class ErrorNamingMapper:
    """Calls another mapper, such as ``DatasetMapper``, and names the file when that one fails.

    Decoders do not know what file they read, and a DataLoader's worker does not tell.
    """

    def __init__(self, mapper: Callable[[dict], dict]):
        """
        Args:
            mapper: from a dataset dict with "file_name" to what the model takes.
        """
        self._mapper = mapper

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Raises:
            ImageError: the mapper raised anything.
        """
        try:
            return self._mapper(dataset_dict)
        except Exception as error:  # what decoders raise on broken files can be anything
            problem = " ".join(f"{type(error).__name__}: {error}".split())
            raise ImageError(
                f"{dataset_dict['file_name']} cannot be used ({problem}); mend it, or take it out "
                "of the annotations. tools/check_dataset.py finds all such images at once"
            ) from error
