/*
 * Many readers or one writer: shlock/_readers.py, on the lock and the parking place of lock.pml.
 *
 * W               owner | PARKED | DIED: the lock of the writers, taken and released as in lock.pml
 * G               DRAINING | SUSPECT
 * C, one a reader 0, READING, IN_LINE: its record
 * S, tokens       as in lock.pml; three keys: who waits for W, readers, and the writer that waits for them; scans are one step
 *
 * read    Q1  W free: CAS(C: 0 -> READING).   Q2  W free: in; else CAS(C: READING -> IN_LINE), L2 -> Q4
 *         Q3  W owned: CAS(C: 0 -> IN_LINE)
 *         Q4  publish.  Q5  C is READING: let in.  W free: CAS(C: IN_LINE -> READING): in, without a further look.
 *             W owned: CAS(w -> w|PARKED), always.  Q6 sleep.  Q7 S := IDLE
 *         Q8  withdraw: S := IDLE, C := 0 by CAS, L2
 *         L1  CAS(C: READING -> 0).   L2  DRAINING: wake the writer that waits
 * write   A1 to A8 of lock.pml: W.  In:
 *         W1  the one before died: G says that he was DRAINING, and not SUSPECT: he was not inside, DIED := 0
 *         W2  every C once: IN_LINE -> READING; then wake the readers
 *         W3  no C is READING -> W5.  G := DRAINING, SUSPECT if DIED
 *         W4  publish; no C is READING -> W5; sleep
 *         W5  S := IDLE, G := 0: inside
 *         R1, R2 of lock.pml, and where PARKED was set: wake all readers, then a writer
 *
 * Q-D     a reader's poll: W's owner is dead: CAS(W -> DIED, or 0 if he was DRAINING and not SUSPECT), wake as a release
 *
 * I1  No lost wake-up: without deaths nobody polls, and who sleeps for ever is a dead end.
 * X1  A writer is inside alone; readers never with a writer.
 * X2  While a reader is IN_LINE, at most one writer gets in.
 * X3  A death inside is told to each reader and to each writer that comes, until a writer has left; a death outside to nobody.
 *     In between (W taken, no reader found) it may be told.
 *
 * With LEASES readers have deadlines, as in shlock/_leased_readers.py, and there is a supervisor:
 * D, one a reader: its ledger says that it is inside.  TAKEN, one a reader: with C READING only
 *
 *         E2  D := 1.   E3  C READING: inside; with TAKEN: CAS(C -> READING).  C 0: D := 0, again from Q1
 *         X1  D := 0.   Then L1, L2.   Q2 is an exchange that may fail: C is looked at again
 * T       C READING, D 0, for as long as it likes: T1  TAKEN.   T3  D 1: CAS(C -> READING).  D 0: CAS(C -> 0), then as L2
 * K       C READING, D 1: kills.  It is dead a while later; then, and not before: C := 0, as L2
 *
 * Y1  X1 as ever; and a writer gets in although a reader stops for ever at any step at which it has a record.
 * That stores and the supervisor's look at D are ordered is for enforcement.pml, and so are the supervisor's own deaths.
 */

#ifndef WRITERS
#define WRITERS 2
#endif
#ifndef READERS
#define READERS 2
#endif
#ifndef ROUNDS
#define ROUNDS 0            /* 0: any number */
#endif
#ifndef CRASHES
#define CRASHES 0           /* before any step; then there are polls */
#endif
#ifndef WITHDRAW
#define WITHDRAW 0          /* 1: who waits may give up before any step, readers; 2: writers; 3: both */
#endif

#ifndef LEASES
#define LEASES 0
#endif
#ifndef STALLS
#define STALLS LEASES       /* so many readers may be stopped for ever, where they have a record */
#endif
#ifndef TAKES
#define TAKES LEASES        /* so many times T thinks that of one that is only slow, or K that it overran */
#endif

