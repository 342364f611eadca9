"""Data of the contract as Lightning sees it: one endless epoch of micro-batches whose state is exact."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import replace

import lightning.pytorch as pl
import torch

from components.contracts import IGNORE, Batch, BatchStream, Data, UserError


class EndlessLoader:
    """Epoch after epoch of a stream, in whole accumulation windows only.

    Lightning never sees the end of an epoch: its own bookkeeping there is not exact on resume. The last micro-batches of an epoch that
    do not fill a window are left out; they differ from epoch to epoch.
    """

    def __init__(self, stream: BatchStream, accumulate: int = 1, repeat: int = 0) -> None:
        """
        Args:
            stream: micro-batches.
            accumulate: micro-batches in an optimizer step.
            repeat: give the first so many micro-batches again and again (debug=overfit); 0: all of them, epoch after epoch.

        Raises:
            UserError: an epoch is shorter than one optimizer step.
        """
        self.stream = stream
        self.repeat = repeat
        self.usable = min(len(stream), repeat or len(stream)) // accumulate * accumulate
        if not self.usable:
            raise UserError(
                f"trainer.accumulate_grad_batches: {accumulate} is more than the {len(stream)} batch(es) that an epoch has; "
                "lower it or data.batch_size, or use more data"
            )

    def __len__(self) -> int:
        """Never reached; without a length Lightning fetches one batch ahead, and the saved position would be wrong."""
        return sys.maxsize

    def __iter__(self) -> Iterator[Batch]:
        while True:
            state = self.stream.state_dict()
            if state["position"] >= self.usable:
                self.stream.load_state_dict({**state, "epoch": state["epoch"] + (not self.repeat), "position": 0})
            epoch = self.stream.state_dict()["epoch"]
            for batch in self.stream:
                yield batch
                now = self.stream.state_dict()
                if now["epoch"] != epoch or now["position"] >= self.usable:
                    break

    def state_dict(self) -> dict[str, int]:
        """{epoch, position} of the batches that training has taken."""
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a saved state."""
        self.stream.load_state_dict(state)


class Share:
    """Every `of`-th batch, from number `rank` on. Where the last ones are missing, batches stand in whose labels do not count.

    All processes then see equally many: one that goes on alone would wait for the others.
    """

    def __init__(self, batches: Iterable[Batch], rank: int, of: int) -> None:
        """batches: re-iterable."""
        self.batches, self.rank, self.of = batches, rank, of
        self.length = -(-(len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)) // of)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        given, spare = 0, None
        for index, batch in enumerate(self.batches):
            spare = spare or batch
            if index % self.of == self.rank:
                given += 1
                yield batch
        assert spare is not None and spare.labels is not None
        for _ in range(self.length - given):
            yield replace(spare, labels=torch.full_like(spare.labels, IGNORE), loss_tokens=0)


class StreamDataModule(pl.LightningDataModule):
    """Train and validation loaders over a `Data` option."""

    def __init__(self, data: Data, seed: int) -> None:
        """
        Args:
            data: prepared data.
            seed: of the batch order.
        """
        super().__init__()
        self.data = data
        self.seed = seed

    def train_dataloader(self) -> EndlessLoader:
        """Micro-batches of this rank, without end."""
        trainer = self.trainer
        assert trainer is not None
        accumulate = trainer.accumulate_grad_batches
        stream = self.data.train_stream(self.seed, accumulate, trainer.global_rank, trainer.world_size)
        return EndlessLoader(stream, accumulate, repeat=int(trainer.overfit_batches))  # type: ignore[attr-defined]

    def val_dataloader(self) -> Iterable[Batch]:
        """Every held-out token once as a label, over all processes together."""
        trainer = self.trainer
        assert trainer is not None
        batches = self.data.val_batches()
        return batches if trainer.world_size == 1 else Share(batches, trainer.global_rank, trainer.world_size)
