/*
 * Leases: a holder that overruns is killed, one that stalls outside is passed over, and the supervisor that does it may die.
 *
 * Not here: waiting (see lock.pml).  To acquire is one exchange when W is free or its owner dead, and blocks otherwise.
 * Contracts, sentences (K3) and the terminate call (K1) are left out: nobody decides anything by them.
 *
 * W     owner | DIED | TAKEN      the owner is a process; 0 is free
 *
 *   state         owner    entered by                leaves to
 *   0             -        X2, T3                    HELD
 *   DIED          -        pass on, T3               HELD|DIED: the heir
 *   HELD          alive    E1, E3, T3: given back    0 (X2), HELD|TAKEN (T1)
 *   HELD|TAKEN    alive    T1                        HELD (E3; T3: P is inside), 0 or DIED (T3: P is not inside), 0 (X2)
 *   HELD...       dead     death                     DIED (pass on), HELD|DIED (E1, a waiter's poll)
 *
 * HELD, with TAKEN or without, means that P is between E1 and X2, whatever became of the supervisor.
 *
 * D, one per process    0: not inside yet; LEFT: not inside any more; else the deadline of its hold.  Written by P only
 * token                 rises with every hold; written by the holder only
 * doubt[P]               1: T1 was made for P; set by the supervisor, cleared by P.  Fast: P looks at it instead of at W
 *
 *   E0  D := 0.   E1  W: free or of a dead owner -> P.   E2  D := deadline.
 *   E3  fast, after an E1 that found W 0: doubt[P] is 0: in.  else doubt[P] := 0, and
 *       w = W.  P without TAKEN: in.  P with TAKEN: exchange for P without: in.  not P: D := 0, again from E1.
 *   E4  token := token + 1.
 *   X1  D := LEFT.   X2  W of P, with TAKEN or without: exchange for 0.  not P: it was taken away while we were out; nothing to do.
 *   The stores of E0, E2, E3, E4, X1 and T1 are plain, and so are all loads.  What orders them is E1's and X2's exchange, and T2, K2.
 *
 *   K   W of P, D a deadline that has passed.   K2  membarrier; D and W once more: as before, else nothing.
 *   K4  SIGKILL.   K5  wait until the pidfd says that P is dead.   K6  W of P: exchange for DIED.
 *   T   W of P, D no deadline, for a lease the same W, D and token.   T1  exchange for W with TAKEN, then
 *       doubt[P] := 1.   T2  membarrier.
 *   T3  D.  a deadline: W of P with TAKEN: exchange for W without.  0: exchange for W & DIED.  LEFT: exchange for 0.
 *   A supervisor that finds TAKEN in W when it begins goes on at doubt[P] := 1.  Deadlines passed by then count from its beginning.
 *
 * Threads of one process exclude each other first, from E0 to X2 (the seat): W and D do not tell them apart.
 *
 * S1  Nobody else is inside: between E4 and X1.
 * S2  Whoever is killed overran: X1 was not before the deadline.
 * S3  Nobody waits for ever: not for a stalled or dead process while a supervisor lives, nor for anything but a stalled one
 *     while none does.
 * S4  Each hold's token is greater than every earlier one's.
 * S5  A death inside is told to the next who gets inside, and to nobody after that.  Nothing else is told, but that an owner
 *     died between E1 and E4, or X1 and X2, may be.
 * S6  W is taken from P only after P was seen dead, or not inside.
 * S7  T takes W only from who did nothing for a lease.
 * S8  A deadline that passed while no supervisor lived costs nobody his life before the next one has been there for a lease.
 *
 * Time: a deadline may pass at any instant after it was computed; so may the lease since the look of T, and since a
 * supervisor began.  Processes may be slow for as long as they like; a stalled one does nothing until it is killed, and a
 * killed one may go on for a while.
 */

