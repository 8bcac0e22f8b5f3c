/*
 * The ring of messages, in two halves.  DATA: TAIL, HEAD and the chunks, where waiting costs nothing.  Else: who waits for a
 * message or for room, and who wakes whom, where putting and taking are one step each.
 *
 * DATA.  A message takes a chunk of its own, so that each step of taking chunks and of giving them back is there for each.
 * HEAD and TAIL name a chunk and count messages; the chunk that TAIL names gets a link to the chunk of the next message.
 *
 * L[x]         lock of the producers, of the consumers; here: had at once from nobody and from the dead (see lock.pml)
 * table[c]     FREE, USED, LEFT
 * INTENTP      the chunk that producers are taking;   INTENTC, AFTERn: the chunk that consumers leave, and HEAD then
 * put          undo INTENTP if TAIL is not there; INTENTP := c; USED; link; bytes (two steps); TAIL; release
 * get          bytes (looked at twice); AFTER; INTENTC; HEAD; LEFT; INTENTC := none; FREE; other LEFT ones FREE; release
 *
 * Waiting.  marked[x] is PARKED of WRITABLE (0) and READABLE (1); S and tokens as in lock.pml; scans are one step.
 * act          put or take a message; look at PARKED of the other word: wake; waited, PARKED and more to do: wake
 * wait         S := WAITING; mark; look; sleep.  woken: renew S, mark, look.  got in: S := IDLE; chosen just then: as leave
 * leave        (an exception at any step, or a deadline) S := IDLE; mark, look, wake one
 * wake         clear the mark; choose; NOTIFIED; post
 *
 * Looking ahead (AHEAD).  With the bytes of a message those of the next one are copied.  The next get of the same process hands
 * out that copy if nobody has moved HEAD since (here: nobody else was the last to; the number of messages is as good).
 *
 * R1, R2  what is read at HEAD is the whole message of that number, and stays so until HEAD has moved
 * R4      no chunk is lost: nobody waits for room in an empty ring
 * R7      where nothing can happen any more, nobody sleeps beside a message or beside room
 */

#ifndef DATA
#define DATA 0
#endif
#ifndef PRODUCERS
#define PRODUCERS 1
#endif
#ifndef CONSUMERS
#define CONSUMERS 2
#endif
#ifndef AHEAD
#define AHEAD 0             /* DATA: 1: consumers look ahead, and may leave with what a signal handler has raised */
#endif
#ifndef CHUNKS
#define CHUNKS 3            /* DATA: one of them is where TAIL is; so many messages less one can wait */
#endif
#ifndef ROOMS
#define ROOMS 2             /* else: so many messages can wait */
#endif
#ifndef BOTH
#define BOTH 0              /* else: whether producers wait as consumers do, for room; it is the same code.  0: that costs nothing */
#endif
#ifndef CRASHES
#define CRASHES 0
#endif
#ifndef POLL
#define POLL 0              /* 1: sleepers look by themselves, where that changes something */
#endif
#ifndef WITHDRAW
#define WITHDRAW 0          /* 1: who waits may leave at any step */
#endif
#ifndef POLLERS
#define POLLERS 0           /* 1: who waited may go away without acting, as poll() does */
#endif

