/* Locks, leases, and who is told by signal. */
#include "state.h"

#include <poll.h>
#include <sys/file.h>
#include <sys/mman.h>

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

/* A file with text at both ends of a hole, on which this process then has a lease, and is told of its end. */
static int lease_file(const char *path, int flags, int kind)
{
	int file = MUST(open(path, O_WRONLY | O_CREAT, 0600));
	MUST(pwrite(file, "begin", 5, 0));
	MUST(pwrite(file, "end", 3, 1 << 20));
	MUST(close(file));
	file = MUST(open(path, flags));
	MUST(lseek(file, 7, SEEK_SET));
	MUST(fcntl(file, F_SETLEASE, kind));
	MUST(fcntl(file, F_SETSIG, SIGRTMIN + 4));
	listen_for(SIGRTMIN + 4);
	return file;
}
/* Somebody wants the file who does not wait. */
static void break_lease(const char *path, int flags, int file)
{
	told = 0;
	CHECK(open(path, flags | O_NONBLOCK) == -1 && errno == EWOULDBLOCK, "%s can be opened", path);
	CHECK(told == SIGRTMIN + 4 && told_fd == file, "signal %d for descriptor %d", told, told_fd);
	told = 0;
}
static void expect_lease(int file, int kind)
{
	CHECK(!told, "signal %d for descriptor %d", told, told_fd);
	CHECK(fcntl(file, F_GETLEASE) == kind, "the lease is %d, not %d", fcntl(file, F_GETLEASE), kind);
	CHECK(lseek(file, 0, SEEK_CUR) == 7, "the position is %ld", (long)lseek(file, 0, SEEK_CUR));
}
/* Gives the lease up, and looks at what the file holds. */
static void expect_leased_content(const char *path, int file)
{
	char begin[6] = "", end[4] = "";
	MUST(fcntl(file, F_SETLEASE, F_UNLCK));
	int again = MUST(open(path, O_RDONLY));
	struct stat now;
	MUST(fstat(again, &now));
	MUST(pread(again, begin, 5, 0));
	MUST(pread(again, end, 3, 1 << 20));
	CHECK(!strcmp(begin, "begin") && !strcmp(end, "end"), "%s holds `%s` and `%s`", path, begin, end);
	CHECK(now.st_size == (1 << 20) + 3, "%s has %ld bytes", path, (long)now.st_size);
	CHECK(now.st_blocks < 1024, "%s has lost its hole", path);
	close(again);
}

static void lease_for_writing_setup(void) { fd = lease_file("/dev/shm/leased-too", O_RDWR, F_WRLCK); }
static void lease_for_writing_check(void)
{
	expect_lease(fd, F_WRLCK);
	break_lease("/dev/shm/leased-too", O_RDONLY, fd);
	CHECK(fcntl(fd, F_GETLEASE) == F_RDLCK, "it is to become %d", fcntl(fd, F_GETLEASE));
	expect_leased_content("/dev/shm/leased-too", fd);
}
static void lease_for_writing_spoil(void) { MUST(fcntl(fd, F_SETLEASE, F_UNLCK)); }
STATE(lease_for_writing)

/* In the root, whose files have an inode of their own for each layer. */
static void lease_for_writing_in_root_setup(void)
{
	fd = lease_file("/tmp/leased", O_WRONLY, F_WRLCK);
	other = lease_file("/tmp/leased-too", O_RDONLY, F_WRLCK);
}
static void lease_for_writing_in_root_check(void)
{
	expect_lease(fd, F_WRLCK);
	expect_lease(other, F_WRLCK);
	break_lease("/tmp/leased", O_RDONLY, fd);
	break_lease("/tmp/leased-too", O_RDWR, other);
	CHECK(fcntl(other, F_GETLEASE) == F_UNLCK, "it is to become %d", fcntl(other, F_GETLEASE));
	expect_leased_content("/tmp/leased", fd);
	expect_leased_content("/tmp/leased-too", other);
}
static void lease_for_writing_in_root_spoil(void) { MUST(fcntl(fd, F_SETLEASE, F_UNLCK)); }
STATE(lease_for_writing_in_root)

/* Leases that somebody waits for: what they were, and what is wanted. */
static const struct { const char *path; int flags, kind, wanted, to; bool readers_wait; } broken_leases[] = {
	{"/tmp/broken-0", O_RDONLY, F_RDLCK, O_WRONLY, F_UNLCK, false},
	{"/tmp/broken-1", O_WRONLY, F_WRLCK, O_RDONLY, F_RDLCK, true},
	{"/tmp/broken-2", O_WRONLY, F_WRLCK, O_WRONLY, F_UNLCK, true},
	{"/tmp/broken-3", O_RDONLY, F_WRLCK, O_WRONLY, F_UNLCK, true},
	{"/dev/shm/broken-4", O_RDWR, F_WRLCK, O_RDONLY, F_RDLCK, true},
	{"/dev/shm/broken-5", O_RDONLY, F_WRLCK, O_WRONLY, F_UNLCK, true},
};
#define BROKEN (sizeof broken_leases / sizeof *broken_leases)
static int broken[BROKEN];
static void leases_breaking_setup(void)
{
	for (size_t i = 0; i < BROKEN; i++) {
		broken[i] = lease_file(broken_leases[i].path, broken_leases[i].flags, broken_leases[i].kind);
		break_lease(broken_leases[i].path, broken_leases[i].wanted, broken[i]);
	}
}
static void leases_breaking_check(void)
{
	for (size_t i = 0; i < BROKEN; i++) {
		expect_lease(broken[i], broken_leases[i].to);
		int reader = open(broken_leases[i].path, O_RDONLY | O_NONBLOCK);
		CHECK((reader == -1) == broken_leases[i].readers_wait, "%s: a reader gets %d", broken_leases[i].path, reader);
		if (reader != -1)
			close(reader);
		CHECK(!told, "signal %d for descriptor %d", told, told_fd);
		expect_leased_content(broken_leases[i].path, broken[i]);
	}
}
static void leases_breaking_spoil(void) { MUST(fcntl(broken[3], F_SETLEASE, F_UNLCK)); }
STATE(leases_breaking)

