"""CPython's own tests of multiprocessing, on `shlock.get_context("fork")`."""

import cpython_support

cpython_support.load(globals(), "fork")