#define NONE               0
#define TAIL_FIRST         1    /* TAIL is stored before the bytes */
#define HEAD_FIRST         2    /* HEAD is stored, and the chunk given back, before the bytes are read */
#define FREE_BEFORE_HEAD   3    /* the chunk is given back before HEAD moves */
#define FREE_BEFORE_CLOSED 4    /* the chunk is FREE while INTENT is still open (R6) */
#define NO_FENCE           5    /* PARKED is looked at before TAIL, or HEAD, is visible */
#define LOOK_THEN_MARK     6    /* a waiter looks at the ring first, and then marks the word */
#define WAKE_THEN_CLEAR    7    /* the mark is cleared after somebody was chosen */
#define LEAVE_KEEPS        8    /* who leaves passes nothing on */
#define LEAVE_MARKS_NOT    9    /* who leaves wakes the next only if there is something to do, and does not mark the word */
#define LEAVE_IF_NOTIFIED 10    /* who leaves passes on only if it is chosen just then */
#define IN_KEEPS          11    /* who got in and was chosen once more passes nothing on */
#define IN_MARKS_NOT      12    /* it wakes the next if there is something to do, and does not mark the word */
#define ACT_KEEPS         13    /* who was woken and has acted does not wake the next */
#define POLLER_KEEPS      14    /* who was woken and does not act does not wake the next */
#define NO_UNDO           15    /* a dead producer's INTENT is not undone */
#define NO_FINISH         16    /* a dead consumer's INTENT is forgotten */
#define NO_SWEEP          17    /* chunks LEFT by a dead consumer stay so */
#define NEVER_STUCK       18    /* a waiting producer does not look whether the dead keep chunks */
#define FINISH_UNLOCKED   19    /* a producer gives back what a consumer had, without the consumers' lock */
#define FINISH_ALWAYS     20    /* ... also if HEAD has not moved */
#define MARK_ONCE         21    /* a woken waiter that finds nothing does not mark the word again */
#define AHEAD_UNCHECKED   22    /* a copy is handed out whoever has moved HEAD */
#define AHEAD_EARLY       23    /* a copy counts before HEAD has moved past the message that it follows */
#define AHEAD_BEYOND      24    /* what lies behind the last message is copied, too */
#ifndef MUTATION
#define MUTATION NONE
#endif
#define IS(mutation) (MUTATION == mutation)

#define THREADS  (PRODUCERS + CONSUMERS)
#define NOBODY   255
#define WRITABLE 0
#define READABLE 1
#define SIDE(i)  ((i) < PRODUCERS -> WRITABLE : READABLE)
#define MINE     SIDE(me)
#define OTHER    (1 - SIDE(me))
#define ANY(P)   (P(0) || P(1) || (THREADS > 2 && P(2 % THREADS)) || (THREADS > 3 && P(3 % THREADS)))

/* Ghosts. */
bit dead[THREADS], asleep[THREADS];
byte crashes;

#if CRASHES
#define MAY_DIE :: atomic { crashes < CRASHES -> crashes++; dead[me] = 1; asleep[me] = 0; goto end_of_thread }
#else
#define MAY_DIE
#endif
#define STEP(what) if MAY_DIE :: atomic { true -> what } fi

#if DATA

#define FREE     0
#define USED     1
#define LEFT     2
#define TORN     9

byte L[2] = NOBODY;
byte table[CHUNKS], link[CHUNKS], bytes[CHUNKS];
byte TAILn, TAILc, HEADn, HEADc;            /* numbers count modulo 4 */
byte INTENTP = NOBODY, INTENTC = NOBODY, AFTERn;

#if AHEAD
byte last = NOBODY;                         /* who moved HEAD last */
#define GOES_ON(me) (last == me)
#else
#define GOES_ON(me) 0
#endif

#define MESSAGE    (TAILn != HEADn)
#define HAS(state) (table[0] == state || table[1] == state || (CHUNKS > 2 && table[2 % CHUNKS] == state))
#define ROOM       HAS(FREE)
#define CAN_HAVE(x)  (L[x] == NOBODY || dead[L[x]])
#define KEPT_BY_DEAD ((INTENTP != NOBODY && INTENTP != TAILc && CAN_HAVE(0)) || ((INTENTC != NOBODY || (HAS(LEFT) && !IS(NO_SWEEP))) && CAN_HAVE(1)))
#define LOST(i)      (asleep[i] && SIDE(i) == WRITABLE && !MESSAGE)

/* Give back what the dead left, under the lock of the consumers. */
#define FINISH \
    if \
    MAY_DIE \
    :: atomic { INTENTC != NOBODY && (HEADn == AFTERn || IS(FINISH_ALWAYS)) && !IS(NO_FINISH) -> \
                if :: table[INTENTC] == USED -> table[INTENTC] = (IS(FREE_BEFORE_CLOSED) -> FREE : LEFT) :: else fi } \
    :: atomic { !(INTENTC != NOBODY && (HEADn == AFTERn || IS(FINISH_ALWAYS)) && !IS(NO_FINISH)) } \
    fi; \
    STEP(INTENTC = NOBODY)
#define SWEEP(label) \
label: \
    if \
    MAY_DIE \
    :: atomic { table[0] == LEFT && !IS(NO_SWEEP) -> table[0] = FREE; goto label } \
    :: atomic { table[1] == LEFT && !IS(NO_SWEEP) -> table[1] = FREE; goto label } \
    :: atomic { CHUNKS > 2 && table[2 % CHUNKS] == LEFT && !IS(NO_SWEEP) -> table[2 % CHUNKS] = FREE; goto label } \
    :: atomic { !HAS(LEFT) || IS(NO_SWEEP) } \
    fi