#ifndef THREADS
#define THREADS 2
#endif
#ifndef SIBLINGS
#define SIBLINGS 0          /* 1: threads 1 and 2 are of one process */
#endif
#ifndef ROUNDS
#define ROUNDS 1            /* holds of each thread */
#endif
#ifndef STALLS
#define STALLS 1            /* so many processes may be stopped for ever, at any step */
#endif
#ifndef CRASHES
#define CRASHES 0           /* so many processes may die of themselves, at any step */
#endif
#ifndef SUPERVISOR_DEATHS
#define SUPERVISOR_DEATHS 0
#endif
#ifndef SUCCESSOR
#define SUCCESSOR 1         /* 0: nobody follows the last supervisor that dies */
#endif
#ifndef STORE_BUFFER
#define STORE_BUFFER 0      /* 1: plain stores wait in a store buffer */
#endif
#ifndef BY_NAME
#define BY_NAME 0           /* 1: the first draft: T1 writes the supervisor's own name into W, after T0 noted P's beside it */
#endif
/* 0: leave it to the other checks to find what comes of it. */
#ifndef CHECK_S4
#define CHECK_S4 1
#endif
#ifndef CHECK_S5
#define CHECK_S5 1
#endif
#ifndef CHECK_S6
#define CHECK_S6 1
#endif
#ifndef CHECK_S7
#define CHECK_S7 1
#endif

/* Mutations: each must be refuted in some configuration. */
#define NONE                     0
#define E3_SKIPPED               1
#define E3_IGNORES_TAKEN         2   /* E3 looks at the owner only */
#define E3_YIELDS                3   /* E3 begins again when it sees TAKEN, and leaves W as it is */
#define K2_NO_SECOND_LOOK        4
#define K2_NO_MEMBARRIER         5
#define K2_CLOCK_LAST            6   /* the clock is read after the second look at D, not before the membarrier */
#define T2_NO_MEMBARRIER         7
#define PASS_ON_EARLY            8   /* no K5 */
#define T1_FREES                 9   /* T1 frees W at once */
#define T3_NEVER_GIVES_BACK     10
#define T3_STORES               11   /* T3 stores what it decided, without exchange */
#define T3_DROPS_DIED           12
#define T3_TELLS                13   /* whoever gets W after T3 is told of a death */
#define T_AT_ONCE               14   /* T does not wait */
#define T_WITHOUT_TOKEN         15   /* T compares W and D only */
#define X1_AFTER_X2             16
#define X1_WRITES_0             17   /* no LEFT */
#define NO_E0                   18
#define X2_ANY_OWNER            19   /* X2 frees W whoever has it */
#define TOKEN_BEFORE_E3         20
#define NO_SEAT                 21
#define NO_RESPITE              22   /* a supervisor counts deadlines that passed before it began as passed */
#define TAKEN_LEFT_ALONE        23   /* a supervisor does nothing about TAKEN that it finds */
#define NO_T0                   24   /* BY_NAME */
#define POLL_TAKES_SUPERVISORS  25   /* BY_NAME: a waiter takes W from a dead supervisor */
#define DOUBT_NEVER             26
#define DOUBT_BEFORE_T1         27
#define DOUBT_AFTER_T2          28
#define ADOPTED_AT_T2           29   /* a supervisor that finds TAKEN goes on at T2 */
#ifndef MUTATION
#define MUTATION NONE
#endif
#define IS(mutation) (MUTATION == mutation)

#define OWNER 7
#define DIED  8
#define TAKEN 16
#define FREE(w) (((w) & OWNER) == 0)

/* Processes are 1 to PROCESSES; FIRST_SUPERVISOR and the one after it are supervisors, by turns. */
#define PROCESSES (THREADS - SIBLINGS)
#define PROCESS(thread) ((thread) - ((SIBLINGS && (thread) > 1) -> 1 : 0))
#define FIRST_SUPERVISOR 5
#define IS_SUPERVISOR(p) ((p) >= FIRST_SUPERVISOR)

#define LEFT 1
#define DEADLINE 2
#define INSIDE(d) ((d) == DEADLINE)

byte W;
byte D[PROCESSES + 1];
byte token;
byte taken_from;            /* BY_NAME */
bool doubt[PROCESSES + 1];
byte seat[PROCESSES + 1];
byte dead, stalled, killed; /* a bit for each process */
bool supervised = true;
byte supervisor = FIRST_SUPERVISOR;

#define BIT(set, i) (((set) >> (i)) & 1)
#define RUNS(p) (!BIT(dead, p) && !BIT(stalled, p))

