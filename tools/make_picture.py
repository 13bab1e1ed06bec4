"""Make docs/denoised.png, the README's picture: samples/noisy.png beside its denoised self.

python tools/make_picture.py [OUT] [--model NAME|PATH]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from xunit_rs import Denoiser
from xunit_rs.denoise import DEFAULT_MODEL

ROOT = Path(__file__).parents[1]
GAP = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "docs/denoised.png")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default: %(default)s")
    args = parser.parse_args()
    noisy = np.asarray(Image.open(ROOT / "samples/noisy.png"))
    clean = Denoiser.from_pretrained(args.model)(noisy)
    gap = np.full((noisy.shape[0], GAP), 255, np.uint8)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.hstack([noisy, gap, clean])).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