proctype Thread(byte me) {
    byte c = NOBODY, before = NOBODY, tried;
    byte copy = NOBODY;
    bit kept, counts;

act:
    if
    MAY_DIE
    :: atomic { CAN_HAVE(MINE) -> L[MINE] = me; if :: MINE == READABLE -> goto get :: else fi }
    fi;

    /* put */
    if
    MAY_DIE
    :: atomic { INTENTP != NOBODY && INTENTP != TAILc && !IS(NO_UNDO) -> if :: table[INTENTP] == USED -> table[INTENTP] = FREE :: else fi }
    :: atomic { !(INTENTP != NOBODY && INTENTP != TAILc && !IS(NO_UNDO)) }
    fi;
    STEP(INTENTP = NOBODY);
choose:
    if
    MAY_DIE
    :: atomic { table[0] == FREE -> c = 0 }
    :: atomic { table[1] == FREE -> c = 1 }
    :: atomic { CHUNKS > 2 && table[2 % CHUNKS] == FREE -> c = 2 }
    :: atomic { !ROOM && !tried && (INTENTC != NOBODY || HAS(LEFT)) && (CAN_HAVE(1) || IS(FINISH_UNLOCKED)) ->
                tried = 1; if :: IS(FINISH_UNLOCKED) :: else -> L[1] = me fi; goto finish }
    :: atomic { !ROOM && (tried || (INTENTC == NOBODY && !HAS(LEFT)) || !(CAN_HAVE(1) || IS(FINISH_UNLOCKED))) -> goto in_vain }
    fi;
    STEP(INTENTP = c);
    STEP(table[c] = USED);
    STEP(link[TAILc] = c);
    if
    :: atomic { !IS(TAIL_FIRST) }
    :: atomic { IS(TAIL_FIRST) -> before = TAILn; TAILn = (TAILn + 1) % 4; TAILc = c }
    fi;
    STEP(bytes[c] = TORN);
    STEP(bytes[c] = (IS(TAIL_FIRST) -> before : TAILn); before = NOBODY);
    if
    MAY_DIE
    :: atomic { !IS(TAIL_FIRST) -> TAILn = (TAILn + 1) % 4; TAILc = c }
    :: atomic { IS(TAIL_FIRST) }
    fi;
    goto released;

finish:
    FINISH;
    SWEEP(sweep);
    STEP(if :: IS(FINISH_UNLOCKED) :: else -> L[1] = NOBODY fi; goto choose);

get:
    if
    MAY_DIE
    :: atomic { !MESSAGE -> goto in_vain }
    :: atomic { MESSAGE -> before = HEADc; c = link[HEADc];
                if
                :: counts && (GOES_ON(me) || IS(AHEAD_UNCHECKED)) -> assert(copy == HEADn); counts = 0; copy = NOBODY; goto had
                :: else -> counts = 0; copy = NOBODY
                fi }
    fi;
    STEP(if :: IS(HEAD_FIRST) :: else -> assert(bytes[c] == HEADn) fi);          /* R1 */
    STEP(if :: IS(HEAD_FIRST) :: else -> assert(bytes[c] == HEADn) fi);          /* R2 */
#if AHEAD
    if
    MAY_DIE
    :: atomic { GOES_ON(me) && (TAILn != (HEADn + 1) % 4 || IS(AHEAD_BEYOND)) ->
                copy = bytes[link[c]]; kept = 1; counts = IS(AHEAD_EARLY) }
    :: atomic { true }
    fi;
    if
    :: atomic { true -> kept = 0; before = NOBODY; if :: counts :: else -> copy = NOBODY fi; goto released }     /* raised */
    :: atomic { true }
    fi;
#endif
had:
    if
    :: atomic { INTENTC != NOBODY -> skip }
    :: atomic { INTENTC == NOBODY -> goto step }
    fi;
    FINISH;
step:
    STEP(if :: IS(FREE_BEFORE_HEAD) -> table[before] = FREE :: else fi; AFTERn = (HEADn + 1) % 4);
    STEP(INTENTC = before);
#if AHEAD
    STEP(HEADn = AFTERn; HEADc = c; last = me; counts = kept; kept = 0);
#else
    STEP(HEADn = AFTERn; HEADc = c);
#endif
    STEP(if :: IS(FREE_BEFORE_HEAD) :: IS(FREE_BEFORE_CLOSED) -> table[before] = FREE :: else -> table[before] = LEFT fi);
    STEP(INTENTC = NOBODY);
    STEP(if :: table[before] == LEFT -> table[before] = FREE :: else fi);
    SWEEP(sweep_others);
    if
    MAY_DIE
    :: atomic { IS(HEAD_FIRST) -> L[READABLE] = NOBODY; tried = AFTERn; goto read_late }
    :: atomic { !IS(HEAD_FIRST) }
    fi;

released:
    STEP(L[MINE] = NOBODY; c = NOBODY; before = NOBODY; tried = 0; if :: goto act :: MINE == WRITABLE -> goto end_of_thread fi);

read_late:
    STEP(assert(bytes[c] == (tried + 3) % 4); c = NOBODY; before = NOBODY; tried = 0; goto act);

in_vain:
    STEP(L[MINE] = NOBODY; c = NOBODY; tried = 0; asleep[me] = 1);
end_asleep:
    if
    MAY_DIE
    :: atomic { MINE == READABLE && MESSAGE -> asleep[me] = 0; goto act }
    :: atomic { MINE == WRITABLE && (ROOM || (KEPT_BY_DEAD && !IS(NEVER_STUCK))) -> asleep[me] = 0; goto act }
    fi;
end_of_thread:
    skip
}

