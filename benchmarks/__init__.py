"""Measurements of this library beside what people would use instead, each checked before its time counts."""

import os

# Before numpy is imported: its threads would make forking unsafe, and every rank of every system has one thread anyway.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
