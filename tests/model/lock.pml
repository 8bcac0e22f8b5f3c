/*
 * The lock: acquire, park, poll, withdraw, release, and the death of owners found by waiters alone.
 *
 * Not here: bias (BIASED, REVOKING).  A releaser may choose any waiter, which covers every order of precedence and of
 * arrival; with PRECEDENCE it has to choose the best one, and a check says that nobody gets in before one who is asleep
 * and better.
 *
 * W, one per lock     owner | PARKED | DIED      the owner is a thread here; 0 is free
 *                     RESERVED(spot, sequence) | PARKED | DIED
 *                     RESERVED(nobody, who looks) | PARKED | DIED
 *
 *   state             owner    entered by                  leaves to
 *   0                 -        R1, R2, A8                  HELD
 *   HELD              alive    A1, A2                      0, HELD|PARKED
 *   HELD|PARKED       alive    A5                          0
 *   HELD|PARKED|DIED  alive    A2, A3, A5, A6: the heir    0; DIED when the heir withdraws before it was told
 *   HELD...           dead     death                       HELD|PARKED|DIED
 *   DIED              -        A8                          HELD|DIED, HELD|PARKED|DIED
 *   RESERVED          -        F2: for one waiter          HELD|PARKED by that one; RESERVED for nobody (F0)
 *                     -        F0, for nobody              RESERVED for a waiter, 0, DIED (F2); for nobody, by another (F0)
 *
 * R2 clears PARKED although others may sleep: a wake-up is about to be made, and whoever gets it marks W again, takes it
 * with PARKED, or passes the wake-up on.
 *
 * S, one per spot     state | key | sequence     state is IDLE, WAITING or NOTIFIED; key is the lock waited for
 *
 *   IDLE -> WAITING       A4, by the claimant; the sequence rises
 *   WAITING -> NOTIFIED   unpark_one, by a releaser or by somebody who withdraws
 *   NOTIFIED -> WAITING   A6, by the claimant, after a token or a poll
 *   NOTIFIED -> IDLE      A6, by a poller, when the claimant is dead; the poller claims the spot first, and gives it back
 *   any -> IDLE           A7, A8, by the claimant; C2, by the next claimant of a dead one's spot
 *
 * tokens, one per spot    what its semaphore holds; stale ones cost an empty wake-up each
 * claim, one per spot     whose spot it is: 0, or a thread; a dead one's may be taken over
 *
 * I1  Somebody asleep implies that the lock is held with PARKED, or that a wake-up is under way: a token, a post about to
 *     be made, a waiter about to look at W, or a thread inside unpark_one.  (Until somebody dies.)
 * I2  Whoever is inside owns W, and nobody else is inside.
 * I3  A death is owed to the next owner exactly while W has a dead owner, or DIED and an owner who was not told yet.
 * I4  A spot that is not IDLE belongs to a thread that waits, or to a dead one.
 * I5  Whoever sleeps has a spot that is not IDLE.
 * I6  When all have finished and nobody died, every spot is IDLE and every W is free.
 *
 * A compare-exchange loop (read w, try to exchange, again on failure) is one step: only its last turn has an effect,
 * and that turn is indivisible.  Every other access to shared memory is a step of its own, and a thread can die
 * (CRASHES) or be interrupted by an exception (WITHDRAW) before each of them.
 *
 * A poll that would change nothing is left out, so a state in which only useless polls are possible is a deadlock that
 * SPIN reports.  In the same way a thread that withdraws while it sleeps decides so when it falls asleep (A6T); those
 * that do not (A6) must be woken.
 */

#ifndef THREADS
#define THREADS 2
#endif
#ifndef LOCKS
#define LOCKS 1             /* with 2, thread 1 always holds both, and the others take either */
#endif
#ifndef CRASHES
#define CRASHES 0           /* exactly this many threads may die, at any step */
#endif
#ifndef ROUNDS
#define ROUNDS 0            /* rounds of each thread; 0: any number */
#endif
#ifndef WITHDRAW
#define WITHDRAW 0          /* 1: exceptions and deadlines at any instant of an acquire, and once more during A8; and once during R3 */
#endif
#ifndef POLL
#define POLL 0              /* 1: sleepers poll at any time; 2: only where a wake-up is lost, and that at most POLLS times */
#endif
#ifndef POLLS
#define POLLS 0
#endif
#ifndef SKIP
#define SKIP 1              /* 1: a releaser that sees a NOTIFIED spot may leave it at that; 2: it always does; 0: it never does */
#endif
#ifndef STORE_BUFFER
#define STORE_BUFFER 0      /* 1: the stores of A7 and C2 (without NAPS also of A4 and A6) are plain, and wait in a store buffer */
#endif
#ifndef NEWCOMERS
#define NEWCOMERS 0         /* how many of the threads start only after a death, and must take over a spot */
#endif
#ifndef SPOTS
#define SPOTS (THREADS - NEWCOMERS)
#endif
#ifndef FOREIGN
#define FOREIGN 0           /* 1: an owner may leave the release to a thread that never acquires */
#endif
#ifndef TRIERS
#define TRIERS 0            /* the first TRIERS threads never block (A3) */
#endif
#ifndef NAPS
#define NAPS 1              /* 1: a chosen thread may take the lock, or mark it, before it makes S WAITING again; A5 relies on such threads */
#endif
#ifndef SEQUENCES
#define SEQUENCES 2         /* sequence numbers count modulo this */
#endif
#ifndef TOKENS
#define TOKENS 2            /* a semaphore counts up to this; more stale tokens would bring nothing new */
#endif
#ifndef SCAN_AT_ONCE
#define SCAN_AT_ONCE 0      /* 1: unpark_one looks at all spots in one step (fewer states) */
#endif
#ifndef HANDOVER
#define HANDOVER 0          /* 1: any release may hand the lock over to a waiter, instead of leaving it free */
#endif
#ifndef PRECEDENCE
#define PRECEDENCE 0        /* 1: a thread of a higher number has precedence: every release hands over if anybody waits, to the best */
#endif
#ifndef CHECK_I1
#define CHECK_I1 1          /* 0: leave a lost wake-up to be found as the deadlock that it leads to */
#endif

