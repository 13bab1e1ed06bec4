"""Put a trained network into the package, with its PSNR on test sets in its metadata.

    python tools/make_weights.py RUN/xdncnn.safetensors NAME --test SET=FOLDER [--test ...]

Measured is the runtime without PyTorch, by the protocol "kair", at the noise level the network was
trained for, or at those of --sigma; the metadata of training (recipe, data, validation) are kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xunit_rs import Denoiser
from xunit_rs.evaluation import evaluate
from xunit_rs.models import XDnCNN

WEIGHTS = Path(__file__).parents[1] / "python/xunit_rs/weights"


def test_set(text: str) -> tuple[str, Path]:
    name, found, folder = text.partition("=")
    if not found or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"expected SET=FOLDER, got {text!r}")
    return name, Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trained", type=Path, help="result of `xunit-rs train`")
    parser.add_argument("name", help="of the network in the package")
    parser.add_argument("--test", type=test_set, action="append", required=True)
    parser.add_argument("--sigma", type=float, action="append", help="noise, 0-255 scale")
    parser.add_argument("--init", help="name of the network that the training started from")
    parser.add_argument("--license", default="MIT OR Apache-2.0")
    args = parser.parse_args()
    denoiser = Denoiser.from_pretrained(args.trained)
    metadata = dict(denoiser.network.metadata)  # type: ignore[attr-defined]
    sigmas = args.sigma or [float(metadata["sigma"])]
    for name, folder in args.test:
        results = [evaluate(denoiser, folder, sigma, "kair") for sigma in sigmas]
        measured = [
            f"{r.psnr:.3f} dB (kair, sigma {s:g})" for r, s in zip(results, sigmas, strict=True)
        ]
        metadata[f"psnr_{name}"] = ", ".join(measured)
        print(f"{name}: {metadata[f'psnr_{name}']}, {results[0].images} images")
    if args.init:
        metadata["init"] = args.init
    metadata["license"] = args.license
    WEIGHTS.mkdir(exist_ok=True)
    target = WEIGHTS / f"{args.name}.safetensors"
    XDnCNN.from_pretrained(args.trained).save(target, **metadata)
    print(target)


if __name__ == "__main__":
    main()
