/*
 * The other words on the parking place that need no owner: Semaphore and Event.
 *
 * V, Semaphore        value | PARKED
 * V, Event            SET | generation | PARKED     the generation counts the times that SET was set
 * S, tokens           as in lock.pml, with one key and one spot for each thread; scans are one step
 *
 * Semaphore, acquire  A1, A2: CAS(value > 0: value - 1, PARKED kept)
 *                     A4 publish, A5: value > 0: CAS(value - 1, PARKED set) -> A7; else CAS(w | PARKED) -> A6
 *                     A7, with the permit, and A8, without: S := IDLE by exchange, and only then look at V:
 *                     value > 0: unpark_one; else CAS(w | PARKED).  A lock's owner may swallow a wake-up, because its own
 *                     release makes another; a permit's may never release, and may have swallowed those of two releases.
 * Semaphore, release  CAS(value + 1); PARKED was set: unpark_one; none found: CAS(this very word, without PARKED)
 * Event, wait         SET: done; A4; A5: SET: done; else CAS(w | PARKED), the generation is kept; A6; woken: SET or
 *                     another generation: done; A8: S := IDLE
 * Event, set          CAS(SET, generation + 1, PARKED cleared); PARKED was set: unpark_all
 * Event, clear        CAS(without SET)
 *
 * I1  Somebody asleep implies that there is nothing to wait for yet and PARKED is set, or that a wake-up is under way.
 *     (Until somebody dies.  Then: a poll finds what there is.)
 * I2  Semaphore: no more are inside than there were permits.
 *
 * A compare-exchange loop is one step, as in lock.pml, and a poll that would change nothing is left out.
 */

#ifndef EVENT
#define EVENT 0             /* 0: Semaphore; 1: Event, set and cleared by the last thread, waited for by the others */
#endif
#ifndef THREADS
#define THREADS 3
#endif
#ifndef PERMITS
#define PERMITS 1
#endif
#ifndef ROUNDS
#define ROUNDS 0            /* 0: any number */
#endif
#ifndef CRASHES
#define CRASHES 0           /* deaths, anywhere but with a permit: nobody can know that a plain permit has an owner */
#endif
#ifndef POLL
#define POLL 0
#endif
#ifndef WITHDRAW
#define WITHDRAW 0
#endif
#ifndef SKIP
#define SKIP 0              /* 1: a release wakes nobody while some spot is NOTIFIED */
#endif

#define NONE                  0
#define A7_KEEPS_WAKEUP       1    /* a waiter that takes a permit does not look whether more are left */
#define A8_KEEPS_WAKEUP       4
#define NO_GENERATION         5    /* a woken waiter looks at SET only */
#define SET_STORES            6    /* set forgets whether PARKED was there when it wrote: it looks first, then stores */
#define UNPARK_ONLY_ONE       7    /* set wakes one waiter */
#define POLL_LOOKS_AT_S_ONLY  8    /* a poll does not look at V */
#define A7_LOOKS_FIRST        9    /* it looks at V before it sets S to IDLE */
#define A8_SKIPS_PARKED      11    /* the same in A8 */
#ifndef MUTATION
#define MUTATION NONE
#endif
#define IS(mutation) (MUTATION == mutation)

#if EVENT
#define SET         1
#define PARKED      8
#define GENERATION(v) (((v) >> 1) & 3)
#define READY(v)    ((v) & SET)
#define READY_SINCE(v) (((v) & SET) || (GENERATION(v) != generation[me] && !IS(NO_GENERATION)))
#else
#define PARKED      8
#define READY(v)    (((v) & 7) > 0)
#define READY_SINCE(v) READY(v)
#endif

#define IDLE     0
#define WAITING  1
#define NOTIFIED 2
#define NOBODY   255

byte V;
byte S[THREADS];
byte tokens[THREADS];
byte generation[THREADS];

/* Ghosts. */
#define OUT   0
#define LOOK  1
#define SLEEP 2
#define WAKE  3
byte stage[THREADS];
byte posting[THREADS];
byte inside, crashes;