/* Mutations: each but NOTIFY_BLIND, which is harmless without deaths, must be refuted in some configuration. */
#define NONE                     0
#define A5_PLAIN_LOOK            1   /* no exchange where PARKED is set already */
#define TAKE_WITHOUT_PARKED      2   /* a waiter takes the lock as if nobody slept behind it */
#define TAKE_WITH_SEEN_PARKED    3   /* a waiter takes the lock with w & PARKED */
#define A8_KEEPS_WAKEUP          4   /* withdrawing never passes a wake-up on */
#define A8_ONLY_NOTIFIED         5   /* withdrawing passes a wake-up on only when S was NOTIFIED */
#define A8_LEAVES_OTHERS_ALONE   6   /* withdrawing does not set PARKED in a W that another owns */
#define A8_TRUSTS_WORD           7   /* withdrawing takes "W names me" for "my exchange succeeded" */
#define A8_LOOKS_FIRST           8   /* withdrawing looks at W before it sets S to IDLE */
#define NOTIFY_BLIND             9   /* the exchange in unpark_one covers neither key nor sequence */
#define UNPARK_ANY_KEY          10   /* unpark_one and its skip look at every spot, whatever its key */
#define HEIR_DROPS_DIED         11   /* the heir clears DIED when it takes the lock */
#define R2_KEEPS_DIED           12   /* release leaves DIED behind */
#define R3_SKIPPED              13   /* an exception after R2 ends the release */
#define R3_POST_LOST            14   /* an exception between NOTIFIED and the post starts unpark_one afresh, without that post */
#define R3_PLAIN_CLEAR          15   /* PARKED is cleared by a store */
#define R3_BEFORE_R2            16   /* unpark_one runs before W is free */
#define REAP_LIVING             17   /* a poller reaps a NOTIFIED spot without asking whether its thread is dead */
#define REAP_CLAIM_FIRST        18   /* a poller reads the claim before S */
#define REAP_STORE              19   /* a poller reaps by a store */
#define NO_REAP                 20   /* nobody reaps NOTIFIED spots, and the skip is always taken */
#define CLAIM_AFTER_IDLE        21   /* S is set to IDLE before the claim */
#define CLAIM_LEFT_DIRTY        22   /* an exception between C1 and C2 leaves the dead claimant's state in the spot */
#define POLL_NOT_TOLD           23   /* a poller takes a dead owner's lock without DIED */
#define STAY_NOTIFIED           24   /* after a token S stays NOTIFIED */
#define SLEEP_THEN_PUBLISH      25   /* A5 before A4 */
#define POLL_TAKES_STALE        26   /* a poller takes the lock by a store, after it looked */
#define POLL_STAYS_NOTIFIED     27   /* a poll that finds nothing leaves S NOTIFIED: its post may never come, and no scan sees it */
#define NAP_UNCHOSEN            29   /* a thread that naps makes S WAITING first, and does not mark W */
#define NAP_TAKES_BARE          30   /* a thread that has napped takes the lock without PARKED */
#define A5_RELIES_ON_NOBODY     31   /* A5 leaves the mark out although no spot is NOTIFIED */
#define A5_RELIES_ON_ANY_KEY    32   /* A5 leaves the mark out when a spot is NOTIFIED for another lock */
#define GIVES_WAY_TO_NOBODY     28   /* A5 leaves the lock free although no spot is NOTIFIED */
#define GIVES_WAY_FOR_EVER      42   /* A5 leaves the lock free after a poll, too */
#define A4_PLAIN_STORE          33   /* A4 and A6 store S, and A5 relies on others nevertheless */
#define F3_UNCHECKED            34   /* nobody looks whether the chosen thread still waits */
#define A8_KEEPS_RESERVATION    35   /* withdrawing leaves a lock that is reserved for the thread as it is */
#define POLL_KEEPS_RESERVATION  36   /* a poll does not look for whom a lock is reserved */
#define POLL_TRUSTS_SPOT        37   /* a poll looks whether the chosen one's spot says that it waits, not whether it lives */
#define F3_NOT_AGAIN            38   /* an exception after F2 ends the release */
#define TAKES_ANY_RESERVATION   39   /* a waiter takes a lock that is reserved for another */
#define F0_KEEPS_PARKED         40   /* PRECEDENCE: the owner looks for waiters without taking PARKED away first */
#define F0_KEEPS_NAME           41   /* who hands over what is not its own only takes PARKED away, as an owner does: two may do so */
#ifndef MUTATION
#define MUTATION NONE
#endif
#define IS(mutation) (MUTATION == mutation)

#define OWNER   7
#define PARKED  8
#define DIED    16
#define RESERVED 32         /* OWNER is a spot then, and ODD the lowest bit of its sequence */
#define ODD      64
#define NOBODYS 128         /* RESERVED for nobody; OWNER is the thread that looks for somebody */

#define IDLE     0
#define WAITING  1
#define NOTIFIED 2
#define STATE(x)      ((x) & 3)
#define KEY(x)        (((x) >> 2) & 1)
#define SEQUENCE(x)   ((x) >> 3)
#define WORD(sequence, key, state) ((((sequence) % SEQUENCES) << 3) | ((key) << 2) | (state))

#define NOBODY 255

byte W[LOCKS];
byte S[SPOTS];
byte tokens[SPOTS];
byte claim[SPOTS];
byte dead;                  /* a bit for each thread */

#define IS_DEAD(t)   ((dead >> (t)) & 1)
#define FREE(w)      (((w) & (OWNER | RESERVED)) == 0)
#define DEAD_OWNER(w) (((w) & OWNER) != 0 && !((w) & RESERVED) && IS_DEAD((w) & OWNER))
#define RESERVATION(i, x) (RESERVED | (i) | ((SEQUENCE(x) & 1) * ODD))
#define RESERVED_FOR(w, i, key) (HANDOVER && !((w) & NOBODYS) && ((w) & (RESERVED | OWNER | ODD)) == RESERVATION(i, S[i]) && STATE(S[i]) != IDLE && KEY(S[i]) == (key))
/* For whom it is, is there and waits for it. */
#define IS_GOOD(w, i, key) (RESERVED_FOR(w, i, key) && !IS_DEAD(claim[i]))
#define IS_VALID(w, key) (IS_GOOD(w, (w) & OWNER, key))

/* Ghosts: seen by the checks only. */
byte inside[LOCKS];         /* who is in the critical section */
bool owed[LOCKS];           /* a death that nobody was told of */
byte stage[THREADS + 2];    /* where a thread is, and with which lock */
byte posting[SPOTS];        /* how many are between their exchange of S and their post */
byte crashes, polls, finished;
#if FOREIGN
byte duty[LOCKS];           /* whose acquisition Releaser is to release */
#endif

#define OUT   0
#define CLAIM 1             /* from C1 to A4 */
#define LOOK  2             /* S is published, and the thread has not yet slept, or was just woken */
#define SLEEP 3
#define TAKEN 4             /* from the exchange to A7 */
#define WAKE  5             /* from R2 or A8 to the end of unpark_one */
#define STAGE(what, lock) ((what) | ((lock) << 3))

#if STORE_BUFFER
byte buffered[SPOTS];       /* a value of S + 1 that is on its way to memory; 0: none.  One place: a second store waits */
#define DRAIN(spot) if :: buffered[spot] != 0 -> S[spot] = buffered[spot] - 1; buffered[spot] = 0 :: else fi
#define OWN_S(spot) (buffered[spot] != 0 -> buffered[spot] - 1 : S[spot])
#define STORE_S(spot, x) buffered[spot] = (x) + 1
#define ROOM(spot) (buffered[spot] == 0)
#else
#define DRAIN(spot) skip
#define OWN_S(spot) S[spot]
#define STORE_S(spot, x) S[spot] = x
#define ROOM(spot) true
#endif
/* Where A5 may leave its exchange out, A4 and A6 are exchanges. */
#if NAPS && MUTATION != A4_PLAIN_STORE
#define PUBLISH_S(spot, x) DRAIN(spot); S[spot] = x
#else
#define PUBLISH_S(spot, x) STORE_S(spot, x)
#endif
#define DRAIN_OWN  if :: spot != NOBODY -> DRAIN(spot) :: else fi

