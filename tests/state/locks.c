/* Locks, leases, and who is told by signal. */
#include "state.h"

#include <poll.h>
#include <sys/file.h>

static int fd, other;
static pid_t child;
static int hold[2];

static int try_lock(int file, int command, short type, off_t start, off_t length)
{
	struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = length};
	return fcntl(file, command, &lock);
}

/* What a process that owns nothing would find at a byte of a file. */
static struct flock found_at(const char *path, short type, off_t start)
{
	struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = 1};
	pid_t asker = MUST(fork());
	if (asker == 0) {
		int file = open(path, O_RDWR);
		if (fcntl(file, F_GETLK, &lock) == -1)
			_exit(200);
		_exit(lock.l_type == F_UNLCK ? 0 : lock.l_pid & 0x7f);
	}
	int status;
	MUST(waitpid(asker, &status, 0));
	lock.l_type = WEXITSTATUS(status) ? type : F_UNLCK;
	lock.l_pid = WEXITSTATUS(status);
	return lock;
}

static int wait_for_parent(void)
{
	char byte;
	return read(hold[0], &byte, 1) == 1 ? 0 : 2;
}
static void let_child_end(void) { MUST(write(hold[1], "x", 1)); expect_exit(child, 0); }

static void lock_ranges_setup(void)
{
	fd = MUST(open("/tmp/ranges", O_RDWR | O_CREAT, 0666));
	other = MUST(open("/tmp/ranges", O_RDONLY));
	MUST(try_lock(fd, F_SETLK, F_WRLCK, 0, 10));
	MUST(try_lock(fd, F_SETLK, F_RDLCK, 5, 10));
	MUST(try_lock(fd, F_SETLK, F_WRLCK, 100, 0));
	MUST(try_lock(fd, F_SETLK, F_UNLCK, 200, 10));
}
static void lock_ranges_check(void)
{
	static const struct { off_t at; bool reads, writes; } expected[] = {
		{0, true, true}, {4, true, true}, {5, false, true}, {14, false, true}, {15, false, false}, {99, false, false},
		{100, true, true}, {199, true, true}, {200, false, false}, {209, false, false}, {210, true, true}, {1 << 20, true, true},
	};
	for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
		bool reads = found_at("/tmp/ranges", F_RDLCK, expected[i].at).l_type != F_UNLCK;
		bool writes = found_at("/tmp/ranges", F_WRLCK, expected[i].at).l_type != F_UNLCK;
		CHECK(reads == expected[i].reads && writes == expected[i].writes, "byte %ld", (long)expected[i].at);
	}
	CHECK(found_at("/tmp/ranges", F_WRLCK, 0).l_pid == getpid(), "the owner is another");
}
static void lock_ranges_spoil(void) { MUST(try_lock(fd, F_SETLK, F_UNLCK, 0, 1)); }
STATE(lock_ranges)

static int lock_shared_body(void)
{
	if (try_lock(fd, F_SETLK, F_RDLCK, 0, 50) || try_lock(fd, F_SETLK, F_WRLCK, 60, 5))
		return 3;
	if (write(hold[1], "y", 1) != 1)
		return 4;
	until_finishing();
	struct timespec pause = {.tv_nsec = 500000000};
	nanosleep(&pause, NULL);
	return wait_for_parent();
}
static void lock_overlapping_setup(void)
{
	fd = MUST(open("/tmp/overlap", O_RDWR | O_CREAT, 0666));
	MUST(try_lock(fd, F_SETLK, F_RDLCK, 20, 30));
	MUST(pipe(hold));
	child = in_child(lock_shared_body);
	char byte;
	MUST(read(hold[0], &byte, 1));
}
static void lock_overlapping_check(void)
{
	CHECK(try_lock(fd, F_SETLK, F_WRLCK, 20, 1) == -1, "the child's shared lock is gone");
	CHECK(try_lock(fd, F_SETLK, F_RDLCK, 60, 1) == -1, "the child's exclusive lock is gone");
	MUST(try_lock(fd, F_SETLK, F_UNLCK, 20, 30));
	CHECK(found_at("/tmp/overlap", F_WRLCK, 40).l_pid == child, "the child's lock is gone");
	let_child_end();
	MUST(try_lock(fd, F_SETLK, F_WRLCK, 0, 0));
}
static void lock_overlapping_spoil(void) { MUST(kill(child, SIGKILL)); MUST(waitpid(child, NULL, WNOWAIT | 0)); }
STATE(lock_overlapping)

