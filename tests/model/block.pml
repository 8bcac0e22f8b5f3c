/*
 * The content of a Block: writers and editors under a lock, readers without one, and who waits for a version.
 *
 * The lock is one word here: taken when it is free or when its owner is dead (lock.pml shows that this can be done).
 * A copy of the content is two cells, so that it can be torn; each attempt to write has a value of its own.
 *
 * CURRENT       number and copy of the last committed version
 * VERSIONS[i]   number of the version that copy i holds, or UNFINISHED and the number of the one that is to be
 * EDITOR        who edits the current copy in place, or did so last
 *
 * write   W1 VERSIONS[i] := UNFINISHED, v+1; i any copy but the current one.  W2 the cells.  W3 still ours?  VERSIONS[i] := v+1.
 *         W4 CURRENT := v+1, i.  W5 release; somebody parked: wake him
 * edit    D1 EDITOR := me.  D2 VERSIONS[i] := UNFINISHED, v+1; i the current copy.  D3 the cells.  CURRENT := v+1, i.
 *         D4 VERSIONS[i] := v+1.  D5 as W5
 * read    G1 CURRENT, VERSIONS[i].  G2 the cells.  G3 VERSIONS[i] again.  G4 UNFINISHED: is EDITOR inside, and alive?  Not:
 *         the cells; VERSIONS[i], then CURRENT and EDITOR again: told
 * watch   V1 publish the spot.  V2 PARKED := 1.  V3 look at CURRENT.  V4 sleep
 *
 * Stores wait in a buffer: they come out in their order (BUFFER=1, x86-64) or in any (BUFFER=2), where FENCES=1 waits at
 * the fences of the code.  Releasing the lock empties the buffer, and so does the death of the process, before it is known.
 * A reader's loads are done in their order, or, with LOADS=2, in any: only that of CURRENT comes first, for where the
 * others look depends on it.
 *
 * B1  who holds the lock finds in VERSIONS of the current copy the number in CURRENT, or UNFINISHED
 * B2  what a reader returns is whole, and is what was committed under that number; numbers do not fall
 * B3  no number is committed twice
 * B4  who is told of a dead editor: there was one, and he had begun; but who is named may be somebody whose repair failed.
 *     An heir to a half-changed content is told
 * B5  nobody sleeps when there is a version that he has not seen (until somebody dies)
 */

#ifndef COPIES
#define COPIES 3
#endif
#ifndef WRITERS
#define WRITERS 2
#endif
#ifndef ROUNDS
#define ROUNDS 2            /* of each writer */
#endif
#ifndef ROUNDS_2
#define ROUNDS_2 ROUNDS     /* of the second one */
#endif
#ifndef READERS
#define READERS 1
#endif
#ifndef READS
#define READS 2             /* of each reader */
#endif
#ifndef WATCHERS
#define WATCHERS 0
#endif
#ifndef EDITS
#define EDITS 0             /* 1: each round is a write or an edit; 2: an edit */
#endif
#ifndef CRASHES
#define CRASHES 0           /* writers that may die, at any step */
#endif
#ifndef EXCEPTIONS
#define EXCEPTIONS 0        /* 1: a write may end unpublished, and a repair uncommitted */
#endif
#ifndef LOSE
#define LOSE 0              /* 1: the lock may be passed on before W3 although its owner lives */
#endif
#ifndef BUFFER
#define BUFFER 0            /* 0: none; 1: stores in their order; 2: in any */
#endif
#ifndef FENCES
#define FENCES 1
#endif
#ifndef LOADS
#define LOADS 1             /* 2: a reader's loads in any order */
#endif

