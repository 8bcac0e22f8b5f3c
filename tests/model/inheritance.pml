/*
 * Priority inheritance: shlock/supervisor/inheritance.py, with what holders and waiters say (shlock/_leased.py, contract.py).
 *
 * W, one a lock           the process that has it
 * THREAD, a process       which of its threads has the seat of its contract for a lock          by the client
 * WAITS, a thread         for which lock it waits                                                by the client
 * LIFTS, a thread         a record: OWN, GIVEN, NEXT; it counts from when REC is set             by the supervisor
 * scheduled, a thread     the kernel's own: as what it runs.  1 to 4, the larger the better; the kernel has nothing else
 * rung                    somebody rang: look soon
 * armed                   the supervisor looks again in any case, INTERVAL after its last look
 *
 * holder  E0  the seat, THREAD := me.   E1 take W.   X2 W := 0.   X3 THREAD := 0, the seat.   A record in our LIFTS: ring
 * waiter  WAITS := lock, ring; again at each poll until a supervisor has heard it.   In, or giving up: WAITS := 0, ring
 * look    L1  who waits for whom: WAITS, THREAD, W, and THREAD once more
 *         L2  of all these threads and of all that are lifted: OWN, as N3 says
 *         L3  who gets what
 *         L4  no more: OWN and NEXT of the record, set it back, clear the record
 *         L5  to be lifted: a record; or of one that is lifted, OWN and NEXT.   Set it.   GIVEN := NEXT, NEXT := 0
 *         L6  somebody waits or is lifted: look again
 * hello   a client comes to the next supervisor, if it has a contract or a record in LIFTS: its records are taken over
 *
 * At rest, which is where nothing is left to be done, with threads that stopped for ever inside or wait for them:
 * N1  a thread has the best of its own priority and those of all that wait for it, also through others; so without waiters its
 *     own, and no record is left
 * N2  also when the supervisor died between any two steps
 * N3  its own is what the user made of it meanwhile
 * N6  at any time: nobody is lifted who did not hold a lock at some instant of that look
 *
 * The timer is a step that may come at any time, but only if something has changed since the last look began: another look at the
 * same things does the same.
 */

#ifndef ROUNDS
#define ROUNDS 1
#endif
#ifndef WAITERS
#define WAITERS 1           /* threads 3 and 2 want the lock of thread 1 */
#endif
#ifndef CHAIN
#define CHAIN 0             /* thread 3 wants lock B, which thread 2 has while it wants A, which thread 1 has */
#endif
#ifndef SIBLINGS
#define SIBLINGS 0          /* thread 4 is of thread 1's process, and wants the same lock */
#endif
#ifndef WITHDRAW
#define WITHDRAW 0
#endif
#ifndef CRASHES
#define CRASHES 0           /* of processes */
#endif
#ifndef SUPERVISOR_DEATHS
#define SUPERVISOR_DEATHS 0
#endif
#ifndef STALLS
#define STALLS 1            /* so many threads stop for ever inside */
#endif
#ifndef DROPS
#define DROPS 0             /* who is done gives its contract back */
#endif
#ifndef LOSSES
#define LOSSES 0            /* so many times the socket is full */
#endif
#ifndef USER
#define USER 0              /* what the user sets thread 1 to, once, at any time but between L2 and L5 of that thread */
#endif
#ifndef USER_RACES
#define USER_RACES 0        /* also between these */
#endif

/* Mutations: each must be refuted in some configuration. */
#define NONE                   0
#define LIFT_THEN_RECORD       1
#define RECORD_NOT_WHOLE       2    /* REC is set before OWN is written */
#define NO_ADOPTION            3    /* the next supervisor knows nothing of records */
#define ADOPTS_LATE            4    /* it may look before it takes them over */
#define NO_TIMER               5
#define TIMER_WHILE_WAITED     6    /* only while somebody waits, whoever is lifted.  Harmless: such a look leaves nobody lifted */
#define TIMER_WHILE_HELD       7    /* not when somebody waits for a lock that nobody with a contract has at that instant */
#define OWN_IS_WHAT_IT_HAS     8    /* when a lift changes, OWN := as what the thread runs */
#define NO_NEXT                9    /* NEXT is not written */
#define NO_N3                 10
#define WAITS_KEPT            11    /* who gives up does not take it back */
#define NOT_TRANSITIVE        12
#define THREAD_ONCE           13    /* no second look at THREAD */
#define HELLO_WITH_CONTRACTS  14    /* who has none any more does not come to the next supervisor */
#define RINGS_ONCE            15
#define CLEARED_FIRST         16    /* the record, before the thread is put back */
#define RELEASE_SILENT        17    /* a holder does not look whether it was lifted.  Harmless: the timer comes */
#ifndef MUTATION
#define MUTATION NONE
#endif
#define IS(mutation) (MUTATION == mutation)

