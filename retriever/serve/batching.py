"""One thread for the models: questions that arrive together wait in a queue, and those of a kind share one call."""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Busy(Exception):
    """More questions wait than may: come back later."""


class Answer(NamedTuple):
    """What a question gets."""

    value: Any
    shared: int
    """Questions that the call answered."""
    waited: float
    """Seconds in the queue."""
    took: float
    """Seconds of the call."""


@dataclass(frozen=True)
class Question:
    """One question in the queue."""

    call: Callable[[list[Any]], list[Any]]
    asked: Any
    kind: Hashable | None
    since: float = field(default_factory=time.monotonic)
    answer: "Future[Answer]" = field(default_factory=Future)


class Batcher:
    """A queue, and the thread that answers what stands in it.

    The first question is never passed over; those behind it of the same kind are answered with it. A call that fails is
    repeated for each of its questions alone: one that cannot be answered costs the others time, not their answer.
    """

    def __init__(self, *, most: int, waiting: int) -> None:
        """
        Args:
            most: questions that one call answers.
            waiting: questions that may stand in the queue.
        """
        self.most, self.waiting = most, waiting
        self.calls, self.answered = 0, 0
        self.called: Callable[[int], None] = lambda questions: None
        """Told of each call, with the number of questions that it answered."""
        self._queue: deque[Question] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="models", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Questions that wait."""
        return len(self._queue)

    def ask(self, call: Callable[[list[Any]], list[Any]], asked: Any, *, kind: Hashable) -> "Future[Answer]":
        """Put a question in the queue.

        Args:
            call: answers a list of questions, one answer each and in their order; all of a kind give the same call.
            kind: questions of equal kinds may share a call.

        Raises:
            Busy: the queue is full, or the thread has been stopped.
        """
        return self._put(Question(call, asked, kind))

    def alone(self, call: Callable[[], Any]) -> "Future[Answer]":
        """Run a call in the thread, between others.

        Raises:
            Busy: as `ask`.
        """
        return self._put(Question(lambda _: [call()], None, None))

    def is_alive(self) -> bool:
        """Whether questions are answered."""
        return self._thread.is_alive()

    def close(self, *, seconds: float | None = None) -> None:
        """Finish the call that runs, refuse what waits, and stop.

        Args:
            seconds: to wait for the call at most.
        """
        with self._changed:
            self._closed = True
            left = list(self._queue)
            self._queue.clear()
            self._changed.notify()
        for question in left:
            if question.answer.set_running_or_notify_cancel():
                question.answer.set_exception(Busy())
        self._thread.join(seconds)

    def _put(self, question: Question) -> "Future[Answer]":
        with self._changed:
            if self._closed or len(self._queue) >= self.waiting:
                raise Busy
            self._queue.append(question)
            self._changed.notify()
        return question.answer

    def _work(self) -> None:
        while questions := self._take():
            self._settle([question for question in questions if question.answer.set_running_or_notify_cancel()])

    def _take(self) -> list[Question]:
        """The first question and those of its kind; none when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._closed:
                return []
            kind = self._queue[0].kind
            taken = [self._queue[0]] if kind is None else [one for one in self._queue if one.kind == kind][: self.most]
            chosen = set(map(id, taken))
            self._queue = deque(one for one in self._queue if id(one) not in chosen)
            return taken

    def _settle(self, questions: list[Question]) -> None:
        """Answer questions of one kind."""
        if not questions:
            return
        began = time.monotonic()
        try:
            values = questions[0].call([question.asked for question in questions])
            assert len(values) == len(questions), f"{len(values)} answers to {len(questions)} questions"
        except Exception as error:
            if len(questions) == 1:
                questions[0].answer.set_exception(error)
            else:
                for one in questions:
                    self._settle([one])
            return
        took = time.monotonic() - began
        self.calls += 1
        self.answered += len(questions)
        self.called(len(questions))
        for one, value in zip(questions, values, strict=True):
            one.answer.set_result(Answer(value, len(questions), began - one.since, took))