/* Time: a bit for each process, or for what the supervisor remembers. */
byte late;                  /* the deadline in D, or on its way there, has passed */
byte spared;                /* it had passed when this supervisor began */
bool settled = true;        /* a lease has passed since that one began */
byte seen;                  /* whose deadline the supervisor remembers; no two deadlines are equal: */
bool seen_changed;          /* D was written since */
byte look_W, look_D, look_token;        /* T's first look; look_W 0: none */
bool aged;                  /* a lease has passed since */

/* Ghosts: seen by the checks only. */
bool S1 = true, S2 = true, S3 = true, S4 = true, S5 = true, S6 = true, S7 = true, S8 = true;      /* for the report */
byte inside;                /* the thread */
byte owed;                  /* what the next one is to be told: NOTHING, MAYBE or DEATH */
byte last_token;
byte open;                  /* a bit for each process: between E2 and X1 */
byte guilty;                /* a bit for each process: its deadline passed before X1 */
byte unwatched;             /* a bit for each process: its deadline passed while there was no supervisor */
bool moved;                 /* whom T looked at has changed D or W since */
byte leaving;               /* a bit for each thread that is about to be dead, before anything else happens */
byte stalls, crashes, supervisor_deaths, finished;

#define NOTHING 0
#define MAYBE   1
#define DEATH   2

#define SET(set, i) set = set | (1 << (i))
#define CLEAR(set, i) set = set & ~(1 << (i))
#define FORGET_TIME(p) CLEAR(late, p); CLEAR(spared, p); CLEAR(guilty, p); CLEAR(unwatched, p)
#define MOVED(p) moved = moved || (look_W & OWNER) == (p)

/* A store on its way: the token, doubt or D. */
#define TOKEN_STORE 128
#define DOUBT_STORE 64
inline apply(thread, x) {
    if
    :: (x) & TOKEN_STORE -> assert(!S4 || !CHECK_S4 || ((x) & ~TOKEN_STORE) > token); token = (x) & ~TOKEN_STORE
    :: (x) == DOUBT_STORE -> doubt[PROCESS(thread)] = false
    :: else -> D[PROCESS(thread)] = x; MOVED(PROCESS(thread)); seen_changed = seen_changed || seen == PROCESS(thread)
    fi
}
#if STORE_BUFFER
chan buffer[THREADS + 1] = [4] of { byte };     /* E2 to X1 */
#define STORE(x) buffer[me]!(x)
inline drain(thread) {
    do
    :: nempty(buffer[thread]) -> buffer[thread]?stored; apply(thread, stored); stored = 0
    :: empty(buffer[thread]) -> break
    od
}
#else
#define STORE(x) apply(me, x)
#define drain(thread) skip
#endif
inline membarrier() {
#if STORE_BUFFER
    i = 1;
    do
    :: i <= THREADS -> drain(i); i++
    :: else -> break
    od;
    i = 0
#else
    skip
#endif
}

#define TAKES_FROM_SUPERVISOR (IS(POLL_TAKES_SUPERVISORS) && IS_SUPERVISOR(W & OWNER) && !(supervised && supervisor == (W & OWNER)))

