"""Runs rounds of one rank on one core module, without torch: what callgrind counts the instructions of.

python one_rank.py MODULE_FILE NUM_ROUNDS FIELDS, where FIELDS is the JSON of ``fault_a2a.core_fields.core_fields``. It
calls the module as ``fault_a2a/buffer.py`` does, and is a program of its own because importing torch under callgrind
takes minutes.
"""

import ctypes
import importlib.util
import json
import os
import random
import struct
import sys
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any


def main() -> None:
    path, num_rounds, fields = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    core = load(path)
    endpoint = core.Endpoint(fields, core.LocalGroup(fields), "")
    endpoint.create()
    endpoint.open_peers()
    endpoint.serve()
    run_rounds(endpoint, fields, num_rounds)
    sys.stdout.flush()
    os._exit(0)  # the native thread needs no farewell


def load(path: Path) -> Any:
    name = path.name.split(".")[0]  # a module's name must be the one that it was built with
    loader = ExtensionFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def run_rounds(endpoint: Any, fields: dict[str, Any], num_rounds: int) -> None:
    num_tokens, num_topk = fields["num_max_tokens_per_rank"], fields["num_topk"]
    num_experts, row_bytes = fields["num_experts"], fields["hidden_bytes"]
    x, out = (ctypes.create_string_buffer(num_tokens * row_bytes) for _ in range(2))
    received = ctypes.create_string_buffer(num_experts * num_tokens * row_bytes)
    counts, offsets = (ctypes.create_string_buffer(4 * (num_experts + 1)) for _ in range(2))
    codes, lost = ctypes.create_string_buffer(num_tokens * num_topk), ctypes.create_string_buffer(1)
    chance = random.Random(0)
    choices = [expert for _ in range(num_tokens) for expert in chance.sample(range(num_experts), num_topk)]
    topk_idx = ctypes.create_string_buffer(struct.pack(f"{len(choices)}q", *choices))
    topk_weights = ctypes.create_string_buffer(struct.pack(f"{len(choices)}f", *[1 / num_topk] * len(choices)))
    at = ctypes.addressof
    for _ in range(num_rounds):
        status, number, *_ = endpoint.dispatch_send(at(x), at(topk_idx), True, at(topk_weights), num_tokens)
        assert status == "ok", status
        status, *_ = endpoint.dispatch_receive(number, at(received), at(counts), at(offsets))
        assert status == "ok", status
        status = endpoint.combine_send(at(received), number)
        assert status == "ok", status
        status = endpoint.combine_receive(number, at(out), at(codes), at(lost))
        assert status == "ok" and lost.raw == b"\0", status


if __name__ == "__main__":
    main()
