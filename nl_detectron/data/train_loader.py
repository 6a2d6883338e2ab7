"""Training batches that can be reproduced: batch i depends on the seed and i alone."""

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError

STEP, IMAGE = range(2)  # keys that keep the seeds of steps and images apart


class ImageError(UserError):
    """An image or annotations that cannot be used; the message names the image file."""


class ImageLoader(DataLoader):
    """A DataLoader of ``batches``, lists of pairs (dataset dict, seed for augmentation or None)."""

    def __init__(self, mapper: Callable[[dict], dict], batches: Iterable[list], **kwargs):
        kwargs.update(collate_fn=list, worker_init_fn=ignore_signals)
        super().__init__(_Images(mapper), batch_sampler=batches, **kwargs)

    def __iter__(self) -> Iterator[list[dict]]:
        for batch in super().__iter__():
            for image in batch:
                if isinstance(image, ImageError):
                    raise image
            yield batch


class _Images(Dataset):
    def __init__(self, mapper: Callable[[dict], dict]):
        self._mapper = mapper

    def __getitem__(self, item: tuple[dict, int | None]) -> dict | ImageError:
        # DataLoader would add a traceback to the message of an error that a worker raises.
        dataset_dict, seed = item
        if seed is not None:
            seed_all_rng(seed)
        try:
            return self._mapper(dataset_dict)
        except ImageError as error:
            return error
        except Exception as error:  # decoders raise anything on broken files
            problem = " ".join(f"{type(error).__name__}: {error}".split())
            hint = "repair or remove it. tools/check_dataset.py finds all such images"
            return ImageError(f"{dataset_dict['file_name']} cannot be used ({problem}); {hint}")


class TrainLoader:
    """The batches of ``build_detection_train_loader(cfg)``, starting at any iteration.

    detectron2's loader selects the images of each batch without reading them, so that skipping is
    fast. Each image is then augmented with its own seed. The process is seeded for each step.
    """

    def __init__(self, cfg: CfgNode, mapper: Callable[[dict], dict]):
        self.start_iter = 0  # the first iteration; may be set until the first batch is requested
        self.batch = []  # the latest batch
        self._seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self._num_workers = cfg.DATALOADER.NUM_WORKERS
        self._mapper = mapper
        seed_all_rng(self._seed)  # some samplers draw their seed
        self._batches = build_detection_train_loader(cfg, mapper=lambda d: d, num_workers=0)

    def __iter__(self) -> Iterator[list[dict]]:
        # A generator, because detectron2 0.5 calls iter() before start_iter is known.
        batches = self._seeded_batches()
        loader = ImageLoader(self._mapper, batches, num_workers=self._num_workers)
        for iteration, batch in enumerate(loader, self.start_iter):
            self.batch = batch
            seed_all_rng(self._derived_seed(STEP, iteration, comm.get_rank()))
            yield batch

    def _seeded_batches(self) -> Iterator[list[tuple[dict, int]]]:
        rank, processes = comm.get_rank(), comm.get_world_size()
        batches = itertools.islice(self._batches, self.start_iter, None)
        for iteration, batch in enumerate(batches, self.start_iter):
            # Samplers deal images to the processes in turn. Counted over all processes, an image
            # has the same position and seed for any world size, unless aspect ratios are grouped.
            positions = range(rank, rank + processes * len(batch), processes)
            seeds = [self._derived_seed(IMAGE, iteration, position) for position in positions]
            yield list(zip(batch, seeds))

    def _derived_seed(self, *key: int) -> int:
        return int(np.random.SeedSequence(self._seed, spawn_key=key).generate_state(1)[0])


def ignore_signals(worker_id: int) -> None:
    """Ignore SIGINT, and SIGTERM unless the main process sends it, in a worker of a DataLoader.

    Both go to all processes of a job, but the main process needs its workers to finish the step.
    """

    def exit_with_parent() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=exit_with_parent, daemon=True).start()
