"""``shlock demo``: worker processes hash the files of a folder into a shared table while a chaos process kills them.

The files are items of a Queue; their contents come through a Channel from one process that reads them, which is killed
as well; the results are gathered in a Block, and added to the table under one lock, in steps that a kill tears apart. With
``shlock.Lock`` the next worker is told and repairs the table, and in the end nothing is lost and nothing counted twice; with
``multiprocessing.Lock`` everything hangs at the first worker that dies inside.

    workers.py  take, hash, commit, acknowledge
    stream.py   the contents on their way to the workers
    table.py    the shared table, its undo journal, and the heir's recovery
    gathered.py the results in a Block
    chaos.py    the killer
    job.py      the parent: supervises, judges
    folder.py   the files and their digests
    report.py   the words at the end
"""

from .folder import DemoError, standard_library
from .job import Outcome, Settings, SignalledError, run
from .report import report

__all__ = ["DemoError", "Outcome", "Settings", "SignalledError", "report", "run", "standard_library"]