#define A 1
#define B 2
#define THREADS 4
#define PROCESS(t) ((t) == 4 -> 1 : (t))
#define IS_THERE(t) ((t) == 1 || (t) == 3 || ((t) == 2 && (WAITERS > 1 || CHAIN)) || ((t) == 4 && SIBLINGS))
#define FIRST_LOCK(t) ((CHAIN && ((t) == 2 || (t) == 3)) -> B : A)
#define BIT(set, i) (((set) >> (i)) & 1)
#define SET(set, i) set = set | (1 << (i))
#define CLEAR(set, i) set = set & ~(1 << (i))

byte W[3];
byte THREAD[12];            /* 3 * process + lock */
#define SEAT(p, l) THREAD[3 * (p) + (l)]
byte seat[12];              /* inside the process */
byte WAITS[5];
byte REC, OWN[5], GIVEN[5], NEXT[5];
byte scheduled[5];
bool rung, armed, supervised = true;
byte known;                 /* clients of the present supervisor */
byte contract;              /* processes with a contract */
byte heard;                 /* threads whose wait the present supervisor was told of */
byte dead, stalled;

/* Ghosts. */
bool N1 = true, N6 = true;   /* for the report */
byte own[5];                /* what each thread has by itself */
byte holder[3], wants[5];
byte held;                  /* a bit for each thread that held something at some instant of this look */
byte touched;               /* threads between L2 and L5 */
bool changed;
byte stalls, crashes, supervisor_deaths, losses;
bool user_has_set;

/* What the present supervisor remembers of whom it has lifted, and of one look. */
byte lifted, lift_own[5], lift_older[5], lift_given[5];
byte pair[5], seen[5], target[5];

#define CHANGED changed = true
inline ring(t) {
    if
    :: supervised && BIT(known, PROCESS(t)) && losses < LOSSES -> losses++; if :: IS(RINGS_ONCE) -> SET(heard, t) :: else fi
    :: supervised && BIT(known, PROCESS(t)) -> rung = true; SET(heard, t)
    :: !(supervised && BIT(known, PROCESS(t))) -> skip
    fi
}
#define CAN_TAKE(l) (W[l] == 0 || BIT(dead, W[l]))
#define RUNS(t) (!BIT(dead, PROCESS(t)) && !BIT(stalled, t))

proctype Thread(byte t) provided (RUNS(_pid)) {
    byte l, round;

next_round:
    if
    :: atomic { IS_THERE(t) && round < ROUNDS -> round++; l = FIRST_LOCK(t) }
    :: atomic {
        !IS_THERE(t) || round == ROUNDS ->
        round = 0; l = 0;
        if :: DROPS && t != 4 && !SIBLINGS -> CLEAR(contract, PROCESS(t)); CHANGED :: else fi;
        goto end_of_thread
    }
    fi;
E0: atomic {
        seat[3 * PROCESS(t) + l] == 0 -> seat[3 * PROCESS(t) + l] = t; SEAT(PROCESS(t), l) = t; CHANGED;
        if :: !SIBLINGS && CAN_TAKE(l) -> W[l] = PROCESS(t); holder[l] = t; SET(held, t); goto inside :: else fi
    };
    if
    :: atomic { CAN_TAKE(l) -> W[l] = PROCESS(t); holder[l] = t; SET(held, t); CHANGED; goto inside }
    :: atomic { !CAN_TAKE(l) -> wants[t] = l; CHANGED }
    fi;
    atomic { WAITS[t] = l; CLEAR(heard, t); CHANGED };
waits:
    if
    :: atomic { CAN_TAKE(l) -> W[l] = PROCESS(t); holder[l] = t; SET(held, t); wants[t] = 0; CHANGED }
    :: atomic { !BIT(heard, t) && supervised && BIT(known, PROCESS(t)) -> ring(t); goto waits }
#if WITHDRAW
    :: atomic { wants[t] = 0; if :: IS(WAITS_KEPT) :: else -> WAITS[t] = 0 fi; CHANGED; ring(t) };
        goto X3
#endif
    fi;
    atomic { WAITS[t] = 0; CHANGED; ring(t) };

inside:
    if
    :: atomic { CHAIN && t == 2 && l == B -> l = A; goto E0 }
    :: atomic { !(CHAIN && t == 2 && l == B) && stalls < STALLS -> stalls++; SET(stalled, t) }
    :: atomic { !(CHAIN && t == 2 && l == B) }
    fi;
X2: atomic { W[l] = 0; holder[l] = 0; CHANGED };
X3: atomic {
        SEAT(PROCESS(t), l) = 0; seat[3 * PROCESS(t) + l] = 0; CHANGED;
        if :: (BIT(REC, t) || (SIBLINGS && (BIT(REC, 1) || BIT(REC, 4)))) && !IS(RELEASE_SILENT) -> ring(t) :: else fi;
        if
        :: CHAIN && t == 2 && l == A -> l = B; goto X2
        :: else -> goto next_round
        fi
    };

end_of_thread:
    false
}