#define NONE               0
#define Q2_NO_LOOK         1    /* a reader does not look at W again */
#define Q2_WAKES_NOBODY    2    /* who steps back into the line does not wake the writer that saw it reading */
#define Q5_LOOKS_AGAIN     3    /* a reader of the line looks at W again when it has gone in, and steps back */
#define Q5_NO_PARKED       4
#define Q5_LOOKS_FIRST     5    /* it looks at W before it publishes S, and marks nothing afterwards */
#define Q8_WAKES_NOBODY    6
#define L2_WAKES_NOBODY    7
#define W2_NOBODY          8    /* a writer lets nobody in */
#define W2_WAKES_NOBODY    9
#define W_SCANS_FIRST     10    /* a writer looks at the records before it has W */
#define W4_LATE_DRAINING  11    /* DRAINING is set after the look at the records */
#define W5_LATE           12    /* DRAINING is cleared at the end */
#define NO_SUSPECT        13
#define NO_W1             14
#define R3_ONLY_WRITER    15
#define A8_ONLY_WRITER    16    /* a writer that took W and gives up wakes no readers */
#define NO_REAP           17
#define NO_QD             18    /* readers do not look for a dead writer */
#define Q2_BELIEVES       19    /* a reader whose step back fails takes it that it was let in */
#define E3_SKIPPED        20
#define T1_FREES          21    /* no TAKEN: C := 0 after the look at D */
#define T3_NO_LOOK        22    /* T3 does not look at D once more */
#define T3_WAKES_NOBODY   23
#define K_CLEARS_EARLY    24    /* C := 0 before it is dead */
#define D_WAKES_NOBODY    25
#define T_NEVER           26
#ifndef MUTATION
#define MUTATION NONE
#endif
#define IS(mutation) (MUTATION == mutation)

#define THREADS (WRITERS + READERS)
#define IDLE     0
#define WAITING  1
#define NOTIFIED 2
#define READING  1
#define IN_LINE  2
#define KEY_W    0
#define KEY_R    1
#define KEY_D    2

byte owner;                 /* 0: free; else thread + 1 */
bit PARKED, DIED, DRAINING, SUSPECT;
byte C[READERS];
byte S[THREADS];
byte key[THREADS];
bit tokens[THREADS];
bit dead[THREADS];
#if LEASES
bit D[READERS], TAKEN[READERS], stopped[READERS], killed[READERS];
byte stalls, takes;
#define UNMARK TAKEN[r] = 0
#define MAY_STOP :: atomic { stalls < STALLS && !killed[r] -> stalls++; stopped[r] = 1; goto end_stopped }
#define MAY_BE_KILLED :: atomic { killed[r] -> die(); goto end_of_thread }
#define LOST :: atomic { C[r] == 0 -> S[me] = IDLE; D[r] = 0; w = 0; goto Q1 }
#else
#define UNMARK skip
#define MAY_STOP
#define MAY_BE_KILLED
#define LOST
#endif

/* Ghosts. */
byte reading, writing, crashes;
byte passed[READERS];
byte dirty;                 /* 0: whole; 1: a writer died inside; 2: W was taken, nothing is known */

#define CELL(i) C[i]
#define ANY_READING (C[0] == READING || (READERS > 1 && C[1 % READERS] == READING) || (READERS > 2 && C[2 % READERS] == READING))
#define IS_DEAD_READING(i) (C[i] == READING && dead[WRITERS + i])
#define OWNER_DEAD (owner && dead[owner - 1])
#define NOT_INSIDE (DRAINING && !SUSPECT)
#define WAITS(i, k) (S[i] == WAITING && key[i] == k)
#define CAN_POLL (crashes > 0)

#if CRASHES
#define MAY_DIE :: atomic { crashes < CRASHES -> crashes++; die(); goto end_of_thread }
#else
#define MAY_DIE
#endif
#if WITHDRAW & 1
#define READER_LEAVES :: atomic { true -> goto Q8 }
#else
#define READER_LEAVES
#endif
#if WITHDRAW & 2
#define WRITER_LEAVES :: atomic { true -> goto A8 }
#define DRAINER_LEAVES :: atomic { true -> goto W8 }
#else
#define WRITER_LEAVES
#define DRAINER_LEAVES
#endif

inline die() {
    dead[me] = 1;
    if
    :: me < WRITERS && inside -> writing--; dirty = 1
    :: me < WRITERS && !inside && owner == me + 1 && !DRAINING && !dirty -> dirty = 2
    :: me >= WRITERS && inside -> reading--
    :: else
    fi;
    chosen = 0; many = 0; inside = 0; w = 0; was_parked = 0; i = 0
}