/* Nobody gives way any more after a poll: the thread that it relies on may have been chosen by one that died. */
#if POLL
#define HAS_POLLED(x) has_polled = x
#define GIVES_WAY (!has_polled || IS(GIVES_WAY_FOR_EVER))
#else
#define HAS_POLLED(x) skip
#define GIVES_WAY true
#endif

/* The wake-up of a dead thread's spot that was on its way when it died, and that a poller may reap. */
#define REAPABLE(i, key) (STATE(S[i]) == NOTIFIED && KEY(S[i]) == (key) && claim[i] != 0 && IS_DEAD(claim[i]))
/* Another thread is on its way in: it takes the lock with PARKED, or marks it, or passes its wake-up on. */
#define NOTIFIED_ELSEWHERE(i, key) (i != spot && STATE(S[i]) == NOTIFIED && KEY(S[i]) == (key))
#define NOTIFIED_FOR_ANYTHING(i, key) (STATE(S[i]) == NOTIFIED)
#define NOTIFIED_ANYWHERE(i, key) (STATE(S[i]) == NOTIFIED && KEY(S[i]) == (key))
#if MUTATION == A5_RELIES_ON_NOBODY
#define RELIES(key) true
#elif MUTATION == A5_RELIES_ON_ANY_KEY
#define RELIES(key) ANY_SPOT(NOTIFIED_FOR_ANYTHING, key)
#else
#define RELIES(key) ANY_SPOT(NOTIFIED_ANYWHERE, key)
#endif
#if SPOTS == 1
#define ANY_SPOT(P, key) (P(0, key))
#elif SPOTS == 2
#define ANY_SPOT(P, key) (P(0, key) || P(1, key))
#elif SPOTS == 3
#define ANY_SPOT(P, key) (P(0, key) || P(1, key) || P(2, key))
#else
#define ANY_SPOT(P, key) (P(0, key) || P(1, key) || P(2, key) || P(3, key))
#endif
#if HANDOVER
#define KEPT_IN_VAIN(key) ((W[key] & RESERVED) && !IS_VALID(W[key], key) && !(MUTATION == POLL_TRUSTS_SPOT && RESERVED_FOR(W[key], W[key] & OWNER, key)) && MUTATION != POLL_KEEPS_RESERVATION)
#define KEPT_FOR_ME(key) (spot != NOBODY && RESERVED_FOR(W[key], spot, key))
#else
#define KEPT_IN_VAIN(key) false
#define KEPT_FOR_ME(key) false
#endif
#define POLL_HELPS(key) (KEPT_IN_VAIN(key) || KEPT_FOR_ME(key) || FREE(W[key]) || DEAD_OWNER(W[key]) || (!(W[key] & PARKED) && !ANY_SPOT(NOTIFIED_ELSEWHERE, key)) || ANY_SPOT(REAPABLE, key))

#define ANY_THREAD(P, k) (P(1, k) || P(2, k) || (THREADS > 2 && P(3 % (THREADS + 1), k)) || (THREADS > 3 && P(4 % (THREADS + 1), k)))
#define SLEEPS(i, k)    (stage[claim[i]] == STAGE(SLEEP, k) && tokens[i] == 0 && posting[i] == 0)
#define AWAKES(i, k)    (stage[claim[i]] == STAGE(SLEEP, k) && (tokens[i] != 0 || posting[i] != 0))
#define UNDER_WAY(t, k) (stage[t] == STAGE(LOOK, k) || stage[t] == STAGE(WAKE, k))

/* Somebody sleeps on this lock, and nobody is going to wake it. */
#define LOST(k) ( \
    ANY_SPOT(SLEEPS, k) && !ANY_SPOT(AWAKES, k) && !ANY_THREAD(UNDER_WAY, k) && !(FOREIGN && UNDER_WAY(THREADS + 1, k)) \
    && !(!FREE(W[k]) && !DEAD_OWNER(W[k]) && !(W[k] & RESERVED) && (W[k] & PARKED)))

#if POLL == 2
#define POLL_NOW(key) LOST(key)
#elif POLL == 1
#define POLL_NOW(key) POLL_HELPS(key)
#else
#define POLL_NOW(key) false
#endif

/* `seen` is 0 exactly between the exchange of S and the post. */
inline forget_scan() {
    if :: chosen != NOBODY && seen == 0 -> posting[chosen]-- :: else fi;
    other = 0; chosen = NOBODY; seen = 0; in_flight = 0
}

#if HANDOVER
#define FORGET_HANDOVER seen_word = 0; polling = 0
#else
#define FORGET_HANDOVER skip
#endif

/* Death at this step.  The memory of a dead thread stays as it is; what it had in its store buffer arrives. */
inline die() {
    DRAIN_OWN;
    dead = dead | (1 << me);
    stage[me] = OUT;
    lock = 0;
    do
    :: lock < LOCKS ->
        if :: (W[lock] & (OWNER | RESERVED)) == me -> owed[lock] = true :: else fi;
        if :: inside[lock] == me -> inside[lock] = 0 :: else fi;
        lock++
    :: else -> break
    od;
    lock = 0; nested = 0; told = 0; got = 0; again = 0; in_release = 0; spot = NOBODY; round = 0;
    forget_scan();
    FORGET_HANDOVER
}
#if CRASHES
#define MAY_DIE :: atomic { crashes < CRASHES -> crashes++; goto dying }
#else
#define MAY_DIE
#endif

/* An exception at this step of an acquire: A8.  During A8: A8 once more.  After R2: the rest of the release once more. */
#if WITHDRAW
#define MAY_LEAVE       :: atomic { true -> stage[me] = STAGE(WAKE, lock); forget_scan(); goto A8 }
#define MAY_LEAVE_AGAIN :: atomic { !again && !in_release -> again = 1; forget_scan(); goto A8 }
#define MAY_REPEAT_R3   :: atomic { !again && in_release -> again = 1; forget_scan(); if :: IS(R3_SKIPPED) -> goto wake_up_passed :: else -> goto unpark_one fi }
#else
#define MAY_LEAVE
#define MAY_LEAVE_AGAIN
#define MAY_REPEAT_R3
#endif


inline post() { tokens[chosen] = (tokens[chosen] < TOKENS -> tokens[chosen] + 1 : TOKENS) }

/*
 * An option of an if must not begin with an if that has an else: SPIN takes both for one, and the else waits until nobody
 * may die or leave any more.  Hence the `true ->` at the beginning of some.
 */

