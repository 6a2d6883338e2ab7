#!/usr/bin/env python3
"""Check and measure what needs a GPU, most important first: about 25 minutes in all.

correctness: block against float64, torch.compile, training steps with mixed precision
kernels:     implementations of softmax attention, by size and type
models:      Mask R-CNN with +0, +1, +5 and +10 blocks, and the GPU-hours of Tables 5 and 6

Each part writes a JSON file, row by row. --quick runs all of it with tiny inputs, also on a CPU.
"""

import math
import operator
import shlex
import sys
import time
import traceback
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
from detectron2.utils.events import EventStorage
from nl_benchmark.competitors import build_models, detectors, passes_of, random_image
from nl_benchmark.report import circumstances, save
from nl_benchmark.timing import measure, short_text
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nl_detectron import NonLocalBlock
from nl_detectron.errors import exit_on_user_error
from nl_detectron.layers import INSTANTIATIONS, SUBSAMPLES, affinity, kernels

LOCATIONS = {  # one, five and ten blocks; the paper gives the last two for R_50
    "R_50": [["res4.-2"], ["res3.1::2", "res4.1::2"], ["res3.*", "res4.*"]],
    "R_101": [["res4.-2"], ["res3.1::2", "res4.6::7"], ["res3.*", "res4.2::4"]],
    "X_152_32x8d": [["res4.-2"], ["res3.1::4", "res4.6::11"], ["res3.1::2", "res4.5::6"]],
}
TRAINED_IMAGES = 90_000 * 16  # the 1x schedule


def correctness(args: Namespace) -> Iterator[dict]:
    """Yield errors relative to float64, of a block and its gradient, in eps of the type."""
    # TensorFloat-32 has 13 bits fewer than float32.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    shape = (2, 16, 5, 6) if args.quick else (2, 1024, 50, 84)
    for subsample, name in product(reversed(SUBSAMPLES), INSTANTIATIONS):
        torch.manual_seed(0)
        block = NonLocalBlock(shape[1], instantiation=name, subsample=subsample).to(args.device)
        torch.nn.init.kaiming_normal_(block.out.weight)
        x = torch.randn(shape, device=args.device, requires_grad=True)
        exact = _result_and_gradient(block.double(), x.double().detach().requires_grad_())
        block.float()
        modes = ["float32", "float16", "bfloat16"]
        for mode in modes + ["compile"] * (subsample == "pool_conv"):
            row = {"facts": {"function": name, "sub-sampling": subsample, "mode": mode}}
            try:
                errors = _errors(block, x, exact, mode, args)
                # The gradient of Eq. 5 has a step where the ReLU begins, so rounding theta and phi
                # moves pairs across it. The N x M matrix has the same error, for example 270 eps.
                limits = (50, 500 if name == "concatenation" else 50)
                yield {**row, "errors": errors, "ok": all(map(operator.lt, errors, limits))}
            except Exception as error:  # a compiler raises errors of its own
                yield {**row, "failure": short_text(error), "ok": False}
    torch.backends.cudnn.allow_tf32 = True
    yield from _training(args)


def _errors(block: Callable, x: Tensor, exact: list[Tensor], mode: str, args: Namespace) -> list:
    """Return the errors of the result and of the gradient in eps; "compile" is in float32."""
    dtype = torch.float32 if mode == "compile" else getattr(torch, mode)
    if mode == "compile":
        torch.compiler.reset()
        block = torch.compile(block, backend="aot_eager" if args.quick else "inductor")
    with torch.autocast(args.device, dtype, enabled=dtype.itemsize == 2):
        results = _result_and_gradient(block, x)
    eps = torch.finfo(dtype).eps
    return [((a - b).norm() / b.norm() / eps).item() for a, b in zip(results, exact)]


def _result_and_gradient(block: Callable, x: Tensor) -> list[Tensor]:
    z = block(x)
    return [z.detach(), *torch.autograd.grad(z, x, torch.ones_like(z))]


def _training(args: Namespace) -> Iterator[dict]:
    """Train with mixed precision; every loss must be finite."""
    images = [random_image(*args.image_size, args.device) for _ in range(2)]
    models = build_models("R_50", LOCATIONS["R_50"][:1], ["pool_conv"], args.device)
    for (name, model), dtype in product(models.items(), args.amp_types):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9)
        scaler = torch.amp.GradScaler(args.device, enabled=dtype == torch.float16)
        losses = []
        for _ in range(1 if args.quick else 20):
            with EventStorage(), torch.autocast(args.device, dtype):
                loss = sum(model.train()(images).values())
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
        ok = all(map(math.isfinite, losses))
        yield {"facts": {"model": name, "mode": str(dtype)}, "losses": losses, "ok": ok}


