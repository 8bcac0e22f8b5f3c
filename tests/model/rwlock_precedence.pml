/*
 * Readers and writers with precedence: what _readers.py and _handover.py add where some contracts have a rank.  The rest of an
 * RWLock (leases, the line without ranks) is in rwlock.pml, and the hand-over of a Lock in lock.pml.
 *
 * W               0; HELD by a thread; RESERVED for a writer's spot and sequence; RESERVED for nobody (by who looks for one)
 *                 each with PARKED, DIED
 * G               DRAINING | SUSPECT
 * C, one a reader 0, READING, IN_LINE, LEFT: its record; LEFT is in line, too, and a writer has gone by since it last looked
 * S, key, odd     as in lock.pml; three keys: who waits for W, readers, and the writer that waits for them; a spot each
 *                 Looking over all the spots is one step, over the records one for each.
 *
 * read    Q1  W free: CAS(C: 0 -> READING).   Q2  W still free: in; else L1, L2 -> Q4
 *         Q4  publish: P1.  Q3  W owned: CAS(C: 0 -> IN_LINE); free: CAS(C: 0 -> READING).
 *         Q5  not in line, W free: in.  In line: C is READING: let in.  LEFT: CAS(C: LEFT -> IN_LINE).  Then W free:
 *             CAS(C: IN_LINE -> READING): in; failed: Q5.   W owned, not in line: CAS(C: READING -> IN_LINE), L2 -> Q5.
 *             W owned, in line: CAS(w -> w|PARKED), always.   Q6  sleep
 *         Q7, Q8, L1, L2 of rwlock.pml
 * write   A1 free: CAS(W: -> me).  A4 publish.  A5 free, or reserved for this very spot: CAS(w -> me|PARKED).  else
 *         CAS(w -> w|PARKED).  A6 sleep.  A7 S := IDLE.  A8 S := IDLE; W reserved: settle.  another's: PARKED.  free: R3
 *         W1  the one before died, and was not inside: DIED := 0
 *         W2  lets in who of the line is as good as this writer, or better; of the others CAS(C: IN_LINE -> LEFT)
 *         W3  no C is READING -> W5.  G := DRAINING, SUSPECT if DIED
 *         W4  publish.  Lets in who is better; no C is READING -> W5; a better writer that lives is first in line, and was not
 *             given way to: G := 0, W back as R2, A1; sleep
 *         W5  S := IDLE, G := 0: inside
 * release R1  CAS(W: me -> 0).  R2  F0 to F2.  R3  wake the line; W reserved: settle; free: wake a writer
 * hand    F0  our own: CAS(w -> w without PARKED).  a dead owner's, or reserved in vain: CAS(w -> RESERVED for nobody, this one)
 * over    F1  the first in line by precedence.  F2  CAS(W: -> RESERVED for it|PARKED|DIED kept); nobody: CAS(W: -> DIED kept)
 * settle  F3  W free: wake the line, and a writer.  reserved, in vain: F0.  else that one's S := NOTIFIED, post
 * polls   W reserved in vain, for a dead one, or for one that does not come: F0.  W's owner dead: F0 by readers, who judge as W1;
 *         writers keep DIED.  W4 clears the records of the dead
 *
 * LEFT is why a reader may go in by itself that saw W free: a writer that took W after that look, and does not let the reader
 * in, has changed its record, or finds it READING and waits.
 *
 * Nobody takes a dead owner's W by itself, neither a poller that is the first in line (POLL_TAKES_LATE) nor who does not wait
 * (A3_TAKES, of whom here is only that): it is handed over, and is free where nobody is in line.
 *
 * H2  Nobody is granted W, free or reserved, while a better writer is asleep that lives and comes.
 * H4  A chosen one that dies was not inside: nobody is told.  X3 of rwlock.pml says it.
 * P1  A record in line has a spot in line.  (X2 depends on it.)
 * P2  A reader that finds W free passes no better writer that is asleep.  A writer lets nobody in who is worse than it is.
 *     A writer gets in before no reader that was asleep and not worse when that writer got W.
 * P3  A writer gives way at most once to each better one while nobody gets in.
 * X1  A writer is inside alone; readers never with a writer.
 * X2  While a reader is in line, at most one writer gets in that is not better.
 * X3  A death inside is told until a writer has left; a death outside to nobody.
 * I1  Who sleeps for ever is a dead end, where nobody died or stopped: without these only a writer at the door polls.
 */

#ifndef WRITERS
#define WRITERS 2
#endif
#ifndef READERS
#define READERS 1
#endif
#ifndef RANKS
#define RANKS 123           /* a digit for each: writers, then readers */
#endif
#ifndef ROUNDS
#define ROUNDS 0            /* 0: any number */
#endif
#ifndef CRASHES
#define CRASHES 0           /* so many die; then there are polls */
#endif
#ifndef DEATHS
#define DEATHS 0            /* 0: before any step; 1: writers inside; 2: these, and who waits for W, is chosen, or hands it over */
#endif
#ifndef STOPS
#define STOPS 0             /* so many writers in line may be stopped for ever; then there are polls */
#endif
#ifndef WITHDRAW
#define WITHDRAW 0          /* a sum, of who may give up before any step: 1 readers; 2 writers in line; 4 writers at the door */
#endif
#ifndef SEQUENCES
#define SEQUENCES 1         /* or 2: whether a spot's S tells one wait from the next */
#endif

