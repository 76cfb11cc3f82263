/*
 * The life of a volume (volume-record.md): two nodes, one disk, one record. A node
 * may freeze or crash at any step, an answer may be lost, a write of the record may
 * conflict. test/suite/model runs it through spin, exhaustively.
 *
 * What is claimed:
 *   - no node writes a data block unless the record names it as the holder;
 *   - there are never two nodes that may write;
 *   - whoever opens a volume finds the header that the record names. A node that was
 *     frozen before it wrote its header may write it late: the holder puts its own
 *     back. Where nobody holds the volume at that moment nobody does, which is stated
 *     in LIMITATIONS.md and left out here by the flag "unheld";
 *   - an active volume has a whole file system.
 *
 * Variants:
 *   -DMACHINE      evidence tells the nodes apart: leases are not bound and do not end
 *   -DLATE_WRITES  a bound holder may be frozen between looking at its clock and
 *                  writing, on a disk without persistent reservations. The first claim
 *                  does not hold then: the stated exception
 *   -DBROKEN_STANDS, -DBROKEN_AGAIN, -DBROKEN_CONFIRM, -DBROKEN_EXPIRY, -DBROKEN_WATCH
 *                  one rule is left out each: spin must find what follows. That only
 *                  one attempt lives at a time is no such rule: it spares the loser its
 *                  work, and safety rests on the second compare-and-swap
 *   -DSMALL        fewer leases and freezes, for every run of the tests
 */

/* How many attempts and leases there are, less one, and how much goes wrong. */
#ifndef IDS
#ifdef SMALL
#define IDS 5
#define FREEZES 1
#else
#define IDS 6
#define FREEZES 2
#endif
#define FAULTS 1
#endif

#define NOBODY 2

mtype = { PENDING, FORMATTED, ACTIVE };
mtype = { DONE, LOST, CONFLICT };

/* The record. IDs of attempts and leases are one sequence; 0 is none. */
mtype state = PENDING;
byte attempt = 0;
byte attempter = NOBODY;
bool attempt_lives = false;
byte lease = 0;
byte holder = NOBODY;
bool lease_lives = false;
byte header = 0;        /* that the record's MACs are of */
byte next = 1;

/* The disk: whose header is on it. 0 is blank. */
byte disk = 0;
bool filesystem = false; /* it is made as a whole */
bool unheld = false;    /* a late header was written while nobody held the volume */

/* The nodes. */
bool writes[2] = false; /* may write data blocks, as far as it knows */
bool past[2] = false;   /* its clock says that its lease has ended */
bool frozen[2] = false;
bool crashed[2] = false;

byte faults = 0, freezes = 0, crashes = 0;

/* What becomes of a call. A conflict changes nothing and is tried again by the key
   service; the answer to a call may be lost after it changed the record. */
inline call()
{
	if
	:: fate = DONE
	:: faults < FAULTS -> faults++; fate = LOST
	:: faults < FAULTS -> faults++; fate = CONFLICT
	fi
}

#ifdef MACHINE
#define MINE(who) (who == me)
#define BOUND false
#else
#define MINE(who) false
#define BOUND true
#endif

#define MAY_BEGIN (attempt == 0 || attempt == a || !attempt_lives || MINE(attempter))

#ifdef BROKEN_STANDS
#define IS_ATTEMPT true
#else
#define IS_ATTEMPT (attempt == a)
#endif

#ifdef BROKEN_CONFIRM
#define MAY_CONFIRM true
#else
#define MAY_CONFIRM (attempt == a)
#endif

/* Nobody is there to put the header back. */
inline spoilt()
{
	if
	:: state != PENDING && disk != header && (!writes[0] || past[0]) && (!writes[1] || past[1]) -> unheld = true
	:: else
	fi
}

/* A data block is written. Nothing but the record's word allows it. */
inline data()
{
	assert(lease == l && holder == me);
	assert(state == FORMATTED || state == ACTIVE);
	assert(!writes[1 - me] || past[1 - me])
}

