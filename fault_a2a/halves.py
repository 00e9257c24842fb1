"""A buffer's rounds in halves: what is sent, and what is received, with tensors made for either."""

from __future__ import annotations

import torch

from fault_a2a import ops
from fault_a2a.checks import check_expert_rows, check_scales, check_sums, check_tensor, check_tokens
from fault_a2a.config import Config
from fault_a2a.errors import ClosedError
from fault_a2a.lent_memory import LentMemory
from fault_a2a.rounds import Handle, Outcome, RecvHook, Verbs

Sent = tuple[tuple[torch.Tensor, ...], RecvHook]
Combined = tuple[torch.Tensor, Outcome, RecvHook]


class Halves:
    """The part of ``Buffer`` that speaks to its kernels."""

    config: Config
    device: torch.device
    verbs: Verbs
    id: int
    num_local_experts: int
    _memory: LentMemory
    _closed: bool

    @property
    def recv_shape(self) -> list[int]:
        """See ``Buffer``."""
        raise NotImplementedError

    @property
    def scales_shape(self) -> list[int]:
        """See ``Buffer``."""
        raise NotImplementedError

    @property
    def weights_shape(self) -> list[int]:
        """See ``Buffer``."""
        raise NotImplementedError

    def _check_open(self) -> None:
        raise NotImplementedError

    def _raise_for(self, status: str) -> None:
        raise NotImplementedError

    def is_captured(self) -> bool:
        """Rounds are being captured into a graph: they are launched, and nothing is waited for or raised."""
        is_capturing = getattr(self.verbs, "is_capturing", None)
        return is_capturing is not None and is_capturing()

    def _empty(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        scales: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        tensors, receive = self._dispatch_send(x, topk_idx, topk_weights, scales)
        receive()
        return tensors

    def _dispatch_send(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, scales: torch.Tensor | None
    ) -> Sent:
        """What the operator returns, and the hook that fills it."""
        self._check_open()
        check_tokens(self.config, self.device, x, topk_idx, topk_weights)
        check_scales(self.config, self.device, x, scales)
        arguments = (
            x.data_ptr(),
            0 if scales is None else scales.data_ptr(),
            topk_idx.data_ptr(),
            topk_idx.dtype == torch.int64,
            topk_weights.data_ptr(),
            x.shape[0],
        )
        if self.is_captured():
            return self._captured_dispatch(arguments)
        status, round_number, _, token, choice, value = self.verbs.dispatch_send(*arguments)
        if status == "bad_expert":
            raise ValueError(
                f"topk_idx[{token}, {choice}] is {value}; give an expert from 0 to {self.config.num_experts - 1}, "
                "or -1 for none"
            )
        if status == "repeated_expert":
            raise ValueError(
                f"topk_idx[{token}] names expert {value} twice; give each expert once, and -1 for the rest"
            )
        self._raise_for(status)
        filled = self._received_tensors()
        handle = torch.tensor([self.id, round_number, x.shape[0], 0], dtype=torch.int64, device=self.device)

        def receive(read: tuple[torch.Tensor | None, ...] = (x, scales)) -> None:  # a stream reads these until it ends
            status, _, num_received, *_ = self.verbs.dispatch_receive(round_number, *_pointers(filled))
            self._raise_for(status)
            handle[3] = num_received

        return _as_operator_returns(filled, handle), RecvHook("dispatch", receive)

    def _received_tensors(self) -> tuple[torch.Tensor, ...]:
        """recv_x, recv_scales, recv_weights, num_tokens, offsets."""
        # Not one buffer for a parity: a compiler computes in place, and hands on what it was given.
        return (
            self._memory.lend(),
            self._empty(self.scales_shape, self.config.scale_dtype),
            self._empty(self.weights_shape, torch.float32),
            self._empty([self.num_local_experts], torch.int32),
            self._empty([self.num_local_experts + 1], torch.int32),
        )

    def _captured_dispatch(self, arguments: tuple[int, int, int, bool, int, int]) -> Sent:
        """The handle is the kernels' own: which round it is, they find out at each replay."""
        if self.config.chunk_tokens < self.config.num_max_tokens_per_rank:
            raise RuntimeError(
                f"num_chunk_tokens: {self.config.chunk_tokens} of {self.config.num_max_tokens_per_rank} tokens make a "
                "stream, which has as many launches as it takes and cannot be captured; capture a Buffer with "
                f"num_chunk_tokens={self.config.num_max_tokens_per_rank}, or call dispatch outside of the graph"
            )
        handle = torch.zeros([ops.HANDLE_WORDS], dtype=torch.int64, device=self.device)
        filled = self._received_tensors()
        self.verbs.launch_dispatch_send(*arguments, handle.data_ptr())  # type: ignore[attr-defined]

        def receive() -> None:
            self.verbs.launch_dispatch_receive(*_pointers(filled), handle.data_ptr())  # type: ignore[attr-defined]

        return _as_operator_returns(filled, handle), RecvHook("dispatch", receive)

    def _combine(
        self, y: torch.Tensor, topk_weights: torch.Tensor, handle: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out, outcome, receive = self._combine_send(y, Handle(handle, topk_weights, self))  # type: ignore[arg-type]
        receive()
        return out, outcome.codes, outcome.lost

    def _combine_send(
        self, y: torch.Tensor, handle: Handle, out: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> Combined:
        self._check_open()
        is_captured = self.is_captured()
        round_number, num_tokens, num_received = (
            (0, handle.topk_weights.shape[0], self.recv_shape[0]) if is_captured else self._check_handle(handle.tensor)
        )
        check_expert_rows(self.config, self.device, self.recv_shape, y, num_received)
        check_sums(self.config, self.device, num_tokens, out, weights)
        if is_captured:
            self.verbs.launch_combine_send(y.data_ptr(), handle.tensor.data_ptr())  # type: ignore[attr-defined]
        else:
            self._raise_for(self.verbs.combine_send(y.data_ptr(), round_number))
        if out is None:
            out = self._empty([num_tokens, self.config.hidden], self.config.dtype)
        codes = self._empty([num_tokens, self.config.num_topk], torch.uint8)
        lost = self._empty([], torch.bool)

        def receive(y: torch.Tensor = y) -> None:  # a stream reads y until it ends
            pointers = [0 if tensor is None else tensor.data_ptr() for tensor in (out, codes, lost, weights)]
            if is_captured:
                launch = self.verbs.launch_combine_receive  # type: ignore[attr-defined]
                return launch(*pointers, num_tokens, handle.tensor.data_ptr())
            self._raise_for(self.verbs.combine_receive(round_number, *pointers))

        return out, Outcome(codes, lost), RecvHook("combine", receive)

    def _check_handle(self, handle: torch.Tensor) -> tuple[int, int, int]:
        """(round, tokens sent, rows received) of an open round of this buffer."""
        check_tensor("handle", handle, (torch.int64,), [ops.HANDLE_WORDS], self.device)
        buffer_id, round_number, num_tokens, num_received = handle.tolist()
        if buffer_id != self.id:
            raise ValueError(
                f"handle is of buffer {buffer_id}, not of this one ({self.id}); combine on the same buffer"
            )
        if self.verbs.open_tokens(round_number) != num_tokens:
            if self._closed:
                raise ClosedError("this buffer is closed.")
            raise RuntimeError(
                f"handle's round {round_number} is not open: it was combined or abandoned before. "
                "Call dispatch for a new handle"
            )
        return round_number, num_tokens, num_received


def _pointers(tensors: tuple[torch.Tensor, ...]) -> list[int]:
    return [tensor.data_ptr() if tensor.numel() else 0 for tensor in tensors]


def _as_operator_returns(filled: tuple[torch.Tensor, ...], handle: torch.Tensor) -> tuple[torch.Tensor, ...]:
    recv_x, recv_scales, recv_weights, num_tokens, offsets = filled
    return recv_x, num_tokens, offsets, handle, recv_scales, recv_weights
