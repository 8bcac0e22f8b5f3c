/*
 * A leased lock that is biased: in and out by the door, and a supervisor that kills who overruns and takes away what is stalled.
 *
 * Process P has the bias at the beginning, two threads, and a ledger; when it has lost the bias it does not come back.  Q wants
 * the lock, and revokes the bias.  See bias.pml for several biases, and enforcement.pml for holds by W alone.
 *
 * W       FREE, BIASED to P, REVOKING, P|REVOKED, with TAKEN or without, HELD by Q
 * H       OUTSIDE, INSIDE, SHUT
 * BEGAN   0, or the number of the hold that P's ledger names.  Plain stores: they wait in a store buffer
 * seat    0, the number of the hold whose thread has it by the door, or TURN + t: thread t has it by its number
 *
 * Threads of P exclude each other but where a call has returned: gil is the thread that has not come to that yet.
 *
 * S1  one at a time is inside.
 * S2  whoever is killed has not left before its deadline: by B3, or where W was REVOKED by then, and still is P's, by X1.
 * D1  H is INSIDE only while BEGAN names a hold, what is in the store buffer included.
 * A deadline passes at any instant after E2; the lease of T's first look is over at any instant.
 */

#ifndef ROUNDS
#define ROUNDS 2
#endif
#ifndef CHECK_D1
#define CHECK_D1 1
#endif

#define NONE              0
#define E2_AFTER_B1       1
#define X1_BEFORE_B3      2
#define NO_SHUT           3   /* T does not shut H */
#define K2_ONE_LOOK       4   /* the ledger is not looked at again after W */
#define SEAT_NOT_CHECKED  5   /* X1 also by who has lost the seat */
#define TAKES_OVER_INSIDE 6   /* the seat is taken over whatever H is */
#define T3_TAKES_ANYHOW   7   /* T3 looks neither at BEGAN again nor at what H was */
#define INSIDE_IS_TAKEN   9   /* T3 looks at BEGAN only: a thread that was INSIDE when H was to be shut may be out by then */
#define NO_TAKEOVER       8   /* whoever waits for the seat waits until it is 0: as good, but for signal handlers */
#ifndef MUTATION
#define MUTATION NONE
#endif
#define IS(mutation) (MUTATION == mutation)

#define FREE     0
#define BIASED   1
#define REVOKING 2
#define REVOKED  3
#define TAKEN    4      /* REVOKED, and T1 was made */
#define HELD     5

#define OUTSIDE  0
#define INSIDE   1
#define SHUT     2

#define TURN     32
#define HOLDS    (2 * ROUNDS + 1)

byte W = BIASED, H = OUTSIDE, BEGAN, seat, holds, gil;
bool door = true;
bool dead;
chan buffer = [4] of { byte };

/* Ghosts. */
byte within;
byte inside_of_P;
bool late[HOLDS], left_in_time[HOLDS];
byte last;              /* what BEGAN is when the buffer is empty */

#define OWNS (W == REVOKED || W == TAKEN || (W == BIASED || W == REVOKING) && H == INSIDE)

inline drain() {
    do
    :: nempty(buffer) -> buffer ? BEGAN
    :: empty(buffer) -> break
    od
}

inline write_began(x) { buffer ! x; last = x }

inline revoke(take) {
    atomic { if :: W == BIASED -> W = REVOKING :: else fi };                                        /* V0 */
    atomic { h = H; if :: W == REVOKING && h == OUTSIDE -> h = SHUT; H = SHUT :: else fi };         /* V1 */
    atomic {
        if
        :: W == REVOKING && h == INSIDE -> W = REVOKED                                              /* V2 */
        :: W == REVOKING && h == SHUT && take -> W = HELD; within++; assert(within == 1)
        :: W == REVOKING && h == SHUT && !take -> W = FREE
        :: else
        fi;
        h = 0
    }
}

/* B5 and B6 */
inline finish() {
    atomic {
        out = false;
        if
        :: !door -> out = true
        :: door && H != SHUT && W == BIASED -> out = true
        :: door && H != SHUT && W != BIASED -> drain(); if :: H == INSIDE -> out = true :: else -> H = SHUT fi
        :: door && H == SHUT
        fi
    };
    if
    :: atomic { out -> out = false }
    :: atomic { !out && !door }
    :: atomic { !out && door -> door = false };
        do
        :: W == BIASED || W == REVOKING -> revoke(false)
        :: atomic { W == REVOKED || W == TAKEN -> drain(); W = FREE; break }
        :: atomic { !(W == BIASED || W == REVOKING || W == REVOKED || W == TAKEN) -> break }
        od
    fi
}