#define IS_NOTIFIED(i) (S[i] == NOTIFIED)
#define IS_WAITING(i)  (S[i] == WAITING)
#define ACTIVE(i)      (stage[i] == LOOK || stage[i] == WAKE || (stage[i] == SLEEP && (tokens[i] || posting[i])))
#define ANY(P)         (P(0) || P(1) || (THREADS > 2 && P(2 % THREADS)) || (THREADS > 3 && P(3 % THREADS)))
#if EVENT
#define STUCK(i) (stage[i] == SLEEP && !tokens[i] && !posting[i] && ((V & SET) || GENERATION(V) != generation[i] || !(V & PARKED)))
#define LOST (ANY(STUCK) && !ANY(WAKES))
#define WAKES(i) (stage[i] == WAKE)
#else
#define STUCK(i) (stage[i] == SLEEP && !tokens[i] && !posting[i] && (READY(V) || !(V & PARKED)))
#define LOST (ANY(STUCK) && !ANY(ACTIVE))
#endif

#if CRASHES
#define MAY_DIE :: atomic { crashes < CRASHES -> crashes++; stage[me] = OUT; forget(); goto end_of_thread }
#else
#define MAY_DIE
#endif
/* Not while it holds a permit. */
#if CRASHES
#define MAY_DIE_IDLE :: atomic { crashes < CRASHES && !permit -> crashes++; stage[me] = OUT; forget(); goto end_of_thread }
#else
#define MAY_DIE_IDLE
#endif
#if WITHDRAW
#define MAY_LEAVE :: atomic { true -> stage[me] = WAKE; goto A8 }
#else
#define MAY_LEAVE
#endif

/* `picked` says that the exchange was made and the post was not. */
inline forget() {
    if :: picked -> posting[chosen]-- :: else fi;
    chosen = NOBODY; picked = 0; all = 0; clear = 0; w = 0
}

inline choose() {
    if
    :: SKIP && !all && ANY(IS_NOTIFIED) -> goto passed
    :: else
    fi;
    if
    :: S[0] == WAITING -> chosen = 0
    :: S[1] == WAITING -> chosen = 1
    :: THREADS > 2 && S[2 % THREADS] == WAITING -> chosen = 2
    :: THREADS > 3 && S[3 % THREADS] == WAITING -> chosen = 3
    :: !ANY(IS_WAITING) -> chosen = NOBODY
    fi
}

