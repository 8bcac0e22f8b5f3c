/*
 * The biased path of a lock: B1-B6, V0-V2 and R1' of shlock/_bias.py, around a lock that is otherwise ordinary.
 *
 * W                   FREE | HELD owner | BIASED slot, generation | REVOKING slot, generation | REVOKED owner
 * claim, H            of each slot: who has claimed it; OUTSIDE, INSIDE, SHUT
 * door, slot          of each process: the generation of the bias whose door it has (0: none), and the slot of that
 * inside              of each process: how many got in by the door
 * leaver, granter     of each process: whether one of its threads gives the bias back, or is between R1' and the door
 * buffer              of each thread: what it has stored and nobody else sees yet, in order
 *
 * Plain stores go through the buffer: the data that the lock guards, and H := OUTSIDE of R1'.  A compare-exchange drains the
 * buffer of its thread.  Where WEAK is 0, B1 and B3 do so, too: they are locked instructions.  Where it is 1, B3 is a release
 * and no more: its store stands in the buffer behind the data, and so may come after the look at W (B4).  Membarrier (V1)
 * drains all buffers, one after the other.  B1 needs no buffer on any processor: it and V1 are compare-exchanges of the same
 * word, so only one of them finds it OUTSIDE.
 *
 * There is one membarrier only, before the revoker's compare-exchange of H.  None is needed after it: whoever finds H OUTSIDE
 * there reads what B3 has stored by a release, and so sees what was stored before it (B3_RELAXED is the mutation).
 *
 * Threads of one process (SIBLINGS) have the interpreter's lock, which goes to another thread only when a call has returned:
 * also between B1 and the count, between B3 and B4, and between R1' and the door.  The buffers do not know of it.
 *
 * Processes die before any step, with all their threads.  Sleeping is left out (lock.pml has it): a thread that finds the lock
 * held waits until W is something else, as if it never missed a wake-up.  A bias is granted, or not, at any release.
 *
 * X1  At most one thread is inside.
 * X2  Whoever is inside sees what the last one inside has stored.
 * X3  A death inside is told to the next one.
 * X4  Nobody waits for ever (an end state in which somebody waits is SPIN's to find).
 * V1, V3 where a thread leaves by the door: it still is this process's own, and says INSIDE.  Mutations have to do without
 *     this, so that X1 to X4 are what refutes them.
 */

#ifndef THREADS
#define THREADS 2
#endif
#ifndef SIBLINGS
#define SIBLINGS 0          /* 1: threads 0 and 1 belong to one process. 2: thread 2 does, too */
#endif
#ifndef SLOTS
#define SLOTS 1
#endif
#ifndef ROUNDS
#define ROUNDS 2
#endif
#ifndef CRASHES
#define CRASHES 0           /* of processes */
#endif
#ifndef WEAK
#define WEAK 0
#endif

#define NONE                    0
#define NO_MEMBARRIER           1
#define B3_RELAXED              2    /* B3 may pass the stores of the data */
#define LOOK_FIRST              3    /* B4 before B3 */
#define B4_SKIPPED              4    /* a release does not look whether the bias still stands */
#define NO_GENERATION           5    /* V0 and V2 look at the slot only */
#define B6_LEAVES_IT            6    /* the owner does not go on with a revocation that it finds */
#define SLOT_SHARED             7    /* a living process's slot may be claimed */
#define SHUT_NOT_ATOMIC         8    /* V1 looks at H, and changes nothing */
#define SHUT_LOOKS_INSIDE       9    /* V1 makes H INSIDE */
#define TWO_LEAVERS            10    /* B6 without a look whether another thread does it */
#define V2_AS_HELD             11    /* a hold that was found at V2 looks like any other */
#define GRANT_WITH_DOOR        12    /* R1' although there is a door */
#define GRANT_WITH_LEAVER      13    /* R1' while another thread is at B6 */
#define FIRST_REVOKES          14    /* who finds REVOKING leaves it to the first one */
#define H_NOT_OPENED           15    /* R1' takes over the H of the dead */
#define DEAD_IS_FREE           16    /* V2 takes the hold of the dead for none */
#define RELEASES_WITHOUT_SHUT  17    /* B6 without B5 */
#define B5_STORES              18    /* H := SHUT, whatever it is */
#define GRANTS_AT_ONCE         19    /* R1' although another thread is between R1' and the door */
#define KEEPS_CLAIM            20    /* no slot is ever given back: not needed for safety, only for others to have a turn */
#ifndef MUTATION
#define MUTATION NONE
#endif
#define IS(mutation) (MUTATION == mutation)

