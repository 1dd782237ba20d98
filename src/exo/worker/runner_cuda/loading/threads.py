"""Chooses the number of threads of a step, by measurements while the model serves: other programs come and go.

llama.cpp has two counts: one for steps of a single row and one for steps of several rows. The second does not change
the results. The first does in contexts of 512 tokens and more, where flash attention divides the cells among the
threads. A request that must be repeatable to the last bit therefore gets a fixed count for single rows.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import psutil

from exo.worker.protocol.cores import usable_cpus
from exo.worker.protocol.events import CpuUse

TURNS = 6
"""Steps with each count in a trial."""
CLEAR = 1.25
"""A trial ends early if the steps with one count take this many times as long: after two steps with each count, or
after one if the steps are long."""
LONG_STEP = 0.1
"""Seconds. The steps of a long prompt take this long, so a whole trial would last for most of the prompt."""
WORTH_MORE = 1.03
"""How many times as fast more threads must be. The text of a token, the server and the client need a core too: they
stop a thread, for which the others then wait."""
CROWDED = 0.12
"""Fewer threads are tried if the computing threads wait for a core for this share of the time, in two windows in a row.
A program that computes for a moment only does not change the count."""
CROWDED_WINDOWS = 2
IDLE_CORE = 0.7
"""More threads are tried if this many cores are idle."""
WINDOW_SECONDS = 0.5
LOOKS, LOOK_SECONDS = 4, 0.001
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds between two trials in the same direction. Each failure doubles them, up to the longest."""
TRIAL_SECONDS = 5.0
"""A longer trial is given up: the number of rows kept changing."""
_KEPT = 0.8
"""The weight of earlier measurements when a new one is added."""

StepKind = tuple[bool, int]
"""Whether prompts were computed, and the number of rows: steps of the same kind take about the same time."""


@dataclass(frozen=True, slots=True)
class CpuWindow:
    """The load of the CPUs over half a second.

    ``delay`` is the share of the time in which the computing threads were runnable and waited for a core. ``idle`` is
    the idle time of the usable CPUs, in CPUs.
    """

    delay: float
    idle: float


class CpuWatch:
    """Reads the run-queue delay of this process's busiest threads, and the idle time of the CPUs that it may use."""

    def __init__(self) -> None:
        self._cpus = usable_cpus()
        self._since = time.monotonic()
        self._idle = self._idle_seconds()
        self._tasks = dict(task_times())

    def window(self, n_threads: int) -> CpuWindow | None:
        """The window that ends now, for ``n_threads`` computing threads; None until it has lasted half a second."""
        now = time.monotonic()
        seconds = now - self._since
        if seconds < WINDOW_SECONDS:
            return None
        tasks, idle = dict(task_times()), self._idle_seconds()
        spent = sorted(
            ((ran - self._tasks.get(task, (0, 0))[0], waited - self._tasks.get(task, (0, 0))[1]))
            for task, (ran, waited) in tasks.items()
        )[-n_threads:]
        wanted = sum(ran + waited for ran, waited in spent)
        found = CpuWindow(sum(waited for _, waited in spent) / wanted if wanted else 0.0, (idle - self._idle) / seconds)
        self._since, self._tasks, self._idle = now, tasks, idle
        return found

    def restart(self) -> None:
        """Begins a new window, after a pause in which nothing was computed."""
        self._since, self._tasks, self._idle = time.monotonic(), dict(task_times()), self._idle_seconds()

    def _idle_seconds(self) -> float:
        times = psutil.cpu_times(percpu=True)
        return sum(times[cpu].idle for cpu in self._cpus if cpu < len(times))


def others_running() -> int | None:
    """Returns the number of other runnable threads on the whole machine; None if the kernel does not report it.

    It is the minimum of a few readings within milliseconds, which a program that computes shows up in each time.
    """
    found: list[int] = []
    for look in range(LOOKS):
        time.sleep(LOOK_SECONDS if look else 0.0)
        try:
            found.append(int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1)
        except (OSError, IndexError, ValueError):
            return None
    return max(0, min(found))