#define NONE            0
#define NO_MARK         1   /* a copy is overwritten without having been marked */
#define CURRENT_FIRST   2   /* CURRENT is stored before the cells */
#define NO_RECHECK      3   /* a reader doesn't look at VERSIONS at the end */
#define NO_FIRST_LOOK   4   /* nor at the beginning: harmless, the last look sees it all */
#define EDIT_UNMARKED   5   /* an editor doesn't mark the copy */
#define EDITOR_LATE     6   /* EDITOR is stored after the mark */
#define NO_W3           7   /* what was written is published although the lock was passed on */
#define SPARE_CURRENT   8   /* a writer may take the current copy */
#define SEAL_FIRST      9   /* D4 before CURRENT */
#define NO_V3          10   /* who marks PARKED doesn't look again */
#define WAKE_FIRST     11   /* W5 looks at PARKED before it releases */
#define MARK_AFTER     12   /* the first cell is written before the mark */
#define NO_LAST_LOOK   13   /* a reader tells of a dead editor without looking whether the copy is still unfinished */
#define BARE_MARK      15   /* the mark doesn't say which version is to be */
#define LAST_LOOK_BACKWARDS 16   /* a reader looks at CURRENT and EDITOR before VERSIONS */
#define EDITOR_IGNORED 14   /* a reader takes every unfinished copy for one of a dead editor */
#ifndef MUTATION
#define MUTATION NONE
#endif
#define IS(mutation) (MUTATION == mutation)

#define UNFINISHED 128      /* and the number that is to be */
#define IS_UNFINISHED(v) ((v & UNFINISHED) != 0)
#define THREADS (WRITERS + 1)

/* Stores that wait, one bit for each of a writer's. */
#define EDITED  1
#define MARK    2
#define CELL_A  4
#define CELL_B  8
#define SEAL    16
#define CURRENT 32

byte number, current;           /* CURRENT */
byte versions[COPIES];
byte a[COPIES], b[COPIES];      /* the cells */
byte editor;
byte W, token;
bool parked, waiting, tokens;   /* CHANGES, the watcher's spot, its semaphore */

byte pending[THREADS];
byte copy[THREADS], next[THREADS], value[THREADS];
bool editing[THREADS];

/* Ghosts. */
bool dead[THREADS];
byte committed[WRITERS * ROUNDS + 1];
byte crashes, seen_by_watcher;
bool half, begun, asleep, lost, failed;

inline perform(w, what) {
    if
    :: what == EDITED -> editor = w
    :: what == MARK -> versions[copy[w]] = UNFINISHED | (IS(BARE_MARK) -> 0 : next[w])
    :: what == CELL_A -> a[copy[w]] = value[w]
    :: what == CELL_B -> b[copy[w]] = value[w]
    :: what == SEAL ->
        versions[copy[w]] = next[w];
        if :: editing[w] -> begun = false :: else fi
    :: what == CURRENT ->
        assert(next[w] == number + 1);                                          /* B3 */
        number = next[w]; current = copy[w]; committed[number] = value[w];
        half = false;
        if :: !editing[w] -> begun = false :: else fi
    fi
}

#if BUFFER
#define STORE(what) pending[me] = pending[me] | what
#define EMPTY(w)    (pending[w] == 0)
#define MAY_LEAVE_1(w, what) (editing[w] && !IS(SEAL_FIRST) \
    -> (what == SEAL -> pending[w] == SEAL : (what == CURRENT -> (pending[w] & 15) == 0 : (pending[w] & (what - 1)) == 0)) \
    : (IS(CURRENT_FIRST) && what < CURRENT && what > MARK -> !(pending[w] & CURRENT) && (pending[w] & (what - 1)) == 0 \
    : (IS(MARK_AFTER) && what == MARK -> !(pending[w] & CELL_A) : (IS(MARK_AFTER) && what == CELL_A -> 1 : \
      (pending[w] & (what - 1)) == 0))))
#if BUFFER == 1
#define MAY_LEAVE(w, what) (pending[w] & what && MAY_LEAVE_1(w, what))
#else
#define MAY_LEAVE(w, what) (pending[w] & what && !(what == SEAL && pending[w] & MARK))
#endif
#define LEAVES(w, what) :: atomic { MAY_LEAVE(w, what) -> pending[w] = pending[w] & ~what; perform(w, what) }

