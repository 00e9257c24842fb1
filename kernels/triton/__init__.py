"""The kernels in Triton: the same bytes and the same faults as on every other machine, in Python."""