proctype node(byte me) provided (!frozen[me])
{
	byte a = 0;  /* its attempt, and the header that it made with it */
	byte h = 0;  /* the header that it has in memory */
	byte l = 0;  /* its lease */
	byte id = 0;
	mtype fate = DONE;
	bool ok = false;

again:
	{
		skip;
start:		atomic { writes[me] = false; a = 0; h = 0; l = 0; id = 0; ok = false; fate = DONE }
		if
		:: atomic { state == PENDING && next < IDS && (attempt == 0 || !attempt_lives || MINE(attempter)) ->
			a = next; h = next; next++ }
		:: atomic { state != PENDING && next < IDS -> id = next; next++ }
			goto take
		:: next >= IDS -> goto stop
		fi;

begin:		atomic {
			call();
			if
			:: fate == CONFLICT -> goto begin
			:: else
			fi;
			ok = (state == PENDING && MAY_BEGIN);
			if
			:: ok -> attempt = a; attempter = me; attempt_lives = true
			:: else
			fi;
			if
			:: fate == LOST -> goto begin
			:: fate != LOST && ok
			:: fate != LOST && !ok -> goto start
			fi
		}

		/* Blank check, marker, header. It may be frozen between any two. */
check:		skip;
write:		atomic {
			disk = a;
			spoilt()
		}
		if
		:: disk == a
		:: disk != a -> goto start
		fi;

stands:		atomic {
			call();
			if
			:: fate == CONFLICT -> goto stands
			:: else
			fi;
			ok = (state != ACTIVE && IS_ATTEMPT);
			if
			:: ok && state == PENDING ->
				state = FORMATTED; header = a; lease = a; holder = me; lease_lives = true
#ifndef BROKEN_AGAIN
			/* The answer to the first was lost: this one gives the whole term, too. */
			:: ok && state == FORMATTED && lease != 0 -> lease_lives = true
#else
			:: ok && state == FORMATTED && lease != 0
#endif
			:: else
			fi;
			if
			:: fate == LOST -> goto stands
			:: fate != LOST && ok -> l = a; past[me] = false; writes[me] = true
			:: fate != LOST && !ok -> goto start
			fi
		}

format:		/* The file system is made: data blocks. */
		if
		:: atomic { !past[me] -> data(); filesystem = false }
			if
			:: atomic { !past[me] -> data(); filesystem = true }
			:: past[me] -> writes[me] = false; goto start
			fi
		:: past[me] -> writes[me] = false; goto start
		fi;

confirm:	atomic {
			call();
			if
			:: fate == CONFLICT -> goto confirm
			:: else
			fi;
			ok = ((state == FORMATTED && MAY_CONFIRM) || (state == ACTIVE && header == h));
			if
			:: ok && state == FORMATTED -> state = ACTIVE; attempt = 0; attempter = NOBODY; attempt_lives = false
			:: else
			fi;
			if
			:: fate == LOST -> goto confirm
			:: fate != LOST && ok
			:: fate != LOST && !ok -> writes[me] = false; goto start
			fi
		}

mounted:	do
#ifdef LATE_WRITES
		:: !past[me] && writes[me] -> data()
#else
		:: atomic { !past[me] && writes[me] -> data() }
#endif
		:: atomic { /* renewal */
			call();
			ok = (lease == l && fate != CONFLICT);
			if
			:: ok -> lease_lives = true
			:: else
			fi;
			if
			:: fate == DONE && ok -> past[me] = false
			:: fate == DONE && !ok -> writes[me] = false; goto start
			:: fate != DONE
			fi
		   }
#ifndef BROKEN_WATCH
		:: atomic { writes[me] && disk != h -> disk = h } /* header watch */
#endif
		:: atomic { past[me] -> writes[me] = false; spoilt() } /* it stops by itself */
			goto start
		:: writes[me] -> /* clean close; the watch looks once more */
			atomic {
#ifndef BROKEN_WATCH
				disk = h;
#endif
				writes[me] = false
			}
			atomic {
				call();
				if
				:: fate != CONFLICT && lease == l -> lease = 0; holder = NOBODY; lease_lives = false
				:: else
				fi
			}
			goto start
		od;

take:		/* The key of a volume whose header stands. */
		atomic {
			call();
			if
			:: fate == CONFLICT -> goto take
			:: else
			fi;
			ok = (state != PENDING && (lease == 0 || lease == id || MINE(holder) || (BOUND && !lease_lives)));
			if
			:: ok ->
				lease = id; holder = me; lease_lives = true;
				if
				:: state == FORMATTED -> attempt = id; attempter = me
				:: else
				fi
			:: else
			fi;
			if
			:: fate == LOST -> goto start
			:: fate != LOST && ok ->
				/* The table of the mapping is made of the header on the disk, which has the record's MAC. */
				assert(disk == header || unheld);
				assert(state == FORMATTED || filesystem);
				l = id; a = id; h = header; past[me] = false; writes[me] = true
			:: fate != LOST && !ok -> goto start
			fi
		}
		if
		:: state == FORMATTED -> goto format
		:: state == ACTIVE -> goto mounted
		fi;

stop:		goto end
	} unless { atomic { crashed[me] -> crashed[me] = false; writes[me] = false } };
	goto again;
end:	atomic { writes[me] = false }
}

/* Time passes, and machines fail. */
active proctype world()
{
	do
	:: atomic { attempt_lives -> attempt_lives = false }
	/* A holder that runs has renewed, or has stopped by itself before the end. */
#ifdef BROKEN_EXPIRY
	:: atomic { BOUND && lease_lives -> lease_lives = false }
#else
	:: atomic { BOUND && lease_lives && holder != NOBODY && (frozen[holder] || !writes[holder]) ->
		lease_lives = false; past[holder] = true; spoilt() }
#endif
	:: atomic { freezes < FREEZES && !frozen[0] -> frozen[0] = true; freezes++ }
	:: atomic { freezes < FREEZES && !frozen[1] -> frozen[1] = true; freezes++ }
	:: atomic { frozen[0] -> frozen[0] = false }
	:: atomic { frozen[1] -> frozen[1] = false }
	:: atomic { crashes < 1 && !crashed[0] -> crashes++; crashed[0] = true; frozen[0] = false; writes[0] = false; spoilt() }
	:: break
	od
}

init
{
	atomic { run node(0); run node(1) }
}