inline entered(r) {
    if
    :: C[r] == IN_LINE && !dead[WRITERS + r] -> passed[r]++; assert(passed[r] <= 1)
    :: else
    fi
}

/* S of one that waits with this key -> NOTIFIED; `chosen` is it, plus one; 0: none. */
inline choose(k) {
    chosen = 0;
    if
    :: WAITS(0, k) -> chosen = 1
    :: WAITS(1, k) -> chosen = 2
    :: THREADS > 2 && WAITS(2 % THREADS, k) -> chosen = 3
    :: THREADS > 3 && WAITS(3 % THREADS, k) -> chosen = 4
    :: !WAITS(0, k) && !WAITS(1, k) && !(THREADS > 2 && WAITS(2 % THREADS, k)) && !(THREADS > 3 && WAITS(3 % THREADS, k))
    fi;
    if :: chosen -> S[chosen - 1] = NOTIFIED :: else fi
}

inline see_line() {
    many = 0;
    if :: WAITS(WRITERS, KEY_R) -> many = many | 1 :: else fi;
    if :: READERS > 1 && WAITS((WRITERS + 1) % THREADS, KEY_R) -> many = many | 2 :: else fi;
    if :: READERS > 2 && WAITS((WRITERS + 2) % THREADS, KEY_R) -> many = many | 4 :: else fi
}

/* The next one of `many`, if it still waits. */
inline choose_of_line() {
    chosen = 0;
    if
    :: many & 1 -> many = many & ~1; chosen = WRITERS + 1
    :: !(many & 1) && (many & 2) -> many = many & ~2; chosen = WRITERS + 2
    :: !(many & 3) && (many & 4) -> many = many & ~4; chosen = WRITERS + 3
    :: else
    fi;
    if
    :: chosen && WAITS((chosen - 1), KEY_R) -> S[chosen - 1] = NOTIFIED
    :: chosen && !WAITS((chosen - 1), KEY_R) -> chosen = 0
    :: else
    fi
}

inline renew() {
    if :: S[me] == NOTIFIED -> S[me] = WAITING :: else fi
}

