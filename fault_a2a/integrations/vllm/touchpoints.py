"""Everything of vLLM that this integration touches, each with the shape that it must have. Read here what a new vLLM
may break.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fault_a2a.integrations.vllm import backend_name

_ALL2ALL = "vllm.distributed.device_communicators.all2all"
_MOE = "vllm.model_executor.layers.fused_moe"

# Names that are set to ours. vLLM looks each of them up when it needs it, in the module that is named here.
REPLACED = (
    (_ALL2ALL, "NixlEPAll2AllManager"),
    (f"{_MOE}.all2all_utils", "NixlEPPrepareAndFinalize"),
    (f"{_MOE}.all2all_utils", "NIXL_EP_QUANT_BLOCK_SHAPE"),
)

# Where step starts are marked (`steps`): every executor calls its worker through this class.
WORKER = ("vllm.v1.worker.worker_base", "WorkerWrapperBase")
STEP_STARTS_MARKED = "_fault_a2a_marks_step_starts"
# What takes the name of the backend (`backend_name`).
CONFIG = ("vllm.config.parallel", "ParallelConfig")

# Classes that ours derive from: method, and its parameters as vLLM passes them.
_PREPARE = "a1 topk_weights topk_ids num_experts expert_map apply_router_weight_on_input quant_config defer_input_quant"
_FINALIZE = "output fused_expert_output topk_weights topk_ids apply_router_weight_on_input weight_and_reduce_impl"
BASES: dict[tuple[str, str], dict[str, str]] = {
    ("vllm.distributed.device_communicators.base_device_communicator", "All2AllManagerBase"): {
        "__init__": "cpu_group tcp_store_group",
        "get_handle": "kwargs",
        "query_active_mask": "",
        "query_fault": "",
        "clean_buffers": "",
        "stage_ep_size": "",
        "commit_ep_size": "",
        "mask_remote_ranks": "",
        "destroy": "",
        "max_sms_used": "",
    },
    (f"{_MOE}.modular_kernel", "FusedMoEPrepareAndFinalizeModular"): {
        "post_init_setup": "fused_experts",
        "topk_indices_dtype": "",
        "max_num_tokens_per_rank": "",
        "num_dispatchers": "",
        "output_is_reduced": "",
        "supports_async": "",
        "prepare": _PREPARE,
        "prepare_async": _PREPARE,
        "finalize": _FINALIZE,
        "finalize_async": _FINALIZE,
    },
}
# What a subclass must bring; one more would make ours abstract.
ABSTRACT = {
    "activation_format",
    "topk_indices_dtype",
    "max_num_tokens_per_rank",
    "num_dispatchers",
    "output_is_reduced",
    "prepare",
    "finalize",
}

# Functions and classes that ours call: the parameters that they are given, which must stand first, in this order.
CALLED: dict[tuple[str, str], str] = {
    (f"{_MOE}.utils", "moe_kernel_quantize_input"): "A A_scale quant_dtype per_act_token_quant block_shape",
    (f"{_MOE}.utils", "normalize_batched_scales_shape"): "scales num_experts",
    (f"{_MOE}.modular_kernel", "ExpertTokensMetadata"): "expert_num_tokens expert_num_tokens_cpu",
    ("vllm.config", "get_current_vllm_config"): "",
    ("vllm.v1.worker.ubatching", "dbo_current_ubatch_id"): "",
    ("vllm.v1.worker.ubatching", "dbo_maybe_run_recv_hook"): "",
}
# Values that ours read.
READ = (
    (f"{_MOE}.modular_kernel", "FusedMoEActivationFormat", "BatchedExperts"),
    (f"{_MOE}.topk_weight_and_reduce", "TopKWeightAndReduceDelegate", "apply"),
    (*CONFIG, "enable_elastic_ep"),
    (*CONFIG, "elastic_ep_max_dp_size"),
    (*CONFIG, "data_parallel_size"),
    ("vllm", "envs", "VLLM_ELASTIC_EP_SCALE_UP_LAUNCH"),
    ("vllm.v1.core.sched.output", "SchedulerOutput", "total_num_scheduled_tokens"),
)
# What executors ask of a worker by these names, as a step's first call; else nothing of ours would be called.
ASKED_OF_WORKERS = ("vllm.v1.executor.abstract", "execute_model", "execute_dummy_batch")

# Calls that vLLM makes of ours: where, of what, with how many positional arguments, and which keywords.
CALLERS = (
    ("vllm.distributed.device_communicators.cuda_communicator", "NixlEPAll2AllManager", 2, ""),
    (
        f"{_MOE}.all2all_utils",
        "NixlEPPrepareAndFinalize",
        1,
        "max_tokens_per_rank num_dispatchers expert_capacity use_fp8_dispatch global_to_physical physical_to_global "
        "local_expert_global_ids",
    ),
    (f"{_MOE}.all2all_utils", "NixlEPPrepareAndFinalize.maybe_roundup_layer_hidden_size", 1, ""),
)
# What vLLM puts into get_handle, as literal keywords of `dict`.
HANDLE_FIELDS = (f"{_MOE}.all2all_utils", "max_num_tokens_per_dp_rank token_hidden_size num_local_experts")


def vllm_version() -> str:
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown version"


def complaints() -> list[str]:
    """A sentence for everything that is not as expected; empty: this vLLM fits."""
    return [*_of_bases(), *_of_called(), *_of_read(), *_of_callers(), *_of_step_starts(), *_of_name()]


def _look_up(module: str, name: str) -> tuple[Any, str]:
    """(the object, "") or (None, why there is none)."""
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        return None, f"{module} cannot be imported ({error})"
    found = getattr(loaded, name, None)
    return found, "" if found is not None else f"{module} has no {name}"


def _parameters(function: Any) -> list[str]:
    names = list(inspect.signature(function).parameters)
    return names[1:] if names[:1] == ["self"] else names


def _of_bases() -> Iterator[str]:
    for (module, name), methods in BASES.items():
        base, why = _look_up(module, name)
        if base is None:
            yield why
            continue
        for method, wanted in methods.items():
            if not hasattr(base, method):
                yield f"{module}.{name} has no {method}"
            elif callable(getattr(base, method)) and _parameters(getattr(base, method)) != wanted.split():
                yield (
                    f"{module}.{name}.{method} takes ({', '.join(_parameters(getattr(base, method)))}), "
                    f"not ({', '.join(wanted.split())})"
                )
        new = set(getattr(base, "__abstractmethods__", ())) - ABSTRACT
        if new:
            yield f"{module}.{name} has new abstract methods: {', '.join(sorted(new))}"


def _of_called() -> Iterator[str]:
    for (module, name), wanted in CALLED.items():
        function, why = _look_up(module, name)
        if function is None:
            yield why
            continue
        # Wrappers take anything: ubatching makes its functions of methods.
        names = _parameters(function)
        if names not in (["args", "kwargs"],) and names[: len(wanted.split())] != wanted.split():
            yield f"{module}.{name} takes ({', '.join(names)}), not ({', '.join(wanted.split())}, ...)"


def _of_read() -> Iterator[str]:
    for module, name, attribute in READ:
        found, why = _look_up(module, name)
        if found is None:
            yield why
        elif not hasattr(found, attribute) and attribute not in getattr(found, "__dataclass_fields__", ()):
            yield f"{module}.{name} has no {attribute}"


def _of_callers() -> Iterator[str]:
    """Read in vLLM's source: a call cannot be inspected, and the CUDA communicator need not be importable here."""
    for module, name, num_positional, keywords in CALLERS:
        calls = [call for call in _calls(module) if ast.unparse(call.func) == name]
        if not calls:
            yield f"{module} does not call {name} any more"
        for call in calls:
            given = [keyword.arg for keyword in call.keywords]
            if len(call.args) != num_positional or given != keywords.split():
                yield (
                    f"{module} calls {name} with {len(call.args)} arguments and ({', '.join(map(str, given))}), "
                    f"not with {num_positional} and ({', '.join(keywords.split())})"
                )
    module, fields = HANDLE_FIELDS
    made = [{keyword.arg for keyword in call.keywords} for call in _calls(module) if ast.unparse(call.func) == "dict"]
    if set(fields.split()) not in made:
        yield f"{module} asks get_handle for other things than ({', '.join(fields.split())})"


def _of_step_starts() -> Iterator[str]:
    (module, name), (executors, *asked) = WORKER, ASKED_OF_WORKERS
    wrapper, why = _look_up(module, name)
    if wrapper is None:
        yield why
        return
    execute_model = getattr(wrapper, "execute_model", None)
    if execute_model is None or _parameters(execute_model) != ["scheduler_output"]:
        yield f"{module}.{name}.execute_model does not take (scheduler_output)"
    if "execute_dummy_batch" in vars(wrapper) and not hasattr(wrapper, STEP_STARTS_MARKED):
        yield f"{module}.{name} has an execute_dummy_batch of its own"
    if not hasattr(wrapper, "__getattr__"):
        yield f"{module}.{name} does not pass other calls on to its worker"
    calls = [ast.unparse(call.args[0]) for call in _calls(executors) if call.args]
    for method in asked:
        if repr(method) not in calls:
            yield f"{executors} does not ask workers for {method} any more"


def _of_name() -> Iterator[str]:
    config, why = _look_up(*CONFIG)
    why = why or backend_name.complaint(config)
    if why:
        yield f"{CONFIG[0]}: {why}" if config is not None else why


def _calls(module: str) -> list[ast.Call]:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return []
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
