"""Workers that are killed in the middle of a job: the job comes back to the queue, and every one of them is done."""

import os
import random
import signal
import time

from shlock import JoinableQueue, Queue, get_context

JOBS, WORKERS, DEATHS = 40, 3, 10


def work(jobs, results):
    while True:
        job = jobs.take()
        with job as number:  # leaving the block says that it is done; an exception or a death puts it back
            time.sleep(random.random() / 100)
            results.put((number, number**2, job.deliveries))


if __name__ == "__main__":
    jobs, results = JoinableQueue(max_deliveries=20), Queue()
    jobs.put_many(range(JOBS))

    def start():
        worker = get_context("fork").Process(target=work, args=(jobs, results), daemon=True)
        worker.start()
        return worker

    workers = [start() for _ in range(WORKERS)]
    for _ in range(DEATHS):
        time.sleep(0.02)
        victim = random.randrange(WORKERS)
        os.kill(workers[victim].pid, signal.SIGKILL)  # as the OOM killer would do it
        workers[victim] = start()
    jobs.join()

    done = {}
    while not results.empty():
        number, square, deliveries = results.get()
        done[number] = square, max(deliveries, done.get(number, (0, 0))[1])
    assert done == {number: (number**2, done[number][1]) for number in range(JOBS)}
    again = sum(deliveries > 1 for _, deliveries in done.values())
    print(f"{len(done)} of {JOBS} jobs done; {DEATHS} workers were killed, and {again} jobs were begun again")
    print("given up:", jobs.dead_letters.qsize())