static void lock_kinds_setup(void)
{
	fd = MUST(open("/tmp/kinds", O_RDWR | O_CREAT, 0666));
	MUST(try_lock(fd, F_OFD_SETLK, F_WRLCK, 3, 4));
	MUST(flock(fd, LOCK_SH));
	other = MUST(open("/tmp/kinds", O_RDONLY));
	MUST(flock(other, LOCK_SH));
}
static void lock_kinds_check(void)
{
	int third = MUST(open("/tmp/kinds", O_RDWR));
	CHECK(try_lock(third, F_OFD_SETLK, F_RDLCK, 3, 1) == -1, "the open file description lock is gone");
	MUST(try_lock(third, F_OFD_SETLK, F_WRLCK, 0, 3));
	CHECK(flock(third, LOCK_EX | LOCK_NB) == -1, "the flocks are gone");
	MUST(flock(fd, LOCK_UN));
	CHECK(flock(third, LOCK_EX | LOCK_NB) == -1, "the second flock is gone");
	close(other);
	MUST(flock(third, LOCK_EX | LOCK_NB));
}
static void lock_kinds_spoil(void) { MUST(flock(other, LOCK_UN)); }
STATE(lock_kinds)

static int flock_body(void)
{
	int result = wait_for_parent();
	/* The last holder of the description gives the lock back. */
	return result ? result : flock(fd, LOCK_EX | LOCK_NB) == 0 ? 0 : 1;
}
static void flock_forked_setup(void)
{
	fd = MUST(open("/tmp/forked", O_RDWR | O_CREAT, 0666));
	MUST(flock(fd, LOCK_EX));
	MUST(pipe(hold));
	child = in_child(flock_body);
	close(fd);
}
static void flock_forked_check(void)
{
	other = MUST(open("/tmp/forked", O_RDONLY));
	CHECK(flock(other, LOCK_SH | LOCK_NB) == -1 && errno == EWOULDBLOCK, "the lock is gone");
	let_child_end();
	MUST(flock(other, LOCK_EX | LOCK_NB));
}
static void flock_forked_spoil(void) { MUST(kill(child, SIGKILL)); }
STATE(flock_forked)

static int lock_waiter_body(void)
{
	int file = open("/tmp/waited", O_RDWR);
	if (flock(file, LOCK_EX) || try_lock(file, F_SETLKW, F_WRLCK, 0, 1))
		return 1;
	return finishing() ? 0 : 2;
}
static void lock_waiter_setup(void)
{
	fd = MUST(open("/tmp/waited", O_RDWR | O_CREAT, 0666));
	MUST(try_lock(fd, F_SETLK, F_WRLCK, 0, 0));
	MUST(flock(fd, LOCK_EX));
	child = in_child(lock_waiter_body);
	struct timespec pause = {.tv_nsec = 100000000};
	nanosleep(&pause, NULL);
}
static void lock_waiter_check(void)
{
	CHECK(waitpid(child, NULL, WNOHANG) == 0, "the waiter got the lock too early");
	MUST(flock(fd, LOCK_UN));
	struct timespec pause = {.tv_nsec = 100000000};
	nanosleep(&pause, NULL);
	CHECK(waitpid(child, NULL, WNOHANG) == 0, "the waiter got the second lock too early");
	MUST(try_lock(fd, F_SETLK, F_UNLCK, 0, 0));
	expect_exit(child, 0);
}
static void lock_waiter_spoil(void) { MUST(kill(child, SIGKILL)); }
STATE(lock_waiter)

/* Who is told. */

static int told, told_fd;
static void on_signal(int number, siginfo_t *information, void *context)
{
	(void)context;
	told = number;
	told_fd = information->si_fd;
}
static void listen_for(int number)
{
	struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
	MUST(sigaction(number, &action, NULL));
}

static int ends[2];
static void async_pipe_setup(void)
{
	MUST(pipe(ends));
	listen_for(SIGRTMIN + 3);
	MUST(fcntl(ends[0], F_SETOWN, getpid()));
	MUST(fcntl(ends[0], F_SETSIG, SIGRTMIN + 3));
	MUST(fcntl(ends[0], F_SETFL, O_ASYNC | O_NONBLOCK));
}
static void async_pipe_check(void)
{
	CHECK(!told, "signal %d came too early", told);
	CHECK(MUST(fcntl(ends[0], F_GETFL)) & O_ASYNC, "O_ASYNC is lost");
	CHECK(fcntl(ends[0], F_GETSIG) == SIGRTMIN + 3, "the signal is %d", fcntl(ends[0], F_GETSIG));
	MUST(write(ends[1], "x", 1));
	CHECK(told == SIGRTMIN + 3 && told_fd == ends[0], "signal %d for descriptor %d", told, told_fd);
}
static void async_pipe_spoil(void) { MUST(fcntl(ends[0], F_SETFL, 0)); }
STATE(async_pipe)

