"""CPython's own tests of multiprocessing, on `shlock.get_context("spawn")`."""

import cpython_support

cpython_support.load(globals(), "spawn")