#define HAS_REC(p) (BIT(REC, p) || ((p) == 1 && BIT(REC, 4)))
#define COMES(p) (!BIT(known, p) && !BIT(dead, p) && (BIT(contract, p) || (HAS_REC(p) && !IS(HELLO_WITH_CONTRACTS))))
#define LEAVES(p) (BIT(known, p) && !BIT(dead, p) && !BIT(contract, p))
#define IS_ALIVE(t) (!BIT(dead, PROCESS(t)))

#if SUPERVISOR_DEATHS
#define MAY_DIE :: atomic { supervisor_deaths < SUPERVISOR_DEATHS -> supervisor_deaths++; goto dying }
#else
#define MAY_DIE
#endif

inline forget_lift(x) {
    CLEAR(lifted, x); lift_own[x] = 0; lift_older[x] = 0; lift_given[x] = 0
}
inline adopt(x) {
    if
    :: BIT(REC, x) && !IS(NO_ADOPTION) ->
        SET(lifted, x); lift_own[x] = OWN[x];
        lift_older[x] = (NEXT[x] -> GIVEN[x] : 0); lift_given[x] = (NEXT[x] -> NEXT[x] : GIVEN[x])
    :: else
    fi
}
inline bury(p) {
    atomic {
        BIT(known, p) && BIT(dead, p) ->
        CLEAR(known, p); forget_lift(p); if :: p == 1 -> forget_lift(4) :: else fi; rung = true
    }
}
inline look_at(x) {         /* L2, N3 */
    seen[x] = 0;
    if
    :: IS_ALIVE(x) && (BIT(lifted, x) || pair[x] || pair[1] == x || pair[2] == x || pair[3] == x || pair[4] == x) ->
        SET(touched, x);
        if
        :: !BIT(lifted, x) -> seen[x] = scheduled[x]
        :: BIT(lifted, x) ->
            if
            :: scheduled[x] != lift_given[x] && scheduled[x] != lift_older[x] && !IS(NO_N3) -> lift_own[x] = scheduled[x]
            :: else
            fi;
            seen[x] = lift_own[x]
        fi
    :: else
    fi;
    target[x] = seen[x]
}
#define BETTER(x) (pair[x] && seen[x] && seen[pair[x]] && target[pair[x]] < (IS(NOT_TRANSITIVE) -> seen[x] : target[x]))
inline who_gets_what() {    /* L3 */
    do
    :: BETTER(1) -> target[pair[1]] = (IS(NOT_TRANSITIVE) -> seen[1] : target[1])
    :: BETTER(2) -> target[pair[2]] = (IS(NOT_TRANSITIVE) -> seen[2] : target[2])
    :: BETTER(3) -> target[pair[3]] = (IS(NOT_TRANSITIVE) -> seen[3] : target[3])
    :: BETTER(4) -> target[pair[4]] = (IS(NOT_TRANSITIVE) -> seen[4] : target[4])
    :: else -> break
    od
}
inline reset_look() {
    t = 0; l = 0; p = 0; h = 0; somebody = false; held = 0; touched = 0;
    pair[1] = 0; pair[2] = 0; pair[3] = 0; pair[4] = 0;
    seen[1] = 0; seen[2] = 0; seen[3] = 0; seen[4] = 0;
    target[1] = 0; target[2] = 0; target[3] = 0; target[4] = 0
}

