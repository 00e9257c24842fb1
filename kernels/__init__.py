"""Who executes the protocol: one folder a machine, one file a verb. Installed as fault_a2a.kernels."""
