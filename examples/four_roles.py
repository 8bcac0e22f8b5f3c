"""A privileged process owns a socket; a user process reads what arrives, and answers, in memory that they share.

    network -> privileged producer -> [receive buffer] -> user consumer
    network <- privileged consumer <- [send buffer]    <- user producer

What arrives goes from the kernel straight into the receive buffer, and the user process reads it there: nothing is copied in
between.  Each buffer has a lock control block of its own, which outlives whoever is killed while holding it.
"""

import multiprocessing
import queue
import socket
import struct
import threading

import shlock

ADDRESS = struct.Struct("!4sH")  # in front of every message: where it came from, and where the answer goes
STOP = b""


def privileged_producer(sock, channel):
    while True:
        reservation = channel.reserve(ADDRESS.size + 65_535)
        with reservation as view:
            length, (host, port) = sock.recvfrom_into(view[ADDRESS.size :])  # from the kernel into shared memory
            ADDRESS.pack_into(view, 0, socket.inet_aton(host), port)
            reservation.truncate(ADDRESS.size + length)
        if length == 0:
            return


def privileged_consumer(sock, channel):
    while True:
        with channel.peek() as view:
            host, port = ADDRESS.unpack_from(view)
            if len(view) == ADDRESS.size:
                return
            sock.sendto(view[ADDRESS.size :], (socket.inet_ntoa(host), port))  # from shared memory to the kernel


def user_consumer(channel, answers):
    while True:
        with channel.peek() as view:  # read-only, where the kernel has put it
            address, length = bytes(view[: ADDRESS.size]), len(view) - ADDRESS.size
            answers.put((address, b"%d bytes, sum %d" % (length, sum(view[ADDRESS.size :])) if length else STOP))
        if not length:
            return


def user_producer(channel, answers):
    while True:
        address, answer = answers.get()
        with channel.reserve(len(address) + len(answer)) as view:
            view[: len(address)] = address
            view[len(address) :] = answer
        if answer == STOP:
            return


def run_both(*roles):
    threads = [threading.Thread(target=role, args=arguments) for role, *arguments in roles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def privileged_process(sock, channel):
    run_both((privileged_producer, sock, channel), (privileged_consumer, sock, channel))


def user_process(channel):
    answers = queue.SimpleQueue()
    run_both((user_consumer, channel, answers), (user_producer, channel, answers))


if __name__ == "__main__":
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 0))
    user_end = shlock.Channel(size=1 << 20)
    privileged_end = user_end.other_end()
    processes = [
        multiprocessing.Process(target=privileged_process, args=(server, privileged_end)),
        multiprocessing.Process(target=user_process, args=(user_end,)),
    ]
    for process in processes:
        process.start()

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:  # somebody in the network
        client.settimeout(30)
        client.connect(server.getsockname())
        for data in (b"hello", bytes(range(256)) * 100, b"\xff" * 60_000):
            client.send(data)
            print("answer:", client.recv(1000).decode())
        client.send(STOP)
    for process in processes:
        process.join()
    print("exit codes:", [process.exitcode for process in processes])