proctype Thread(byte me; byte p) provided ((leaving == 0 && RUNS(PROCESS(_pid))) || BIT(leaving, _pid)) {
    byte round, t, stored;
    bit told;               /* a death is to be reported when acquire returns */
    bit fast;               /* W was 0 */

{
    skip;
next_round:
    if
    :: atomic { round == ROUNDS -> SET(finished, me); round = 0; goto end_of_thread }
    :: atomic { round < ROUNDS && (seat[p] == 0 || IS(NO_SEAT)) -> round++; seat[p] = me }
    fi;

    if
    :: atomic { !IS(NO_E0) -> STORE(0) }
    :: IS(NO_E0)
    fi;
E1: if
    :: atomic { FREE(W) -> drain(me); fast = (W == 0); told = ((W & DIED) != 0); W = p | (W & DIED); MOVED(p) }
    :: atomic {             /* The poll. */
        !FREE(W) && (BIT(dead, W & OWNER) || TAKES_FROM_SUPERVISOR) ->
        drain(me); told = BIT(dead, W & OWNER); W = p | (told -> DIED : W & DIED); MOVED(p)
    }
    fi;
E2: atomic { FORGET_TIME(p); SET(open, p); STORE(DEADLINE) };
#if MUTATION == TOKEN_BEFORE_E3
    t = token;
    atomic { STORE(TOKEN_STORE | (t + 1)) };
#endif
    if                      /* E3, fast */
    :: atomic { fast && !BY_NAME -> fast = 0; if :: doubt[p] -> STORE(DOUBT_STORE) :: else -> goto E4 fi }
    :: atomic { true -> fast = 0 }
    fi;
E3: if
    :: atomic { (W & OWNER) == p && (!(W & TAKEN) || IS(E3_IGNORES_TAKEN)) || IS(E3_SKIPPED) -> skip }
    :: atomic { (W & OWNER) == p && (W & TAKEN) && !IS(E3_YIELDS) && !IS(E3_IGNORES_TAKEN) -> drain(me); W = W & ~TAKEN; MOVED(p) }
    :: atomic { ((W & OWNER) != p || ((W & TAKEN) && IS(E3_YIELDS))) && !IS(E3_SKIPPED) -> CLEAR(open, p); STORE(0); told = 0; goto E1 }
    fi;
E4: if
    :: atomic { !IS(TOKEN_BEFORE_E3) -> t = token }
    :: atomic { IS(TOKEN_BEFORE_E3) }
    fi;
    atomic {
        true ->
        if
        :: IS(TOKEN_BEFORE_E3)
        :: else -> STORE(TOKEN_STORE | (t + 1))
        fi;
        assert(!S1 || inside == 0);
        inside = me;
        assert(!S4 || !CHECK_S4 || t + 1 > last_token);
        last_token = t + 1; t = 0;
        assert(!S5 || !CHECK_S5 || (told -> owed != NOTHING : owed != DEATH));
        owed = NOTHING; told = 0
    };

X1: atomic {
        inside = 0; CLEAR(open, p);
        if
        :: IS(X1_AFTER_X2)
        :: IS(X1_WRITES_0) -> STORE(0)
        :: else -> STORE(LEFT)
        fi
    };
X2: if
    :: atomic { (W & OWNER) == p || IS(X2_ANY_OWNER) -> drain(me); W = 0; MOVED(p) }
    :: atomic { (W & OWNER) != p && !IS(X2_ANY_OWNER) -> drain(me) }
    fi;
#if MUTATION == X1_AFTER_X2
    atomic { STORE(LEFT) };
#endif
    atomic {
        if :: IS(NO_SEAT) :: else -> seat[p] = 0; FORGET_TIME(p) fi;
        goto next_round
    };

end_of_thread:
    false
} unless atomic { BIT(leaving, me) -> round = 0; fast = 0; t = 0; stored = 0; told = false; CLEAR(leaving, me) }
}

#define LATE(p) (BIT(late, p) && (settled || !BIT(spared, p) || IS(NO_RESPITE)))
#define CURRENT (W & OWNER)
/* Ghost: what the look found that decides. */
#define VERDICT d = BIT(guilty, p) + 2 * BIT(unwatched, p)
#define HELD_ALIVE (!FREE(W) && !IS_SUPERVISOR(CURRENT) && !BIT(dead, CURRENT))
#define SAME_LOOK (look_W == W && look_D == D[CURRENT] && (look_token == token || IS(T_WITHOUT_TOKEN)))

#if SUPERVISOR_DEATHS
#define MAY_DIE :: atomic { supervisor_deaths < SUPERVISOR_DEATHS -> supervisor_deaths++; goto dying }
#else
#define MAY_DIE
#endif

