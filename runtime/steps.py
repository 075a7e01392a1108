"""Steps whose gradient is not finite: left out, counted, named, and the end of the run where they go on."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from runtime.errors import InputError
from runtime.log import log
from runtime.place import Place
from runtime.ranks import sum_counts
from runtime.state import TrainState

MOST_IN_A_ROW = 10  # steps left out one after the other that end a run


class StepGuard:
    """Judges the steps of an epoch; a step left out leaves everything as it was before.

    Weights, their average and the optimiser were not moved by such a step (`update_weights`). The running
    statistics of batch norm were, by its forward passes, and are put back here. `name_cases` returns the ids
    of the cases in the batches from the first to the last of two numbers; `remedy` ends the error's sentence.
    """

    def __init__(
        self, state: TrainState, place: Place, name_cases: Callable[[int, int], Sequence[str]], remedy: str
    ) -> None:
        self.state = state
        self.place = place
        self.name_cases = name_cases
        self.remedy = remedy
        self.statistics = [each for each in state.network.buffers() if each.is_floating_point()]
        self._keep(place.totals, place.steps)

    def judge(self, is_finite: bool, totals: Tensor, batch: int) -> Tensor:
        """Return the epoch's totals after the step that ended with this batch; without it where left out.

        With loss scaling a gradient beyond float16 is expected now and then: the scaler lowers its scale, and
        this counts apart. It is none where the loss is not finite either or the scale is down at 1.
        """
        if is_finite:
            self.state.left_out_in_a_row = 0
            self._keep(totals, batch + 1)
            return totals
        scaler = self.state.scaler
        if scaler.is_enabled() and bool(sum_counts(totals).isfinite().all()) and scaler.get_scale() >= 1:
            self.place.overflowed += 1
            return self._put_back(batch)
        return self.leave_out(batch)

    def leave_out(self, batch: int) -> Tensor:
        """Return the totals before the step that ended with this batch; InputError for too many in a row."""
        cases = ", ".join(self.name_cases(self.first_batch, batch))
        self.place.left_out += 1
        self.state.left_out_in_a_row += 1
        log.warning(
            "epoch %d, batch %d: the gradient is not finite, so this step is left out; its cases: %s",
            self.state.epoch + 1,
            batch + 1,
            cases,
        )
        if self.state.left_out_in_a_row >= MOST_IN_A_ROW:
            raise InputError("the gradient", f"was not finite in {MOST_IN_A_ROW} steps in a row", self.remedy)
        return self._put_back(batch)

    def _keep(self, totals: Tensor, first_batch: int) -> None:
        self.totals = totals
        self.first_batch = first_batch  # of the next step
        self.kept = torch.cat([each.flatten() for each in self.statistics]) if self.statistics else None

    def _put_back(self, batch: int) -> Tensor:
        self.first_batch = batch + 1
        if self.kept is not None:
            pieces = self.kept.split([each.numel() for each in self.statistics])
            for each, piece in zip(self.statistics, pieces, strict=True):
                each.copy_(piece.view_as(each))
        return self.totals