def task_times() -> Iterator[tuple[str, tuple[int, int]]]:
    """Yields each thread's id, and its nanoseconds of running and of waiting for a core (Linux's ``schedstat``).

    Leaves out threads that give way to others, such as those that encode pictures: they wait when streams are computed.
    """
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        return
    usual = os.getpriority(os.PRIO_PROCESS, os.getpid())
    for name in os.listdir(tasks):
        try:
            if os.getpriority(os.PRIO_PROCESS, int(name)) > usual:
                continue
            ran, waited, _ = (tasks / name / "schedstat").read_text().split()
        except (OSError, ValueError):  # the thread has ended, or this kernel does not report it
            continue
        yield name, (int(ran), int(waited))


@dataclass(slots=True)
class Trial:
    """Alternates between two counts until it is known which one is faster."""

    usual: int
    other: int
    began: float
    turn: int = 0
    times: dict[tuple[StepKind, int], list[float]] = field(default_factory=dict[tuple[StepKind, int], list[float]])

    @property
    def count(self) -> int:
        """The count whose turn it is. The order is A B B A, so that a trend favours neither."""
        return self.usual if self.turn % 4 in (0, 3) else self.other

    def note(self, kind: StepKind, seconds: float) -> None:
        """Adds a step that was computed with ``count``."""
        self.times.setdefault((kind, self.count), []).append(seconds)
        self.turn += 1

    def verdict(self, kind: StepKind) -> bool | None:
        """Whether ``other`` is better; None while that is not known."""
        usual, other = self.times.get((kind, self.usual), []), self.times.get((kind, self.other), [])
        n = min(len(usual), len(other))
        if n >= (1 if min(usual, default=0.0) >= LONG_STEP else 2):
            if fmean(other) > CLEAR * fmean(usual):
                return False
            if fmean(usual) > CLEAR * fmean(other):
                return True
        if n < TURNS:
            return None
        worth = WORTH_MORE if self.other > self.usual else 1.0
        return fmean(other) * worth <= fmean(usual)