/* Each must be refuted, but R3_NO_LINE_IF_RESERVED, which is harmless. */
#define NONE                      0
#define TAKES_ANY_RESERVATION     1  /* a writer takes W although it is reserved for another */
#define R2_LEAVES_FREE            2  /* a release leaves W free and wakes the first in line: who comes along slips in */
#define F0_KEEPS_PARKED           3  /* the owner looks for waiters without taking PARKED away first */
#define F1_ANYBODY                4  /* it hands over to anybody in line */
#define F3_SKIPPED                5  /* nobody calls the chosen one */
#define A8_KEEPS_RESERVATION      6  /* a chosen writer that gives up leaves W reserved */
#define POLL_KEEPS_RESERVATION    7  /* a writer's poll does not look for whom W is reserved */
#define QD_KEEPS_RESERVATION      8  /* a reader's poll does not */
#define POLL_TRUSTS_SPOT          9  /* a poll looks whether the chosen one's spot says that it waits, not whether it lives */
#define POLL_TELLS               10  /* who passes on what was reserved for a dead one says that this one died inside */
#define POLL_KEEPS_STOPPED       11  /* nobody takes W back from a chosen one that lives and does not come */
#define W2_EVERYBODY             12  /* a writer lets everybody in who is in line */
#define W2_ONLY_BETTER           13  /* a writer leaves its equals in line */
#define Q3_BEFORE_Q4             14  /* P1: a reader that finds W owned gets in line without a spot */
#define W4_GIVES_WAY_AGAIN       15  /* a writer forgets whom it has given way to */
#define W2_LEAVES_NO_MARK        16  /* a writer does nothing to the records that it leaves in line */
#define Q5_LOOKS_AGAIN           17  /* instead, a reader of the line looks at W again when it has gone in, and steps back */
#define Q5_NO_PARKED             18
#define R3_NO_LINE               19  /* a release wakes no readers */
#define R3_NO_LINE_IF_RESERVED   20  /* harmless: the chosen writer wakes them when it leaves, or who finds that it does not come */
#define SETTLE_NO_LINE           21  /* who settles, and leaves W free, wakes no readers */
#define POLL_TAKES_LATE          22  /* a writer that polls looks whether it is the first in line, and then takes a dead owner's W */
#define A3_TAKES                 23  /* who does not wait takes a dead owner's W without a look at the line */
#ifndef MUTATION
#define MUTATION NONE
#endif
#define IS(mutation) (MUTATION == mutation || (MUTATION == Q5_LOOKS_AGAIN && mutation == W2_LEAVES_NO_MARK))

#define THREADS (WRITERS + READERS)
#define DIGIT(n) ((n) == 0 -> RANKS % 10 : ((n) == 1 -> RANKS / 10 % 10 : ((n) == 2 -> RANKS / 100 % 10 : RANKS / 1000)))
#define RANK(t) (DIGIT(THREADS - 1 - (t)))

#define IDLE     0
#define WAITING  1
#define NOTIFIED 2
#define READING  1
#define IN_LINE  2
#define LEFT     3          /* in line, and a writer has gone by */
#define IS_IN_LINE(r) (C[r] >= IN_LINE)
#define KEY_W    0
#define KEY_R    1
#define KEY_D    2
#define NOBODY   7

/* W without its flags. */
byte W;
#define HELD(t)         ((t) + 1)
#define RESERVED(t, o)  (8 + 2 * (t) + (o))
#define NOBODYS(t)      (16 + (t))
#define IS_HELD(w)      ((w) > 0 && (w) < 8)
#define IS_RESERVED(w)  ((w) >= 8)
#define CHOSEN(w)       (((w) - 8) / 2)
bit PARKED, DIED, DRAINING, SUSPECT;
byte C[READERS];
byte S[THREADS];
byte key[THREADS];
bit odd[THREADS];
bit tokens[THREADS];
byte dead, stopped;         /* a bit for each thread */

/* Ghosts. */
byte reading, writing, crashes, stops;
byte asleep;                /* a bit for each thread that sleeps to get W, or in line */
byte ahead;                 /* readers that have to get in before the writer that has W */
byte passed[READERS];
byte leaving;               /* readers that have given up, with a record yet */
byte ways;                  /* how often somebody gave way since somebody got in */
byte dirty;                 /* 0: whole; 1: a writer died inside; 2: W was taken, nothing is known */
bit overtaken, worse;

#define BIT(t)          (1 << (t))
#define IS_DEAD(t)      ((dead >> (t)) & 1)
#define IS_STOPPED(t)   ((stopped >> (t)) & 1)
#define IS_ASLEEP(t)    ((asleep >> (t)) & 1)
#define OWNER_DEAD      (IS_HELD(W) && IS_DEAD(W - 1))
#define NOT_INSIDE      (DRAINING && !SUSPECT)
#define IN_VAIN(w)      ((w) >= 16 || (IS_RESERVED(w) && !(S[CHOSEN(w)] != IDLE && key[CHOSEN(w)] == KEY_W && odd[CHOSEN(w)] == ((w) & 1))))
#define OF_THE_DEAD     (IS_RESERVED(W) && W < 16 && IS_DEAD(CHOSEN(W)) && !IS(POLL_TRUSTS_SPOT))
#define OF_THE_STOPPED  (IS_RESERVED(W) && W < 16 && IS_STOPPED(CHOSEN(W)) && !IS(POLL_KEEPS_STOPPED))
#define KEPT            (IN_VAIN(W) || OF_THE_DEAD || OF_THE_STOPPED)
#define CAN_POLL        (crashes > 0 || stops > 0)