#define FREE     0
#define HELD     1
#define BIASED   2
#define REVOKING 3
#define REVOKED  4

#define OUTSIDE  0
#define INSIDE   1
#define SHUT     2

#define NOBODY   15

#define PROCESS(t) (SIBLINGS && (t) <= SIBLINGS -> 0 : (t))

/* Where another thread of this process may go on.  Alone in a process there is none, and only others see what is done. */
#if SIBLINGS
#define SWITCH }; atomic {
#else
#define SWITCH
#endif

byte kind = FREE, who, number;          /* W: what it is, whom or which slot it names, generation */
byte claim[SLOTS] = NOBODY;
byte H[SLOTS];
byte D;                                 /* the data that the lock guards */
byte generation;

byte door[THREADS], slot[THREADS];
byte inside[THREADS];
bool leaver[THREADS], granter[THREADS];
bool dead[THREADS];

chan buffer[THREADS] = [3] of { byte }; /* the slot whose H becomes OUTSIDE, or 16 + data */

/* Ghosts. */
byte count, crashes, within;
bool in[THREADS];
bool untold;

#define NAMES_SLOT (kind == BIASED || kind == REVOKING)
#define GONE       ((kind == HELD || kind == REVOKED) && dead[who])
#define IS_OURS    ((kind == HELD || kind == REVOKED) && who == p)      /* else somebody has released what we hold */

inline apply(x) {
    if
    :: x >= 16 -> D = x - 16
    :: else -> H[x] = OUTSIDE
    fi
}

inline drain(t) {
    do
    :: nempty(buffer[t]) -> buffer[t] ? value; apply(value)
    :: empty(buffer[t]) -> break
    od;
    value = 0
}

inline membarrier() {
    atomic { drain(0) };
    atomic { drain(1 % THREADS) };
    atomic { drain(2 % THREADS) }
}

inline set_word(a, b, c) { kind = a; who = b; number = c }

inline enter() {
    within++;
    in[me] = true;
    assert(within == 1);                /* X1 */
    assert(!untold || told);            /* X3 */
    if :: told -> untold = false :: else fi;
    assert(D == count);                 /* X2 */
    told = false
}

inline write() {
    atomic {
        count = (count + 1) % 4;
        buffer[me] ! 16 + count
    }
}

inline exit() { within--; in[me] = false }

#define SAME (kind == k && who == w && (number == n || IS(NO_GENERATION)))

/* V0 to V2 for what W was when it was read into k, w and n, with or without taking it. */
inline revoke(take) {
    atomic {
        if
        :: k == BIASED -> drain(me); if :: SAME -> kind = REVOKING; k = REVOKING :: else -> k = FREE fi      /* V0 */
        :: else
        fi
    };
    if
    :: k == REVOKING ->
        if :: WEAK && !IS(NO_MEMBARRIER) -> membarrier() :: else fi;                                          /* V1 */
        atomic {
            drain(me);
            h = H[w];
            if
            :: h == OUTSIDE -> h = SHUT; H[w] = (IS(SHUT_NOT_ATOMIC) -> OUTSIDE : (IS(SHUT_LOOKS_INSIDE) -> INSIDE : SHUT))
            :: else
            fi
        };
        if :: h == INSIDE -> o = claim[w] :: else -> o = NOBODY fi;
        atomic {
            drain(me);
            if
            :: o != NOBODY && !(IS(DEAD_IS_FREE) && dead[o]) ->                                               /* V2 */
                if :: SAME -> set_word((IS(V2_AS_HELD) -> HELD : REVOKED), o, 0) :: else fi
            :: else ->
                if
                :: SAME && take -> set_word(HELD, p, 0); got = true; enter()
                :: SAME && !take -> set_word(FREE, 0, 0)
                :: else
                fi
            fi;
            k = 0; w = 0; n = 0; h = 0; o = 0
        }
    :: else -> atomic { k = 0; w = 0; n = 0 }
    fi
}

