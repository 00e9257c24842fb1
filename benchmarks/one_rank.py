"""Runs rounds of a group of one rank, by the public face: what callgrind counts the instructions of.

python -m benchmarks.one_rank SHAPE NUM_ROUNDS, where SHAPE is the JSON of a ``Shape``. Says "ready" once everything is
imported and built, and begins when a line comes: valgrind counts from then on, and needs minutes to count an import.
"""

import json
import os
import sys

import torch
import torch.distributed

from .systems import FaultA2A
from .work import Batch, Shape


def main() -> None:
    torch.set_num_threads(1)
    shape, num_rounds = Shape(**json.loads(sys.argv[1])), int(sys.argv[2])
    batch = Batch(shape, 0, seed=0)
    system = FaultA2A(shape, 0, torch.distributed.HashStore())
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(num_rounds):
        received, handle = system.dispatch(batch)
        out = system.combine(received, handle)
    trouble = system.trouble() or batch.of_identity.trouble(out, system.bit_exact)
    print(trouble or "right", flush=True)
    os._exit(0)  # the unchecked core has a thread that nobody ends


if __name__ == "__main__":
    main()
