"""Messages between two processes of this server, over a pair of sockets that nobody else can reach.

They are pickled: either end trusts the other, which is the same program; nothing of a client's comes here but pixels
and text that were checked.
"""

from __future__ import annotations

import pickle
import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class Pipe:
    """One end. Its threads read and write, so that neither `post` nor a slow other end holds anyone up.

    `on_message` is called with each message, in order, and `on_end` once when there are no more (the other end closed,
    or died), both in the reading thread.
    """

    def __init__(self, end: socket.socket, on_message: Callable[[Any], None], on_end: Callable[[], None]) -> None:
        self._end, self._on_message, self._on_end = end, on_message, on_end
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for name, work in (("reader", self._read), ("writer", self._write)):
            threading.Thread(target=work, name=f"pipe {name}", daemon=True).start()

    def post(self, message: Any) -> None:
        """Queue a message; one to an end that is closed is lost."""
        self._waiting.put(message)

    def close(self) -> None:
        """End both directions; the other end reads what was sent before."""
        with suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        try:
            with self._end.makefile("rb") as file, suppress(EOFError, OSError, pickle.UnpicklingError):
                while True:
                    self._on_message(pickle.load(file))
        finally:
            self.close()
            self._waiting.put(None)
            self._on_end()

    def _write(self) -> None:
        try:
            with suppress(OSError), self._end.makefile("wb") as file:
                while (message := self._waiting.get()) is not None:
                    pickle.dump(message, file, pickle.HIGHEST_PROTOCOL)
                    file.flush()
        finally:
            self.close()