#define ANY_READER(P)   (P(0) || (READERS > 1 && P((1 % READERS))))
#define ANY_WRITER(P)   (P(0) || (WRITERS > 1 && P((1 % WRITERS))) || (WRITERS > 2 && P((2 % WRITERS))))
#define READS(r)        (C[r] == READING)
#define WAITS_IN_LINE(r) (S[WRITERS + (r)] != IDLE && key[WRITERS + (r)] == KEY_R)
/* P1: of who has no spot nobody knows the precedence. */
#define MAY_BE_LET_IN(r) ((WAITS_IN_LINE(r) -> RANK(WRITERS + (r)) : 0) >= RANK(me) + at_door && !(IS(W2_ONLY_BETTER) && RANK(WRITERS + (r)) == RANK(me)))
#define IS_DEAD_RECORD(r) (C[r] != 0 && IS_DEAD(WRITERS + (r)))
#define IS_BETTER_IN_LINE(r) (IS_IN_LINE(r) && WAITS_IN_LINE(r) && RANK(WRITERS + (r)) > RANK(me))

#if CRASHES
#define DIES :: atomic { crashes < CRASHES -> crashes++; die(); goto end_of_thread }
#define MAY_DIE_INSIDE DIES
#else
#define MAY_DIE_INSIDE
#endif
#if CRASHES && DEATHS != 1
#define MAY_DIE_CHOSEN DIES
#else
#define MAY_DIE_CHOSEN
#endif
#if CRASHES && DEATHS == 0
#define MAY_DIE DIES
#else
#define MAY_DIE
#endif
#if STOPS
#define MAY_STOP :: atomic { stops < STOPS -> stops++; stopped = stopped | BIT(me); asleep = asleep & ~BIT(me); goto end_stopped }
#else
#define MAY_STOP
#endif
#if WITHDRAW & 1
#define READER_LEAVES :: atomic { true -> asleep = asleep & ~BIT(me); goto Q8 }
#else
#define READER_LEAVES
#endif
#if WITHDRAW & 2
#define WRITER_LEAVES :: atomic { true -> asleep = asleep & ~BIT(me); goto A8 }
#else
#define WRITER_LEAVES
#endif
#if WITHDRAW & 4
#define DRAINER_LEAVES :: atomic { true -> goto W8 }
#else
#define DRAINER_LEAVES
#endif

inline forget() {
    then = 0; chosen = NOBODY; but = NOBODY; many = 0; i = 0; gave = 0; w = 0; parked = 0; died = 0; keep = 0; mine = 0;
    inside = 0; told = 0; in_line = 0; at_door = 0; alive = 0; seen = 0; line = 0; woken = 0
}

inline die() {
    dead = dead | BIT(me);
    asleep = asleep & ~BIT(me);
    ahead = ahead & ~BIT(me);
    if
    :: me < WRITERS && inside -> writing--; dirty = 1
    :: me < WRITERS && !inside && W == HELD(me) && !DRAINING && !dirty -> dirty = 2
    :: me >= WRITERS && inside -> reading--
    :: else
    fi;
    forget()
}

/* H2 */
#define IS_OVERTAKEN(t) (IS_ASLEEP(t) && RANK(t) > RANK(granted))
#define GRANT(t) \
    granted = t; \
    overtaken = ANY_WRITER(IS_OVERTAKEN); \
    assert(!overtaken); \
    granted = 0

/* Whose turn it is before that of the writer that takes W now. */
#define SEE(r) if :: IS_IN_LINE(r) && IS_ASLEEP(WRITERS + (r)) && RANK(WRITERS + (r)) >= RANK(me) -> ahead = ahead | BIT(WRITERS + (r)) :: else fi
inline take(mark) {
    W = HELD(me);
    PARKED = PARKED || (mark);
    ahead = 0;
    SEE(0);
    if :: READERS > 1 -> SEE((1 % READERS)) :: else fi
}

inline entered(r) {
    if
    :: IS_IN_LINE(r) && !IS_DEAD(WRITERS + (r)) && !((leaving >> (r)) & 1) && RANK(me) <= RANK(WRITERS + (r)) -> passed[r]++; assert(passed[r] <= 1)
    :: else
    fi
}

/* S of one that waits with this key -> NOTIFIED. */
#define WAITS(t, k) (S[t] == WAITING && key[t] == k)
inline choose(k) {
    chosen = NOBODY;
    if
    :: WAITS(0, k) -> chosen = 0
    :: WAITS(1, k) -> chosen = 1
    :: THREADS > 2 && WAITS(2 % THREADS, k) -> chosen = 2
    :: THREADS > 3 && WAITS(3 % THREADS, k) -> chosen = 3
    :: !WAITS(0, k) && !WAITS(1, k) && !(THREADS > 2 && WAITS(2 % THREADS, k)) && !(THREADS > 3 && WAITS(3 % THREADS, k))
    fi;
    if :: chosen != NOBODY -> S[chosen] = NOTIFIED :: else fi
}

