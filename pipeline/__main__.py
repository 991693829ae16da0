"""`python -m pipeline` and the console script `ips`."""

from __future__ import annotations

from pipeline.cli.main import main

if __name__ == "__main__":
    main()