/* With PRECEDENCE nobody is granted the lock while one is asleep who is alive and better. */
#if PRECEDENCE
#define IS_OVERTAKEN(i, key) (claim[i] > granted && !IS_DEAD(claim[i]) && stage[claim[i]] == STAGE(SLEEP, key) && KEY(S[i]) == (key))
#define GRANT(thread) granted = thread; assert(!ANY_SPOT(IS_OVERTAKEN, lock)); granted = 0
byte granted;
#else
#define GRANT(thread) skip
#endif

/* One look of unpark_one at one spot. */
#define MATCHES(i) (IS(UNPARK_ANY_KEY) || KEY(S[i]) == lock)
inline look_at(i) {
    if
    :: STATE(S[i]) == NOTIFIED && MATCHES(i) -> in_flight = 1
    :: STATE(S[i]) == WAITING && MATCHES(i) -> chosen = i; seen = S[i]
    :: STATE(S[i]) == WAITING && MATCHES(i) && chosen != NOBODY -> skip     /* the other one is better */
    :: STATE(S[i]) == IDLE || !MATCHES(i) -> skip
    fi
}

proctype Thread(byte me) {
    byte lock;              /* the one that is being acquired or released */
    byte round;
    bit nested;             /* lock 0 is held while lock 1 is acquired */
    bit told;               /* a death is to be reported when acquire returns */
    bit got;                /* this thread's own exchange succeeded */
    bit again;              /* the one exception during A8 or R3 has been */
    bit in_release;
    byte spot = NOBODY;
    byte other, chosen = NOBODY, seen;      /* unpark_one: spots, and the word seen there */
    bit in_flight;          /* unpark_one saw a NOTIFIED spot */
#if POLL
    bit has_polled;         /* since A4 */
#endif
#if HANDOVER
    byte seen_word;         /* W as F0 left it */
    bit polling;            /* settle was called by a poll, which goes on to look at W */
#endif

#if NEWCOMERS
    if
    :: me > THREADS - NEWCOMERS -> end_nobody_died: (dead != 0)
    :: else
    fi;
#else
    spot = me - 1;
#endif

next_round:
    assert(STORE_BUFFER || spot == NOBODY || STATE(S[spot]) == IDLE);       /* I4 */
    if
    :: atomic { (ROUNDS == 0 || round == ROUNDS) -> finished++; round = 0; goto end_of_thread }
    :: atomic {
        (ROUNDS == 0 || round < ROUNDS) ->
        if :: ROUNDS -> round++ :: else fi;
        if
        :: lock = 0; nested = (LOCKS == 2 && me == 1)
        :: LOCKS == 2 && me != 1 -> lock = LOCKS - 1
        fi
    }
    fi;

A1: if
    MAY_DIE
    :: atomic { W[lock] == 0 -> GRANT(me); DRAIN_OWN; W[lock] = me; got = 1; goto to_return }
    :: atomic { W[lock] != 0 -> DRAIN_OWN }
    fi;

A2: if
    MAY_DIE
    :: atomic {
        FREE(W[lock]) ->
        GRANT(me);
        DRAIN_OWN;
        told = ((W[lock] & DIED) != 0);
        W[lock] = me | (W[lock] & (PARKED | DIED));
        got = 1;
        goto to_return
    }
    :: atomic { me > TRIERS && spot != NOBODY -> goto A4 }
    :: atomic { me > TRIERS && spot == NOBODY -> goto C1 }
    :: atomic { me <= TRIERS }
    fi;

A3: if
    MAY_DIE
#if HANDOVER
    :: atomic { KEPT_IN_VAIN(lock) -> polling = 1; stage[me] = STAGE(WAKE, lock); goto F0 }
#endif
#if PRECEDENCE
    :: atomic { DEAD_OWNER(W[lock]) -> polling = 1; stage[me] = STAGE(WAKE, lock); goto F0 }
#else
    :: atomic { DEAD_OWNER(W[lock]) -> DRAIN_OWN; W[lock] = me | PARKED | DIED; told = 1; got = 1; goto to_return }
#endif
    :: atomic { !DEAD_OWNER(W[lock]) -> goto gave_up }
    fi;

#if NEWCOMERS
#define CLAIMABLE(i, unused) (claim[i] == 0 || IS_DEAD(claim[i]))
C1: if
    MAY_DIE
    :: atomic { !ANY_SPOT(CLAIMABLE, 0) -> goto gave_up }       /* the table is full: an error */
    :: atomic {
        ANY_SPOT(CLAIMABLE, 0) ->
        if
        :: CLAIMABLE(0, 0) -> spot = 0
        :: SPOTS > 1 && CLAIMABLE(1 % SPOTS, 0) -> spot = 1
        :: SPOTS > 2 && CLAIMABLE(2 % SPOTS, 0) -> spot = 2
        fi;
        if
        :: IS(CLAIM_AFTER_IDLE) -> seen = claim[spot]; goto C0
        :: else -> claim[spot] = me; stage[me] = STAGE(CLAIM, lock)
        fi
    }
    fi;
C2: if
    MAY_DIE
#if MUTATION == CLAIM_LEFT_DIRTY
    :: atomic { WITHDRAW -> stage[me] = OUT; goto gave_up }
#else
    MAY_LEAVE
#endif
    :: atomic { ROOM(spot) -> STORE_S(spot, WORD(SEQUENCE(OWN_S(spot)), 0, IDLE)); goto A4 }
    fi;
C0: /* CLAIM_AFTER_IDLE only. */
    atomic { S[spot] = WORD(SEQUENCE(S[spot]), 0, IDLE) };
    atomic {
        if
        :: claim[spot] == seen -> claim[spot] = me; seen = 0; stage[me] = STAGE(CLAIM, lock)
        :: else -> spot = NOBODY; seen = 0; goto C1
        fi
    };
#else
C1: skip;
#endif

A4: if
    MAY_DIE
    MAY_LEAVE
    :: atomic {
        ROOM(spot) && !IS(SLEEP_THEN_PUBLISH) ->
        PUBLISH_S(spot, WORD(SEQUENCE(OWN_S(spot)) + 1, lock, WAITING));
        HAS_POLLED(0);
        stage[me] = STAGE(LOOK, lock)
    }
    :: atomic { IS(SLEEP_THEN_PUBLISH) && !FREE(W[lock]) -> W[lock] = W[lock] | PARKED; told = 1 }
    :: atomic { IS(SLEEP_THEN_PUBLISH) && FREE(W[lock]) }
    fi;
#if MUTATION == SLEEP_THEN_PUBLISH
    atomic {
        S[spot] = WORD(SEQUENCE(S[spot]) + 1, lock, WAITING);
        if                  /* It saw an owner, or not, before it published, and does not look again. */
        :: told -> told = 0; stage[me] = STAGE(SLEEP, lock); goto A6
        :: else -> stage[me] = STAGE(LOOK, lock)
        fi
    };
#endif

#if HANDOVER
#define TAKE_WHAT_IS_RESERVED \
    :: atomic { \
        KEPT_FOR_ME(lock) || (IS(TAKES_ANY_RESERVATION) && (W[lock] & RESERVED)) -> \
        if :: IS(TAKES_ANY_RESERVATION) && !KEPT_FOR_ME(lock) -> GRANT(me) :: else fi; \
        DRAIN(spot); told = ((W[lock] & DIED) != 0); \
        W[lock] = me | PARKED | (W[lock] & DIED); \
        got = 1; stage[me] = STAGE(TAKEN, lock); \
        goto A7 \
    }
#else
#define TAKE_WHAT_IS_RESERVED
#endif
A5: if
    MAY_DIE
    MAY_LEAVE
    :: atomic {
        FREE(W[lock]) ->
        GRANT(me);
        DRAIN(spot);
        told = ((W[lock] & DIED) != 0);
        if
        :: IS(TAKE_WITHOUT_PARKED) -> W[lock] = me | (W[lock] & DIED)
        :: IS(TAKE_WITH_SEEN_PARKED) -> W[lock] = me | (W[lock] & (PARKED | DIED))
        :: IS(HEIR_DROPS_DIED) -> W[lock] = me | PARKED
        :: else -> W[lock] = me | PARKED | (W[lock] & DIED)
        fi;
        got = 1; stage[me] = STAGE(TAKEN, lock);
        goto A7
    }
    TAKE_WHAT_IS_RESERVED
    :: atomic { NAPS && !FREE(W[lock]) && !KEPT_FOR_ME(lock) && !PRECEDENCE -> goto A5_held }
    :: atomic { NAPS && FREE(W[lock]) && !PRECEDENCE && RELIES(lock) && GIVES_WAY -> goto A5_held }
    :: atomic { IS(GIVES_WAY_TO_NOBODY) && FREE(W[lock]) -> stage[me] = STAGE(SLEEP, lock); goto A6 }
    :: atomic {
        !FREE(W[lock]) && !KEPT_FOR_ME(lock) ->
        if
        :: IS(A5_PLAIN_LOOK) && (W[lock] & PARKED) -> skip
        :: else -> DRAIN(spot); W[lock] = W[lock] | PARKED
        fi;
        stage[me] = STAGE(SLEEP, lock);
        if
        :: goto A6
        :: WITHDRAW -> goto A6T
        fi
    }
    fi;

A5_held: /* It saw an owner, or gives way, and looks whether another thread is on its way in. */
    if
    MAY_DIE
    MAY_LEAVE
    :: atomic { RELIES(lock) -> stage[me] = STAGE(SLEEP, lock); if :: goto A6 :: WITHDRAW -> goto A6T fi }
    :: atomic { !RELIES(lock) && !FREE(W[lock]) && !KEPT_FOR_ME(lock) -> DRAIN(spot); W[lock] = W[lock] | PARKED; stage[me] = STAGE(SLEEP, lock); if :: goto A6 :: WITHDRAW -> goto A6T fi }
    :: atomic { !RELIES(lock) && (FREE(W[lock]) || KEPT_FOR_ME(lock)) -> goto A5 }
    fi;

#define TOKEN    :: atomic { tokens[spot] > 0 -> tokens[spot]--; stage[me] = STAGE(LOOK, lock); goto woken }
#define POLLED   :: atomic { POLL_NOW(lock) -> stage[me] = STAGE(LOOK, lock); if :: POLL == 2 -> polls++; assert(polls <= POLLS) :: else fi; HAS_POLLED(1); goto poll }
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

woken: /* By a token, or by a poll that found nothing: the post of a dead notifier never comes. */
    if
    MAY_DIE
    MAY_LEAVE
#if NAPS
    TAKE_WHAT_IS_RESERVED
    :: atomic {         /* A nap is over, or it looks at once. */
        STATE(OWN_S(spot)) == NOTIFIED && FREE(W[lock]) ->
        GRANT(me);
        DRAIN(spot);
        told = ((W[lock] & DIED) != 0);
        W[lock] = me | (IS(NAP_TAKES_BARE) -> 0 : PARKED) | (W[lock] & DIED);
        got = 1; stage[me] = STAGE(TAKEN, lock);
        goto A7
    }
    :: atomic {         /* It has napped for long enough, and insists. */
        STATE(OWN_S(spot)) == NOTIFIED && !FREE(W[lock]) && !(W[lock] & PARKED) -> DRAIN(spot); W[lock] = W[lock] | PARKED; goto woken
    }
#if MUTATION == NAP_UNCHOSEN
    :: atomic { STATE(OWN_S(spot)) == NOTIFIED && ROOM(spot) && !FREE(W[lock]) -> STORE_S(spot, WORD(SEQUENCE(OWN_S(spot)), lock, WAITING)); stage[me] = STAGE(SLEEP, lock); goto A6 }
#endif
#endif
    :: atomic { STATE(OWN_S(spot)) == NOTIFIED && ROOM(spot) && !IS(STAY_NOTIFIED) -> PUBLISH_S(spot, WORD(SEQUENCE(OWN_S(spot)), lock, WAITING)); goto A5 }
    :: atomic { STATE(OWN_S(spot)) != NOTIFIED || IS(STAY_NOTIFIED) -> goto A5 }
    fi;

poll: /* Reap first; then look at the owner. */
#define DEAD_CLAIMANT(i, unused) (claim[i] != 0 && IS_DEAD(claim[i]))
#if MUTATION == REAP_CLAIM_FIRST
#define TO_REAP DEAD_CLAIMANT
#elif MUTATION == REAP_LIVING
#define TO_REAP NOTIFIED_ELSEWHERE
#elif MUTATION == NO_REAP
#define TO_REAP(i, key) false
#else
#define TO_REAP REAPABLE
#endif
#define REAP_AT(i) :: atomic { i < SPOTS && TO_REAP(i % SPOTS, lock) -> other = i; seen = S[i % SPOTS]; goto reap }
    if
    MAY_DIE
    MAY_LEAVE
    REAP_AT(0)
    REAP_AT(1)
    REAP_AT(2)
    REAP_AT(3)
    :: atomic { !ANY_SPOT(TO_REAP, lock) || IS(REAP_CLAIM_FIRST) -> goto look }
    fi;
reap: /* The claim is taken by an exchange from the dead thread's name; then S is set to IDLE, and the claim given back. */
#if MUTATION == REAP_CLAIM_FIRST
    if
    MAY_DIE
    MAY_LEAVE
    :: atomic { seen = S[other]; if :: STATE(seen) == NOTIFIED && KEY(seen) == lock :: else -> forget_scan(); goto look fi }
    fi;
#elif MUTATION != REAP_LIVING && MUTATION != REAP_STORE
    if
    MAY_DIE
    MAY_LEAVE
    :: atomic { claim[other] != 0 && IS_DEAD(claim[other]) -> DRAIN(spot); claim[other] = me }
    :: atomic { claim[other] == 0 || !IS_DEAD(claim[other]) -> forget_scan(); goto poll }
    fi;
#endif
    if                      /* An exception does not get in between here: what was begun is finished first. */
    MAY_DIE
    :: atomic {
        true ->
        DRAIN(spot);
        if
        :: IS(REAP_STORE) || IS(REAP_LIVING) || IS(REAP_CLAIM_FIRST) ->
            if :: S[other] == seen || IS(REAP_STORE) -> S[other] = WORD(SEQUENCE(seen), 0, IDLE) :: else fi
        :: else -> S[other] = WORD(SEQUENCE(S[other]), 0, IDLE)
        fi
    }
    fi;
    if
    MAY_DIE
    :: atomic {
        true ->
        if :: claim[other] == me && other != spot -> claim[other] = 0 :: else fi;
        forget_scan();
        if :: IS(REAP_CLAIM_FIRST) -> goto look :: else -> goto poll fi
    }
    fi;
look:
    if
    MAY_DIE
    MAY_LEAVE
#if HANDOVER
    :: atomic { KEPT_IN_VAIN(lock) -> polling = 1; stage[me] = STAGE(WAKE, lock); goto F0 }
#endif
#if PRECEDENCE
    :: atomic { DEAD_OWNER(W[lock]) -> polling = 1; stage[me] = STAGE(WAKE, lock); goto F0 }
#endif
    :: atomic {
        DEAD_OWNER(W[lock]) && !PRECEDENCE ->
        if
        :: IS(POLL_TAKES_STALE) -> goto take_stale
        :: else
        fi;
        DRAIN(spot);
        W[lock] = me | PARKED | (IS(POLL_NOT_TOLD) -> 0 : DIED);
        told = !IS(POLL_NOT_TOLD); got = 1; stage[me] = STAGE(TAKEN, lock);
        goto A7
    }
    :: atomic { !DEAD_OWNER(W[lock]) && !KEPT_IN_VAIN(lock) -> if :: IS(POLL_STAYS_NOTIFIED) -> goto A5 :: else -> goto woken fi }
    fi;
take_stale: /* POLL_TAKES_STALE only. */
    atomic { W[lock] = me | PARKED | DIED; told = 1; got = 1; stage[me] = STAGE(TAKEN, lock) };

A7: if
    MAY_DIE
    MAY_LEAVE
    :: atomic { ROOM(spot) -> STORE_S(spot, WORD(SEQUENCE(OWN_S(spot)), 0, IDLE)); stage[me] = OUT }
    fi;

to_return:
    if
    MAY_DIE
    MAY_LEAVE
    :: atomic {
        assert(told == owed[lock]);
        owed[lock] = false; told = 0; got = 0;
        assert(inside[lock] == 0);
        inside[lock] = me;
        if
        :: nested && lock == 0 -> lock = LOCKS - 1; goto A1
        :: else
        fi
    }
    fi;

critical:
    if
    MAY_DIE
#if FOREIGN
    :: atomic { inside[lock] = 0; duty[lock] = me; goto next_round_or_outer }
#endif
    :: atomic { inside[lock] = 0; in_release = 1 }
    fi;

#if MUTATION == R3_BEFORE_R2
    if :: W[lock] & PARKED -> atomic { stage[me] = STAGE(WAKE, lock); goto unpark_one } :: else fi;
#endif
R1: if
    MAY_DIE
    :: atomic { W[lock] == me -> DRAIN_OWN; W[lock] = 0; in_release = 0; goto next_round_or_outer }
    :: atomic { W[lock] != me -> DRAIN_OWN }
    fi;

R2: if
    MAY_DIE
#if HANDOVER
    :: atomic { true -> stage[me] = STAGE(WAKE, lock); goto F0 }
#endif
#if !PRECEDENCE
    :: atomic {
        assert((W[lock] & (OWNER | RESERVED)) == me);
        W[lock] = (IS(R2_KEEPS_DIED) -> W[lock] & DIED : 0);
        stage[me] = STAGE(WAKE, lock);
        if :: IS(R3_BEFORE_R2) -> goto wake_up_passed :: else fi
    }
#endif
    fi;

#if HANDOVER
    goto unpark_one;

/* Hand over what is ours, or a dead owner's, or reserved in vain.  F0 takes PARKED away, so that F2 fails if anybody goes to
 * sleep after F1 looked.  What is not ours others may hand over at the same time: F0 puts a name of its own there, so that
 * F2 fails if another has done F0 since, and has taken away the PARKED of somebody whom F1 did not see. */
#define MINE (((W[lock] & OWNER) == me) && !(W[lock] & RESERVED) && (in_release || got))
#define MAY_BE_HANDED_OVER (MINE || (polling && DEAD_OWNER(W[lock])) || KEPT_IN_VAIN(lock) || SPOT_HAS_LEFT)
#define SPOT_HAS_LEFT ((W[lock] & RESERVED) && !RESERVED_FOR(W[lock], W[lock] & OWNER, lock))
#define IS_BETTER(i) (chosen == NOBODY || claim[i] > claim[chosen])
#define CANDIDATE(i) (STATE(S[i]) != IDLE && KEY(S[i]) == lock && !(polling && IS_DEAD(claim[i])))
#define MAY_REPEAT_F :: atomic { WITHDRAW && !again && in_release -> again = 1; forget_scan(); goto settle_again }
#define MAY_LEAVE_F  :: atomic { WITHDRAW && !again && !in_release -> again = 1; polling = 0; forget_scan(); goto A8 }
F0: if
    MAY_DIE
    MAY_REPEAT_F
    MAY_LEAVE_F
    :: atomic {
        MAY_BE_HANDED_OVER ->
        if
        :: IS(F0_KEEPS_PARKED)
        :: MINE || IS(F0_KEEPS_NAME) -> W[lock] = W[lock] & ~PARKED
        :: !MINE && !IS(F0_KEEPS_NAME) && !IS(F0_KEEPS_PARKED) -> W[lock] = RESERVED | NOBODYS | me | (DEAD_OWNER(W[lock]) -> DIED : W[lock] & DIED)
        fi;
        seen_word = W[lock]; chosen = NOBODY; seen = 0; other = 0
    }
    :: atomic { !MAY_BE_HANDED_OVER -> goto settle }
    fi;
F1: if
    MAY_DIE
    MAY_REPEAT_F
    MAY_LEAVE_F
    :: atomic {
        SCAN_AT_ONCE ->
        do
        :: other < SPOTS && CANDIDATE(other) && (!PRECEDENCE || IS_BETTER(other)) -> chosen = other; seen = S[other]; other++
        :: other < SPOTS && (!CANDIDATE(other) || !PRECEDENCE || !IS_BETTER(other)) && !(CANDIDATE(other) && chosen == NOBODY) -> other++
        :: other == SPOTS -> other = 0; break
        od
    }
    :: atomic { !SCAN_AT_ONCE && other < SPOTS && CANDIDATE(other) && (!PRECEDENCE || IS_BETTER(other)) -> chosen = other; seen = S[other]; other++; goto F1 }
    :: atomic { !SCAN_AT_ONCE && other < SPOTS && (!CANDIDATE(other) || !PRECEDENCE || !IS_BETTER(other)) && !(CANDIDATE(other) && chosen == NOBODY) -> other++; goto F1 }
    :: atomic { !SCAN_AT_ONCE && other == SPOTS -> other = 0 }
    fi;
F2: if
    MAY_DIE
    MAY_REPEAT_F
    MAY_LEAVE_F
    :: atomic {
        W[lock] == seen_word || (IS(F0_KEEPS_PARKED) && (W[lock] & ~PARKED) == (seen_word & ~PARKED)) ->
        DRAIN_OWN;
        seen_word = (in_release && MINE -> 0 : (DEAD_OWNER(W[lock]) -> DIED : W[lock] & DIED));
        if
        :: chosen != NOBODY -> GRANT(claim[chosen]); W[lock] = RESERVATION(chosen, seen) | PARKED | seen_word
        :: chosen == NOBODY -> W[lock] = seen_word
        fi;
        if :: !in_release && !polling && got -> got = 0; told = 0 :: else fi;
        seen_word = 0; chosen = NOBODY; seen = 0; other = 0; in_flight = 0;
        if :: IS(F3_NOT_AGAIN) && again -> goto settled :: else fi
    }
    :: atomic { W[lock] != seen_word && !(IS(F0_KEEPS_PARKED) && (W[lock] & ~PARKED) == (seen_word & ~PARKED)) -> chosen = NOBODY; seen = 0; other = 0; in_flight = 0; goto F0 }
    fi;
settle: /* After F2, by A8, and by polls. */
    if
    MAY_DIE
    MAY_REPEAT_F
    MAY_LEAVE_F
    :: atomic { (W[lock] & RESERVED) && RESERVED_FOR(W[lock], W[lock] & OWNER, lock) && STATE(S[W[lock] & OWNER]) == WAITING -> chosen = W[lock] & OWNER; seen = S[chosen]; goto F3 }
    :: atomic { (W[lock] & RESERVED) && RESERVED_FOR(W[lock], W[lock] & OWNER, lock) && STATE(S[W[lock] & OWNER]) == NOTIFIED -> chosen = W[lock] & OWNER; seen = S[chosen]; post(); forget_scan(); goto settled }
    :: atomic { SPOT_HAS_LEFT -> if :: IS(F3_UNCHECKED) -> goto settled :: else -> goto F0 fi }
    :: atomic { FREE(W[lock]) && !PRECEDENCE && !polling -> goto unpark_one }
    :: atomic { !(W[lock] & RESERVED) && !(FREE(W[lock]) && !PRECEDENCE && !polling) -> goto settled }
    fi;
settle_again: /* After an exception: it begins anew, with what it finds. */
    if
    :: atomic { MINE -> goto F0 }
    :: atomic { !MINE && IS(F3_NOT_AGAIN) -> goto settled }
    :: atomic { !MINE && !IS(F3_NOT_AGAIN) -> goto settle }
    fi;
F3: if
    MAY_DIE
#if WITHDRAW
    :: atomic { !again -> post(); again = 1; forget_scan(); if :: in_release -> goto settle_again :: else -> polling = 0; goto A8 fi }
#endif
    :: atomic { S[chosen] == seen -> S[chosen] = (S[chosen] & ~3) | NOTIFIED; seen = 0; posting[chosen]++ }
    :: atomic { S[chosen] != seen -> forget_scan(); goto settle }
    fi;
    if
    MAY_DIE
    :: atomic { true -> post(); forget_scan() }
    fi;
settled:
    atomic {
        if
        :: polling && me > TRIERS -> polling = 0; stage[me] = STAGE(LOOK, lock); forget_scan(); goto woken
        :: polling && me <= TRIERS -> polling = 0; stage[me] = OUT; forget_scan(); goto gave_up
        :: else -> goto wake_up_passed
        fi
    };
#endif

unpark_one: /* R3 and A8 */
    other = 0;
scan:
#if SCAN_AT_ONCE
    if
    MAY_DIE
    MAY_LEAVE_AGAIN
    MAY_REPEAT_R3
    :: atomic {
        do
        :: other < SPOTS -> look_at(other); other++
        :: other == SPOTS -> other = 0; break
        od
    }
    fi;
#else
    if
    MAY_DIE
    MAY_LEAVE_AGAIN
    MAY_REPEAT_R3
    :: atomic { other < SPOTS -> look_at(other); other++; if :: other < SPOTS -> goto scan :: else -> other = 0 fi }
    fi;
#endif
    if
    :: atomic { in_flight && (SKIP || IS(NO_REAP)) -> forget_scan(); goto wake_up_passed }
    :: atomic { chosen != NOBODY && !(in_flight && (SKIP == 2 || IS(NO_REAP))) -> in_flight = 0; goto notify }
    :: atomic { chosen == NOBODY && !(in_flight && (SKIP == 2 || IS(NO_REAP))) -> forget_scan() }
    fi;

R3_none:
    if
    MAY_DIE
    MAY_LEAVE_AGAIN
    MAY_REPEAT_R3
    :: atomic {
        true ->
        if
        :: in_release && IS(R3_PLAIN_CLEAR) -> W[lock] = 0
        :: else
        fi;
        goto wake_up_passed
    }
    fi;

notify: /* Nobody knows, after an exception, whether the exchange was made: the post is made in any case. */
    if
    MAY_DIE
#if WITHDRAW
    :: atomic { !again -> post(); again = 1; forget_scan(); if :: in_release -> goto unpark_one :: else -> goto A8 fi }
#endif
    :: atomic {
        S[chosen] == seen || (IS(NOTIFY_BLIND) && STATE(S[chosen]) == WAITING) ->
        S[chosen] = (S[chosen] & ~3) | NOTIFIED; seen = 0; posting[chosen]++
    }
    :: atomic { S[chosen] != seen && !(IS(NOTIFY_BLIND) && STATE(S[chosen]) == WAITING) -> forget_scan(); goto unpark_one }
    fi;

post_it: /* An exception here must not lose the post: it is made first, then everything is done once more. */
    if
    MAY_DIE
#if MUTATION == R3_POST_LOST
    MAY_LEAVE_AGAIN
    MAY_REPEAT_R3
#endif
    :: atomic {
        post();
        forget_scan()
    }
    fi;
#if WITHDRAW
    if
    MAY_LEAVE_AGAIN
    MAY_REPEAT_R3
    :: atomic { true }
    fi;
#endif

wake_up_passed:
    atomic {
#if HANDOVER
        polling = 0;
#endif
        forget_scan();
        stage[me] = OUT; again = 0;
        if
        :: in_release && IS(R3_BEFORE_R2) && (W[lock] & OWNER) == me -> goto R1
        :: in_release && !(IS(R3_BEFORE_R2) && (W[lock] & OWNER) == me) -> in_release = 0; goto next_round_or_outer
        :: !in_release -> goto gave_up
        fi
    };

A8: if
    MAY_DIE
    MAY_LEAVE_AGAIN
    :: atomic {
        true ->
        if
        :: spot != NOBODY ->
            DRAIN(spot);
            if
            :: IS(A8_ONLY_NOTIFIED) && STATE(S[spot]) != NOTIFIED && !got -> S[spot] = WORD(SEQUENCE(S[spot]), 0, IDLE); goto wake_up_passed
            :: IS(A8_LOOKS_FIRST) -> skip
            :: else -> S[spot] = WORD(SEQUENCE(S[spot]), 0, IDLE)
            fi
        :: else
        fi
    }
    fi;
A8_word:
    if
    MAY_DIE
    MAY_LEAVE_AGAIN
    :: atomic {
        true ->
#if HANDOVER
        if
        :: got && (W[lock] & OWNER) == me && !(W[lock] & RESERVED) && (PRECEDENCE || IS(F3_UNCHECKED)) -> goto F0
        :: else
        fi;
#endif
        if
        :: got || (IS(A8_TRUSTS_WORD) && (W[lock] & OWNER) == me) ->
            W[lock] = W[lock] & DIED;
            got = 0; told = 0;
            goto A8_pass
        :: else
        fi;
        if
        :: FREE(W[lock]) -> goto A8_pass
        :: else
        fi;
#if HANDOVER
        if
        :: (W[lock] & RESERVED) && !IS(A8_KEEPS_RESERVATION) -> goto settle
        :: else
        fi;
#endif
        if
        :: IS(A8_LEAVES_OTHERS_ALONE)
        :: else -> W[lock] = W[lock] | PARKED
        fi;
        goto A8_done
    }
    fi;
A8_pass:
    if
    :: IS(A8_KEEPS_WAKEUP) -> goto A8_done
    :: else -> goto unpark_one
    fi;
A8_done:
    atomic {
        if :: IS(A8_LOOKS_FIRST) && spot != NOBODY -> S[spot] = WORD(SEQUENCE(S[spot]), 0, IDLE) :: else fi;
        goto wake_up_passed
    };

gave_up:
    atomic { told = 0; got = 0 };

next_round_or_outer:
    atomic {
        if
        :: nested && lock == LOCKS - 1 && inside[0] == me -> lock = 0; nested = 0; goto critical
        :: else -> lock = 0; nested = 0; goto next_round
        fi
    };

#if CRASHES
dying:
    atomic { true -> die() };
#endif

end_of_thread:
    skip
}