inline post() {
    if :: chosen != NOBODY -> tokens[chosen] = 1; chosen = NOBODY :: else fi
}

/* Readers that wait. */
inline see_line() {
    many = (WAITS(WRITERS, KEY_R) -> 1 : 0) | (READERS > 1 && WAITS((WRITERS + 1) % THREADS, KEY_R) -> 2 : 0)
}

/* The next one of `many`, if it still waits. */
inline choose_of_line() {
    if
    :: many & 1 -> many = many & ~1; chosen = WRITERS
    :: else -> many = 0; chosen = (WRITERS + 1) % THREADS
    fi;
    if :: WAITS(chosen, KEY_R) -> S[chosen] = NOTIFIED :: else -> chosen = NOBODY fi
}

/* F1: the first in line for W, by precedence; of equals either, which covers every order of arrival. */
#define CANDIDATE(t) (S[t] != IDLE && key[t] == KEY_W && !(alive && IS_DEAD(t)) && (t) != but)
#define IS_FIRST(t) (CANDIDATE(t) && (IS(F1_ANYBODY) || ( \
    !(CANDIDATE(0) && RANK(0) > RANK(t)) \
    && !(WRITERS > 1 && CANDIDATE((1 % WRITERS)) && RANK((1 % WRITERS)) > RANK(t)) \
    && !(WRITERS > 2 && CANDIDATE((2 % WRITERS)) && RANK((2 % WRITERS)) > RANK(t)))))
inline see_first() {
    if
    :: IS_FIRST(0) -> chosen = 0
    :: WRITERS > 1 && IS_FIRST((1 % WRITERS)) -> chosen = 1
    :: WRITERS > 2 && IS_FIRST((2 % WRITERS)) -> chosen = 2
    :: !ANY_WRITER(CANDIDATE) -> chosen = NOBODY
    fi;
    seen = (chosen == NOBODY -> 0 : odd[chosen])
}

inline publish(k) {
    S[me] = WAITING; key[me] = k;
    if :: SEQUENCES == 2 -> odd[me] = !odd[me] :: else fi
}

inline renew() {
    if :: S[me] == NOTIFIED -> S[me] = WAITING :: else fi
}

inline see_word() { w = W; parked = PARKED; died = DIED }
#define IS_SAME_WORD (W == w && PARKED == parked && DIED == died)

/* Where it goes on after a hand-over. */
#define NEXT_ROUND 0
#define AT_A1      1        /* who gave way */
#define AT_LOOK    2        /* after a poll */
#define AT_A8      3        /* who gave up, and had W */

