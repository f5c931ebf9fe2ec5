"""`python -m lighten`, and what torch's launcher starts: `torchrun --nproc-per-node 2 -m lighten …`."""

from __future__ import annotations

import sys

from lighten.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
