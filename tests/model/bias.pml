/*
 * The biased path of a lock: B0-B6, V0-V2 and R1' of shlock/_bias.py, around a lock that is otherwise ordinary.
 *
 * W                   FREE | HELD owner | BIASED slot, generation | REVOKING slot, generation | REVOKED owner
 * claim, H            of each slot: who has claimed it, and whether that one is in
 * seat, slot          of each process: AWAY, 0, a thread, LEAVING
 * hq, dq              store buffers of each thread: what it has stored by plain stores and nobody else sees yet.  In order,
 *                     for H and data together; with WEAK data has a buffer of its own, so stores may pass stores
 *
 * A compare-exchange drains the buffer of its thread, a membarrier those of all.  So does the interpreter's lock, for threads of
 * one process.  Sleeping is left out (lock.pml has it): a
 * thread that finds the lock held waits until W is something else, as if it never missed a wake-up.  A bias is granted, or
 * not, at any release.
 *
 * X1  At most one thread is inside.
 * X2  Whoever is inside sees what the last one inside has stored.
 * X3  A death inside is told to the next one.
 * X4  Nobody waits for ever (an end state in which somebody waits is SPIN's to find).
 */

#ifndef THREADS
#define THREADS 2
#endif
#ifndef SIBLINGS
#define SIBLINGS 0          /* 1: threads 0 and 1 belong to one process */
#endif
#ifndef SLOTS
#define SLOTS 1
#endif
#ifndef ROUNDS
#define ROUNDS 2
#endif
#ifndef CRASHES
#define CRASHES 0           /* of processes of one thread */
#endif
#ifndef WEAK
#define WEAK 0
#endif

#define NONE                0
#define NO_MEMBARRIER       1
#define ONE_MEMBARRIER      2    /* none after H was found to be 0 */
#define NO_GENERATION       3    /* V2 looks at the slot only */
#define B3_WITHOUT_B6       4
#define B5_SKIPPED          5    /* a release does not look whether the bias still stands */
#define B2_SKIPPED          6
#define SLOT_SHARED         7    /* a living process's slot may be claimed */
#define GRANT_WHILE_SEATED  8
#define V2_AS_HELD          9    /* a hold that was found at V2 looks like any other */
#define FIRST_REVOKES      10    /* who finds REVOKING leaves it to the first one */
#define B6_LEAVES_IT       11    /* the owner does not go on with a revocation that it finds */
#define KEEPS_SEAT_FREE    12    /* the seat is free again during B6 */
#define KEEPS_CLAIM        13    /* no slot is ever given back: not needed for safety, only for others to have a turn */
#define H_NOT_CLEARED      14    /* R1' takes over the H of the dead */
#define DEAD_IS_FREE       15    /* V2 takes the hold of the dead for none */
#ifndef MUTATION
#define MUTATION NONE
#endif
#define IS(mutation) (MUTATION == mutation)

#define FREE     0
#define HELD     1
#define BIASED   2
#define REVOKING 3
#define REVOKED  4

#define AWAY     20
#define LEAVING  21
#define NOBODY   15

#define PROCESS(t) (SIBLINGS && (t) == 1 -> 0 : (t))

byte kind = FREE, who, number;          /* W: what it is, whom or which slot it names, generation */
byte claim[SLOTS] = NOBODY;
bool H[SLOTS];
byte D;                                 /* the data that the lock guards */
byte seat[THREADS] = AWAY, slot[THREADS], mine[THREADS];
bool dead[THREADS];
byte generation;

chan hq[THREADS] = [4] of { byte };     /* slot * 2 + H, or 16 + data */
chan dq[THREADS] = [2] of { byte };
byte pending[THREADS];                  /* data that this thread has stored and others may not see */
byte latest[THREADS];

/* Ghosts. */
byte inside, count, crashes;
bool untold;

#define ANYTHING  (1)
#define NAMES_SLOT (kind == BIASED || kind == REVOKING)
#define GONE      ((kind == HELD || kind == REVOKED) && dead[who])

inline apply(t, x) {
    if
    :: x >= 16 -> D = x - 16; pending[t]--
    :: x < 16 -> H[x / 2] = x % 2
    fi
}

