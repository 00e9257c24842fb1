"""The command line: fault-a2a, or python -m fault_a2a."""