#if FOREIGN
/* R1 fails because W names another. */
proctype Releaser(byte me) {
    byte lock, chosen = NOBODY, other, seen;
    bit in_flight;
end_idle:
    if
    :: atomic { duty[0] != 0 -> lock = 0 }
    :: atomic { duty[LOCKS - 1] != 0 -> lock = LOCKS - 1 }
    fi;
    atomic {
        assert((W[lock] & OWNER) == duty[lock]);
        duty[lock] = 0;
        W[lock] = 0;
        stage[me] = STAGE(WAKE, lock)
    };
scan:
    atomic {
        do
        :: other < SPOTS -> look_at(other); other++
        :: other == SPOTS -> break
        od;
        other = 0;
        if
        :: in_flight && SKIP -> goto done
        :: chosen == NOBODY -> goto done
        :: chosen != NOBODY -> in_flight = 0
        fi
    };
    atomic {
        if
        :: S[chosen] == seen -> S[chosen] = (S[chosen] & ~3) | NOTIFIED; seen = 0; posting[chosen]++
        :: else -> forget_scan(); goto scan
        fi
    };
    atomic { post(); forget_scan(); goto done };
done:
    atomic { forget_scan(); lock = 0; stage[me] = OUT; goto end_idle }
}
#endif

#if STORE_BUFFER
proctype Memory() {
end:
    do
    :: atomic { buffered[0] != 0 -> DRAIN(0) }
    :: atomic { SPOTS > 1 && buffered[1 % SPOTS] != 0 -> DRAIN(1 % SPOTS) }
    :: atomic { SPOTS > 2 && buffered[2 % SPOTS] != 0 -> DRAIN(2 % SPOTS) }
    :: atomic { SPOTS > 3 && buffered[3 % SPOTS] != 0 -> DRAIN(3 % SPOTS) }
    od
}
#endif