proctype Thread(byte me) {
    byte rounds, n, h;
    bool got, out;
    {
        do
        :: rounds < ROUNDS && door ->
            /* E0, E2 */
            if
            :: atomic { gil == 0 && seat == 0 ->
                gil = me; holds++; n = holds; seat = n;
                if :: IS(E2_AFTER_B1) :: else -> write_began(n) fi
                }
            :: atomic { !IS(NO_TAKEOVER) && gil == 0 && seat != 0 && seat < TURN && (H != INSIDE || IS(TAKES_OVER_INSIDE)) ->
                seat = TURN + me; write_began(0)
                };
                atomic { gil == 0 -> gil = me; holds++; n = holds; if :: IS(E2_AFTER_B1) :: else -> write_began(n) fi }
            :: atomic { gil == 0 && !door -> goto over }
            fi;
            atomic { drain(); if :: door && H == OUTSIDE -> H = INSIDE; got = true :: else fi; gil = 0 };       /* B1 */
            if
            :: atomic { got && gil == 0 ->
                if :: IS(E2_AFTER_B1) -> write_began(n) :: else fi;
                if :: seat == TURN + me -> seat = n :: else fi;
                within++; inside_of_P++; assert(within == 1);                                                  /* S1 */
                }
                atomic { gil == 0 ->
                    gil = me; within--; inside_of_P--;
                    if :: IS(X1_BEFORE_B3) -> write_began(0) :: else fi
                };
                atomic { drain(); left_in_time[n] = !late[n] && W == BIASED; H = OUTSIDE; got = false; gil = 0 };  /* B2, B3 */
                atomic { gil == 0 ->
                    if
                    :: seat == n || IS(SEAT_NOT_CHECKED) -> write_began(0); seat = 0;                           /* X1, X3 */
                        left_in_time[n] = left_in_time[n] || !late[n]
                    :: else
                    fi
                };
                if
                :: W == BIASED                                                                                  /* B4 */
                :: W != BIASED -> finish()
                fi
            :: atomic { !got && gil == 0 -> if :: seat == n || seat == TURN + me -> write_began(0); seat = 0 :: else fi };
                finish()
            fi;
            rounds++
        :: atomic { rounds == ROUNDS || !door -> break }
        od;
over:   skip
    } unless { dead }
}

proctype Waiter() {
    byte h, rounds;
    do
    :: rounds < ROUNDS ->
        do
        :: W == BIASED || W == REVOKING -> revoke(true); if :: W == HELD -> break :: else fi
        :: atomic { W == FREE -> W = HELD; within++; assert(within == 1); break }
        :: atomic { dead && (W == REVOKED || W == TAKEN) -> W = HELD; within++; assert(within == 1); break }
        od;
        atomic { within--; W = FREE };
        rounds++
    :: rounds == ROUNDS -> break
    od
}

#define STAYS (!IS(T3_TAKES_ANYHOW) && (d != 0 || w == INSIDE && !IS(INSIDE_IS_TAKEN)))

proctype Supervisor() {
    byte h, d, w;
end:
    do
    :: atomic { !dead && OWNS && BEGAN == 0 -> d = 0 };                                                        /* T */
        if
        :: W == BIASED || W == REVOKING -> revoke(false)
        :: else
        fi;
        atomic { if :: W == REVOKED -> W = TAKEN :: else fi };                                                 /* T1 */
        if
        :: W == TAKEN ->
            atomic { w = H; if :: H == OUTSIDE && !IS(NO_SHUT) -> H = SHUT; w = SHUT :: else fi };
            atomic { drain() };                                                                                /* T2 */
            d = BEGAN;                                                                                         /* T3 */
            atomic {
                if
                :: W == TAKEN && STAYS -> W = REVOKED
                :: W == TAKEN && !STAYS -> W = FREE
                :: else
                fi;
                d = 0; w = 0
            }
        :: else
        fi
    :: atomic { !dead && OWNS };                                                                               /* K */
        d = BEGAN;
        if
        :: d != 0 && late[d] ->
            atomic { drain() };                                                                                /* K2 */
            if
            :: BEGAN == d ->
                if
                :: OWNS ->
                    if
                    :: atomic { BEGAN == d || IS(K2_ONE_LOOK) ->
                        assert(!left_in_time[d]);                                                              /* S2 */
                        dead = true; within = within - inside_of_P; inside_of_P = 0;
                        drain()
                        }
                        do                                                                                     /* K6 */
                        :: W == BIASED || W == REVOKING -> revoke(false)
                        :: atomic { W == REVOKED || W == TAKEN -> W = FREE; break }
                        :: atomic { W == FREE || W == HELD -> break }
                        od
                    :: else
                    fi
                :: else
                fi
            :: else
            fi
        :: else
        fi;
        d = 0
    od
}

/* A deadline passes, a store leaves its buffer. */
proctype World() {
    byte d;
end:
    do
    :: atomic { last != 0 && !late[last] -> late[last] = true }
    :: atomic { nempty(buffer) -> buffer ? BEGAN }
    od
}

#if CHECK_D1
proctype Check() {
end:
    do
    :: atomic { H == INSIDE && last == 0 && !dead -> assert(last != 0) }                                       /* D1 */
    od
}
#endif

init {
    atomic {
        run Thread(1);
        run Thread(2);
        run Waiter();
        run Supervisor();
        run World();
#if CHECK_D1
        run Check()
#endif
    }
}