inline drain(t) {
    do
    :: nempty(hq[t]) -> hq[t] ? value; apply(t, value)
    :: empty(hq[t]) && nempty(dq[t]) -> dq[t] ? value; apply(t, value)
    :: empty(hq[t]) && empty(dq[t]) -> break
    od;
    value = 0
}

inline fence() {                        /* membarrier */
    d_step {
        drain(0);
        drain(1 % THREADS);
        drain(2 % THREADS)
    }
}

inline set_H(h) {
    atomic { hq[me] ! slot[p] * 2 + h }
}

inline enter() {
    inside++;
    in = true;
    assert(inside == 1);                /* X1 */
    assert(!untold || told);            /* X3 */
    if :: told -> untold = false :: else fi;
    assert((pending[me] -> latest[me] : D) == count);   /* X2 */
    told = false
}

inline exit() {
    atomic {
        count = (count + 1) % 4;
        latest[me] = count;
        pending[me]++;
        if
        :: WEAK -> dq[me] ! 16 + count
        :: !WEAK -> hq[me] ! 16 + count
        fi;
        inside--;
        in = false
    }
}

#define MAY_DIE :: crashes < CRASHES -> goto die
#define SAME (kind == k && who == w && (number == n || IS(NO_GENERATION)))

/* V0 to V2 for W as it is, with or without taking it. */
inline revoke(take) {
    atomic { k = kind; w = who; n = number }
    if
    :: k == BIASED ->
        atomic { drain(me); if :: SAME -> kind = REVOKING; k = REVOKING :: else -> k = FREE fi }      /* V0 */
    :: else
    fi;
    if
    :: k == REVOKING ->
        if MAY_DIE :: ANYTHING fi;
        if :: !IS(NO_MEMBARRIER) -> fence() :: else fi;                                                /* V1 */
        atomic { h = H[w]; o = claim[w] }
        if MAY_DIE :: ANYTHING fi;
        if
        :: h && !(IS(DEAD_IS_FREE) && dead[o]) ->                                                      /* V2 */
            atomic {
                drain(me);
                if
                :: SAME -> assert(o != NOBODY); kind = (IS(V2_AS_HELD) -> HELD : REVOKED); who = o; number = 0
                :: else
                fi
            }
        :: else ->
            if :: WEAK && !IS(ONE_MEMBARRIER) -> fence() :: else fi;
            atomic {
                drain(me);
                if
                :: SAME && take -> kind = HELD; who = p; number = 0; got = true
                :: SAME && !take -> kind = FREE; who = 0; number = 0
                :: else
                fi
            }
        fi
    :: else
    fi;
    k = 0; w = 0; n = 0; h = false; o = 0
}

#define OURS (kind == REVOKED && who == p || IS(V2_AS_HELD) && kind == HELD && who == p)

inline leave() {                                                                                       /* B6 */
    do
    :: kind == REVOKING && who == slot[p] && number == mine[p] && !IS(B6_LEAVES_IT) -> revoke(false)
    :: atomic { OURS -> drain(me); kind = FREE; who = 0; number = 0; break }
    :: atomic { !(kind == REVOKING && who == slot[p] && number == mine[p] && !IS(B6_LEAVES_IT)) && !OURS -> break }
    od;
    atomic {
        drain(me);
        if :: !IS(KEEPS_CLAIM) -> claim[slot[p]] = NOBODY :: else fi;
        seat[p] = AWAY
    }
}