#define I1_BROKEN(k) (!dead && LOST(k))
#define I2_BROKEN(k) (inside[k] != 0 && (W[k] & (OWNER | RESERVED)) != inside[k])
#define I3_BROKEN(k) ( \
    (owed[k] && !DEAD_OWNER(W[k]) && !(W[k] & DIED)) \
    || (!owed[k] && (DEAD_OWNER(W[k]) || (FREE(W[k]) && (W[k] & DIED)))))
#define I4_BROKEN(i, unused) (!STORE_BUFFER && STATE(S[i]) != IDLE && !IS_DEAD(claim[i]) && stage[claim[i]] == OUT)
#define I5_BROKEN(i, unused) ( \
    !STORE_BUFFER && STATE(S[i]) == IDLE && !IS_DEAD(claim[i]) && (stage[claim[i]] & 7) == SLEEP)

/* Its guards are true only where an invariant is broken, so it adds no states. */
proctype Invariants() {
    bool I1 = true, I2 = true, I3 = true, I4 = true, I5 = true;    /* for the report that one does not hold */
end:
    if
#if CHECK_I1
    :: atomic { I1_BROKEN(0) || I1_BROKEN(LOCKS - 1) -> assert(!I1) }
#endif
    :: atomic { I2_BROKEN(0) || I2_BROKEN(LOCKS - 1) -> assert(!I2) }
    :: atomic { I3_BROKEN(0) || I3_BROKEN(LOCKS - 1) -> assert(!I3) }
    :: atomic { ANY_SPOT(I4_BROKEN, 0) -> assert(!I4) }
    :: atomic { ANY_SPOT(I5_BROKEN, 0) -> assert(!I5) }
    fi
}

#if FOREIGN
#define ALL_DONE (finished == THREADS && duty[0] == 0 && duty[LOCKS - 1] == 0 && stage[THREADS + 1] == OUT)
#else
#define ALL_DONE (finished == THREADS)
#endif

init {
    byte i;
    atomic {
#if !NEWCOMERS
        do
        :: i < SPOTS -> claim[i] = i + 1; i++
        :: else -> break
        od;
#endif
        i = 1;
        do
        :: i <= THREADS -> run Thread(i); i++
        :: else -> break
        od;
        i = 0;
#if FOREIGN
        run Releaser(THREADS + 1);
#endif
#if STORE_BUFFER
        run Memory();
#endif
        run Invariants()
    };
end_somebody_never_started:
    atomic {
        ALL_DONE ->
        /* I6 */
        assert(FREE(W[0]) && FREE(W[LOCKS - 1]));
#if !STORE_BUFFER
        do
        :: i < SPOTS -> assert(STATE(S[i]) == IDLE); i++
        :: else -> break
        od
#endif
    }
}
