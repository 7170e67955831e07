"""What `plain_on_avx2` starts, with AVX-512 hidden: python -m tests.bench.avx2 MODEL prints its rows as JSON."""

from __future__ import annotations

import json
import sys

from backpack_lm import processor

from tests.bench.against_itself import plain
from tests.bench.side_by_side import MODELS, small


def main() -> None:
    name = sys.argv[1]
    assert processor.features() == (processor.AVX2,), f"{processor.described()}: AVX-512 isn't hidden"
    bench = small(senses=False) if name == "Small" else MODELS[name]()
    plain(bench)
    print(json.dumps({"rows": bench.rows, "data": bench.data}))


if __name__ == "__main__":
    main()