#define OURS   (kind == REVOKED && who == p || IS(V2_AS_HELD) && kind == HELD && who == p)
#define OF_IT  (NAMES_SLOT && who == s && number == d && !(IS(B6_LEAVES_IT) && kind == REVOKING))

/* B5 and B6, as far as they are due.  d: the bias that is given back, 0: there is nothing to do. */
inline finish() {
    atomic {
        d = door[p]; s = slot[p];
        SWITCH
        if
        :: d == 0 || H[s] == SHUT || IS(RELEASES_WITHOUT_SHUT)
        :: else ->
            if
            :: kind == BIASED && who == s && number == door[p] -> d = 0
            :: else ->
                drain(me);
                if
                :: H[s] == INSIDE && !IS(B5_STORES) -> d = 0
                :: else -> H[s] = SHUT                                                                        /* B5 */
                fi
            fi
        fi;
        SWITCH
        if
        :: d == 0
        :: d != 0 && (door[p] == d || IS(TWO_LEAVERS)) -> leaver[p] = true; door[p] = 0                       /* B6 */
        :: d != 0 && !(door[p] == d || IS(TWO_LEAVERS)) -> d = 0
        fi
    };
    do
    :: d == 0 -> break
    :: atomic { d != 0 && OF_IT -> k = kind; w = who; n = number } revoke(false)
    :: atomic { d != 0 && !OF_IT && OURS -> drain(me); set_word(FREE, 0, 0); break }
    :: atomic { d != 0 && !OF_IT && !OURS -> break }
    od;
    atomic {
        if
        :: d != 0 ->
            drain(me);
            if :: !IS(KEEPS_CLAIM) && claim[s] == p -> claim[s] = NOBODY :: else fi
        :: else
        fi;
        SWITCH
        if :: d != 0 -> leaver[p] = false :: else fi;
        d = 0; s = 0
    }
}

#define NO_DOOR   (door[p] == 0 || IS(GRANT_WITH_DOOR))
#define NO_OTHER  ((!leaver[p] || IS(GRANT_WITH_LEAVER)) && (!granter[p] || IS(GRANTS_AT_ONCE)))
#define MAY_CLAIM (claim[s] == NOBODY || claim[s] != p && dead[claim[s]] || IS(SLOT_SHARED) || IS(KEEPS_CLAIM) && claim[s] == p)