proctype Supervisor() {
    byte t, l, p, h;
    bool somebody, only_one;

watch:
    if
    MAY_DIE
    :: atomic {
        rung || (armed && changed && !IS(NO_TIMER)) ->
        rung = false; changed = false; t = 1;
        if :: holder[A] -> SET(held, holder[A]) :: else fi;
        if :: holder[B] -> SET(held, holder[B]) :: else fi
    }
    :: bury(1); goto watch
    :: bury(2); goto watch
    :: bury(3); goto watch
    :: atomic { COMES(1) -> p = 1; goto hello }
    :: atomic { COMES(2) -> p = 2; goto hello }
    :: atomic { COMES(3) -> p = 3; goto hello }
    :: atomic { LEAVES(1) -> p = 1; goto forget }
    :: atomic { LEAVES(2) -> p = 2; goto forget }
    :: atomic { LEAVES(3) -> p = 3; goto forget }
    fi;

L1: if
    MAY_DIE
    :: atomic {
        true ->
        do
        :: t <= THREADS && (!WAITS[t] || !BIT(known, PROCESS(t))) -> t++
        :: else -> break
        od;
        if :: t > THREADS -> t = 1; goto L2 :: else fi;
        l = WAITS[t]; h = SEAT(PROCESS(t), l); somebody = somebody || !IS(TIMER_WHILE_HELD);
        if
        :: h != 0 && h != t -> pair[t] = h; somebody = true; l = 0; h = 0; t++; goto L1    /* another thread of its process */
        :: else -> h = 0
        fi
    }
    fi;
    atomic {
        p = (BIT(known, W[l]) -> W[l] : 0);
        if :: p == 0 -> l = 0; t++; goto L1 :: else fi
    };
    h = SEAT(p, l);
#if SIBLINGS
    atomic { if :: IS(THREAD_ONCE) || W[l] == p :: else -> h = 0 fi };
    atomic { if :: IS(THREAD_ONCE) || SEAT(p, l) == h :: else -> h = 0 fi };
#endif
    atomic { pair[t] = h; somebody = somebody || h; p = 0; h = 0; l = 0; t++; goto L1 };

L2: if
    MAY_DIE
    :: atomic { look_at(1); look_at(2); look_at(3); look_at(4); who_gets_what() }
    fi;

act:
    atomic {
        true ->
        do
        :: t > THREADS -> goto L6
        :: t <= THREADS && BIT(lifted, t) && !seen[t] -> CLEAR(REC, t); forget_lift(t); t++      /* it has ended */
        :: t <= THREADS && BIT(lifted, t) && seen[t] && target[t] == seen[t] -> goto L4
        :: t <= THREADS && seen[t] && target[t] > seen[t] -> goto L5
        :: t <= THREADS && !BIT(lifted, t) && target[t] == seen[t] -> CLEAR(touched, t); t++
        od
    };

L4: if
    MAY_DIE
    :: atomic { OWN[t] = lift_own[t]; NEXT[t] = lift_own[t]; lift_older[t] = lift_given[t]; lift_given[t] = lift_own[t] }
    fi;
#if MUTATION == CLEARED_FIRST
    if
    MAY_DIE
    :: atomic { CLEAR(REC, t) }
    fi;
#endif
    if
    MAY_DIE
    :: atomic { true -> if :: IS_ALIVE(t) -> scheduled[t] = lift_own[t] :: else fi }
    fi;
    if
    MAY_DIE
    :: atomic { CLEAR(REC, t); OWN[t] = 0; GIVEN[t] = 0; NEXT[t] = 0; forget_lift(t) }
    fi;
    goto next;

L5: if
    MAY_DIE
    :: atomic { BIT(lifted, t) && lift_older[t] == 0 && lift_given[t] == target[t] && scheduled[t] == target[t] -> goto next }
    :: atomic {
        BIT(lifted, t) && !(lift_older[t] == 0 && lift_given[t] == target[t] && scheduled[t] == target[t]) ->
        OWN[t] = (IS(OWN_IS_WHAT_IT_HAS) -> scheduled[t] : lift_own[t]);
        lift_own[t] = OWN[t];
        if :: IS(NO_NEXT) :: else -> NEXT[t] = target[t] fi;
        lift_older[t] = lift_given[t]; lift_given[t] = target[t]
    }
    :: atomic {
        !BIT(lifted, t) ->
        SET(lifted, t); lift_own[t] = seen[t]; lift_given[t] = target[t];
        if
        :: IS(RECORD_NOT_WHOLE) -> SET(REC, t)
        :: IS(LIFT_THEN_RECORD)
        :: else -> OWN[t] = seen[t]; GIVEN[t] = 0; NEXT[t] = (IS(NO_NEXT) -> 0 : target[t])
        fi
    };
        if
        MAY_DIE
        :: atomic { true -> if :: IS(LIFT_THEN_RECORD) :: IS(RECORD_NOT_WHOLE) :: else -> SET(REC, t) fi }
        fi
    fi;
    if
    MAY_DIE
    :: atomic {
        assert(!N6 || BIT(held, t) || !IS_ALIVE(t));
        if :: IS_ALIVE(t) -> scheduled[t] = target[t] :: else fi
    }
    fi;
    if
    MAY_DIE
    :: atomic {
        true ->
        if :: IS(LIFT_THEN_RECORD) || IS(RECORD_NOT_WHOLE) -> SET(REC, t); OWN[t] = lift_own[t] :: else fi;
        GIVEN[t] = target[t]; NEXT[t] = 0; lift_older[t] = 0
    }
    fi;

next:
    atomic { CLEAR(touched, t); t++; if :: only_one -> goto forgotten :: else -> goto act fi };

L6: atomic {
        armed = (IS(TIMER_WHILE_WAITED) -> somebody : somebody || lifted != 0);
        reset_look();
        goto watch
    };

hello:
    if
    MAY_DIE
    :: atomic {
        SET(known, p);
        if :: IS(ADOPTS_LATE) -> rung = true :: else -> adopt(p); if :: p == 1 -> adopt(4) :: else fi; rung = true; p = 0; goto watch fi
    }
    fi;
#if MUTATION == ADOPTS_LATE
    /* One look at who is not lifted: of a thread with a record it believes that this is its own. */
    atomic { adopt(p); if :: BIT(lifted, p) -> lift_own[p] = scheduled[p] :: else fi; p = 0; goto watch };
#endif

forget:                     /* a client that has no contract any more: its threads are put back before it is forgotten */
    if
    MAY_DIE
    :: atomic { BIT(lifted, p) -> t = p; look_at(t); only_one = true; goto L4 }
    :: atomic { !BIT(lifted, p) -> goto forgotten }
    fi;
forgotten:
    atomic {
        CLEAR(known, p); only_one = false;
        reset_look();
        rung = true; goto watch
    };

dying:
    atomic {
        reset_look(); only_one = false;
        supervised = false; known = 0; heard = 0; rung = false; armed = false;
        forget_lift(1); forget_lift(2); forget_lift(3); forget_lift(4)
    };
    atomic { supervised = true; goto watch }
}

