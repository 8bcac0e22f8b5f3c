"""One writer, four readers, frames of 4 MB: the writer is killed in mid-frame, again and again; no reader sees half of one."""

import multiprocessing
import random
import time

import shlock

try:
    import numpy
except ImportError:
    numpy = None

WIDTH, HEIGHT, KILLS = 1280, 800, 20


def paint(block):
    """Frame after frame, each of one colour, in eight stripes: time enough to be killed in between."""
    while True:
        with block.write(fresh=True) as view:
            colour = (block.version + 1) % 256
            if numpy is not None:
                frame = numpy.frombuffer(view, dtype="u4").reshape(HEIGHT, WIDTH)
                for stripe in numpy.split(frame, 8):
                    stripe[:] = colour * 0x01010101
            else:
                step = len(view) // 8
                for start in range(0, len(view), step):
                    view[start : start + step] = bytes([colour]) * step


def watch(block, over, frames, torn):
    """Look at each new frame; count the looks, and the frames of more than one colour."""
    version = 0
    while not over.is_set():
        version = block.wait_for_change(version, timeout=0.1) or version
        with block.read() as view:  # waits for nobody, dead or alive
            frames.value += 1
            if numpy is not None:
                frame = numpy.frombuffer(view, dtype="u4")
                torn.value += bool((frame != frame[0]).any())
            else:
                torn.value += bytes(view) != bytes([view[0]]) * len(view)


if __name__ == "__main__":
    block = shlock.Block(size=4 * WIDTH * HEIGHT)
    over = shlock.Event()
    counts = [(multiprocessing.Value("Q", lock=False), multiprocessing.Value("Q", lock=False)) for _ in range(4)]
    readers = [multiprocessing.Process(target=watch, args=(block, over, *both)) for both in counts]
    for reader in readers:
        reader.start()

    killed_inside = 0
    for _ in range(KILLS):
        before = block.version
        writer = multiprocessing.Process(target=paint, args=(block,))
        writer.start()
        while block.version == before:
            time.sleep(0.001)
        time.sleep(random.random() * 0.03)
        writer.kill()
        writer.join()
        killed_inside += block.owner is not None  # until the next writer comes, the lock is still the dead one's
    over.set()
    for reader in readers:
        reader.join()

    print(f"{KILLS} writers killed, {killed_inside} of them in mid-frame; {block.version} frames committed")
    print(f"{sum(frames.value for frames, _ in counts)} looked at, {sum(torn.value for _, torn in counts)} of them torn")
