"""`python -m xunit_rs`, the same as `xunit-rs`."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
