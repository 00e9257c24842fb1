"""What every rank of a group must agree on: shapes, formats, and how long silence may last."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fault_a2a.placement import MAX_NUM_EXPERTS, MAX_NUM_RANKS, Placement, as_whole_number

RECV_FORMATS = ("batched", "packed")
REDUCES = ("owner", "expert")
WEIGHTS_AT = ("owner", "expert")
ON_LOST = ("drop", "renormalize")
AGREEMENTS = ("windows", "store")
BACKENDS = ("cpu", "cuda", "triton", "cuda-host", "auto")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# What rows may travel as, besides `dtype`: one byte an element, and scales.
DISPATCH_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)
SCALE_ALIGNMENT = 16
SCALE_BLOCK = 128  # elements that share a scale when rows are quantised here
MAX_NUM_SCALES = 16384

MIN_HIDDEN, MAX_HIDDEN, HIDDEN_MULTIPLE = 8, 16384, 8
MAX_NUM_TOPK = 32
# A signal counts the rows it publishes in 19 bits; combine returns up to one row per (token, choice).
MAX_NUM_ROWS_PER_CHUNK = (1 << 19) - 1
MAX_NUM_TOKENS = (1 << 19) - 1
MAX_UNSPLIT_TOKENS, DEFAULT_CHUNK_TOKENS = 1024, 128
MAX_MS = 24 * 3600 * 1000  # a day
MAX_SPARE_PARTITIONS = 64
MAX_NUM_SMS = 1024
MAX_COLLECTIVE_BYTES = 524287  # a field of the word
# A watcher that slept for a quarter of a timeout starts it anew, so a shorter silence could never be measured.
MIN_BEATS_PER_SILENCE = 4

# Field: (least, most). Checked in this order, so that the first error is about the first wrong field.
_WHOLE_NUMBERS = {
    "num_experts": (1, MAX_NUM_EXPERTS),
    "hidden": (MIN_HIDDEN, MAX_HIDDEN),
    "num_topk": (1, MAX_NUM_TOPK),
    "num_max_tokens_per_rank": (1, MAX_NUM_TOKENS),
    "beat_ms": (1, MAX_MS),
    "silence_ms": (1, MAX_MS),
    "stall_ms": (1, MAX_MS),
    "link_ms": (1, MAX_MS),
    "settle_ms": (0, MAX_MS),
    "construct_timeout_ms": (1, MAX_MS),
    "agreement_timeout_ms": (1, MAX_MS),
    "join_hold_ms": (1, MAX_MS),
    "num_spare_partitions": (0, MAX_SPARE_PARTITIONS),
    "max_collective_bytes": (8, MAX_COLLECTIVE_BYTES),
}
# How long each rank is ready to wait for the others is its own business.
# So is what its kernels run on: they put the same bytes on the wire.
_MAY_DIFFER = ("construct_timeout_ms", "backend", "num_sms")
_CHOICES = {
    "recv_format": RECV_FORMATS,
    "reduce": REDUCES,
    "on_lost": ON_LOST,
    "weights_at": WEIGHTS_AT,
    "agreement": AGREEMENTS,
    "backend": BACKENDS,
}


@dataclass(frozen=True)
class Config:
    """The shape of a group's work and its timeouts; the same on every rank.

    Args:
        num_experts: experts in the whole group, 1 to 65536.
        hidden: elements in a row of ``x``, 8 to 16384, a multiple of 8 (so that a row is whole 16-byte words).
        num_topk: choices per token, 1 to 32, at most ``num_experts``.
        num_max_tokens_per_rank: most tokens that one rank passes to one ``dispatch``, 1 to 524287.
        dtype: of ``y`` and ``out``, and of ``x`` and ``recv.x`` if ``dispatch_dtype`` is ``None``: ``torch.bfloat16``,
            ``torch.float16`` or ``torch.float32``.
        recv_format: ``"batched"``: ``recv.x`` is ``[num_local_experts, capacity, hidden]`` with
            ``capacity = num_ranks * num_max_tokens_per_rank``; ``"packed"``: ``[num_recv, hidden]`` and offsets.
        reduce: who sums the choices of a token. ``"owner"``: the token's own rank, in the order of the choices (same
            bits wherever the experts stand); ``"expert"``: each expert rank first sums its share (fewer bytes back).
        on_lost: ``"drop"``: a lost choice adds nothing; ``"renormalize"``: the weights of the delivered choices are
            scaled up to the weight that the token asked for.
        placement: which rank holds which expert: a ``Placement``, a sequence with the rank of each expert, or ``None``
            for contiguous blocks.
        beat_ms: how often a rank's native thread shows that the process lives, at least 1.
        silence_ms: a rank whose beat stands still this long while somebody waits for it is suspected; at least
            ``4 * beat_ms``.
        stall_ms: a rank that beats but does not move on this long, while somebody waits for it, is suspected.
        link_ms: how long a signal may be missing once its sender is known to be past it.
        settle_ms: how long an accusation other than a process exit waits for others to join it, 0 or more.
        construct_timeout_ms: how long ``Buffer(...)`` waits for the group to come together.
        agreement_timeout_ms: how long a rank waits for its peers to agree on a view before it suspends itself.
        max_num_ranks: ranks that the group may grow to; windows, masks and placement have room for them from the
            start, and those beyond the ranks that construct the group are not active until they join. ``None``: no more
            than construct it.
        join_hold_ms: how long ``begin_step`` waits at most until all have agreed on a change of membership that stands
            at a step start; once they have, it waits until the view is decided.
        agreement: who decides between proposals for a view. ``"windows"``: the members, over their shared memory,
            without a leader or a store; ``"store"``: the group's store, by ``compare_set``; while that is gone, views
            cannot change.
        num_spare_partitions: partitions of each rank's window beyond one a rank, 0 to 64: landing room for ranks that
            come back. Each costs every rank up to a partition of memory (``fault-a2a doctor --window``).
        max_collective_bytes: the most that ``all_gather`` and ``all_reduce`` take of a rank, 8 to 524287; twice so much
            is kept in every partition.
        num_chunk_tokens: windows hold so many tokens of each rank (twice, if there are more); a longer batch travels
            as a stream of such chunks, each of which waits until its reader has made room. 1 to
            ``num_max_tokens_per_rank``, times ``num_topk`` at most 524287. ``None``: all tokens in one chunk up to
            1024, chunks of 128 above.
        dispatch_dtype: of ``recv.x``, if rows travel quantised: ``torch.float8_e4m3fn``, to which an ``x`` in
            ``dtype`` is quantised on the way out, in blocks of 1 x 128 (``reference.quantize_1x128``); this one,
            ``float8_e5m2``, ``int8`` and ``uint8`` also for an ``x`` that comes quantised, with its ``scales``.
        scale_dtype: of the scales that travel with a quantised row. ``torch.float32``, or ``torch.int32`` for powers of
            two, four UE8M0 bytes in each; for rows that come quantised any dtype.
        num_scales: scales of a row; ``None`` for what blocks of 1 x 128 make.
        weights_at: where ``topk_weights`` are applied. ``"owner"``: in the sum; ``"expert"``: by the caller's experts,
            who find them in ``recv.weights``, and the sum leaves them out.
        backend: what runs this rank's kernels; ranks of a group may differ. ``"cpu"``. ``"cuda"``, a GPU's, with
            tensors and windows on it, on every rank or on none (not run on a GPU yet); streams of chunks are not
            captured in a graph. ``"cuda-host"``, for tests only, the sources of the CUDA kernels, run thread by thread
            on the CPU. ``"triton"``, for batches that fit into one chunk, Triton's, in its interpreter where there is
            no GPU (slow: for tests). ``"auto"``: whatever runs here best, see ``fault_a2a.backends``;
            ``buffer.config.backend`` says which. Not the default, since it decides where tensors must lie.
        num_sms: blocks of the CUDA kernels that copy and sum; those that wait have one. ``None``: as many as the device
            has multiprocessors; 2 of ``"cuda-host"``.
            Nothing to ``"cpu"``; ranks may differ.

    Raises:
        TypeError: a field has the wrong type. The message names the field and what to pass.
        ValueError: a field is out of its range, or two fields do not fit each other.
    """

    num_experts: int
    hidden: int
    num_topk: int
    num_max_tokens_per_rank: int
    dtype: torch.dtype = torch.bfloat16
    recv_format: str = "batched"
    reduce: str = "owner"
    on_lost: str = "drop"
    placement: Placement | Sequence[int] | None = None
    beat_ms: int = 10
    silence_ms: int = 2000
    stall_ms: int = 30000
    link_ms: int = 5000
    settle_ms: int = 50
    construct_timeout_ms: int = 60000
    agreement_timeout_ms: int = 10000
    join_hold_ms: int = 500
    max_num_ranks: int | None = None
    num_spare_partitions: int = 1
    max_collective_bytes: int = 4096
    agreement: str = "windows"
    num_chunk_tokens: int | None = None
    dispatch_dtype: torch.dtype | None = None
    scale_dtype: torch.dtype = torch.float32
    num_scales: int | None = None
    weights_at: str = "owner"
    backend: str = "cpu"
    num_sms: int | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in _WHOLE_NUMBERS.items():
            value = as_whole_number(name, getattr(self, name))
            if not least <= value <= most:
                raise ValueError(f"{name}: {value} is out of range; pass {least} to {most}.")
            object.__setattr__(self, name, value)
        if self.max_num_ranks is not None:
            self._set_max_num_ranks()
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        _check_dtype(self.dtype)
        if self.num_sms is not None and not 1 <= as_whole_number("num_sms", self.num_sms) <= MAX_NUM_SMS:
            raise ValueError(f"num_sms: {self.num_sms} is out of range; pass 1 to {MAX_NUM_SMS}, or None.")
        self._set_chunk()
        self._set_scales()
        self._check_fit()
        if self.placement is not None and not isinstance(self.placement, Placement):
            object.__setattr__(self, "placement", _as_expert_rank(self.placement))
        self._check_placement_size()

    def _set_max_num_ranks(self) -> None:
        value = as_whole_number("max_num_ranks", self.max_num_ranks)
        if not 1 <= value <= MAX_NUM_RANKS:
            raise ValueError(f"max_num_ranks: {value} is out of range; pass 1 to {MAX_NUM_RANKS}, or None.")
        object.__setattr__(self, "max_num_ranks", value)

    def _set_chunk(self) -> None:
        most = self.num_max_tokens_per_rank
        chunk = self.num_chunk_tokens
        if chunk is None:
            chunk = most if most <= MAX_UNSPLIT_TOKENS else DEFAULT_CHUNK_TOKENS
        chunk = as_whole_number("num_chunk_tokens", chunk)
        if not 1 <= chunk <= most:
            raise ValueError(
                f"num_chunk_tokens: {chunk} is out of range; pass 1 to num_max_tokens_per_rank = {most}, or None."
            )
        object.__setattr__(self, "num_chunk_tokens", chunk)

    def _set_scales(self) -> None:
        if self.dispatch_dtype is None:
            if self.num_scales is not None:
                raise ValueError("num_scales: only quantised rows have scales; set dispatch_dtype, or pass None.")
            return
        names = ", ".join(str(dtype) for dtype in DISPATCH_DTYPES)
        if not isinstance(self.dispatch_dtype, torch.dtype):
            raise TypeError(
                f"dispatch_dtype: expected a torch.dtype, got {self.dispatch_dtype!r}; pass {names} or None."
            )
        if self.dispatch_dtype not in DISPATCH_DTYPES:
            raise ValueError(f"dispatch_dtype: rows cannot travel as {self.dispatch_dtype}; pass {names} or None.")
        if not isinstance(self.scale_dtype, torch.dtype):
            raise TypeError(f"scale_dtype: expected a torch.dtype, got {self.scale_dtype!r}; pass torch.float32.")
        num_scales = self.num_block_scales if self.num_scales is None else self.num_scales
        num_scales = as_whole_number("num_scales", num_scales)
        if not 1 <= num_scales <= MAX_NUM_SCALES:
            raise ValueError(f"num_scales: {num_scales} is out of range; pass 1 to {MAX_NUM_SCALES}, or None.")
        object.__setattr__(self, "num_scales", num_scales)

    @property
    def num_block_scales(self) -> int:
        """Scales of a row in blocks of 1 x 128: one float32 each, or four UE8M0 bytes in each int32."""
        num_blocks = -(-self.hidden // SCALE_BLOCK)
        return -(-num_blocks // 4) if self.scale_dtype == torch.int32 else num_blocks

    @property
    def quantizes(self) -> str:
        """What becomes of an ``x`` in ``dtype``: "never", or quantised with scales "float32" or "ue8m0"."""
        formats = {torch.float32: "float32", torch.int32: "ue8m0"}
        fits = self.dispatch_dtype == torch.float8_e4m3fn and self.num_scales == self.num_block_scales
        return formats.get(self.scale_dtype, "never") if fits else "never"

    @property
    def recv_dtype(self) -> torch.dtype:
        """Of ``recv.x``."""
        return self.dispatch_dtype or self.dtype

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of one row; 0 if rows have none."""
        return (self.num_scales or 0) * self.scale_dtype.itemsize

    @property
    def payload_bytes(self) -> int:
        """Bytes of one row of ``recv.x``."""
        return self.hidden * self.recv_dtype.itemsize

    @property
    def scales_at(self) -> int:
        """Where the scales of a row stand behind its payload, on its way."""
        return -(-self.payload_bytes // SCALE_ALIGNMENT) * SCALE_ALIGNMENT

    @property
    def dispatch_bytes(self) -> int:
        """Bytes of one row on its way out, scales included."""
        return self.scales_at + self.scale_bytes if self.scale_bytes else self.payload_bytes

    @property
    def chunk_tokens(self) -> int:
        """``num_chunk_tokens``, chosen if it was left open."""
        assert self.num_chunk_tokens is not None
        return self.num_chunk_tokens

    def _check_fit(self) -> None:
        """Fields that are fine alone and do not fit together."""
        if self.hidden % HIDDEN_MULTIPLE:
            raise ValueError(
                f"hidden: {self.hidden} is not a multiple of {HIDDEN_MULTIPLE}; "
                f"pad the rows to {-(-self.hidden // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE} elements."
            )
        if self.num_topk > self.num_experts:
            raise ValueError(
                f"num_topk: {self.num_topk} is more than num_experts ({self.num_experts}), and an expert may stand "
                f"only once per token; pass at most {self.num_experts}."
            )
        if self.chunk_tokens * self.num_topk > MAX_NUM_ROWS_PER_CHUNK:
            raise ValueError(
                f"num_chunk_tokens: {self.chunk_tokens} tokens of {self.num_topk} choices are more rows than a signal "
                f"can count; pass at most {MAX_NUM_ROWS_PER_CHUNK // self.num_topk}."
            )
        if self.backend == "triton" and self.chunk_tokens < self.num_max_tokens_per_rank:
            raise ValueError(
                f"backend: {self.backend!r} sends every batch in one chunk, and num_chunk_tokens is "
                f"{self.chunk_tokens} of {self.num_max_tokens_per_rank} tokens; pass num_chunk_tokens="
                f"{self.num_max_tokens_per_rank}, or backend='cpu'."
            )
        if self.silence_ms < MIN_BEATS_PER_SILENCE * self.beat_ms:
            raise ValueError(
                f"silence_ms: {self.silence_ms} is too short for a beat every {self.beat_ms} ms; pass at least "
                f"{MIN_BEATS_PER_SILENCE * self.beat_ms} ({MIN_BEATS_PER_SILENCE} * beat_ms), or lower beat_ms."
            )

    def _check_placement_size(self) -> None:
        if self.placement is None:
            return
        expert_rank = self.placement.expert_rank if isinstance(self.placement, Placement) else self.placement
        if len(expert_rank) != self.num_experts:
            raise ValueError(
                f"placement: places {len(expert_rank)} experts, num_experts is {self.num_experts}; "
                "pass the rank of every expert once."
            )

    def num_ranks_for(self, num_founders: int) -> int:
        """Ranks that a group constructed by ``num_founders`` has room for.

        Raises:
            ValueError: there are more of them than ``max_num_ranks``.
        """
        if self.max_num_ranks is not None and self.max_num_ranks < num_founders:
            raise ValueError(
                f"max_num_ranks: {self.max_num_ranks} is less than the {num_founders} ranks of the group; "
                "pass at least as many, or None."
            )
        return num_founders if self.max_num_ranks is None else self.max_num_ranks

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one row of ``y`` and ``out``."""
        return self.hidden * self.dtype.itemsize

    def compared(self, num_ranks: int) -> dict[str, str]:
        """What must be the same on every rank of a group of ``num_ranks``, as texts short enough to send around."""
        fields = {name: str(value) for name, value in vars(self).items() if name not in _MAY_DIFFER}
        expert_rank = repr(self.placement_for(num_ranks).expert_rank)
        digest = hashlib.sha256(expert_rank.encode()).hexdigest()[:8]
        windows = "on a GPU" if self.backend == "cuda" else "on the host"
        return {"num_ranks": str(num_ranks), **fields, "windows": windows, "placement": f"one with digest {digest}"}

    def capacity(self, num_ranks: int) -> int:
        """Rows that one expert can receive in one round: every token of every rank."""
        return num_ranks * self.num_max_tokens_per_rank

    def placement_for(self, num_ranks: int) -> Placement:
        """The placement of the experts in a group of ``num_ranks`` (1 to 1024).

        Raises:
            ValueError: ``placement`` was made for another group size, or names a rank that this group does not have,
                or the received rows of a rank could not be numbered in 31 bits.
        """
        if self.placement is None:
            placement = Placement.contiguous(self.num_experts, num_ranks)
        elif isinstance(self.placement, Placement):
            placement = self.placement
        else:
            placement = Placement(self.placement, num_ranks)
        if placement.num_ranks != num_ranks:
            raise ValueError(
                f"placement: made for {placement.num_ranks} ranks, this group has {num_ranks}; "
                f"pass Placement(expert_rank, {num_ranks}), or None for contiguous blocks."
            )
        num_rows = placement.max_local_experts * self.capacity(num_ranks)
        if num_rows >= 1 << 31:
            raise ValueError(
                f"num_max_tokens_per_rank: {placement.max_local_experts} local experts of capacity "
                f"{self.capacity(num_ranks)} make {num_rows} rows, more than an int32 can number; "
                f"pass at most {((1 << 31) - 1) // (placement.max_local_experts * num_ranks)}."
            )
        return placement


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    wanted = " or ".join(f'"{choice}"' for choice in choices)
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {value!r} ({type(value).__name__}); pass {wanted}.")
    if value not in choices:
        raise ValueError(f'{name}: "{value}" is not known; pass {wanted}.')


def _check_dtype(dtype: object) -> None:
    wanted = "torch.bfloat16, torch.float16 or torch.float32"
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {dtype!r} ({type(dtype).__name__}); pass {wanted}.")
    if dtype in DTYPES:
        return
    if str(dtype).startswith("torch.float8"):
        raise ValueError(f"dtype: sums do not come as {dtype}; pass {wanted}, and dispatch_dtype={dtype}.")
    raise ValueError(f"dtype: {dtype} is not a payload type; pass {wanted}.")


def _as_expert_rank(placement: object) -> tuple[int, ...]:
    if isinstance(placement, str) or not hasattr(placement, "__iter__"):
        raise TypeError(
            f"placement: expected a Placement, a sequence of ranks or None, got {type(placement).__name__}; "
            "pass Placement(expert_rank, num_ranks), or None for contiguous blocks."
        )
    return tuple(as_whole_number(f"placement[{expert}]", rank) for expert, rank in enumerate(placement))
