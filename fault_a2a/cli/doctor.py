"""The command fault-a2a doctor: what this machine can run, what the rest would need, and how large a window is."""

from __future__ import annotations

import argparse
import ctypes
import errno
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fault_a2a import nvrtc
from fault_a2a._version import __version__
from fault_a2a.cli.words import named_by_option

if TYPE_CHECKING:
    from fault_a2a.backends import Machine
    from fault_a2a.config import Config

_SHARED_MEMORY = Path("/dev/shm")
_SYS_FUTEX_WAITV = 449  # the same number on every architecture
_PROBE_TIMEOUT_S = 5.0
_MB = 1e6
_DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "float32": "float32"}

_GET_NVRTC = "`pip install 'fault_a2a[cuda13]'`"
_NOT_RUN = "this release has not been run on a GPU before it came to you"

Found = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fault-a2a doctor``."""
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else")
    window = parser.add_argument_group("how large is a window")
    window.add_argument("--window", action="store_true", help="the bytes that a rank exports, part by part, for:")
    for name, default, text in (
        ("experts", 256, "experts of the layer"),
        ("topk", 8, "experts that a token goes to"),
        ("tokens", 128, "most tokens of a rank in a round"),
        ("hidden", 7168, "elements of a row"),
        ("ranks", 8, "ranks of the group"),
        ("spare-partitions", 1, "landing room kept for ranks that come back"),
    ):
        window.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (%(default)s)")
    window.add_argument("--dtype", choices=sorted(_DTYPES), default="bf16", help="of the rows (%(default)s)")
    window.add_argument("--reduce", choices=("owner", "expert"), default="owner", help="who sums (%(default)s)")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Examines the machine; 0 when a group can run on it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the probe of exits forks
    answer = examine()
    if args.window and answer["backends"]["cpu"]["available"]:
        try:
            answer["window"] = _window(args)
        except (ValueError, TypeError) as error:
            parser.error(named_by_option(str(error), {"num_spare_partitions": "--spare-partitions"}))
    print(json.dumps(answer) if args.json else "\n".join(_lines(answer)))
    return 0 if answer["backends"]["cpu"]["available"] else 1


def examine() -> Found:
    """What there is, as the JSON of the command."""
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": _version_of("torch"),
        "shared_memory": _shared_memory(),
        "futex_waitv": _has_futex_waitv(),
        "pidfd": _has_pidfd(),
    }
    core_why = _core_failure()
    exit_evidence = {"works": False, "took_ms": None, "why": "it needs the native core"}
    if not core_why:
        exit_evidence = _probe_exit_evidence()
    machine["exit_evidence"] = exit_evidence
    machine["gpu_windows"] = _gpu_windows(core_why)
    chips, unknown_why = _this_machine()
    backends = {"cpu": _cpu(core_why, machine), "triton": _triton(chips), "cuda": _cuda(chips)}
    answer = {"version": __version__, "backends": backends, "auto": _auto(chips, unknown_why)}
    return {**answer, "machine": machine, "advice": _advice(machine)}


# -- backends --------------------------------------------------------------------------------------------------------


def _core_failure() -> str:
    """Why the native core cannot be loaded; empty when it can."""
    try:
        import fault_a2a.buffer  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""


def _cpu(core_why: str, machine: Found) -> Found:
    if core_why:
        return {"available": False, "why": core_why}
    if not machine["shared_memory"]["writable"]:
        return {"available": False, "why": f"{_SHARED_MEMORY} is not writable; mount a tmpfs there"}
    return {
        "available": True,
        "why": "groups run between the processes of this host",
    }


def _triton(machine: Machine | None) -> Found:
    if not importlib.util.find_spec("triton"):
        return {"available": False, "why": "triton is not installed; run `pip install 'fault_a2a[triton]'`"}
    name = f"triton {_version_of('triton')}"
    if machine is None or machine.interprets:
        return {"available": True, "why": f"{name}, in its interpreter on the CPU (slow: for tests)"}
    from fault_a2a.backends import why_not

    if why := why_not("triton", machine):
        return {"available": False, "why": f"{name}, but {why}"}
    return {"available": True, "why": f"{name} on {machine.gpu}; {_NOT_RUN}"}


def _cuda(machine: Machine | None) -> Found:
    gpus, found = _gpus()
    if not found or machine is None:
        compiler = "compile here (fault-a2a compile)" if nvrtc.load() else f"need NVRTC to compile ({_GET_NVRTC})"
        return {"available": False, "why": f"kernels {compiler} and run on a GPU; {gpus}"}
    if not machine.compiles_cuda:
        return {"available": False, "why": f"{gpus}; kernels need NVRTC to compile ({_GET_NVRTC})"}
    return {"available": True, "why": f"{gpus}; {_NOT_RUN}"}


def _auto(machine: Machine | None, unknown_why: str) -> Found:
    """What ``Config(backend="auto")`` is here, and why it is none of those before it."""
    if machine is None:
        return {"backend": None, "why": unknown_why}
    from fault_a2a.backends import ORDER, choose, why_not

    chosen = choose(machine)
    passed = [f"{backend}: {why_not(backend, machine)}" for backend in ORDER[: ORDER.index(chosen)]]
    return {"backend": chosen, "why": "; ".join(passed) or "the first choice"}


def _this_machine() -> tuple[Machine | None, str]:
    """What the choice of kernels rests on, or why that cannot be found out."""
    try:
        from fault_a2a.backends import this_machine
    except ImportError as error:
        return None, str(error)
    return this_machine(), ""


def _gpus() -> tuple[str, bool]:
    """What is here, and whether torch can use it."""
    try:
        import torch
    except ImportError:
        return "torch is not installed", False
    if torch.version.cuda is None:
        driver = "an NVIDIA driver is" if Path("/proc/driver/nvidia/version").exists() else "no NVIDIA driver is"
        return f"torch {torch.__version__} is built without CUDA, and {driver} loaded", False
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and finds no device", False
    names = sorted({torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())})
    return f"{torch.cuda.device_count()} devices are here: {', '.join(names)}", True


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- the machine -----------------------------------------------------------------------------------------------------


def _shared_memory() -> Found:
    if not _SHARED_MEMORY.is_dir():
        return {"path": str(_SHARED_MEMORY), "size_bytes": 0, "free_bytes": 0, "writable": False}
    room = os.statvfs(_SHARED_MEMORY)
    return {
        "path": str(_SHARED_MEMORY),
        "size_bytes": room.f_blocks * room.f_frsize,
        "free_bytes": room.f_bavail * room.f_frsize,
        "writable": os.access(_SHARED_MEMORY, os.W_OK | os.X_OK),
    }


def _has_futex_waitv() -> bool:
    """Whether a thread can sleep on several words at once (Linux 5.16); if not, the pulse looks every millisecond."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(ctypes.c_long(_SYS_FUTEX_WAITV), None, 0, 0, None, 0)  # no word at all: EINVAL where it exists
    return ctypes.get_errno() == errno.EINVAL