proctype Thread(byte me) {
    byte round, then, w, many, i, gave;
    byte chosen = NOBODY, but = NOBODY, granted;
    bit parked, died, keep, mine, inside, told, in_line, at_door, alive, seen, line, woken;

next_round:
    atomic {
        forget(); ways = 0;
        if
        :: ROUNDS && round == ROUNDS -> round = 0; goto end_of_thread
        :: ROUNDS && round < ROUNDS -> round++
        :: !ROUNDS
        :: !ROUNDS -> goto end_of_thread
        fi;
        if :: me < WRITERS -> goto A1 :: else -> goto Q1 fi
    };

/* -- writers ------------------------------------------------------------------------------------------------------------ */

A1: if
    MAY_DIE
    :: atomic { !W -> GRANT(me); take(0); goto W1 }
    :: atomic { IS(A3_TAKES) && OWNER_DEAD -> GRANT(me); take(1); DIED = 1; goto W1 }
    :: atomic { W }
    fi;
A4: if
    MAY_DIE
    :: atomic { true -> publish(KEY_W) }
    fi;
A5: if
    MAY_DIE_CHOSEN
    MAY_STOP
    WRITER_LEAVES
    :: atomic { !W -> GRANT(me); take(1); goto A7 }
    :: atomic { W == RESERVED(me, odd[me]) -> take(1); goto A7 }
    :: atomic { IS(TAKES_ANY_RESERVATION) && IS_RESERVED(W) && W != RESERVED(me, odd[me]) -> GRANT(me); take(1); goto A7 }
    :: atomic {
        W && W != RESERVED(me, odd[me]) && !(IS(TAKES_ANY_RESERVATION) && IS_RESERVED(W)) ->
        PARKED = 1; asleep = asleep | BIT(me)
    }
    fi;
A6: if
    MAY_DIE_CHOSEN
    MAY_STOP
    WRITER_LEAVES
    :: atomic { tokens[me] -> tokens[me] = 0; asleep = asleep & ~BIT(me) }
    :: atomic { CAN_POLL && (!W || W == RESERVED(me, odd[me]) || (!PARKED && IS_HELD(W))) -> asleep = asleep & ~BIT(me) }
    :: atomic { CAN_POLL && KEPT && W != RESERVED(me, odd[me]) && !IS(POLL_KEEPS_RESERVATION) -> asleep = asleep & ~BIT(me); then = AT_LOOK; goto poll_reservation }
    #if MUTATION == POLL_TAKES_LATE
    :: atomic { CAN_POLL && OWNER_DEAD -> asleep = asleep & ~BIT(me); see_word(); goto poll_dead }
#else
    :: atomic { CAN_POLL && OWNER_DEAD -> asleep = asleep & ~BIT(me); see_word(); alive = 1; keep = 1; then = AT_LOOK; goto F0 }
#endif
    fi;
A6_awake:
    if
    MAY_DIE_CHOSEN
    WRITER_LEAVES
    :: atomic { true -> renew(); goto A5 }
    fi;
#if MUTATION == POLL_TAKES_LATE
poll_dead: /* It sees that it is the first in line, and then takes W. */
    if
    MAY_DIE_CHOSEN
    WRITER_LEAVES
    :: atomic { true -> alive = 1; see_first() }
    fi;
    if
    MAY_DIE_CHOSEN
    WRITER_LEAVES
    :: atomic {
        (chosen == me || chosen == NOBODY) && IS_SAME_WORD ->
        GRANT(me); take(1); DIED = 1;
        chosen = NOBODY; seen = 0; alive = 0; w = 0; parked = 0; died = 0;
        goto A7
    }
    :: atomic { (chosen == me || chosen == NOBODY) && !IS_SAME_WORD -> chosen = NOBODY; seen = 0; alive = 0; w = 0; parked = 0; died = 0; goto A6_awake }
    :: atomic { chosen != me && chosen != NOBODY -> chosen = NOBODY; seen = 0; then = AT_LOOK; keep = 1; goto F0 }
    fi;
#endif
A7: if
    MAY_DIE_CHOSEN
    WRITER_LEAVES
    :: atomic { true -> S[me] = IDLE }
    fi;
W1: if
    MAY_DIE
    WRITER_LEAVES
    :: atomic { true -> if :: DIED && NOT_INSIDE -> DIED = 0 :: else fi; told = DIED }
    fi;
W2: /* And at each look of W4. */
    if
    MAY_DIE
    DRAINER_LEAVES
    :: atomic {
        true ->
        many = (MAY_BE_LET_IN(0) -> 1 : 0) | (READERS > 1 && MAY_BE_LET_IN((1 % READERS)) -> 2 : 0);
        if :: IS(W2_EVERYBODY) -> many = 3 :: else fi
    }
    fi;
W2_record:
    if
    MAY_DIE
    DRAINER_LEAVES
    :: atomic {
        i < READERS && IS_IN_LINE(i) && ((many >> i) & 1) ->
        worse = !IS_DEAD(WRITERS + i) && S[WRITERS + i] != IDLE && RANK(WRITERS + i) < RANK(me);
        assert(!worse);                                     /* P2 */
        C[i] = READING; ahead = ahead & ~BIT(WRITERS + i); line = 1; i++;
        goto W2_record
    }
    :: atomic {
        i < READERS && !(IS_IN_LINE(i) && ((many >> i) & 1)) ->
        if :: C[i] == IN_LINE && !at_door && !IS(W2_LEAVES_NO_MARK) -> C[i] = LEFT :: else fi;
        i++;
        goto W2_record
    }
    :: atomic { i == READERS -> i = 0; many = 0; if :: line -> see_line(); line = 0 :: else fi }
    fi;
W2_wake:
    if
    MAY_DIE
    :: atomic { many -> choose_of_line() }
    :: atomic { !many -> goto W3 }
    fi;
    if
    MAY_DIE
    :: atomic { true -> post(); goto W2_wake }
    fi;
W3: if
    MAY_DIE
    DRAINER_LEAVES
    :: atomic { i < READERS && C[i] != READING -> i++; goto W3 }
    :: atomic { i < READERS && C[i] == READING -> i = 0; if :: at_door -> goto W4_way :: else fi }
    :: atomic { i == READERS -> i = 0; goto W5 }
    fi;
    if
    MAY_DIE
    DRAINER_LEAVES
    :: atomic { true -> DRAINING = 1; SUSPECT = SUSPECT || DIED }
    fi;
    if
    MAY_DIE
    DRAINER_LEAVES
    :: atomic { true -> publish(KEY_D); at_door = 1; goto W2 }
    fi;
W4_way: /* Is there a better writer? */
#define HAS_GIVEN_WAY(t) ((gave >> (2 * (t) + odd[t])) & 1)
#define LIVES_IN_LINE(t) (S[t] != IDLE && key[t] == KEY_W && !IS_DEAD(t))
#define IS_BETTER(t) (LIVES_IN_LINE(t) && RANK(t) > RANK(me) && !HAS_GIVEN_WAY(t) \
    && !(LIVES_IN_LINE(0) && RANK(0) > RANK(t)) \
    && !(WRITERS > 1 && LIVES_IN_LINE((1 % WRITERS)) && RANK((1 % WRITERS)) > RANK(t)) \
    && !(WRITERS > 2 && LIVES_IN_LINE((2 % WRITERS)) && RANK((2 % WRITERS)) > RANK(t)))
    if
    MAY_DIE
    DRAINER_LEAVES
    :: atomic {
        true ->
        if
        :: IS_BETTER(0) -> chosen = 0
        :: WRITERS > 1 && IS_BETTER((1 % WRITERS)) -> chosen = 1
        :: WRITERS > 2 && IS_BETTER((2 % WRITERS)) -> chosen = 2
        :: !ANY_WRITER(IS_BETTER)
        fi;
        if :: chosen != NOBODY -> goto W4_gives_way :: else fi
    }
    fi;
