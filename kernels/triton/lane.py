"""What a rank remembers of the round that is open on one lane: a few words here, the rest in the kernels' memory."""

from __future__ import annotations

import torch

from fault_a2a.kernels.triton.layout import COLUMNS, LANE_WORDS, OFFSETS, Layout

_NO_ROUND = -1


class Lane:
    """One lane of a rank, closed. Stages follow each other: closed, sent, received, answered, closed."""

    def __init__(self, at: Layout, device: str) -> None:
        self.at = at
        self.memory = torch.zeros(at.lane_bytes // 8, dtype=torch.int64, device=device)
        self.stage = "closed"
        self.round_number = _NO_ROUND
        self.num_tokens = 0
        self._peers = self.memory[len(LANE_WORDS) :][: len(COLUMNS) * at.ranks_block].view(len(COLUMNS), at.ranks_block)

    @property
    def address(self) -> int:
        return self.memory.data_ptr()

    def open(self, round_number: int, num_tokens: int) -> None:
        self.stage, self.round_number, self.num_tokens = "sent", round_number, num_tokens

    def word(self, name: str) -> int:
        return int(self.memory[LANE_WORDS.index(name)])

    def set_word(self, name: str, value: int) -> None:
        self.memory[LANE_WORDS.index(name)] = value

    def column(self, name: str) -> torch.Tensor:
        """int64 ``[num_ranks]``: what is known of each peer."""
        return self._peers[COLUMNS.index(name), : self.at.num_ranks]

    def fill(self, name: str, value: int) -> None:
        self.column(name).fill_(value)

    def forget_experts(self) -> None:
        first = self.at.lane_expert_rows // 4
        self.memory.view(torch.int32)[first : first + self.at.num_experts] = 0

    def sources(self) -> list[list[int]]:
        """(row of ``recv.x``, local expert, src_rank, token on src_rank, its choice) of every row that was taken."""
        at, numbers = self.at, self.memory.view(torch.int32).cpu()
        header_words, choice_words = at.header_stride // 4, OFFSETS["choice_stride"] // 4
        headers, positions = at.lane_headers // 4, at.lane_position // 4
        out = []
        for src, (taken, num_rows) in enumerate(
            zip(self.column("taken").tolist(), self.column("rows_from").tolist(), strict=True)
        ):
            for row in range(num_rows if taken else 0):
                index = src * at.num_tokens + row
                header = numbers[headers + index * header_words :][:header_words].tolist()
                token = header[OFFSETS["header_token"] // 4]
                for i in range(header[OFFSETS["header_num_choices"] // 4]):
                    choice = header[OFFSETS["header_choices"] // 4 + i * choice_words :]
                    position = int(numbers[positions + index * at.max_choices + i])
                    expert, k = choice[OFFSETS["choice_expert"] // 4], choice[OFFSETS["choice_k"] // 4]
                    out.append([position, expert, src, token, k])
        return out
