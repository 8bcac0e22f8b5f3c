/*
 * Condition: a waiter parks under the condition's own key; the notifier hands out notifications one by one.
 *
 * CONSUMERS threads wait for items one by one; the PRODUCER makes ITEMS of them, with one notify for each.
 *
 * S, tokens    as in lock.pml, with one key and one spot for each consumer; scans are one step
 * the lock     an exact one, here in one step: lock.pml shows that it is.  A dead owner's is free for the next.
 *
 * wait    N1  S := WAITING, under the lock          N2  release the lock
 *         N3  wait for a token; S NOTIFIED: N4, else N3 again.  A poll looks at S, too, and reaps.
 *         N4  take the lock again                   N5  S := IDLE, under the lock; return
 *         N6  deadline or exception from N1 to N4: CAS(S: WAITING -> IDLE); it was NOTIFIED: unpark_one, then S := IDLE;
 *             then N4
 * notify  under the lock: unpark_one; nobody: nothing
 * reap    by a waiter that polls: a NOTIFIED spot of a dead one: unpark_one first, then the spot IDLE by exchange.  The
 *         other order loses the notification when the reaper dies in between; this one may give it twice, which costs
 *         an empty wake-up.
 *
 * S says NOTIFIED as long as the notification can still get lost, so taking the lock again must not need the same spot.
 * Whoever dies with the lock is not the condition's business: the lock tells its next owner.
 *
 * I1  A consumer is never left asleep while there are items that nobody is on the way to take.  It is checked as the
 *     absence of dead ends: a sleeper may stop only when everything was made and taken.
 * I2  A spot that is not IDLE belongs to a thread between N1 and N5 or N6, or to a dead one.
 */

#ifndef CONSUMERS
#define CONSUMERS 2
#endif
#ifndef ITEMS
#define ITEMS 1
#endif
#ifndef CRASHES
#define CRASHES 0
#endif
#ifndef POLL
#define POLL 0
#endif
#ifndef WITHDRAW
#define WITHDRAW 0          /* how many exceptions; whoever had one stops waiting for good */
#endif

#define NONE                   0
#define PUBLISH_AFTER_RELEASE  1    /* N2 before N1 */
#define N6_KEEPS               2    /* an exception swallows the notification */
#define N6_LOOKS_FIRST         3    /* it reads S, then stores IDLE */
#define NO_REAP                4
#define REAP_FIRST             5    /* the spot IDLE first, then unpark_one */
#define POLL_IGNORES_S         6    /* a poll does not look at its own S */
#define IDLE_BEFORE_LOCK       9    /* N5 before N4 */
#define N6_IDLE_FIRST         10    /* S := IDLE by exchange, then unpark_one */
#define NOTIFY_SKIPS           7    /* notify wakes nobody while some spot is NOTIFIED */
#ifndef MUTATION
#define MUTATION NONE
#endif
#define IS(mutation) (MUTATION == mutation)

#define IDLE     0
#define WAITING  1
#define NOTIFIED 2
#define NOBODY   255
#define PRODUCER CONSUMERS

byte S[CONSUMERS];
byte tokens[CONSUMERS];
byte items;
byte holder = NOBODY;           /* the lock */

/* Ghosts. */
byte dead;
byte crashes, exceptions, made, stopped;
#define IS_DEAD(t) ((dead >> (t)) & 1)
#define CAN_TAKE (holder == NOBODY || IS_DEAD(holder))
#define ALL_OVER (stopped && items == 0)

#define REAPABLE(i) (S[i] == NOTIFIED && IS_DEAD(i))
#define IS_NOTIFIED(i) (S[i] == NOTIFIED)
#define IS_WAITING(i) (S[i] == WAITING)
#define ANY(P) (P(0) || (CONSUMERS > 1 && P(1 % CONSUMERS)) || (CONSUMERS > 2 && P(2 % CONSUMERS)))

#if CRASHES
#define MAY_DIE :: atomic { crashes < CRASHES -> crashes++; dead = dead | (1 << me); if :: me == PRODUCER -> stopped = 1 :: else fi; goto end_of_thread }
#else
#define MAY_DIE
#endif
#if WITHDRAW
#define MAY_LEAVE :: atomic { exceptions < WITHDRAW -> exceptions++; leaving = 1; goto N6 }
#else
#define MAY_LEAVE
#endif

/* What unpark_one finds in one scan. */
inline choose() {
    if
    :: S[0] == WAITING -> chosen = 0
    :: CONSUMERS > 1 && S[1 % CONSUMERS] == WAITING -> chosen = 1
    :: CONSUMERS > 2 && S[2 % CONSUMERS] == WAITING -> chosen = 2
    :: !ANY(IS_WAITING) -> chosen = NOBODY
    fi
}