proctype Supervisor() provided (leaving == 0) {
    byte p, d, i, stored;

watch:
    if
    MAY_DIE
    :: atomic { !FREE(W) && !IS_SUPERVISOR(CURRENT) && BIT(dead, CURRENT) -> p = CURRENT; goto K6 }
    :: atomic { HELD_ALIVE && INSIDE(D[CURRENT]) && (LATE(CURRENT) || IS(K2_CLOCK_LAST)) ->
        p = CURRENT; seen = p; VERDICT; goto K2
    }
    :: atomic {
        HELD_ALIVE && !(W & TAKEN) && !INSIDE(D[CURRENT]) && !SAME_LOOK ->
        look_W = W; look_D = D[CURRENT]; look_token = token; aged = false; moved = false
    }
    :: atomic {
        HELD_ALIVE && !(W & TAKEN) && !INSIDE(D[CURRENT]) && ((SAME_LOOK && aged) || IS(T_AT_ONCE)) ->
        p = CURRENT;
        assert(!S7 || !CHECK_S7 || (aged && !moved));
        look_W = 0; look_D = 0; look_token = 0; aged = false; moved = false;
        goto T1
    }
    :: atomic { HELD_ALIVE && (W & TAKEN) && !IS(TAKEN_LEFT_ALONE) -> p = CURRENT; if :: IS(ADOPTED_AT_T2) -> goto T2 :: else -> goto doubted fi }
    :: atomic { IS_SUPERVISOR(CURRENT) -> p = taken_from; goto T2 }      /* BY_NAME: its predecessor's */
    fi;
    goto watch;

K2: if
    MAY_DIE
    :: atomic { true -> if :: IS(K2_NO_MEMBARRIER) :: else -> membarrier() fi }
    fi;
    if
    MAY_DIE
    :: atomic { !seen_changed || IS(K2_NO_SECOND_LOOK) -> if :: IS(K2_NO_SECOND_LOOK) :: else -> VERDICT fi }
    :: atomic { seen_changed && !IS(K2_NO_SECOND_LOOK) -> goto nothing }
    fi;
#if MUTATION == K2_CLOCK_LAST
    if
    :: atomic { LATE(p) -> VERDICT }
    :: atomic { !LATE(p) -> goto nothing }
    fi;
#endif
    if
    MAY_DIE
    :: atomic { CURRENT != p && !IS(K2_NO_SECOND_LOOK) -> goto nothing }
    :: atomic {
        CURRENT == p || IS(K2_NO_SECOND_LOOK) ->
        assert(!S2 || (d & 1) || BIT(dead, p));
        assert(!S8 || settled || !(d & 2));
        seen = 0; seen_changed = false; d = 0
    }
    fi;
K4: if
    MAY_DIE
    :: atomic { SET(killed, p) }
    fi;
K5: if
    MAY_DIE
    :: atomic { BIT(dead, p) || IS(PASS_ON_EARLY) }
    fi;
K6: if
    MAY_DIE
    :: atomic { CURRENT == p -> assert(!S6 || !CHECK_S6 || BIT(dead, p)); W = DIED; goto nothing }
    :: atomic { CURRENT != p -> goto nothing }
    fi;

T1:
#if BY_NAME
    if                      /* T0 */
    MAY_DIE
    :: atomic { !IS(NO_T0) -> taken_from = p }
    :: atomic { IS(NO_T0) }
    fi;
#endif
#if MUTATION == DOUBT_BEFORE_T1
    atomic { true -> doubt[p] = true };
#endif
    if
    MAY_DIE
    :: atomic {
        CURRENT == p && !(W & TAKEN) ->
        if
        :: IS(T1_FREES) -> W = W & DIED; goto nothing
        :: BY_NAME -> W = supervisor | (W & DIED)
        :: else -> W = W | TAKEN
        fi
    }
    :: atomic { CURRENT != p || (W & TAKEN) -> goto nothing }
    fi;
doubted:
    if
    MAY_DIE
    :: atomic { true -> if :: BY_NAME || IS(DOUBT_NEVER) || IS(DOUBT_BEFORE_T1) || IS(DOUBT_AFTER_T2) :: else -> doubt[p] = true fi }
    fi;
T2:
progress_lease_over:
    if
    MAY_DIE
    :: atomic { true -> if :: IS(T2_NO_MEMBARRIER) :: else -> membarrier() fi }
    fi;
#if MUTATION == DOUBT_AFTER_T2
    atomic { true -> doubt[p] = true };
#endif
T3: if
    MAY_DIE
    :: atomic { true -> d = (IS(T3_NEVER_GIVES_BACK) -> 0 : D[p]) }
    fi;
#define STILL_TAKEN (IS(T3_STORES) || (BY_NAME -> IS_SUPERVISOR(CURRENT) : CURRENT == p && (W & TAKEN)))
    if
    MAY_DIE
    :: atomic {
        STILL_TAKEN ->
        if
        :: INSIDE(d) -> W = p | (W & DIED)
        :: else ->
            assert(!S6 || !CHECK_S6 || inside == 0 || PROCESS(inside) != p || BIT(dead, p));
            if
            :: IS(T3_TELLS) -> W = DIED
            :: d == LEFT || IS(T3_DROPS_DIED) -> W = 0
            :: else -> W = W & DIED
            fi
        fi
    }
    :: atomic { !STILL_TAKEN }
    fi;

nothing:
    atomic { p = 0; d = 0; seen = 0; seen_changed = false; goto watch };

dying:
    atomic {
        true ->
        p = 0; d = 0; seen = 0; seen_changed = false; look_W = 0; look_D = 0; look_token = 0; aged = false; moved = false;
        settled = true; supervised = false
    };
    atomic {                /* It begins when its predecessor is dead. */
        SUCCESSOR || supervisor_deaths < SUPERVISOR_DEATHS ->
        supervised = true;
        supervisor = (supervisor == FIRST_SUPERVISOR -> FIRST_SUPERVISOR + 1 : FIRST_SUPERVISOR);
        settled = false;
        spared = late;
        goto watch
    }
}