proctype Reader(byte me) {
    byte chosen, many, w, i, round;
    bit inside, was_parked, told;
    byte r = me - WRITERS;

next_round:
    atomic {
        w = 0; told = 0;
        if
        :: ROUNDS && round == ROUNDS -> goto end_of_thread
        :: ROUNDS && round < ROUNDS -> round++
        :: !ROUNDS
        :: !ROUNDS -> goto end_of_thread
        fi
    };
Q1: if
    MAY_DIE
    :: atomic { !owner }
    :: atomic { owner -> goto Q3 }
    fi;
    if
    MAY_DIE
    :: atomic { true -> C[r] = READING }
    fi;
Q2: if
    MAY_DIE
    MAY_STOP
    :: atomic { !owner || IS(Q2_NO_LOOK) -> goto in }
    :: atomic { owner && !IS(Q2_NO_LOOK) }
    fi;
    if
    MAY_DIE
    MAY_STOP
    LOST
#if LEASES
    :: atomic { IS(Q2_BELIEVES) && C[r] == READING && TAKEN[r] -> goto in }
    :: atomic { C[r] == READING && !(IS(Q2_BELIEVES) && TAKEN[r]) -> C[r] = IN_LINE; UNMARK; passed[r] = 0 }
#else
    :: atomic { true -> C[r] = IN_LINE; passed[r] = 0 }
#endif
    fi;
    if
    MAY_DIE
    :: atomic { DRAINING && !IS(Q2_WAKES_NOBODY) -> choose(KEY_D) }
    :: atomic { !DRAINING || IS(Q2_WAKES_NOBODY) -> goto Q4 }
    fi;
    if
    MAY_DIE
    :: atomic { true -> if :: chosen -> tokens[chosen - 1] = 1 :: else fi; chosen = 0; goto Q4 }
    fi;
Q3: if
    MAY_DIE
    :: atomic { true -> C[r] = IN_LINE; passed[r] = 0 }
    fi;
Q4: if
    MAY_DIE
    READER_LEAVES
    :: atomic { IS(Q5_LOOKS_FIRST) -> w = owner; if :: w -> PARKED = 1 :: else fi }
    :: atomic { !IS(Q5_LOOKS_FIRST) }
    fi;
    if
    MAY_DIE
    MAY_STOP
    READER_LEAVES
    :: atomic { true -> S[me] = WAITING; key[me] = KEY_R }
    fi;
Q5: if
    MAY_DIE
    MAY_STOP
    LOST
    READER_LEAVES
    :: atomic { C[r] == READING -> goto Q7 }
    :: atomic { C[r] == IN_LINE && (IS(Q5_LOOKS_FIRST) -> w : owner) -> w = 0; if :: !IS(Q5_NO_PARKED) -> PARKED = 1 :: else fi; goto Q6 }
    :: atomic { C[r] == IN_LINE && !(IS(Q5_LOOKS_FIRST) -> w : owner) }
    fi;
    if
    MAY_DIE
    READER_LEAVES
    LOST
    :: atomic { C[r] == IN_LINE -> C[r] = READING }
    :: atomic { C[r] == READING -> goto Q7 }
    fi;
    if
    MAY_DIE
    :: atomic { IS(Q5_LOOKS_AGAIN) && owner }
    :: atomic { !IS(Q5_LOOKS_AGAIN) || !owner -> goto Q7 }
    fi;
    if
    MAY_DIE
    :: atomic { true -> C[r] = IN_LINE }
    fi;
    if
    :: atomic { DRAINING -> choose(KEY_D) }
    :: atomic { !DRAINING -> goto Q5 }
    fi;
    if
    MAY_DIE
    :: atomic { true -> if :: chosen -> tokens[chosen - 1] = 1 :: else fi; chosen = 0; goto Q5 }
    fi;
Q6: if
    MAY_DIE
    MAY_STOP
    READER_LEAVES
    :: atomic { tokens[me] -> tokens[me] = 0 }
    :: atomic { CAN_POLL && (C[r] == READING || !owner) }
    :: atomic { CAN_POLL && OWNER_DEAD && !IS(NO_QD) -> w = owner; goto QD }
    fi;
    if
    MAY_DIE
    READER_LEAVES
    :: atomic { true -> renew(); goto Q5 }
    fi;
QD: if
    MAY_DIE
    :: atomic { owner == w && w -> was_parked = NOT_INSIDE }        /* a look at G, then an exchange of W */
    :: atomic { owner != w || !w -> w = 0; goto Q5 }
    fi;
    if
    MAY_DIE
    :: atomic { owner == w && w -> owner = 0; PARKED = 0; if :: !was_parked -> DIED = 1 :: else fi; was_parked = 0 }
    :: atomic { owner != w || !w -> w = 0; was_parked = 0; goto Q5 }
    fi;
    if
    MAY_DIE
    :: atomic { true -> w = 0; see_line() }
    fi;
QD_readers:
    if
    MAY_DIE
    :: atomic { many -> choose_of_line() }
    :: atomic { !many -> choose(KEY_W); goto QD_writer }
    fi;
    if
    MAY_DIE
    :: atomic { true -> if :: chosen -> tokens[chosen - 1] = 1 :: else fi; chosen = 0; goto QD_readers }
    fi;
QD_writer:
    if
    MAY_DIE
    :: atomic { true -> if :: chosen -> tokens[chosen - 1] = 1 :: else fi; chosen = 0; renew(); goto Q5 }
    fi;

Q7: if
    MAY_DIE
    MAY_STOP
    :: atomic { true -> S[me] = IDLE }
    fi;
in:
#if LEASES
E2: if
    MAY_STOP
    :: atomic { true -> D[r] = 1 }
    fi;
E3: if
    MAY_STOP
    MAY_BE_KILLED
    :: atomic { C[r] == 0 && !IS(E3_SKIPPED) -> D[r] = 0; w = 0; goto Q1 }
    :: atomic { C[r] == READING || IS(E3_SKIPPED) -> if :: IS(E3_SKIPPED) :: else -> UNMARK fi }
    fi;
#endif
    if
    MAY_DIE
    MAY_BE_KILLED
    MAY_STOP
    :: atomic { true -> inside = 1; reading++; assert(!writing || dead[me]); passed[r] = 0; told = DIED }
    fi;
    if      /* `told`: W, then G */
    MAY_DIE
    MAY_BE_KILLED
    MAY_STOP
    :: atomic { true -> told = told && !NOT_INSIDE; assert(dirty == 2 || told == dirty); told = 0 }
    fi;
#if LEASES
X1: if
    MAY_BE_KILLED
    MAY_STOP
    :: atomic { true -> inside = 0; reading--; D[r] = 0 }
    fi;
L1: if
    MAY_BE_KILLED
    MAY_STOP
    :: atomic { C[r] == READING -> C[r] = 0; UNMARK }
    :: atomic { C[r] == 0 }
    fi;
#else
L1: if
    MAY_DIE
    :: atomic { true -> inside = 0; reading--; C[r] = 0 }
    fi;
#endif
L2: if
    MAY_DIE
    :: atomic { DRAINING && !IS(L2_WAKES_NOBODY) -> choose(KEY_D) }
    :: atomic { !DRAINING || IS(L2_WAKES_NOBODY) -> goto next_round }
    fi;
    if
    MAY_DIE
    :: atomic { true -> if :: chosen -> tokens[chosen - 1] = 1 :: else fi; chosen = 0; goto next_round }
    fi;
Q8: if
    MAY_DIE
    :: atomic { true -> S[me] = IDLE; w = 0 }
    fi;
    if
    MAY_DIE
    :: atomic { true -> C[r] = 0; UNMARK; passed[r] = 0; if :: IS(Q8_WAKES_NOBODY) -> goto next_round :: else -> goto L2 fi }
    fi;
#if LEASES
end_stopped:
    if
    MAY_BE_KILLED
    fi;
#endif
end_of_thread:
    skip
}