active proctype Buffer() {
end:
    do
    LEAVES(1, EDITED) LEAVES(1, MARK) LEAVES(1, CELL_A) LEAVES(1, CELL_B) LEAVES(1, SEAL) LEAVES(1, CURRENT)
#if WRITERS > 1
    LEAVES(2, EDITED) LEAVES(2, MARK) LEAVES(2, CELL_A) LEAVES(2, CELL_B) LEAVES(2, SEAL) LEAVES(2, CURRENT)
#endif
    od
}
#else
#define STORE(what) perform(me, what)
#define EMPTY(w)    1
#endif

#define MAY_DIE :: atomic { crashes < CRASHES -> crashes++; dead[me] = true; goto end_of_thread }
#define STEP(what)  if :: atomic { true -> STORE(what) } MAY_DIE fi
#if FENCES
#define FENCE       (BUFFER < 2 || EMPTY(me))
#else
#define FENCE       true
#endif

proctype Writer(byte me) {
    byte round, mine, before;
    bool found, wakes;

    do
    :: round == (me == 2 -> ROUNDS_2 : ROUNDS) -> break
    :: else ->
        atomic {
            (W == 0 || (dead[W] && EMPTY(W))) -> W = me; token++; mine = token;
            found = IS_UNFINISHED(versions[current]);
            assert(found || versions[current] == number);                           /* B1 */
            assert(!half || found);                                                 /* B4 */
            assert(!found || begun);
            round++;
            next[me] = number + 1;
            value[me] = (me - 1) * ROUNDS + round;
            wakes = false
        }
        if
        :: EDITS < 2 -> goto write
        :: EDITS -> goto edit
        MAY_DIE
        fi;

write:  atomic {
            editing[me] = false;
            if
            :: current != 0 || IS(SPARE_CURRENT) -> copy[me] = 0
            :: COPIES > 1 && (current != 1 || IS(SPARE_CURRENT)) -> copy[me] = 1
            :: COPIES > 2 && (current != 2 || IS(SPARE_CURRENT)) -> copy[me] = 2 % COPIES
            fi
        }
        if :: IS(MARK_AFTER) -> STEP(CELL_A) :: else fi;
        if :: !IS(NO_MARK) -> STEP(MARK) :: else fi;                                /* W1 */
        FENCE;
        if :: IS(CURRENT_FIRST) -> STEP(CURRENT) :: else fi;
        if :: !IS(MARK_AFTER) -> STEP(CELL_A) :: else fi;                           /* W2 */
        STEP(CELL_B);
        if
        :: true
        :: EXCEPTIONS -> goto release
        :: atomic { LOSE && EMPTY(me) -> lost = true; W = 0; token++ }
        fi;
        if
        :: (W != me || token != mine) && !IS(NO_W3) -> EMPTY(me); goto next_round   /* W3 */
        :: else
        fi;
        FENCE;
        STEP(SEAL);
        FENCE;
        if :: !IS(CURRENT_FIRST) -> STEP(CURRENT) :: else fi;                       /* W4 */
        wakes = true;
        goto release;

edit:   atomic { editing[me] = true; copy[me] = current; before = editor };
        if :: !IS(EDITOR_LATE) -> STEP(EDITED) :: else fi;                          /* D1 */
        FENCE;
        if
        :: atomic { true -> begun = true; if :: !IS(EDIT_UNMARKED) -> STORE(MARK) :: else fi }   /* D2 */
        MAY_DIE
        fi;
        FENCE;
        if :: IS(EDITOR_LATE) -> STEP(EDITED) :: else fi;
        if :: atomic { true -> half = true; STORE(CELL_A) } MAY_DIE fi;             /* D3 */
        STEP(CELL_B);
        if
        :: true
        :: EXCEPTIONS && found && BUFFER == 0 -> failed = true; editor = before; goto release      /* D5, of a repair that failed */
        fi;
        FENCE;
        if :: IS(SEAL_FIRST) -> STEP(SEAL); FENCE; STEP(CURRENT) :: else -> STEP(CURRENT); FENCE; STEP(SEAL) fi;   /* D4 */
        wakes = true;

release:
        if :: IS(WAKE_FIRST) -> wakes = wakes && parked :: else fi;
        if
        :: atomic { EMPTY(me) -> if :: W == me -> W = 0 :: else fi }                /* W5: an exchange */
        MAY_DIE
        fi;
        if
        :: atomic { wakes && parked -> parked = false }
            if :: atomic { waiting -> waiting = false; tokens = true } :: !waiting MAY_DIE fi
        :: !(wakes && parked)
        MAY_DIE
        fi;
next_round:
        EMPTY(me)
    od;
end_of_thread:
    skip
}