static int leased_child(void)
{
	int status = wait_for_parent();
	return status ? status : fcntl(other, F_GETLEASE) != F_WRLCK;
}
/* One that has several descriptors, and one that is left to a child by the process that has taken it. */
static void leases_forked_setup(void)
{
	MUST(pipe(hold));
	fd = lease_file("/tmp/forked", O_RDWR, F_WRLCK);
	break_lease("/tmp/forked", O_WRONLY, fd);
	other = lease_file("/tmp/left", O_RDWR, F_WRLCK);
	child = in_child(leased_child);
	MUST(close(other));
	MUST(dup(fd));
}
static void leases_forked_check(void)
{
	expect_lease(fd, F_UNLCK);
	CHECK(open("/tmp/left", O_RDONLY | O_NONBLOCK) == -1 && errno == EWOULDBLOCK, "the lease of the child is gone");
	CHECK(told == SIGRTMIN + 4, "signal %d", told);
	MUST(kill(child, SIGKILL));
	MUST(waitpid(child, NULL, 0));
	CHECK(access("/tmp/left", R_OK) == 0, "the file is gone");
	close(MUST(open("/tmp/left", O_RDONLY)));
	expect_leased_content("/tmp/forked", fd);
}
static void leases_forked_spoil(void)
{
	MUST(kill(child, SIGKILL));
	MUST(waitpid(child, NULL, 0));
	child = in_child(wait_for_parent);
}
STATE(leases_forked)

static int opens_leased(void)
{
	char begin[6] = "";
	int file = open("/tmp/awaited", O_RDONLY);
	if (file == -1 || pread(file, begin, 5, 0) != 5)
		return 3;
	return strcmp(begin, "begin") ? 4 : 0;
}
static void lease_waiter_setup(void)
{
	fd = lease_file("/tmp/awaited", O_RDWR, F_WRLCK);
	child = in_child(opens_leased);
	while (!told)
		usleep(1000);
	told = 0;
}
static void lease_waiter_check(void)
{
	expect_lease(fd, F_RDLCK);
	CHECK(waitpid(child, NULL, WNOHANG) == 0, "the waiter got the file too early");
	MUST(fcntl(fd, F_SETLEASE, F_UNLCK));
	expect_exit(child, 0);
}
static void lease_waiter_spoil(void) { MUST(kill(child, SIGKILL)); }
STATE(lease_waiter)

static void lease_unlinked_setup(void)
{
	fd = lease_file("/tmp/leased-and-gone", O_RDWR, F_WRLCK);
	other = lease_file("/dev/shm/leased-and-gone", O_RDONLY, F_WRLCK);
	MUST(unlink("/tmp/leased-and-gone"));
	MUST(unlink("/dev/shm/leased-and-gone"));
}
static void lease_unlinked_check(void)
{
	expect_lease(fd, F_WRLCK);
	expect_lease(other, F_WRLCK);
	char path[32];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	break_lease(path, O_RDONLY, fd);
	expect_leased_content(path, fd);
	snprintf(path, sizeof path, "/proc/self/fd/%d", other);
	break_lease(path, O_RDONLY, other);
	expect_leased_content(path, other);
}
static void lease_unlinked_spoil(void) { MUST(fcntl(fd, F_SETLEASE, F_UNLCK)); }
STATE(lease_unlinked)

/* Outside of an overlay there is no other way to its content than the description, which can't be read. */
static void lease_write_only_setup(void) { fd = lease_file("/dev/shm/write-only", O_WRONLY, F_WRLCK); }
static void lease_write_only_check(void) { expect_lease(fd, F_WRLCK); }
static void lease_write_only_spoil(void) { MUST(fcntl(fd, F_SETLEASE, F_UNLCK)); }
STATE(lease_write_only, .refused = "open for writing only, with a lease")

static void lease_mapped_setup(void)
{
	fd = lease_file("/dev/shm/leased-and-mapped", O_RDWR, F_WRLCK);
	CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0) != MAP_FAILED, "no mapping");
}
static void lease_mapped_check(void) { expect_lease(fd, F_WRLCK); }
static void lease_mapped_spoil(void) { MUST(fcntl(fd, F_SETLEASE, F_UNLCK)); }
STATE(lease_mapped, .refused = "a lease for writing on a file that is mapped")

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