static int owner_body(void) { return wait_for_parent(); }
static struct f_owner_ex owners[3];
static int owned[3];
static void owners_setup(void)
{
	MUST(pipe(hold));
	child = in_child(owner_body);
	MUST(setpgid(child, child));
	owners[0] = (struct f_owner_ex){F_OWNER_TID, getpid()};
	owners[1] = (struct f_owner_ex){F_OWNER_PID, child};
	owners[2] = (struct f_owner_ex){F_OWNER_PGRP, child};
	for (int i = 0; i < 3; i++) {
		owned[i] = MUST(open("/tmp", O_RDONLY));
		MUST(fcntl(owned[i], F_SETOWN_EX, &owners[i]));
	}
}
static void owners_check(void)
{
	for (int i = 0; i < 3; i++) {
		struct f_owner_ex now;
		MUST(fcntl(owned[i], F_GETOWN_EX, &now));
		CHECK(now.type == owners[i].type && now.pid == owners[i].pid, "owner %d is %d of type %d", i, now.pid, now.type);
	}
	let_child_end();
}
static void owners_spoil(void) { MUST(fcntl(owned[0], F_SETOWN, 0)); }
STATE(owners)

static void lease_setup(void)
{
	fd = MUST(open("/dev/shm/leased", O_RDONLY | O_CREAT, 0600));
	listen_for(SIGRTMIN + 4);
	MUST(fcntl(fd, F_SETLEASE, F_RDLCK));
	MUST(fcntl(fd, F_SETSIG, SIGRTMIN + 4));
}
static void lease_check(void)
{
	CHECK(fcntl(fd, F_GETLEASE) == F_RDLCK, "the lease is %d", fcntl(fd, F_GETLEASE));
	CHECK(!told, "the lease was broken");
	CHECK(open("/dev/shm/leased", O_RDWR | O_NONBLOCK) == -1 && errno == EWOULDBLOCK, "the file can be opened");
	CHECK(told == SIGRTMIN + 4 && told_fd == fd, "signal %d for descriptor %d", told, told_fd);
	CHECK(fcntl(fd, F_GETLEASE) == F_UNLCK, "it is to become %d", fcntl(fd, F_GETLEASE));
}
static void lease_spoil(void) { MUST(fcntl(fd, F_SETLEASE, F_UNLCK)); }
STATE(lease)

static void lease_breaking_setup(void)
{
	lease_setup();
	CHECK(open("/dev/shm/leased", O_RDWR | O_NONBLOCK) == -1, "the lease does not hold");
	CHECK(told == SIGRTMIN + 4, "no signal");
	told = 0;
}
static void lease_breaking_check(void)
{
	CHECK(!told, "the lease was broken once more");
	CHECK(fcntl(fd, F_GETLEASE) == F_UNLCK, "it is to become %d", fcntl(fd, F_GETLEASE));
	CHECK(open("/dev/shm/leased", O_RDWR | O_NONBLOCK) == -1 && errno == EWOULDBLOCK, "the lease is gone");
	CHECK(!told, "the second opening broke it once more");
	MUST(fcntl(fd, F_SETLEASE, F_UNLCK));
	close(MUST(open("/dev/shm/leased", O_RDWR | O_NONBLOCK)));
}
static void lease_breaking_spoil(void) { MUST(fcntl(fd, F_SETLEASE, F_UNLCK)); }
STATE(lease_breaking)

static void lease_for_writing_setup(void)
{
	fd = MUST(open("/dev/shm/leased-too", O_RDWR | O_CREAT, 0600));
	MUST(fcntl(fd, F_SETLEASE, F_WRLCK));
}
static void lease_for_writing_check(void) { CHECK(fcntl(fd, F_GETLEASE) == F_WRLCK, "the lease was broken"); }
static void lease_for_writing_spoil(void) { MUST(fcntl(fd, F_SETLEASE, F_UNLCK)); }
STATE(lease_for_writing, .refused = "a lease for writing")

#ifndef F_GET_RW_HINT
#define F_GET_RW_HINT 1035
#define F_SET_RW_HINT 1036
#endif
static void write_hint_setup(void)
{
	fd = MUST(open("/dev/shm/hint", O_RDWR | O_CREAT, 0600));
	uint64_t hint = 3;
	MUST(fcntl(fd, F_SET_RW_HINT, &hint));
}
static void write_hint_check(void)
{
	uint64_t hint;
	MUST(fcntl(fd, F_GET_RW_HINT, &hint));
	CHECK(hint == 3, "the hint is %d", (int)hint);
}
static void write_hint_spoil(void) { uint64_t hint = 2; MUST(fcntl(fd, F_SET_RW_HINT, &hint)); }
STATE(write_hint)