W4_sleep:
    if
    MAY_DIE
    DRAINER_LEAVES
    :: atomic { tokens[me] -> tokens[me] = 0 }
    :: atomic { CAN_POLL && !ANY_READER(READS) }
    :: atomic { ANY_READER(IS_BETTER_IN_LINE) }
    :: atomic { ANY_WRITER(IS_BETTER) }
    :: atomic { CAN_POLL && IS_DEAD_RECORD(0) -> C[0] = 0 }
    :: atomic { CAN_POLL && READERS > 1 && IS_DEAD_RECORD((1 % READERS)) -> C[1 % READERS] = 0 }
    fi;
    if
    MAY_DIE
    DRAINER_LEAVES
    :: atomic { true -> renew(); goto W2 }
    fi;
W4_gives_way:
    if
    MAY_DIE
    :: atomic {
        true ->
        S[me] = IDLE; at_door = 0; told = 0;
        if :: !IS(W4_GIVES_WAY_AGAIN) -> gave = gave | BIT(2 * chosen + odd[chosen]) :: else fi;
        chosen = NOBODY;
        ways++; assert(ways <= WRITERS * WRITERS)          /* P3 */
    }
    fi;
    if
    MAY_DIE
    :: atomic { true -> DRAINING = 0; SUSPECT = 0; mine = 1; keep = 1; line = 1; then = AT_A1; goto F0 }
    fi;
W5: if
    MAY_DIE
    DRAINER_LEAVES
    :: atomic { true -> S[me] = IDLE; at_door = 0 }
    fi;
    if
    MAY_DIE
    DRAINER_LEAVES
    :: atomic { true -> DRAINING = 0; SUSPECT = 0 }
    fi;
    if
    MAY_DIE
    :: atomic {
        true ->
        inside = 1; writing++;
        assert(writing == 1 && !reading);                   /* X1 */
        assert(!ahead);                                     /* P2 */
        entered(0);                                         /* X2 */
        if :: READERS > 1 -> entered((1 % READERS)) :: else fi;
        assert(dirty == 2 || told == dirty);                /* X3, H4 */
        told = 0; ways = 0; gave = 0
    }
    fi;
    if
    MAY_DIE_INSIDE
    :: atomic { true -> inside = 0; writing--; dirty = 0 }
    fi;
R1: if
    MAY_DIE
    :: atomic { !PARKED && !DIED -> W = 0; goto next_round }
    :: atomic { PARKED || DIED -> mine = 1; keep = 0; line = 1; then = NEXT_ROUND; goto F0 }
    fi;

A8: if      /* without W, unless it was just taken: then `mine` */
    MAY_DIE_CHOSEN
    :: atomic { true -> S[me] = IDLE; mine = (W == HELD(me)); told = 0; w = 0; parked = 0; died = 0; keep = 0; alive = 0; chosen = NOBODY; seen = 0 }
    fi;
A8_word:
    if
    MAY_DIE_CHOSEN
    :: atomic { W == HELD(me) -> keep = 1; line = 0; then = AT_A8; goto F0 }
    :: atomic { IS_RESERVED(W) -> if :: IS(A8_KEEPS_RESERVATION) -> goto next_round :: else -> then = NEXT_ROUND; goto settle fi }
    :: atomic { IS_HELD(W) && W != HELD(me) -> PARKED = 1; goto next_round }
    :: atomic { !W -> then = NEXT_ROUND; goto R3 }
    fi;
W8: if      /* with W, and not inside */
    MAY_DIE
    :: atomic { true -> S[me] = IDLE; forget() }
    fi;
    if
    MAY_DIE
    :: atomic { true -> DRAINING = 0; SUSPECT = 0; mine = 1; keep = 1; line = 1; then = NEXT_ROUND; goto F0 }
    fi;

/* -- handing over ------------------------------------------------------------------------------------------------------- */
/*
 * mine   W is ours; else `w`, `parked` and `died` are the word that is passed on
 * keep   DIED stays, or is set if W had an owner
 * line   the readers are woken, too
 */

poll_reservation:
    if
    MAY_DIE_CHOSEN
    :: atomic { !IS_RESERVED(W) || IN_VAIN(W) -> goto settle }
    :: atomic { OF_THE_DEAD && !IN_VAIN(W) -> see_word(); but = CHOSEN(W); alive = 1; keep = DIED || IS(POLL_TELLS); line = 0; goto F0 }
    :: atomic { OF_THE_DEAD && !IN_VAIN(W) -> S[CHOSEN(W)] = IDLE; goto settle }            /* its spot is reaped */
    :: atomic { OF_THE_STOPPED && !IN_VAIN(W) -> see_word(); but = CHOSEN(W); keep = DIED; line = 0; goto F0 }
    :: atomic { IS_RESERVED(W) && !KEPT -> goto settle }
    fi;