#if LEASES
#define SLOW(i) (stopped[i] || takes < TAKES)
#define AT_THE_DOOR(i) (C[i] == READING && !TAKEN[i] && !D[i] && !dead[WRITERS + i] && SLOW(i) && !IS(T_NEVER))
#define OVERRUNS(i) (C[i] == READING && D[i] && !killed[i] && !dead[WRITERS + i] && SLOW(i))
#define IS_DEAD(i) (C[i] != 0 && dead[WRITERS + i])
#define DECIDE(i) \
    :: atomic { (i) < READERS && AT_THE_DOOR((i) % READERS) -> r = (i) % READERS; if :: !stopped[r] -> takes++ :: else fi; goto T1 } \
    :: atomic { \
        (i) < READERS && OVERRUNS((i) % READERS) -> \
        r = (i) % READERS; \
        if :: !stopped[r] -> takes++ :: else fi; \
        killed[r] = 1; \
        if :: IS(K_CLEARS_EARLY) -> goto clear :: else -> goto end_watch fi \
    } \
    :: atomic { (i) < READERS && IS_DEAD((i) % READERS) -> r = (i) % READERS; goto clear }

proctype Supervisor() {
    byte r, chosen;
    bit d;

end_watch:
    if
    DECIDE(0)
    DECIDE(1)
    fi;
T1: atomic { true -> if :: C[r] == READING && !IS(T1_FREES) -> TAKEN[r] = 1 :: else fi; d = 0 };
    /* By now it may be inside. */
T3: atomic { true -> d = D[r] && !IS(T3_NO_LOOK) };
    atomic {
        if
        :: C[r] == READING && (TAKEN[r] || IS(T1_FREES)) && !d -> C[r] = 0; TAKEN[r] = 0; d = 0
        :: C[r] == READING && TAKEN[r] && d -> TAKEN[r] = 0; d = 0; r = 0; goto end_watch
        :: else -> d = 0; r = 0; goto end_watch
        fi;
        if
        :: DRAINING && !IS(T3_WAKES_NOBODY) -> choose(KEY_D)
        :: else -> r = 0; goto end_watch
        fi
    };
    goto post;
clear:
    atomic { true -> C[r] = 0; TAKEN[r] = 0 };
    atomic {
        if
        :: DRAINING && !IS(D_WAKES_NOBODY) -> choose(KEY_D)
        :: else -> r = 0; goto end_watch
        fi
    };
post:
    atomic { true -> if :: chosen -> tokens[chosen - 1] = 1 :: else fi; chosen = 0; r = 0; goto end_watch }
}
#endif

