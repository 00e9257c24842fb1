"""The self-check: it passes on the two vLLMs that are supported, and finds what is altered in one."""

import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fault_a2a.integrations.vllm import VllmMovedError, backend_name, plugin, touchpoints

ROOT = Path(__file__).resolve().parents[2]
BEFORE = Path(sys.prefix) / "vllm-0.32.0"
BASE = "vllm.distributed.device_communicators.base_device_communicator"
KERNEL = "vllm.model_executor.layers.fused_moe.modular_kernel"
UTILS = "vllm.model_executor.layers.fused_moe.all2all_utils"
WORKER_MODULE, WORKER = touchpoints.WORKER
EXECUTOR = "vllm.v1.executor.abstract"
CONFIG = "vllm.config.parallel"


def test_this_vllm_fits() -> None:
    assert touchpoints.vllm_version() == "0.33.0"
    assert touchpoints.complaints() == []


def in_a_process(program: str, *folders: Path, **environment: str) -> str:
    path = os.pathsep.join([*map(str, folders), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path, **environment},
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
    ).stdout


def test_the_vllm_before_fits() -> None:
    program = (
        "from fault_a2a.integrations.vllm import touchpoints\nimport vllm\n"
        "print(touchpoints.vllm_version(), vllm.__file__.split('/')[-3], touchpoints.complaints())"
    )
    assert in_a_process(program, BEFORE).split("\n")[-2] == "0.32.0 vllm-0.32.0 []"


def refused(monkeypatch: pytest.MonkeyPatch) -> str:
    """What ``register`` says, and that it left everything as it was."""
    monkeypatch.setenv("FAULT_A2A_VLLM", "1")
    all2all = importlib.import_module(touchpoints.REPLACED[0][0])
    before = all2all.NixlEPAll2AllManager
    with pytest.raises(VllmMovedError) as error:
        plugin.register()
    assert all2all.NixlEPAll2AllManager is before
    assert "0.33.0" in str(error.value) and "FAULT_A2A_VLLM=0" in str(error.value)
    return str(error.value)


def test_a_method_with_other_parameters_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    base = importlib.import_module(BASE).All2AllManagerBase
    monkeypatch.setattr(base, "query_fault", lambda self, since: None)
    assert f"{BASE}.All2AllManagerBase.query_fault takes (since), not ()" in refused(monkeypatch)


def test_a_method_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    base = importlib.import_module(BASE).All2AllManagerBase
    monkeypatch.delattr(base, "mask_remote_ranks")
    assert f"{BASE}.All2AllManagerBase has no mask_remote_ranks" in refused(monkeypatch)


def test_a_new_abstract_method_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    base = importlib.import_module(KERNEL).FusedMoEPrepareAndFinalizeModular
    monkeypatch.setattr(base, "__abstractmethods__", base.__abstractmethods__ | {"rebalance"})
    assert "has new abstract methods: rebalance" in refused(monkeypatch)


def test_a_function_with_other_parameters_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = importlib.import_module("vllm.model_executor.layers.fused_moe.utils")
    monkeypatch.setattr(utils, "normalize_batched_scales_shape", lambda scales, layout: scales)
    assert "normalize_batched_scales_shape takes (scales, layout), not (scales, num_experts, ...)" in refused(
        monkeypatch
    )


def test_a_value_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module(KERNEL), "FusedMoEActivationFormat", object())
    assert "FusedMoEActivationFormat has no BatchedExperts" in refused(monkeypatch)


def test_a_worker_that_takes_a_step_otherwise_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = getattr(importlib.import_module(WORKER_MODULE), WORKER)
    before = wrapper.execute_model
    monkeypatch.setattr(wrapper, "execute_model", lambda self, batch, grammar: None)
    assert f"{WORKER}.execute_model does not take (scheduler_output)" in refused(monkeypatch)
    monkeypatch.setattr(wrapper, "execute_model", before)
    monkeypatch.setattr(wrapper, "execute_dummy_batch", lambda self: None, raising=False)
    assert f"{WORKER} has an execute_dummy_batch of its own" in refused(monkeypatch)


def test_a_list_of_backends_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = importlib.import_module(CONFIG).ParallelConfig
    monkeypatch.setattr(config.__dataclass_fields__["all2all_backend"], "type", str)
    assert "ParallelConfig.all2all_backend is no list of names with 'nixl_ep' in it" in refused(monkeypatch)


def test_a_config_that_does_not_take_the_name_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    config = importlib.import_module(CONFIG).ParallelConfig
    with monkeypatch.context() as altered:
        altered.setattr(backend_name, "_served_name", lambda name: name)
        assert "ParallelConfig(all2all_backend='fault_a2a') holds 'fault_a2a', not 'nixl_ep'" in refused(monkeypatch)
    assert not backend_name.is_taken(config)
    with pytest.raises(ValueError, match="all2all_backend"):
        config(all2all_backend="fault_a2a")
    assert config(all2all_backend="nixl_ep").all2all_backend == "nixl_ep"


