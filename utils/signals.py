"""SIGINT and SIGTERM: finish what is being done, save, then stop."""

import logging
import signal

logger = logging.getLogger(__name__)



class Stopped(Exception):
    """The run was asked to stop by a signal and has saved its state."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.exit_status = 128 + signal_number


class StopSignal:
    """Remembers SIGINT and SIGTERM while the `with` block runs, so that what is being done is finished and saved.

    Only a second Ctrl-C stops at once: SIGTERM comes twice where torchrun hands it on.
    """

    def __init__(self):
        self.received: int | None = None

    def __enter__(self) -> "StopSignal":
        self._previous = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        if self.received is None:
            logger.warning("got %s: finishing this step, then saving", signal.Signals(number).name)
        self.received = self.received or number