inline die(p) {
    SET(dead, p);
    if :: holder[A] && PROCESS(holder[A]) == p -> holder[A] = 0 :: else fi;
    if :: holder[B] && PROCESS(holder[B]) == p -> holder[B] = 0 :: else fi;
    wants[p] = 0; if :: p == 1 -> wants[4] = 0 :: else fi;
    CHANGED
}

byte due[5];                /* N1, of what is so */
#define PASSES(x) (wants[x] && holder[wants[x]] && due[holder[wants[x]]] < due[x])
#define AS_IT_SHOULD(x) (!IS_ALIVE(x) || (scheduled[x] == due[x] && (!BIT(REC, x) || due[x] > own[x])))

proctype World() {
    bool right;

    do
#if CRASHES
    :: atomic { crashes < CRASHES && !BIT(dead, 1) -> crashes++; die(1) }
    :: atomic { crashes < CRASHES && !BIT(dead, 2) && IS_THERE(2) -> crashes++; die(2) }
    :: atomic { crashes < CRASHES && !BIT(dead, 3) -> crashes++; die(3) }
#endif
#if USER
    :: atomic {
        !user_has_set && !BIT(dead, 1) && (USER_RACES || !BIT(touched, 1)) ->
        user_has_set = true; own[1] = USER; scheduled[1] = USER; CHANGED
    }
#endif
    :: atomic {
        timeout ->
        due[1] = own[1]; due[2] = own[2]; due[3] = own[3]; due[4] = own[4];
        do
        :: PASSES(1) -> due[holder[wants[1]]] = due[1]
        :: PASSES(2) -> due[holder[wants[2]]] = due[2]
        :: PASSES(3) -> due[holder[wants[3]]] = due[3]
        :: PASSES(4) -> due[holder[wants[4]]] = due[4]
        :: else -> break
        od;
        right = AS_IT_SHOULD(1) && AS_IT_SHOULD(2) && AS_IT_SHOULD(3) && AS_IT_SHOULD(4);
        assert(!N1 || right);
        due[1] = 0; due[2] = 0; due[3] = 0; due[4] = 0; right = false
    }
    od
}

init {
    byte i;
    atomic {
        own[1] = 1; own[2] = (CHAIN -> 1 : 2); own[3] = 3; own[4] = 1;
        i = 1;
        do
        :: i <= THREADS -> scheduled[i] = own[i]; run Thread(i); i++
        :: else -> break
        od;
        i = 0;
        contract = 14; known = 14;
        run Supervisor();
        run World()
    }
}