proctype Thread(byte me) {
    byte p = PROCESS(me), rounds, value, k, w, n, o, s;
    bool got, in, told, biased, h;

    do
    :: rounds < ROUNDS ->
        rounds++;
        got = false; biased = false;
        if
        :: atomic { seat[p] == 0 -> seat[p] = me + 1; if :: SIBLINGS -> drain(p) :: else fi; if :: SIBLINGS -> drain(1) :: else fi }   /* B0 */
            set_H(1);                                                                                  /* B1 */
            if MAY_DIE :: ANYTHING fi;
            if
            :: atomic { kind == BIASED && who == slot[p] || IS(B2_SKIPPED) -> biased = true; got = true; enter() }   /* B2 */
            :: atomic { !(kind == BIASED && who == slot[p] || IS(B2_SKIPPED)) -> skip }
                set_H(0);                                                                              /* B3 */
                if
                :: IS(B3_WITHOUT_B6) -> seat[p] = AWAY
                :: else -> seat[p] = (IS(KEEPS_SEAT_FREE) -> 0 : LEAVING); leave()
                fi
            fi
        :: seat[p] != 0
        fi;
        do
        :: got -> break
        :: !got && kind == FREE -> atomic { drain(me); if :: kind == FREE -> kind = HELD; who = p; number = 0; got = true; enter() :: else fi }
        :: !got && (kind == BIASED || kind == REVOKING && !IS(FIRST_REVOKES)) ->
            if MAY_DIE :: ANYTHING fi;
            revoke(true);
            if :: got -> atomic { enter() } :: else fi
        :: atomic { !got && GONE -> drain(me); kind = HELD; who = p; number = 0; got = true; told = true; enter() }    /* poll */
        od;
        if MAY_DIE :: ANYTHING fi;
        exit();
        if
        :: biased ->
            set_H(0);                                                                                  /* B4 */
            if MAY_DIE :: ANYTHING fi;
            if
            :: atomic { kind == BIASED && who == slot[p] || IS(B5_SKIPPED) -> seat[p] = 0 }            /* B5 */
            :: atomic { !(kind == BIASED && who == slot[p] || IS(B5_SKIPPED)) -> seat[p] = (IS(KEEPS_SEAT_FREE) -> 0 : LEAVING) }
                leave()
            fi
        :: !biased && (seat[p] == AWAY || IS(GRANT_WHILE_SEATED)) ->                                   /* R1' */
            s = 0;
            do
            :: s < SLOTS && (claim[s] == NOBODY || claim[s] != p && dead[claim[s]] || IS(SLOT_SHARED) || IS(KEEPS_CLAIM) && claim[s] == p) ->
                atomic { drain(me); claim[s] = p; if :: !IS(H_NOT_CLEARED) -> H[s] = 0 :: else fi }
                if MAY_DIE :: ANYTHING fi;
                atomic {
                    drain(me);
                    generation = (generation + 1) % 16;
                    assert(kind == HELD && who == p || IS(V2_AS_HELD));
                    kind = BIASED; who = s; number = generation;
                    slot[p] = s; mine[p] = generation; seat[p] = 0
                }
                break
            :: s < SLOTS && !(claim[s] == NOBODY || claim[s] != p && dead[claim[s]] || IS(SLOT_SHARED) || IS(KEEPS_CLAIM) && claim[s] == p) -> s++
            :: s == SLOTS -> atomic { drain(me); kind = FREE; who = 0; number = 0 } break
            od;
            s = 0
        :: atomic { !biased -> drain(me); kind = FREE; who = 0; number = 0 }                           /* R1 */
        fi
    :: rounds == ROUNDS -> goto over
    od;
die:
    atomic {
        crashes++;
        drain(me);
        dead[p] = true;
        if
        :: in -> untold = true; inside--
        :: else
        fi
    };
over:
    skip
}

/* A store leaves its buffer at any time, also after the death of who made it. */
proctype Buffers() {
    byte value;
end:
    do
    :: atomic { nempty(hq[0]) -> hq[0] ? value; apply(0, value); value = 0 }
    :: atomic { nempty(dq[0]) -> dq[0] ? value; apply(0, value); value = 0 }
    :: atomic { nempty(hq[1]) -> hq[1] ? value; apply(1, value); value = 0 }
    :: atomic { nempty(dq[1]) -> dq[1] ? value; apply(1, value); value = 0 }
    :: atomic { THREADS > 2 && nempty(hq[2 % THREADS]) -> hq[2 % THREADS] ? value; apply(2 % THREADS, value); value = 0 }
    :: atomic { THREADS > 2 && nempty(dq[2 % THREADS]) -> dq[2 % THREADS] ? value; apply(2 % THREADS, value); value = 0 }
    od
}

init {
    atomic {
        byte t = 0;
        do
        :: t < THREADS -> run Thread(t); t++
        :: t == THREADS -> break
        od;
        run Buffers()
    }
}
