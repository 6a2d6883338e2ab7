"""The tiny config, models of detectron2's zoo, and what tests measure of models and optimizers."""

from pathlib import Path

import detectron2
import torch
from detectron2.config import get_cfg

from nl_detectron import add_nonlocal_config

TINY = str(Path(__file__).with_name("mask_rcnn_tiny.yaml"))  # a Mask R-CNN with one block in res4
# Not by detectron2.model_zoo, which upstream cannot be imported without pkg_resources.
ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"

# With this before a train_net.py, --num-gpus 2 starts two processes without GPUs, also in release
# 0.5 of detectron2.
WITHOUT_GPUS = """
import importlib
from types import SimpleNamespace

import detectron2.utils.comm as comm
import torch.distributed as dist

importlib.import_module("nl_detectron.engine.checks")._check_processes = lambda cfg, args: None
launch = importlib.import_module("detectron2.engine.launch")
if not hasattr(comm, "create_local_process_group"):
    init = dist.init_process_group
    cuda = dict(is_available=lambda: True, device_count=lambda: 2, set_device=lambda rank: None)
    launch.torch = SimpleNamespace(cuda=SimpleNamespace(**cuda))
    launch.dist = SimpleNamespace(
        new_group=dist.new_group, init_process_group=lambda backend, **rest: init("gloo", **rest)
    )
"""


def zoo_config(*options, name="COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"):
    """Return a config of the zoo, for the CPU, with KEY, VALUE, ... from ``options``."""
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.merge_from_file(str(ZOO / name))
    cfg.merge_from_list(["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", *options])
    return cfg


def parameter_settings(optimizer, model):
    """Return name -> (learning rate, weight decay, momentum) for every parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [
        (names[parameter], (group["lr"], group["weight_decay"], group["momentum"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def saved_bytes(function, *inputs):
    """Count the bytes of the storages that autograd saves in one call."""
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function(*inputs)
    return sum(storage.nbytes() for storage in saved.values())
