"""SIGINT and SIGTERM: finish the current step, save, then stop."""

import logging
import signal

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """A signal asked the run to stop, and the run has saved its state."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.exit_status = 128 + signal_number


class StopSignal:
    """A context that remembers SIGINT and SIGTERM, so that the current step can be finished and saved.

    A second Ctrl-C stops at once. A second SIGTERM does not, because torchrun may send SIGTERM twice.
    """

    def __init__(self):
        self.received: int | None = None

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            logger.warning("received %s: finishing this step, then saving", signal.Signals(number).name)
            self.received = number
