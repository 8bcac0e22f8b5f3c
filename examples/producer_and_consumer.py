"""One process sends, others receive.  A consumer that is killed in the middle of a message gives it to the next one."""

import multiprocessing
import os
import signal

import shlock

MESSAGES = 1000


def produce(channel):
    for number in range(MESSAGES):
        channel.send_bytes(b"%d " % number + b"x" * 5000)  # waits while the channel is full


def consume(channel, seen, dies_at):
    while seen.value < MESSAGES:
        with channel.peek() as view:  # the message where it lies; it is taken when this block ends, and not before
            number = int(bytes(view[:6]).split()[0])
            assert number == seen.value, "none is lost, and none comes twice"
            if number == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)  # as the OOM killer would do it
            seen.value += 1


if __name__ == "__main__":
    channel = shlock.Channel(size=100_000)  # bytes; any number of producers and consumers at each end
    seen = multiprocessing.Value("q", 0, lock=False)
    producer = multiprocessing.Process(target=produce, args=(channel.other_end(),))
    producer.start()
    for dies_at in (300, 600, None):
        consumer = multiprocessing.Process(target=consume, args=(channel, seen, dies_at))
        consumer.start()
        consumer.join()
        print(f"a consumer ended with {consumer.exitcode} after message {seen.value}")
    producer.join()