/* The memory of a dead process stays as it is; what it had in its store buffers arrives. */
inline die(victim) {
    i = 1;
    do
    :: i <= THREADS ->
        if
        :: PROCESS(i) == victim ->
            drain(i);
            SET(leaving, i);
            if
            :: inside == i -> inside = 0; owed = DEATH
            :: else
            fi
        :: else
        fi;
        i++
    :: else -> break
    od;
    i = 0;
    if
    :: CURRENT == victim && owed == NOTHING -> owed = MAYBE
    :: else
    fi;
    SET(dead, victim);
    CLEAR(stalled, victim); CLEAR(open, victim); CLEAR(killed, victim);
    FORGET_TIME(victim);
    seat[victim] = 0
}

/* Deadlines matter while the process may be inside, or may still be thought to be. */
#define MAY_PASS(p) (!BIT(dead, p) && !BIT(late, p) && (INSIDE(D[p]) || BIT(open, p) || (seen == p && IS(K2_CLOCK_LAST))))
inline pass(holder) {
    SET(late, holder);
    if :: BIT(open, holder) -> SET(guilty, holder) :: else fi;
    if :: !supervised -> SET(unwatched, holder) :: else fi
}

#define DONE(t) (BIT(finished, t) || !RUNS(PROCESS(t)))
#define ALL_DONE (DONE(1) && DONE(2) && DONE(THREADS))

/* What processes do not do themselves: they are stopped, die, and grow old; their stores arrive. */
#define HAPPENS_TO(x) \
    :: atomic { x <= PROCESSES && crashes < CRASHES && !BIT(dead, x % (PROCESSES + 1)) -> crashes++; die(x % (PROCESSES + 1)) } \
    :: atomic { x <= PROCESSES && BIT(killed, x) && !BIT(dead, x) -> die(x % (PROCESSES + 1)) } \
    :: atomic { x <= PROCESSES && stalls < STALLS && RUNS(x) && seat[x % (PROCESSES + 1)] != 0 -> stalls++; SET(stalled, x) } \
    :: atomic { x <= PROCESSES && MAY_PASS(x % (PROCESSES + 1)) -> pass(x % (PROCESSES + 1)) }

proctype World() provided (leaving == 0) {
    byte i, stored;
    do
    HAPPENS_TO(1)
    HAPPENS_TO(2)
    HAPPENS_TO(3)
    :: atomic { look_W != 0 && !aged -> aged = true }
    :: atomic { !settled -> settled = true }
#if STORE_BUFFER
    :: atomic { nempty(buffer[1]) -> buffer[1]?stored; apply(1, stored); stored = 0 }
    :: atomic { nempty(buffer[2]) -> buffer[2]?stored; apply(2, stored); stored = 0 }
#if THREADS > 2
    :: atomic { nempty(buffer[3]) -> buffer[3]?stored; apply(3, stored); stored = 0 }
#endif
#endif
    :: timeout ->
progress_at_rest:
        assert(!S3 || ALL_DONE || (!supervised && !FREE(W) && BIT(stalled, CURRENT)))
    od
}

init {
    byte i;
    atomic {
        i = 1;
        do
        :: i <= THREADS -> run Thread(i, PROCESS(i)); i++
        :: else -> break
        od;
        i = 0;
        run Supervisor();
        run World()
    }
}
