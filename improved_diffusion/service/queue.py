"""What waits to be drawn, and who is next: clients take turns, and requests of equal settings go together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from .job import Job

Share = tuple[Job, tuple[int, ...]]  # a job, and the numbers of its images to draw


class FairQueue:
    """Jobs with images that nobody draws yet. Not for several threads."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, list[Job]] = OrderedDict()  # the next client first

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[Job]:
        """The jobs in about the order of their turns: the first of each client, the second of each, ..."""
        longest = max(map(len, self._clients.values()), default=0)
        for place in range(longest):
            yield from (jobs[place] for jobs in self._clients.values() if place < len(jobs))

    def add(self, job: Job) -> None:
        """Let a job wait behind the others of its client."""
        self._clients.setdefault(job.client, []).append(job)

    def put_back(self, job: Job, numbers: tuple[int, ...]) -> None:
        """Images that were taken, and not drawn: they are next."""
        job.todo[:0] = numbers
        jobs = self._clients.setdefault(job.client, [])
        if job not in jobs:
            jobs.insert(0, job)
        self._clients.move_to_end(job.client, last=False)

    def remove(self, job: Job) -> None:
        """Forget a job."""
        jobs = self._clients.get(job.client, [])
        if job in jobs:
            jobs.remove(job)
        if not jobs:
            self._clients.pop(job.client, None)

    def take(self, most: Callable[[Job], int]) -> list[Share]:
        """The images to draw next as one batch, taken out of the queue; [] where none wait.

        The client whose turn it is decides on the settings. Its jobs of these settings and those of the others share
        the batch evenly.
        :param most: how many images a batch like the job's may have.
        """
        if not self._clients:
            return []
        client = next(iter(self._clients))
        first = self._clients[client][0]
        room, taken = most(first), OrderedDict[Job, list[int]]()
        waiting = {name: [job for job in jobs if job.group == first.group] for name, jobs in self._clients.items()}
        while room and (sharing := [jobs for jobs in waiting.values() if jobs]):
            share = max(1, room // len(sharing))
            for jobs in sharing:
                count = min(share, room)
                while count and jobs:
                    numbers = jobs[0].todo[:count]
                    del jobs[0].todo[:count]
                    taken.setdefault(jobs[0], []).extend(numbers)
                    count, room = count - len(numbers), room - len(numbers)
                    if not jobs[0].todo:
                        jobs.pop(0)
        self._clients.move_to_end(client)
        for job in taken:
            if not job.todo:
                self.remove(job)
        return [(job, tuple(numbers)) for job, numbers in taken.items()]