F0: if
    MAY_DIE_CHOSEN
    :: atomic { mine && IS(R2_LEAVES_FREE) -> W = 0; PARKED = 0; DIED = keep && DIED; mine = 0; goto handed_over }
    :: atomic { mine && !IS(R2_LEAVES_FREE) -> if :: IS(F0_KEEPS_PARKED) :: else -> PARKED = 0 fi }
    :: atomic {
        !mine && IS_SAME_WORD ->
        w = NOBODYS(me); W = w; PARKED = 0; DIED = keep; parked = 0; died = keep
    }
    :: atomic { !mine && !IS_SAME_WORD && w == NOBODYS(me) -> goto handed_over }         /* another passes it on */
    :: atomic { !mine && !IS_SAME_WORD && IS_HELD(w) -> goto settled }
    :: atomic { !mine && !IS_SAME_WORD && IS_RESERVED(w) && w != NOBODYS(me) -> line = 0; goto handed_over }
    fi;
F1: if
    MAY_DIE_CHOSEN
    :: atomic { true -> see_first() }
    fi;
F2: if
    MAY_DIE_CHOSEN
    :: atomic {
        (mine && (!PARKED || IS(F0_KEEPS_PARKED))) || (!mine && IS_SAME_WORD) ->
        if
        :: chosen == NOBODY -> W = 0; PARKED = 0
        :: else -> GRANT(chosen); W = RESERVED(chosen, seen); PARKED = 1
        fi;
        DIED = DIED && keep;
        chosen = NOBODY; seen = 0; mine = 0
    }
    :: atomic { mine && PARKED && !IS(F0_KEEPS_PARKED) -> chosen = NOBODY; seen = 0; goto F0 }
    :: atomic { !mine && !IS_SAME_WORD && W == w -> parked = PARKED; chosen = NOBODY; seen = 0; goto F0 }      /* somebody went to sleep */
    :: atomic { !mine && !IS_SAME_WORD && W != w -> chosen = NOBODY; seen = 0 }
    fi;
handed_over:
    atomic {
        w = 0; parked = 0; died = 0; keep = 0; but = NOBODY; alive = 0; mine = 0; woken = 0;
        if
        :: then == AT_A8 -> then = NEXT_ROUND; goto A8_word
        :: then != AT_A8 && line -> line = 0
        :: then != AT_A8 && !line -> goto settle
        fi
    };
R3: /* The line; then a writer. */
    if
    MAY_DIE_CHOSEN
    :: atomic {
        true ->
        woken = 1;
        if
        :: IS(R3_NO_LINE) || (IS(R3_NO_LINE_IF_RESERVED) && IS_RESERVED(W)) -> goto settle
        :: else -> see_line()
        fi
    }
    fi;
wake_line:
    if
    MAY_DIE_CHOSEN
    :: atomic { many -> choose_of_line() }
    :: atomic { !many -> goto settle }
    fi;
    if
    MAY_DIE_CHOSEN
    :: atomic { true -> post(); goto wake_line }
    fi;
settle:
    if
    MAY_DIE_CHOSEN
    :: atomic { !W && !IS(SETTLE_NO_LINE) && !woken -> goto R3 }
    :: atomic { !W && !(!IS(SETTLE_NO_LINE) && !woken) -> choose(KEY_W) }
    :: atomic { IS_HELD(W) -> goto settled }
    :: atomic { IS_RESERVED(W) && IN_VAIN(W) -> see_word(); mine = 0; keep = DIED; goto F0 }
    :: atomic { IS_RESERVED(W) && !IN_VAIN(W) && IS(F3_SKIPPED) -> goto settled }
    :: atomic { IS_RESERVED(W) && !IN_VAIN(W) && !IS(F3_SKIPPED) -> chosen = CHOSEN(W); S[chosen] = NOTIFIED }
    fi;
    if
    MAY_DIE_CHOSEN
    :: atomic { true -> post() }
    fi;
settled:
    atomic {
        many = 0; w = 0; parked = 0; died = 0; keep = 0; but = NOBODY; alive = 0; line = 0; woken = 0;
        if
        :: then == NEXT_ROUND -> goto next_round
        :: then == AT_A1 -> then = 0; goto A1
        :: then == AT_LOOK && me < WRITERS -> then = 0; goto A6_awake
        :: then == AT_LOOK && me >= WRITERS -> then = 0; goto Q6_awake
        fi
    };

/* -- readers ------------------------------------------------------------------------------------------------------------ */

Q1: if
    MAY_DIE
    :: atomic { !W -> GRANT(me) }
    :: atomic { W && !IS(Q3_BEFORE_Q4) -> goto Q4 }
    :: atomic { W && IS(Q3_BEFORE_Q4) -> C[me - WRITERS] = IN_LINE; in_line = 1; passed[me - WRITERS] = 0; goto Q4 }
    fi;
    if
    MAY_DIE
    :: atomic { true -> C[me - WRITERS] = READING }
    fi;
Q2: if
    MAY_DIE
    :: atomic { !W -> GRANT(me); goto in }
    :: atomic { W }
    fi;
    if
    MAY_DIE
    :: atomic { true -> C[me - WRITERS] = 0 }
    fi;
    if
    MAY_DIE
    :: atomic { DRAINING -> choose(KEY_D) }
    :: atomic { !DRAINING -> goto Q4 }
    fi;
    if
    MAY_DIE
    :: atomic { true -> post() }
    fi;