def _has_pidfd() -> bool:
    """Whether the exit of any process can be seen (Linux 5.3); the second witness of a death."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def _gpu_windows(core_why: str) -> Found:
    """By which handles windows on the first GPU can be imported: by processes of this host, and by other hosts of its
    NVLink domain. Not run on a GPU."""
    found = {}
    for name, across_hosts in (("file_descriptors", False), ("fabric", True)):
        why = "it needs the native core"
        if not core_why:
            from fault_a2a._core import core

            why = core.why_no_windows(0, across_hosts)
        found[name] = {"available": not why, "why": why}
    return found


def _probe_exit_evidence() -> Found:
    """Builds a group of two, kills one of them, and takes the time until the other knows."""
    ears, mouth = os.pipe(), os.pipe()  # the parent's, the child's
    token = f"doctor-{os.getpid()}-{time.monotonic_ns():x}"
    pid = os.fork()
    if pid == 0:
        try:
            victim = _Probe(1, token, hears=mouth[0], tells=ears[1])  # held: an endpoint that is freed says goodbye
            victim.join()
            time.sleep(2 * _PROBE_TIMEOUT_S)  # the parent's signal ends it
        finally:
            os._exit(1)
    try:
        for fd in (ears[1], mouth[0]):
            os.close(fd)  # so that a child that died is the end of its pipe
        return _kill_and_watch(pid, _Probe(0, token, hears=ears[0], tells=mouth[1]))
    except (OSError, RuntimeError) as error:
        return {"works": False, "took_ms": None, "why": str(error)}
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for fd in (ears[0], mouth[1]):
            os.close(fd)


def _kill_and_watch(pid: int, probe: _Probe) -> Found:
    from fault_a2a._core import core

    probe.join()
    try:
        killed_at_ns = core.now_ns()
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + _PROBE_TIMEOUT_S
        while time.monotonic() < deadline:
            for rank, kind, at_ns in probe.endpoint.evidence():
                if rank == 1 and kind == "exit":
                    return {"works": True, "took_ms": round((at_ns - killed_at_ns) / 1e6, 3), "why": ""}
            time.sleep(0.001)
        return {
            "works": False,
            "took_ms": None,
            "why": f"a killed process was not noticed within {_PROBE_TIMEOUT_S:.0f} s",
        }
    finally:
        probe.endpoint.close()


class _Probe:
    """One of two ranks that meet over pipes instead of a store."""

    def __init__(self, rank: int, token: str, hears: int, tells: int) -> None:
        import torch

        from fault_a2a._core import core
        from fault_a2a.config import Config
        from fault_a2a.core_fields import core_fields

        config = Config(num_experts=2, hidden=8, num_topk=1, num_max_tokens_per_rank=1, dtype=torch.float32)
        self.endpoint = core.Endpoint(core_fields(config, 2, rank), None, token)
        self._hears, self._tells = hears, tells

    def join(self) -> None:
        self.endpoint.create()
        self._meet()
        self.endpoint.open_peers()
        self._meet()
        self.endpoint.serve()
        self._meet()

    def _meet(self) -> None:
        os.write(self._tells, b".")
        if os.read(self._hears, 1) != b".":
            raise RuntimeError("the other process of the probe died while the group was built")


def _advice(machine: Found) -> list[str]:
    """What to do about what is missing."""
    advice = []
    evidence = machine["exit_evidence"]
    if not evidence["works"]:
        advice.append(
            f"exit evidence is off ({evidence['why']}): a dead process is then noticed by its silence only. "
            "Let the processes of a group share /dev/shm and one PID namespace."
        )
    if not machine["futex_waitv"]:
        advice.append(
            "this kernel has no futex_waitv (Linux 5.16): watchers look every millisecond instead of sleeping."
        )
    if not machine["pidfd"]:
        advice.append("this kernel has no pidfd (Linux 5.3): an exit has one witness instead of two.")
    if machine["shared_memory"]["size_bytes"] < 1 << 30:
        advice.append("/dev/shm is smaller than 1 GiB: enlarge it (docker: --shm-size) before you run real sizes.")
    return advice


# -- the window ------------------------------------------------------------------------------------------------------


def _window(args: argparse.Namespace) -> Found:
    import torch

    from fault_a2a.config import Config

    config = Config(
        num_experts=args.experts,
        hidden=args.hidden,
        num_topk=args.topk,
        num_max_tokens_per_rank=args.tokens,
        dtype=getattr(torch, _DTYPES[args.dtype]),
        reduce=args.reduce,
        num_spare_partitions=args.spare_partitions,
    )
    return window_parts(config, args.ranks)


def window_parts(config: Config, num_ranks: int) -> Found:
    """The bytes that one rank exports, part by part; ``recv_x_bytes`` stands beside them: it is private memory."""
    from fault_a2a._core import core
    from fault_a2a.core_fields import window_fields

    layout = core.window_layout(window_fields(config, num_ranks))
    parities = len(layout["dispatch_rows"])
    slots = parities * layout["num_halves"]
    one = {
        "dispatch_rows": slots * layout["num_dispatch_rows"] * layout["dispatch_stride"],
        "combine_rows": slots * layout["num_combine_rows"] * layout["combine_stride"],
        "row_headers": slots * layout["num_dispatch_rows"] * layout["header_stride"],
    }
    one["signals_and_padding"] = layout["partition_bytes"] - sum(one.values())
    num_partitions = layout["num_partitions"]
    local_rows = config.placement_for(num_ranks).max_local_experts * config.capacity(num_ranks)
    return {
        "num_ranks": num_ranks,
        "num_experts": config.num_experts,
        "num_topk": config.num_topk,
        "num_max_tokens_per_rank": config.num_max_tokens_per_rank,
        "hidden_bytes": config.hidden_bytes,
        "reduce": config.reduce,
        "partition_bytes": layout["partition_bytes"],
        "partition_parts": one,
        "num_partitions": num_partitions,
        "num_spare_partitions": config.num_spare_partitions,
        "parts": {
            **{name: num_bytes * num_partitions for name, num_bytes in one.items()},
            "control_page": layout["control_page_bytes"],
        },
        "spare_bytes": layout["partition_bytes"] * config.num_spare_partitions,
        "window_bytes": layout["window_bytes"] + layout["control_page_bytes"],
        "recv_x_bytes": parities * local_rows * config.hidden_bytes,
    }


# -- for people ------------------------------------------------------------------------------------------------------


def _lines(answer: Found) -> list[str]:
    machine = answer["machine"]
    memory, evidence = machine["shared_memory"], machine["exit_evidence"]
    lines = [f"fault_a2a {answer['version']}, Python {machine['python']}, torch {machine['torch']}", "", "backends"]
    for name, backend in answer["backends"].items():
        lines.append(f"  {name:<7} {'yes' if backend['available'] else 'no':<4} {backend['why']}")
    lines.append(f"  auto    {answer['auto']['backend']} ({answer['auto']['why']})")
    room = f"{memory['free_bytes'] / _MB:,.0f} of {memory['size_bytes'] / _MB:,.0f} MB free"
    took = f"yes, a killed process was noticed after {evidence['took_ms']} ms"
    lines += [
        "",
        "machine",
        f"  system         {machine['system']}, {machine['cores']} cores",
        f"  shared memory  {memory['path']}, {room}",
        f"  exit evidence  {took if evidence['works'] else 'no, ' + evidence['why']}",
        f"  futex_waitv    {'yes' if machine['futex_waitv'] else 'no'}",
        f"  pidfd          {'yes' if machine['pidfd'] else 'no'}",
    ]
    for label, name in (("gpu windows    ", "file_descriptors"), ("gpu fabric     ", "fabric")):
        found = machine["gpu_windows"][name]
        lines.append(f"  {label}{'yes' if found['available'] else 'no, ' + found['why']}")
    lines += [f"\n{sentence}" for sentence in answer["advice"]]
    return lines + (_window_lines(answer["window"]) if "window" in answer else [])


def _window_lines(window: Found) -> list[str]:
    shape = (
        f"{window['num_experts']} experts, top-{window['num_topk']}, {window['num_max_tokens_per_rank']} tokens, "
        f"rows of {window['hidden_bytes']} bytes, {window['num_ranks']} ranks, reduce={window['reduce']}"
    )
    partitions = f"{window['num_partitions']} partitions, {window['num_spare_partitions']} of them spare"
    lines = ["", f"window of one rank ({shape})"]
    lines += [f"  {name:<22} {num_bytes / _MB:>10.2f} MB" for name, num_bytes in window["parts"].items()]
    lines.append(f"  {'in all':<22} {window['window_bytes'] / _MB:>10.2f} MB  without recv.x; {partitions}")
    lines.append(f"  {'recv.x':<22} {window['recv_x_bytes'] / _MB:>10.2f} MB  private memory, for two open rounds")
    return lines
