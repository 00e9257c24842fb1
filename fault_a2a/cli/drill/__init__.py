"""fault-a2a drill: a real group of processes, real faults, and a judge that recomputes every output."""
