"""The command `xunit-rs eval`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from . import evaluation
from ._terminal import Bar, natural, numbers
from .denoise import DEFAULT_MODEL, Denoiser, pretrained_names

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        metavar="FOLDER",
        help="folders of clean images; published figures are shown for those named BSD68, Set12 "
        "or CBSD68",
    )
    parser.add_argument(
        "--model",
        nargs="+",
        metavar="NAME|PATH",
        default=[DEFAULT_MODEL],
        help=f"{', '.join(pretrained_names()) or 'none shipped'}, a checkpoint, or a baseline: "
        f"{', '.join(evaluation.BASELINES)} (default: {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--sigma",
        type=numbers,
        default=[25.0],
        metavar="S[,S...]",
        help="noise, 0-255 scale, such as 15,25,50 (default: 25)",
    )
    parser.add_argument(
        "--protocol", choices=evaluation.PROTOCOLS, default="kair", help="default: kair"
    )
    parser.add_argument(
        "--runtime",
        choices=("rust", "torch"),
        default="rust",
        help="what runs the networks; torch, PyTorch, takes every architecture and the official "
        "checkpoints (default: rust)",
    )
    parser.add_argument("--ssim", action="store_true", help="measure SSIM, too")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a line for each image")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--threads", type=natural, default=0, help="0 = all cores (default)")


def run(args: argparse.Namespace) -> int:
    try:
        rows = _rows(args)
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] not in ("skimage", "bm3d", "pywt"):
            raise
        raise RuntimeError(str(error)) from error
    if args.csv is not None:
        evaluation.write_csv(rows, args.csv)
    if args.json:
        results = [
            {"model": row.model, "data": row.data, **dataclasses.asdict(row.result)} for row in rows
        ]
        print(json.dumps(_finite(results), indent=2, allow_nan=False))
    else:
        print(evaluation.table(rows))
    return 0


def _rows(args: argparse.Namespace) -> list[evaluation.Row]:
    if args.csv is not None and not args.csv.absolute().parent.is_dir():
        raise FileNotFoundError(f"{args.csv.parent}: no such folder")
    baselines = evaluation.BASELINES
    networks = {name: _network(name, args) for name in args.model if name not in baselines}
    rows = []
    with Bar() as bar:
        for folder in args.data:
            for sigma in args.sigma:
                for name in args.model:
                    label = f"{name}, {folder.resolve().name}, sigma {sigma:g}"

                    def show(done: int, total: int, label: str = label) -> None:
                        bar.show(done, total, label)

                    model = networks.get(name) or evaluation.Baseline(name, sigma)
                    result = evaluation.evaluate(
                        model, folder, sigma, args.protocol, with_ssim=args.ssim, progress=show
                    )
                    rows.append(evaluation.Row(name, folder.resolve().name, result))
    return rows


def _network(name: str, args: argparse.Namespace) -> Any:
    if args.runtime == "rust":
        return Denoiser.from_pretrained(name, threads=args.threads)
    from . import models  # and not before: the runtime in Rust needs no PyTorch

    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    return models.from_pretrained(name)


def _finite(value: Any) -> Any:
    """`value` with None for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