#define SAME  (number == n && current == i && editor == e)
#define INSIDE (W == f && f && !(dead[f] && EMPTY(f)) && !IS(EDITOR_IGNORED))

proctype Reader() {
    byte reads, last, n, i, first, x, y, second, e, f, loaded;

    do
    :: reads == READS -> break
    :: else ->
again:  atomic { n = number; i = current; loaded = 0 };                             /* G1 */
#if LOADS == 1
        first = versions[i];
        x = a[i];                                                                   /* G2 */
        y = b[i];
        second = versions[i];                                                       /* G3 */
#else
        do
        :: atomic { !(loaded & 1) -> first = versions[i]; loaded = loaded | 1 }
        :: atomic { !(loaded & 2) -> x = a[i]; loaded = loaded | 2 }
        :: atomic { !(loaded & 4) -> y = b[i]; loaded = loaded | 4 }
        :: atomic { !(loaded & 8) -> second = versions[i]; loaded = loaded | 8 }
        :: loaded == 15 -> break
        od;
#endif
        if
        :: (first == n || IS(NO_FIRST_LOOK)) && (second == n || IS(NO_RECHECK)) -> goto good
        :: else
        fi;
        if
        :: number != n || current != i || first == n -> goto again                  /* G4 */
        :: else
        fi;
        assert(IS_UNFINISHED(first) || LOADS == 2);                                  /* B1 */
        e = editor;
        f = editor;
        if
        :: INSIDE -> !(versions[i] == first && INSIDE && SAME); goto again
        :: else
        fi;
        x = a[i];
        if :: IS(LAST_LOOK_BACKWARDS) && !SAME -> goto again :: else fi;
        if :: versions[i] != first && !IS(NO_LAST_LOOK) -> goto again :: else fi;
        atomic {
            if
            :: !SAME && !IS(NO_LAST_LOOK) && !IS(LAST_LOOK_BACKWARDS) -> goto again
            :: else
            fi;
            assert(begun && (dead[e] || lost || failed));                                         /* B4 */
            reads++
        };
        goto next_read;
good:   atomic {
            assert(x == y && x == committed[n] && n >= last);                       /* B2 */
            last = n;
            reads++
        };
next_read:
        skip
    od
}

proctype Watcher() {
    byte n;
    do
    :: atomic { n = number; seen_by_watcher = n };
        do
        :: waiting = true;                                                          /* V1 */
            parked = true;                                                          /* V2: an exchange */
            if
            :: number != n && !IS(NO_V3) -> waiting = false; tokens = false; break  /* V3 */
            :: else
            fi;
            asleep = true;
end:        atomic { (tokens || (crashes && number != n)) -> tokens = false; asleep = false };   /* V4; after a death, polls */
            if :: number != n -> break :: else fi
        od
    od
}

#if WATCHERS
active proctype Monitor() {
end:
    timeout -> assert(!asleep || seen_by_watcher == number)                         /* B5 */
}
#endif

init {
    atomic {
        byte w = 1;
        do :: w <= WRITERS -> run Writer(w); w++ :: else -> break od;
        w = 0;
        do :: w < READERS -> run Reader(); w++ :: else -> break od;
        w = 0;
        do :: w < WATCHERS -> run Watcher(); w++ :: else -> break od
    }
}