class ThreadCount:
    """The count for single rows or for several: from 1 to ``limit``, beginning with ``cores``."""

    def __init__(self, cores: int, limit: int) -> None:
        self.cores = cores
        self.limit = limit
        """The most threads to use."""
        self.count = cores
        self._trial: Trial | None = None
        self._crowded = 0  # the number of crowded windows in a row
        self._next = {True: 0.0, False: 0.0}  # the time from which more (True) or fewer threads may be tried
        self._pause = {True: FIRST_PAUSE, False: FIRST_PAUSE}

    def restrict(self, limit: int) -> None:
        """Sets the limit. Cores that become free are used at once."""
        if limit == self.limit:
            return
        self.count = min(limit, self.cores if limit > self.limit else self.count)
        self.limit = limit
        self._trial = None

    def begin_anew(self, count: int) -> None:
        """Raises the count to ``count``, within the limit. Never lowers it."""
        if (count := min(count, self.cores, self.limit)) > self.count:
            self.count = count
            self._trial = None
            self._pause = {True: FIRST_PAUSE, False: FIRST_PAUSE}

    def now(self) -> int:
        """The count for the next step."""
        return self.count if self._trial is None else self._trial.count

    def computed(self, kind: StepKind, seconds: float, now: float) -> None:
        """Notes the time of a step that used the count from ``now()``."""
        trial = self._trial
        if trial is None:
            return
        trial.note(kind, seconds)
        better = trial.verdict(kind)
        if better is None and now - trial.began < TRIAL_SECONDS:
            return
        self._trial = None
        up = trial.other > trial.usual
        if better:
            self.count = trial.other
            self._pause = {True: FIRST_PAUSE, False: FIRST_PAUSE}
        else:
            self._pause[up] = min(2 * self._pause[up], LONGEST_PAUSE)
        self._next[up] = now + self._pause[up]

    def look(self, window: CpuWindow, now: float) -> None:
        """Begins a trial if the window suggests that another count is better."""
        self._crowded = self._crowded + 1 if window.delay >= CROWDED else 0
        if self._trial is not None:
            return
        step = max(1, self.count // 4)
        if self._crowded >= CROWDED_WINDOWS and self.count > 1 and now >= self._next[False]:
            self._trial = Trial(self.count, self.count - step, now)
        elif window.idle >= IDLE_CORE and self.count < self.limit and now >= self._next[True]:
            self._trial = Trial(self.count, min(self.limit, self.count + step), now)


class Threads:
    """Both counts of a context. Used by the engine's thread.

    ``fixed`` counts, for single rows and for more, come from the model card and never change.
    """

    def __init__(self, cores: int, hyperthreads: int, fixed: tuple[int, int] | None = None) -> None:
        self._cores = cores
        self._fixed = fixed
        self._one, self._more = ThreadCount(cores, cores), ThreadCount(cores, max(cores, hyperthreads))
        self._hyperthreads = max(cores, hyperthreads)
        self._share = cores
        self._watch = CpuWatch()
        self._last_step = time.monotonic()
        self._window = CpuWindow(0.0, 0.0)
        self._quiet: dict[StepKind, float] = {}  # seconds of a step while no other program wanted the cores
        self._slowdown = 1.0

    def restrict(self, share: int) -> None:
        """Limits the cores to ``share``, because other runners of this server compute as well."""
        self._share = min(share, self._cores)
        self._one.restrict(self._share)
        self._more.restrict(self._hyperthreads if self._share == self._cores else self._share)

    def counts(self, *, exact: bool) -> tuple[int, int]:
        """Returns the threads for a step of one row and for a step of more.

        ``exact``: a sequence must be repeatable to the last bit.
        """
        if time.monotonic() - self._last_step > WINDOW_SECONDS:
            self._resume()
        if self._fixed is not None:
            return self._fixed
        return self._cores if exact else self._one.now(), self._more.now()

    def computed(self, n_rows: int, seconds: float, *, prefills: bool, exact: bool) -> None:
        """Notes the time of a step that used the counts from ``counts()``."""
        now, kind, used = time.monotonic(), (prefills, n_rows), self._one if n_rows == 1 else self._more
        self._last_step = now
        if self._fixed is None and not (exact and n_rows == 1):
            used.computed(kind, seconds, now)
        self._note_speed(kind, seconds)
        window = self._watch.window(used.now())
        if window is not None:
            self._window = window
            if self._fixed is None:
                used.look(window, now)

    def _resume(self) -> None:
        """Starts again after a pause, with the cores that no other program uses now.

        If another program has ended meanwhile, a request's prompt and first tokens would otherwise be computed with too
        few threads, until a trial has shown that more are faster.
        """
        self._watch.restart()
        self._last_step = time.monotonic()
        if min(self._one.count, self._more.count) < self._share and (others := others_running()) is not None:
            self._one.begin_anew(self._cores - others)
            self._more.begin_anew(self._cores - others)

    def _note_speed(self, kind: StepKind, seconds: float) -> None:
        quiet = self._quiet.get(kind)
        if self._window.delay < CROWDED / 2 and (self._one if kind[1] == 1 else self._more).count >= self._cores:
            self._quiet[kind] = seconds if quiet is None else _KEPT * quiet + (1 - _KEPT) * seconds
        if quiet:
            self._slowdown = _KEPT * self._slowdown + (1 - _KEPT) * seconds / quiet

    def use(self) -> CpuUse:
        """Returns the report for a heartbeat. Safe to call from any thread."""
        if self._fixed is not None:
            count, reason = self._fixed[0], "the model card sets it"
        else:
            count = self._one.count
            if self._share < self._cores:
                reason = f"{self._cores} cores are shared with other models of this server"
            elif count < self._cores:
                reason = f"of {self._cores} cores, because other programs use the CPU"
            else:
                reason = f"one for each of {self._cores} cores"
        return CpuUse(
            threads=count, reason=reason, delay=round(self._window.delay, 3), slowdown=round(self._slowdown, 2)
        )
