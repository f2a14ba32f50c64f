"""Let a run that receives SIGINT or SIGTERM finish its current step, save its state and stop."""

import logging
import signal

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The exception that ends a run after SIGINT or SIGTERM."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.exit_status = 128 + signal_number


class StopSignal:
    """A context manager that records SIGINT and SIGTERM, so that a run can finish the current step and save its state.

    If the first signal was SIGINT (Ctrl-C), a second SIGINT raises KeyboardInterrupt. A second SIGTERM is ignored,
    because torchrun may send SIGTERM twice.
    """

    def __init__(self):
        self.received: int | None = None

    def __enter__(self) -> "StopSignal":
        self._previous = {
            number: signal.signal(number, self._record_signal) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record_signal(self, number: int, _frame) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            text = "received %s: the program finishes the current step, saves its state and stops"
            logger.warning(text, signal.Signals(number).name)
            self.received = number
