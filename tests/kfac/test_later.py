"""Choosing on the device, where the host does not look: by the "meta" device, which has no values to look at."""

import pytest
import torch

from kfac.later import TOGETHER_AFTER, Later, select


@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_chosen_has_the_dtype_of_what_is_new(device: str, dtype: torch.dtype) -> None:
    """Token numbers among the rows of a two-level step have to stay numbers."""
    condition = torch.ones((), dtype=torch.bool, device=device)
    new = torch.ones(3, dtype=dtype, device=device)
    assert select(condition, new, None).dtype == dtype
    assert select(condition, new, torch.zeros_like(new)).dtype == dtype


class Event:
    """Of a device that is done or not."""

    def __init__(self, done: bool) -> None:
        self.done = done

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


def test_processes_learn_a_number_at_the_same_step_however_fast_their_devices_are() -> None:
    learnt = []
    for done in (True, False):
        number = Later(torch.ones(()), step=5, device=torch.device("cuda"))
        number._event = Event(done)  # type: ignore[assignment]
        assert number.known(6) == done
        learnt.append(next(step for step in range(6, 99) if number.known(step, together=True)))
        assert number.value() == 1 and number._event.query(), "read before the device was done"
    assert learnt == [5 + TOGETHER_AFTER] * 2


def test_what_the_host_has_is_known_at_once() -> None:
    assert Later(torch.ones(()), step=5).known(5, together=True)