def attention_forms(scale: float, flex: bool) -> dict[str, Callable]:
    """Return implementations of softmax attention of theta, phi (B, N, D) and g (B, M, E)."""

    def matrix(theta, phi, g):
        return affinity.embedded_gaussian_affinity(theta, phi, scale) @ g

    def kept(workspace, *inputs):
        kernels.GPU_ATTENTION_WORKSPACE = workspace
        return kernels.Attention.apply(*inputs, scale, True)

    def fused(backend, *inputs):
        with sdpa_kernel(backend):
            return affinity._fused_attention(*inputs, scale)

    forms = {"matrix": matrix}
    forms |= {f"kept, 2^{bits} scores": partial(kept, 2**bits) for bits in (21, 25)}
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        forms[name.lower()] = partial(fused, getattr(SDPBackend, name))
    if flex:
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()  # beyond a number of compilations it would run uncompiled
        compiled = torch.compile(flex_attention, dynamic=True)
        forms["flex"] = lambda *qkv: compiled(*(t.unsqueeze(1) for t in qkv), scale=scale).squeeze(
            1
        )
    return forms


def fastest_kernel(args: Namespace) -> Iterator[dict]:
    """Yield times and memory of the forms of attention, in bfloat16, float32 and TensorFloat-32.

    A form that fails at one size is not tried at the other sizes of the same width and type.
    """
    workspace = kernels.GPU_ATTENTION_WORKSPACE
    # D and E: res4, the Gaussian at res4, res3.
    widths = [(8, 8)] if args.quick else [(512, 512), (1024, 512), (256, 256)]
    positions = [(4200, 1050), (4200, 4200), (16800, 4200), (1050, 1050), (16800, 16800)]
    for (d, e), mode in product(widths, ("bfloat16", "float32", "tf32")):
        torch.set_float32_matmul_precision("high" if mode == "tf32" else "highest")
        dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
        forms = attention_forms(d**-0.5, flex=mode != "tf32" and not args.quick)
        for n, m in [(30, 8)] if args.quick else positions[: 2 if mode == "tf32" else 5]:
            sizes = ((n, d), (m, d), (m, e))
            inputs = [torch.randn(1, *s).to(args.device, dtype).requires_grad_() for s in sizes]
            competitors = {name: passes_of(form, inputs) for name, form in forms.items()}
            for row in measure(competitors, args.rounds, args.device):
                yield {"facts": {"D": d, "E": e, "type": mode, "N": n, "M": m}, **row}
                if "failure" in row:
                    forms.pop(row["competitor"], None)
    torch.set_float32_matmul_precision("highest")
    kernels.GPU_ATTENTION_WORKSPACE = workspace


def models(args: Namespace) -> Iterator[dict]:
    """Yield times of Mask R-CNN, with the GPU-hours of a 1x schedule for a training step."""
    for batch, backbone in [(1, "R_50")] if args.quick else product((2, 8), LOCATIONS):
        shape = (batch, *args.image_size)
        locations = LOCATIONS[backbone][: 1 if args.quick else 3]
        competitors = detectors(
            backbone, locations, ["pool_conv"], shape, args.amp_types[0], args.device
        )
        for row in measure(competitors, args.rounds, args.device):
            if row["pass"] == "training step" and row["seconds"]:
                hours = median(row["seconds"]) / batch * TRAINED_IMAGES / 3600
                row["GPU-hours of 1x"] = round(hours, 1)
            yield {"facts": {"backbone": backbone, "batch": batch}, **row}


PARTS = {"correctness": correctness, "kernels": fastest_kernel, "models": models}


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("gpu_results"), help="folder")
    args = parser.parse_args(arguments)
    args.image_size = (64, 96) if args.quick else (800, 1344)
    # Convolutions in float16 are very slow on a CPU.
    args.amp_types = [torch.float16, torch.bfloat16][args.device == "cpu" :]
    args.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for part in args.parts:
        command = shlex.join(["projects/benchmark/gpu.py", *arguments])
        results = circumstances(command, args.device) | {"part": part, "rows": []}
        facts = None
        try:
            for row in PARTS[part](args):
                results["rows"].append(row)
                save(results, args.output / f"{part}.json")
                if row["facts"] != facts:
                    facts = row["facts"]
                    seconds = time.perf_counter() - start
                    print(f"{seconds:6.1f} s", part, *facts.values(), flush=True)
        except Exception:  # the other parts are measured all the same
            traceback.print_exc()
        failed = [row["facts"] for row in results["rows"] if not row.get("ok", True)]
        print(f"{part}: {len(results['rows'])} rows", *failed, sep="\nwrong: ", flush=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