proctype Writer(byte me) {
    byte chosen, many, w, i, round;
    bit inside, was_parked, told, keep, found;

next_round:
    atomic {
        keep = 0;
        if
        :: ROUNDS && round == ROUNDS -> goto end_of_thread
        :: ROUNDS && round < ROUNDS -> round++
        :: !ROUNDS
        :: !ROUNDS -> goto end_of_thread
        fi
    };
    atomic { if :: IS(W_SCANS_FIRST) -> found = ANY_READING :: else fi };
A1: if
    MAY_DIE
    :: atomic { !owner -> owner = me + 1; goto W1 }
    :: atomic { owner }
    fi;
A4: if
    MAY_DIE
    :: atomic { true -> S[me] = WAITING; key[me] = KEY_W }
    fi;
A5: if
    MAY_DIE
    WRITER_LEAVES
    :: atomic { !owner -> owner = me + 1; PARKED = 1; goto A7 }
    :: atomic { owner -> PARKED = 1 }
    fi;
A6: if
    MAY_DIE
    WRITER_LEAVES
    :: atomic { tokens[me] -> tokens[me] = 0 }
    :: atomic { CAN_POLL && !owner }
    :: atomic { CAN_POLL && OWNER_DEAD -> owner = me + 1; PARKED = 1; DIED = 1; goto A7 }
    fi;
    if
    MAY_DIE
    WRITER_LEAVES
    :: atomic { true -> renew(); goto A5 }
    fi;
A7: if
    MAY_DIE
    :: atomic { true -> S[me] = IDLE }
    fi;
W1: if
    MAY_DIE
    :: atomic { true -> if :: DIED && NOT_INSIDE && !IS(NO_W1) -> DIED = 0 :: else fi; told = DIED; i = 0 }
    fi;
W2: if
    MAY_DIE
    DRAINER_LEAVES
    :: atomic { i < READERS && !IS(W2_NOBODY) -> if :: C[i] == IN_LINE -> C[i] = READING; many = 1 :: else fi; i++; goto W2 }
    :: atomic {
        i == READERS || IS(W2_NOBODY) ->
        i = 0;
        if :: many && !IS(W2_WAKES_NOBODY) -> see_line() :: else -> many = 0 fi
    }
    fi;
W2_wake:
    if
    MAY_DIE
    :: atomic { many -> choose_of_line() }
    :: atomic { !many -> goto W3 }
    fi;
    if
    MAY_DIE
    :: atomic { true -> if :: chosen -> tokens[chosen - 1] = 1 :: else fi; chosen = 0; goto W2_wake }
    fi;
W3: if      /* the records one after the other */
    MAY_DIE
    DRAINER_LEAVES
    :: atomic { IS(W_SCANS_FIRST) -> if :: found -> found = 0 :: else -> goto W5 fi }
    :: atomic { !IS(W_SCANS_FIRST) && i < READERS && C[i] != READING -> i++; goto W3 }
    :: atomic { !IS(W_SCANS_FIRST) && i < READERS && C[i] == READING -> i = 0 }
    :: atomic { !IS(W_SCANS_FIRST) && i == READERS -> i = 0; goto W5 }
    fi;
    if
    MAY_DIE
    DRAINER_LEAVES
    :: atomic { true -> if :: !IS(W4_LATE_DRAINING) -> DRAINING = 1; SUSPECT = DIED && !IS(NO_SUSPECT) :: else fi }
    fi;
    if
    MAY_DIE
    DRAINER_LEAVES
    :: atomic { true -> S[me] = WAITING; key[me] = KEY_D; i = 0 }
    fi;
W4: if
    MAY_DIE
    DRAINER_LEAVES
    :: atomic { i < READERS && C[i] != READING -> i++; goto W4 }
    :: atomic { i < READERS && C[i] == READING -> i = 0 }
    :: atomic { i == READERS -> i = 0; goto W5 }
    fi;
W4S: if
    MAY_DIE
    DRAINER_LEAVES
    :: atomic { IS(W4_LATE_DRAINING) && !DRAINING -> DRAINING = 1; SUSPECT = DIED; goto W4S }
    :: atomic { tokens[me] && (!IS(W4_LATE_DRAINING) || DRAINING) -> tokens[me] = 0 }
    :: atomic { CAN_POLL && !ANY_READING }
    :: atomic { CAN_POLL && !IS(NO_REAP) && IS_DEAD_READING(0) -> C[0] = 0 }
    :: atomic { CAN_POLL && !IS(NO_REAP) && READERS > 1 && IS_DEAD_READING(1 % READERS) -> C[1 % READERS] = 0 }
    :: atomic { CAN_POLL && !IS(NO_REAP) && READERS > 2 && IS_DEAD_READING(2 % READERS) -> C[2 % READERS] = 0 }
    fi;
    if
    MAY_DIE
    DRAINER_LEAVES
    :: atomic { true -> renew(); i = 0; goto W4 }
    fi;
W5: if
    MAY_DIE
    DRAINER_LEAVES
    :: atomic { true -> S[me] = IDLE }
    fi;
    if
    MAY_DIE
    DRAINER_LEAVES
    :: atomic { true -> if :: !IS(W5_LATE) -> DRAINING = 0; SUSPECT = 0 :: else fi }
    fi;
    if
    MAY_DIE
    :: atomic {
        true ->
        inside = 1; writing++;
        assert(writing == 1 && !reading);                   /* X1 */
        entered(0);
        if :: READERS > 1 -> entered((1 % READERS)) :: else fi;
        if :: READERS > 2 -> entered((2 % READERS)) :: else fi;
        assert(dirty == 2 || told == dirty);                /* X3 */
        told = 0
    }
    fi;
critical:
    if
    MAY_DIE
    :: atomic { true -> inside = 0; writing--; dirty = 0 }
    fi;
R2: if
    MAY_DIE
    :: atomic {
        true ->
        was_parked = PARKED || keep;
        owner = 0; PARKED = 0;
        if :: !keep -> DIED = 0 :: else fi;
        if :: IS(W5_LATE) -> DRAINING = 0; SUSPECT = 0 :: else fi;
        if :: was_parked -> was_parked = 0 :: else -> goto next_round fi
    }
    fi;
R3: if
    MAY_DIE
    :: atomic { !IS(R3_ONLY_WRITER) && !(IS(A8_ONLY_WRITER) && keep) -> see_line() }
    :: atomic { IS(R3_ONLY_WRITER) || (IS(A8_ONLY_WRITER) && keep) }
    fi;
R3_readers:
    if
    MAY_DIE
    :: atomic { many -> choose_of_line() }
    :: atomic { !many -> choose(KEY_W); goto R3_writer }
    fi;
    if
    MAY_DIE
    :: atomic { true -> if :: chosen -> tokens[chosen - 1] = 1 :: else fi; chosen = 0; goto R3_readers }
    fi;
R3_writer:
    if
    MAY_DIE
    :: atomic { true -> if :: chosen -> tokens[chosen - 1] = 1 :: else fi; chosen = 0; goto next_round }
    fi;

A8: if      /* without W */
    MAY_DIE
    :: atomic { true -> S[me] = IDLE }
    fi;
    if
    MAY_DIE
    :: atomic { owner -> PARKED = 1; goto next_round }
    :: atomic { !owner -> keep = 1; goto R3 }
    fi;
W8: if      /* with W, and not inside */
    MAY_DIE
    :: atomic { true -> S[me] = IDLE; keep = 1; many = 0; i = 0; told = 0; goto R2 }
    fi;
end_of_thread:
    skip
}

init {
    atomic {
        run Writer(0);
#if WRITERS > 1
        run Writer(1);
#endif
        run Reader(WRITERS);
#if READERS > 1
        run Reader(WRITERS + 1)
#endif
#if READERS > 2
        ; run Reader(WRITERS + 2)
#endif
#if LEASES
        ; run Supervisor()
#endif
    }
}
