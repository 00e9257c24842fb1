"""Leaves this folder out where there is no vLLM; `make test-vllm` sees to it that there is one."""

import importlib.util
import os

# The wheel for CUDA machines runs on a CPU when it is told so; before anything imports vLLM.
os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["*"]