proctype Thread(byte me) {
    byte p = PROCESS(me), rounds, value, k, w, n, o, h, s, d;
    bool got, told, looked;

    {
        do
        :: atomic { rounds < ROUNDS -> rounds++; got = false }
again:      if
            :: atomic {
                door[p] != 0 ->
                    drain(me);
                    if
                    :: H[slot[p]] == OUTSIDE -> H[slot[p]] = INSIDE; got = true; enter()                      /* B1 */
                    :: else
                    fi;
                    SWITCH
                    if :: got -> inside[p]++ :: else fi
                }
                if
                :: got
                :: !got -> finish(); if :: door[p] == 0 -> goto again :: else fi
                fi
            :: door[p] == 0
            fi;
            do
            :: got -> break
            :: atomic { !got && kind == FREE -> drain(me); set_word(HELD, p, 0); got = true; enter() }        /* A1 */
            :: atomic { !got && (kind == BIASED || kind == REVOKING && !IS(FIRST_REVOKES)) -> k = kind; w = who; n = number }
                revoke(true)
            :: atomic { !got && GONE -> drain(me); set_word(HELD, p, 0); got = true; told = true; enter() }   /* poll */
            od;
            write();
            if
            :: atomic {
                inside[p] != 0 ->
#if IS(LOOK_FIRST)
                    looked = kind == BIASED && who == slot[p]                                                 /* B4 */
                }
                atomic {
#endif
                    exit();
                    inside[p]--;                                                                              /* B2 */
#if IS(NONE)
                    assert(H[slot[p]] == INSIDE && claim[slot[p]] == p);                                      /* V1, V3 */
#endif
                    if
                    :: WEAK && IS(B3_RELAXED) -> buffer[me] !! slot[p]
                    :: WEAK && !IS(B3_RELAXED) -> buffer[me] ! slot[p]
                    :: !WEAK -> drain(me); H[slot[p]] = OUTSIDE                                               /* B3 */
                    fi;
                    got = false
                }
#if !IS(LOOK_FIRST)
                looked = kind == BIASED && who == slot[p] || IS(B4_SKIPPED)                                   /* B4 */
#endif
                if
                :: atomic { looked -> looked = false }
                :: !looked -> finish()
                fi
            :: atomic {
                inside[p] == 0 && kind == HELD && NO_DOOR && NO_OTHER ->                                      /* R1' */
                    granter[p] = true; got = false;
                    s = 0;
                    do
                    :: s < SLOTS && !MAY_CLAIM -> s++
                    :: else -> break
                    od;
                    if :: s < SLOTS -> drain(me); claim[s] = p :: else fi
                }
                if
                :: s < SLOTS ->
                    if :: !IS(H_NOT_OPENED) -> buffer[me] ! s :: else fi;
                    atomic {
                        drain(me);
                        generation++;
                        d = generation;
                        exit();
                        assert(IS_OURS);
                        set_word(BIASED, s, d);
                        SWITCH
                        slot[p] = s; door[p] = d; inside[p] = 0; granter[p] = false;
                        s = 0; d = 0
                    }
                :: else -> atomic { granter[p] = false; s = 0; drain(me); exit(); set_word(FREE, 0, 0) }
                fi
            :: inside[p] == 0 ->                                                                              /* R1, R2 */
                do
                :: atomic { NAMES_SLOT -> k = kind; w = who; n = number } revoke(false)
                :: atomic { !NAMES_SLOT -> assert(IS_OURS); drain(me); exit(); set_word(FREE, 0, 0); got = false; break }
                od
            fi
        :: rounds == ROUNDS -> break
        od
    } unless {
        atomic {
            dead[p] ->
                rounds = 0; k = 0; w = 0; n = 0; o = 0; h = 0; s = 0; d = 0;
                got = false; told = false; looked = false
        }
    }
}

inline stop(t) {
    drain(t);
    if :: in[t] -> in[t] = false; within--; untold = true :: else fi
}

proctype Death() {
    byte value, t;
end:
    do
    :: atomic {
        crashes < CRASHES ->
            crashes++;
            if
            :: t = 0
            :: THREADS > 1 && PROCESS(1) == 1 -> t = 1
            :: THREADS > 2 && PROCESS(2) == 2 -> t = 2
            fi;
            dead[t] = true;
            if :: PROCESS(0) == t -> stop(0) :: else fi;
            if :: THREADS > 1 && PROCESS(1) == t -> stop(1 % THREADS) :: else fi;
            if :: THREADS > 2 && PROCESS(2) == t -> stop(2 % THREADS) :: else fi;
            t = 0
        }
    od
}

/* A store leaves its buffer at any time. */
proctype Buffers() {
    byte value;
end:
    do
    :: atomic { nempty(buffer[0]) -> buffer[0] ? value; apply(value); value = 0 }
    :: atomic { nempty(buffer[1]) -> buffer[1] ? value; apply(value); value = 0 }
    :: atomic { THREADS > 2 && nempty(buffer[2 % THREADS]) -> buffer[2 % THREADS] ? value; apply(value); value = 0 }
    od
}

init {
    atomic {
        byte t = 0;
        do
        :: t < THREADS -> run Thread(t); t++
        :: t == THREADS -> break
        od;
        run Buffers();
        run Death()
    }
}