proctype Thread(byte me) {
    byte chosen = NOBODY, w, round;
    bit picked, all, clear, permit;

next_round:
    atomic {
        if
        :: ROUNDS && round == ROUNDS -> goto end_of_thread
        :: ROUNDS && round < ROUNDS -> round++
        :: !ROUNDS
        :: !ROUNDS && (!EVENT || me != THREADS - 1) -> goto end_of_thread
        fi;
#if EVENT
        if :: me == THREADS - 1 -> goto set :: else fi
#endif
    };

A1: if
    MAY_DIE
    :: atomic { READY(V) -> if :: !EVENT -> V--; goto got :: else -> goto next_round fi }
    :: atomic { true }
    fi;
A4: if
    MAY_DIE
    :: atomic { true -> S[me] = WAITING; stage[me] = LOOK }
    fi;
    if MAY_DIE MAY_LEAVE :: atomic { true -> generation[me] = (EVENT -> (V >> 1) & 3 : 0) } fi;
A5: if
    MAY_DIE
    MAY_LEAVE
    :: atomic {
        READY_SINCE(V) ->
        if
        :: EVENT -> goto A7
        :: !EVENT -> V = (V - 1) | PARKED
        fi;
        inside++; assert(inside <= PERMITS);
        permit = 1;
        if
        :: IS(A7_LOOKS_FIRST) && READY(V) -> stage[me] = WAKE
        :: IS(A7_LOOKS_FIRST) && !READY(V) -> stage[me] = OUT
        :: IS(A7_KEEPS_WAKEUP) -> stage[me] = OUT
        :: else
        fi
    }
    :: atomic { !READY_SINCE(V) -> V = V | PARKED; stage[me] = SLEEP; if :: goto A6 :: WITHDRAW -> goto A6T fi }
    fi;
A7: if
    MAY_DIE_IDLE
    :: atomic {
        true ->
        S[me] = IDLE; generation[me] = 0;
        if
        :: EVENT -> stage[me] = OUT; goto next_round
        :: !EVENT && stage[me] == WAKE -> goto unpark
        :: !EVENT && stage[me] == OUT -> goto critical
        :: else
        fi
    }
    fi;
    atomic {
        if
        :: READY(V) -> stage[me] = WAKE; goto unpark
        :: else
        fi;
        V = V | PARKED;
        stage[me] = OUT;
        goto critical
    };

#define TOKEN  :: atomic { tokens[me] > 0 -> tokens[me]--; stage[me] = LOOK; goto woken }
#define POLLED :: atomic { POLL && ((READY_SINCE(V) && !IS(POLL_LOOKS_AT_S_ONLY)) || S[me] == NOTIFIED) -> stage[me] = LOOK; goto woken }
A6: if
    MAY_DIE
    TOKEN
    POLLED
    fi;
A6T: if
    MAY_DIE
    MAY_LEAVE
    TOKEN
    POLLED
    fi;
woken:
    if
    MAY_DIE
    MAY_LEAVE
    :: atomic { true -> S[me] = WAITING; goto A5 }
    fi;

A8: if
    MAY_DIE
    :: atomic { true -> S[me] = IDLE; generation[me] = 0 }
    fi;
    if
    MAY_DIE
    :: atomic { !EVENT && READY(V) && !IS(A8_KEEPS_WAKEUP) -> goto unpark }
    :: atomic {
        EVENT || !READY(V) || IS(A8_KEEPS_WAKEUP) ->
        if
        :: !EVENT && !IS(A8_SKIPS_PARKED) -> V = V | PARKED
        :: else
        fi;
        stage[me] = OUT;
        goto next_round
    }
    fi;

got:
    atomic { inside++; assert(inside <= PERMITS); permit = 1 };
critical:
    atomic { true -> inside--; permit = 0 };
#if !EVENT
release:
    atomic {
        V = V + 1;
        if
        :: V & PARKED -> stage[me] = WAKE; clear = 1; w = V
        :: else -> goto next_round
        fi
    };
#endif
    goto unpark;

#if EVENT
set:
    if
    :: atomic { IS(SET_STORES) -> w = V }
    :: atomic { !IS(SET_STORES) }
    fi;
    if      /* Nobody dies here: what was never set wakes nobody. */
    :: atomic {
        !(V & SET) ->
        if :: !IS(SET_STORES) -> w = V :: else fi;
        V = SET | (((GENERATION(V) + 1) % 4) << 1);
        all = !IS(UNPARK_ONLY_ONE);
        if :: w & PARKED -> stage[me] = WAKE; w = 0; goto unpark :: else -> w = 0; all = 0; goto clear_it fi
    }
    fi;
clear_it:
    if
    :: atomic { ROUNDS && round == ROUNDS -> goto end_of_thread }      /* the last one stays set */
    :: atomic { !ROUNDS -> goto end_of_thread }
    :: atomic { (!ROUNDS || round < ROUNDS) -> V = V & ~SET; goto next_round }
    fi;
#endif

unpark:
    if
    MAY_DIE_IDLE
    :: atomic {
        true ->
        choose();
        if
        :: chosen != NOBODY -> goto notify
        :: else
        fi
    }
    fi;
    if
    MAY_DIE_IDLE
    :: atomic {
        true ->
        if
        :: clear && V == w -> V = V & ~PARKED
        :: else
        fi;
        goto passed
    }
    fi;
notify:
    if
    MAY_DIE_IDLE
    :: atomic { S[chosen] == WAITING -> S[chosen] = NOTIFIED; posting[chosen]++; picked = 1 }
    :: atomic { S[chosen] != WAITING -> chosen = NOBODY; goto unpark }
    fi;
    if
    MAY_DIE_IDLE
    :: atomic {
        true ->
        tokens[chosen] = 1;             /* more would be stale ones, which cost an empty wake-up each */
        posting[chosen]--; picked = 0; chosen = NOBODY;
        if
        :: all -> goto unpark
        :: else -> goto passed
        fi
    }
    fi;
passed:
    atomic {
        forget();
        stage[me] = OUT;
        if
        :: permit -> goto critical
#if EVENT
        :: !permit && me == THREADS - 1 -> goto clear_it
#endif
        :: else -> goto next_round
        fi
    };
end_of_thread:
    skip
}

proctype Invariants() {
    bool I1 = true;
end:
    atomic { !crashes && LOST -> assert(!I1) }
}

init {
    atomic {
        V = (EVENT -> 0 : PERMITS);
        run Thread(0); run Thread(1);
#if THREADS > 2
        run Thread(2);
#endif
#if THREADS > 3
        run Thread(3);
#endif
        run Invariants()
    }
}