proctype Consumer(byte me) {
    byte chosen = NOBODY, reaped = NOBODY;
    bit leaving;

    atomic { CAN_TAKE -> holder = me };
again:
    if
    :: atomic { leaving -> holder = NOBODY; goto end_of_thread }
    :: atomic { !leaving && items > 0 -> items--; holder = NOBODY; goto end_of_thread }
    :: atomic { !leaving && items == 0 && ALL_OVER -> holder = NOBODY; goto end_of_thread }
    :: atomic { !leaving && items == 0 && !ALL_OVER && IS(PUBLISH_AFTER_RELEASE) -> holder = NOBODY }
    :: atomic { !leaving && items == 0 && !ALL_OVER && !IS(PUBLISH_AFTER_RELEASE) -> goto N1 }
    fi;
N1: if
    MAY_DIE
    :: atomic { true -> S[me] = WAITING; if :: IS(PUBLISH_AFTER_RELEASE) -> goto N3 :: else fi }
    fi;
N2: if
    MAY_DIE
    MAY_LEAVE
    :: atomic { true -> holder = NOBODY }
    fi;
N3: if
    MAY_DIE
    MAY_LEAVE
    :: atomic { tokens[me] > 0 -> tokens[me]-- }
    :: atomic { POLL && S[me] == NOTIFIED && !IS(POLL_IGNORES_S) -> goto N4 }
    :: atomic { POLL && ANY(REAPABLE) && !IS(NO_REAP) -> goto reap }
    :: atomic { ALL_OVER -> S[me] = IDLE; goto end_of_thread }
    fi;
    if
    MAY_DIE
    MAY_LEAVE
    :: atomic { S[me] == NOTIFIED -> goto N4 }
    :: atomic { S[me] != NOTIFIED -> goto N3 }
    fi;
N4: if
    MAY_DIE
    MAY_LEAVE
    :: atomic { IS(IDLE_BEFORE_LOCK) -> S[me] = IDLE; goto N4_alone }
    :: atomic { CAN_TAKE && !IS(IDLE_BEFORE_LOCK) -> holder = me }
    fi;
N5: if
    MAY_DIE
    :: atomic { true -> S[me] = IDLE; goto again }
    fi;
N4_alone: /* With S IDLE already. */
    if
    MAY_DIE
    :: atomic { CAN_TAKE -> holder = me; goto again }
    :: atomic { holder == me -> goto again }
    fi;

N6: if
    MAY_DIE
    :: atomic { (S[me] == WAITING || IS(N6_KEEPS)) && !IS(N6_LOOKS_FIRST) -> S[me] = IDLE; goto N4_alone }
    :: atomic { S[me] != WAITING && !IS(N6_KEEPS) -> if :: IS(N6_IDLE_FIRST) -> S[me] = IDLE :: else fi; goto unpark_one }
    :: atomic { S[me] == WAITING && IS(N6_LOOKS_FIRST) }
    fi;
    /* N6_LOOKS_FIRST only. */
    atomic { S[me] = IDLE; goto N4_alone };

reap:
    if
    MAY_DIE
    :: atomic {
        true ->
        if
        :: REAPABLE(0) -> reaped = 0
        :: CONSUMERS > 1 && REAPABLE(1 % CONSUMERS) -> reaped = 1
        :: CONSUMERS > 2 && REAPABLE(2 % CONSUMERS) -> reaped = 2
        :: !ANY(REAPABLE) -> goto N3
        fi;
        if
        :: IS(REAP_FIRST) -> S[reaped] = IDLE
        :: else
        fi;
        goto unpark_one
    }
    fi;

unpark_one: /* A reaper may choose itself. */
    if
    MAY_DIE
    :: atomic { true -> choose(); if :: chosen == NOBODY -> goto passed :: else fi }
    fi;
    if
    MAY_DIE
    :: atomic { S[chosen] == WAITING -> S[chosen] = NOTIFIED }
    :: atomic { S[chosen] != WAITING -> goto unpark_one }
    fi;
    if
    MAY_DIE
    :: atomic { true -> tokens[chosen]++ }
    fi;
passed:
    if
    MAY_DIE
    :: atomic {
        true ->
        chosen = NOBODY;
        if
        :: reaped != NOBODY -> if :: REAPABLE(reaped) -> S[reaped] = IDLE :: else fi; reaped = NOBODY; goto N3
        :: else -> S[me] = IDLE; goto N4_alone
        fi
    }
    fi;

end_of_thread:
    atomic { chosen = NOBODY; reaped = NOBODY; leaving = 0; assert(S[me] == IDLE || IS_DEAD(me)) /* I2 */ }
}

proctype Producer(byte me) {
    byte chosen = NOBODY;

make:
    if
    MAY_DIE
    :: atomic { made == ITEMS -> stopped = 1; goto end_of_thread }
    :: atomic { made < ITEMS && CAN_TAKE -> holder = me }
    fi;
unpark_one:
    if
    MAY_DIE
    :: atomic {
        true ->
        if
        :: IS(NOTIFY_SKIPS) && ANY(IS_NOTIFIED) -> chosen = NOBODY
        :: else -> choose()
        fi;
        if :: chosen == NOBODY -> goto passed :: else fi
    }
    fi;
    if
    MAY_DIE
    :: atomic { S[chosen] == WAITING -> S[chosen] = NOTIFIED }
    :: atomic { S[chosen] != WAITING -> goto unpark_one }
    fi;
    if
    MAY_DIE
    :: atomic { true -> tokens[chosen]++; chosen = NOBODY }
    fi;
passed: /* The item comes last: a producer that dies before it has made none. */
    if
    MAY_DIE
    :: atomic { true -> made++; items++; holder = NOBODY; goto make }
    fi;
end_of_thread:
    skip
}

init {
    atomic {
        run Consumer(0);
#if CONSUMERS > 1
        run Consumer(1);
#endif
#if CONSUMERS > 2
        run Consumer(2);
#endif
        run Producer(PRODUCER)
    }
}