@pytest.mark.parametrize(
    ("module", "old", "new", "complaint"),
    [
        (
            EXECUTOR,
            'self.collective_rpc("execute_dummy_batch")',
            'self.collective_rpc("execute_empty_batch")',
            f"{EXECUTOR} does not ask workers for execute_dummy_batch any more",
        ),
        (
            UTILS,
            "expert_capacity=(",
            "expert_room=(",
            "with 1 arguments and (max_tokens_per_rank, num_dispatchers, expert_room",
        ),
        (
            UTILS,
            "NixlEPPrepareAndFinalize(\n",
            "OtherPrepareAndFinalize(\n",
            "does not call NixlEPPrepareAndFinalize any more",
        ),
        (
            UTILS,
            "token_hidden_size=moe.hidden_dim,\n            num_local",
            "width=moe.hidden_dim,\n            num_local",
            "asks get_handle",
        ),
    ],
)
def test_a_call_that_vllm_makes_otherwise_is_named(
    module: str, old: str, new: str, complaint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = inspect.getsource(importlib.import_module(module))
    assert old in text
    altered = tmp_path / "altered.py"
    altered.write_text(text.replace(old, new))
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        if name == module:
            return importlib.machinery.ModuleSpec(name, None, origin=str(altered))
        return find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert complaint in refused(monkeypatch)


# -- the plug-in, as vLLM loads it -------------------------------------------------------------------------------------

LOAD = """
import vllm.plugins
from importlib import import_module
vllm.plugins.load_general_plugins()
vllm.plugins.plugins_loaded = False
vllm.plugins.load_general_plugins()
module = import_module("vllm.distributed.device_communicators.all2all")
utils = import_module("vllm.model_executor.layers.fused_moe.all2all_utils")
worker = import_module("vllm.v1.worker.worker_base").WorkerWrapperBase
marks = [name for name in ("execute_model", "execute_dummy_batch") if "fault_a2a" in str(
    getattr(vars(worker).get(name), "__code__", ""))]
print(module.NixlEPAll2AllManager.__name__, *marks, getattr(utils, "NixlEPPrepareAndFinalize", None))
"""
# As `vllm serve`: the command line, what is made of it, and what goes to other processes.
SERVE = """
import pickle
from vllm.config import ParallelConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
said = parser.parse_args(["--all2all-backend", "fault_a2a"]).all2all_backend
config = ParallelConfig(all2all_backend=said, data_parallel_size=2, data_parallel_rank=0, enable_expert_parallel=True)
config = pickle.loads(pickle.dumps(config))
held = [config.all2all_backend, ParallelConfig().all2all_backend]
try:
    ParallelConfig(all2all_backend="fault_a2b")
    held.append("anything")
except ValueError as error:
    held.append("'fault_a2a'" in str(error))
print(said, *held, config.use_batched_dp_moe)
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with what an installation of this checkout would declare."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (declared,) = project["entry-points"]["vllm.general_plugins"].items()
    folder = tmp_path / "fault_a2a-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: fault_a2a\nVersion: 0\n")
    (folder / "entry_points.txt").write_text("[vllm.general_plugins]\n{} = {}\n".format(*declared))
    return tmp_path


def test_vllm_loads_it_by_its_entry_point_and_twice_is_once(installed: Path) -> None:
    loaded = in_a_process(LOAD, installed, FAULT_A2A_VLLM="1").split("\n")[-2]
    ours = "FaultA2AManager execute_model execute_dummy_batch <class 'fault_a2a.integrations.vllm.prepare_finalize."
    assert loaded.startswith(ours)


def test_step_starts_are_left_unmarked_where_the_user_wants_so(installed: Path) -> None:
    loaded = in_a_process(LOAD, installed, FAULT_A2A_VLLM="1", FAULT_A2A_STEP_STARTS="0").split("\n")[-2]
    assert loaded.startswith("FaultA2AManager <class 'fault_a2a.integrations.vllm.prepare_finalize.")


@pytest.mark.parametrize("folders", [(), (BEFORE,)], ids=["0.33", "0.32"])
def test_the_command_line_takes_our_name_and_holds_vllms(folders: tuple[Path, ...], installed: Path) -> None:
    told = in_a_process(SERVE, *folders, installed, FAULT_A2A_VLLM="1").split("\n")[-2]
    assert told == "fault_a2a nixl_ep allgather_reducescatter True True"


def test_it_is_off_unless_asked_for(installed: Path) -> None:
    assert in_a_process(LOAD, installed, FAULT_A2A_VLLM="0").split("\n")[-2] == "NixlEPAll2AllManager None"


def test_a_setting_without_meaning_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT_A2A_VLLM", "1")
    monkeypatch.setenv("FAULT_A2A_STALL_MS", "soon")
    with pytest.raises(ValueError, match="FAULT_A2A_STALL_MS is 'soon'; set it to a whole number"):
        plugin.register()