#else

#define IDLE     0
#define WAITING  1
#define NOTIFIED 2

byte messages;
bit marked[2];
byte S[THREADS], tokens[THREADS];

#define CONDITION(x) ((x == READABLE && messages > 0) || (x == WRITABLE && messages < ROOMS))
#define WAITS(i)     (S[i] == WAITING && SIDE(i) == target)
#define LOST(i)      (asleep[i] && !dead[i] && !tokens[i] && CONDITION(SIDE(i)))

#if WITHDRAW
#define MAY_LEAVE :: atomic { true -> asleep[me] = 0; goto leave }
#else
#define MAY_LEAVE
#endif

proctype Thread(byte me) {
    byte chosen = NOBODY, target, then;
    bit waited, seen;

round:
    atomic { if :: true :: goto end_of_thread fi };
act:
end_full:
    if
    MAY_DIE
    :: atomic { !CONDITION(MINE) && (BOTH || MINE == READABLE) -> waited = 1; goto wait }
    :: atomic { CONDITION(MINE) && IS(NO_FENCE) -> seen = marked[OTHER] }
    :: atomic { CONDITION(MINE) && !IS(NO_FENCE) -> goto do_it }
    fi;
do_it:
    if
    MAY_DIE
    :: atomic { !CONDITION(MINE) -> seen = 0; goto act }                   /* somebody else was first */
    :: atomic { CONDITION(MINE) -> if :: MINE == WRITABLE -> messages++ :: else -> messages-- fi;
                if :: MINE == READABLE && !BOTH -> goto more :: else fi }
    fi;
    if
    MAY_DIE
    :: atomic { (IS(NO_FENCE) -> seen : marked[OTHER]) -> seen = 0; target = OTHER; then = 1; goto wake }
    :: atomic { !(IS(NO_FENCE) -> seen : marked[OTHER]) -> seen = 0 }
    fi;
more:                                           /* Producer.pass_on, Consumer.pass_on */
    if
    MAY_DIE
    :: atomic { waited && marked[MINE] && CONDITION(MINE) && !IS(ACT_KEEPS) -> waited = 0; target = MINE; then = 2; goto wake }
    :: atomic { !(waited && marked[MINE] && CONDITION(MINE) && !IS(ACT_KEEPS)) -> waited = 0; goto round }
    fi;

wait:
    STEP(S[me] = WAITING);
mark:
    if
    MAY_DIE
    MAY_LEAVE
    :: atomic { IS(LOOK_THEN_MARK) && CONDITION(MINE) -> goto in }
    :: atomic { IS(LOOK_THEN_MARK) && !CONDITION(MINE) }
    :: atomic { !IS(LOOK_THEN_MARK) -> marked[MINE] = 1 }
    fi;
look:
    if
    MAY_DIE
    MAY_LEAVE
    :: atomic { !IS(LOOK_THEN_MARK) && CONDITION(MINE) -> goto in }
    :: atomic { IS(LOOK_THEN_MARK) || !CONDITION(MINE) ->
                if :: IS(LOOK_THEN_MARK) -> marked[MINE] = 1 :: else fi;
                asleep[me] = 1;
                if :: goto end_asleep :: WITHDRAW -> goto asleep_for_a_while fi }
    fi;
end_asleep:
    if
    MAY_DIE
    :: atomic { tokens[me] -> tokens[me] = 0; asleep[me] = 0; goto awake }
    :: atomic { POLL && (CONDITION(MINE) || S[me] == NOTIFIED) -> asleep[me] = 0; goto awake }
    fi;
asleep_for_a_while:
    if
    MAY_DIE
    MAY_LEAVE
    :: atomic { tokens[me] -> tokens[me] = 0; asleep[me] = 0 }
    fi;
awake:
    if
    MAY_DIE
    MAY_LEAVE
    :: atomic { true -> if :: S[me] == NOTIFIED -> S[me] = WAITING :: else fi; if :: IS(MARK_ONCE) -> goto look :: else -> goto mark fi }
    fi;

in:
    if
    MAY_DIE
    MAY_LEAVE
    :: atomic { S[me] == NOTIFIED && !IS(IN_KEEPS) -> S[me] = IDLE; then = 3; goto pass_on }
    :: atomic { S[me] != NOTIFIED || IS(IN_KEEPS) -> S[me] = IDLE }
    fi;
woken:
    if
    MAY_DIE
    :: atomic { true -> then = 0; goto act }
    :: atomic { POLLERS -> then = 0; if :: IS(POLLER_KEEPS) -> waited = 0; goto round :: else -> goto more fi }
    fi;

leave:
    if
    MAY_DIE
    :: atomic { true -> seen = (S[me] == NOTIFIED); S[me] = IDLE; then = 4 }
    fi;
    if
    :: atomic { IS(LEAVE_KEEPS) || (IS(LEAVE_IF_NOTIFIED) && !seen) -> seen = 0; then = 0; waited = 0; goto round }
    :: atomic { !(IS(LEAVE_KEEPS) || (IS(LEAVE_IF_NOTIFIED) && !seen)) -> seen = 0 }
    fi;

pass_on:                                        /* of a waiter: marks, looks, wakes */
    STEP(if :: (IS(LEAVE_MARKS_NOT) && then == 4) || (IS(IN_MARKS_NOT) && then == 3) :: else -> marked[MINE] = 1 fi);
    if
    MAY_DIE
    :: atomic { CONDITION(MINE) -> target = MINE; goto unpark }
    :: atomic { !CONDITION(MINE) -> goto passed }
    fi;

wake:
    STEP(if :: IS(WAKE_THEN_CLEAR) :: else -> marked[target] = 0 fi);
unpark:
    if
    MAY_DIE
    :: atomic { WAITS(0) -> S[0] = NOTIFIED; chosen = 0 }
    :: atomic { WAITS(1) -> S[1] = NOTIFIED; chosen = 1 }
    :: atomic { THREADS > 2 && WAITS(2 % THREADS) -> S[2 % THREADS] = NOTIFIED; chosen = 2 }
    :: atomic { THREADS > 3 && WAITS(3 % THREADS) -> S[3 % THREADS] = NOTIFIED; chosen = 3 }
    :: atomic { !ANY(WAITS) -> goto chose }
    fi;
    STEP(tokens[chosen] = 1; chosen = NOBODY);
chose:
    STEP(if :: IS(WAKE_THEN_CLEAR) && then < 3 -> marked[target] = 0 :: else fi);
passed:
    atomic {
        target = 0;
        if
        :: then == 1 -> then = 0; goto more
        :: then == 2 -> then = 0; goto round
        :: then == 3 -> then = 0; goto woken
        :: then == 4 -> then = 0; waited = 0; goto round
        fi
    };
end_of_thread:
    skip
}

#endif

proctype Invariants() {
    bool R;
end:
    timeout -> atomic { R = !ANY(LOST); assert(R) }      /* R4, R7 */
}

init {
    atomic {
#if DATA
        table[0] = USED;
#endif
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
