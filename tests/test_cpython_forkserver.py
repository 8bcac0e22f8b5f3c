"""CPython's own tests of multiprocessing, on `shlock.get_context("forkserver")`."""

import cpython_support

cpython_support.load(globals(), "forkserver")