Q4: if
    MAY_DIE
    READER_LEAVES
    :: atomic { true -> publish(KEY_R); if :: in_line -> goto Q5 :: else fi }
    fi;
Q3: if
    MAY_DIE
    READER_LEAVES
    :: atomic { W -> in_line = 1 }
    :: atomic { !W -> GRANT(me); in_line = 0 }
    fi;
    if
    MAY_DIE
    READER_LEAVES
    :: atomic { true -> C[me - WRITERS] = (in_line -> IN_LINE : READING); passed[me - WRITERS] = 0 }
    fi;
Q5: if
    MAY_DIE
    READER_LEAVES
    :: atomic { !in_line && !W -> GRANT(me); goto Q7 }
    :: atomic { !in_line && W -> goto Q5_back }
    :: atomic { in_line && C[me - WRITERS] == READING -> goto Q7 }
    :: atomic { in_line && C[me - WRITERS] == LEFT -> C[me - WRITERS] = IN_LINE }
    :: atomic { in_line && C[me - WRITERS] == IN_LINE }
    fi;
    if
    MAY_DIE
    READER_LEAVES
    :: atomic { W -> if :: !IS(Q5_NO_PARKED) -> PARKED = 1 :: else fi; asleep = asleep | BIT(me); goto Q6 }
    :: atomic { !W -> GRANT(me) }
    fi;
    if
    MAY_DIE
    READER_LEAVES
    :: atomic { C[me - WRITERS] == IN_LINE -> C[me - WRITERS] = READING; ahead = ahead & ~BIT(me) }
    :: atomic { C[me - WRITERS] == LEFT -> goto Q5 }
    :: atomic { C[me - WRITERS] == READING -> goto Q7 }
    fi;
    if
    MAY_DIE
    :: atomic { !IS(Q5_LOOKS_AGAIN) || !W -> goto Q7 }
    :: atomic { IS(Q5_LOOKS_AGAIN) && W }
    fi;
Q5_back:
    if
    MAY_DIE
    READER_LEAVES
    :: atomic { true -> C[me - WRITERS] = IN_LINE; if :: !in_line -> in_line = 1; passed[me - WRITERS] = 0 :: else fi }
    fi;
    if
    MAY_DIE
    READER_LEAVES
    :: atomic { DRAINING -> choose(KEY_D) }
    :: atomic { !DRAINING -> goto Q5 }
    fi;
    if
    MAY_DIE
    :: atomic { true -> post(); goto Q5 }
    fi;
Q6: if
    MAY_DIE
    READER_LEAVES
    :: atomic { tokens[me] -> tokens[me] = 0; asleep = asleep & ~BIT(me) }
    :: atomic { CAN_POLL && (C[me - WRITERS] == READING || !W || (!PARKED && IS_HELD(W))) -> asleep = asleep & ~BIT(me) }
    :: atomic { CAN_POLL && KEPT && !IS(QD_KEEPS_RESERVATION) -> asleep = asleep & ~BIT(me); then = AT_LOOK; goto poll_reservation }
    :: atomic { CAN_POLL && OWNER_DEAD -> asleep = asleep & ~BIT(me); see_word(); goto QD }
    fi;
Q6_awake:
    if
    MAY_DIE
    READER_LEAVES
    :: atomic { true -> renew(); goto Q5 }
    fi;
QD: if
    MAY_DIE
    READER_LEAVES
    :: atomic { true -> keep = !NOT_INSIDE; alive = 1; line = 1; then = AT_LOOK; goto F0 }
    fi;
Q7: if
    MAY_DIE
    :: atomic { true -> S[me] = IDLE }
    fi;
in: if
    MAY_DIE
    :: atomic {
        true ->
        inside = 1; reading++;
        assert(!writing);                                   /* X1 */
        passed[me - WRITERS] = 0; ways = 0; told = DIED
    }
    fi;
    if      /* `told`: W, then G, then W */
    MAY_DIE
    :: atomic { true -> told = told && !NOT_INSIDE }
    fi;
    if
    MAY_DIE
    :: atomic { true -> told = told && DIED; assert(dirty == 2 || told == dirty); told = 0 }
    fi;
L1: if
    MAY_DIE
    :: atomic { true -> inside = 0; reading--; C[me - WRITERS] = 0 }
    fi;
L2: if
    MAY_DIE
    :: atomic { DRAINING -> choose(KEY_D) }
    :: atomic { !DRAINING -> goto next_round }
    fi;
    if
    MAY_DIE
    :: atomic { true -> post(); goto next_round }
    fi;
Q8: if
    MAY_DIE
    :: atomic { true -> S[me] = IDLE; ahead = ahead & ~BIT(me); leaving = leaving | BIT(me - WRITERS); forget() }
    fi;
    if
    MAY_DIE
    :: atomic { true -> C[me - WRITERS] = 0; passed[me - WRITERS] = 0; leaving = leaving & ~BIT(me - WRITERS); goto L2 }
    fi;

#if STOPS
end_stopped:
    false;
#endif
end_of_thread:
    skip
}

init {
    atomic {
        run Thread(0);
        run Thread(1);
#if THREADS > 2
        run Thread(2);
#endif
#if THREADS > 3
        run Thread(3)
#endif
    }
}
