/*
 * What programs with an event loop hold: epoll instances that watch pipes, events, signals, processes and each other, under
 * numbers that still are theirs or no longer are, level, edge and one-shot; timers that are read; descriptors of processes.
 */
#include "workload.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <sys/wait.h>

enum { LEVEL = 1, MOVED, NESTED, INNER, SIGNALS, CHILD, ZOMBIE, EDGE, ONCE };

static void watch(int epoll, int fd, uint32_t events, uint64_t data)
{
	struct epoll_event event = {events, {.u64 = data << 32 | data}};
	MUST(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
}

/* What is due now, or 0. */
static uint64_t due(int epoll)
{
	struct epoll_event event;
	int count = MUST(epoll_wait(epoll, &event, 1, 0));
	CHECK(count == 0 || event.data.u64 >> 32 == (event.data.u64 & 0xffffffff), "an event has half of its data");
	return count ? event.data.u64 & 0xffffffff : 0;
}

static void feed(int fd) { CHECK(write(fd, "x", 1) == 1, "write"); }
static void drain(int fd)
{
	char byte;
	CHECK(read(fd, &byte, 1) == 1 && byte == 'x', "read");
}

static void expect(int epoll, uint64_t data, const char *what)
{
	uint64_t seen = due(epoll);
	CHECK(seen == data, "%s: event %llu, expected %llu", what, (unsigned long long)seen, (unsigned long long)data);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	int level[2], moved[2], inner_pipe[2], once[2];
	MUST(pipe2(level, O_CLOEXEC));
	MUST(pipe2(moved, O_CLOEXEC));
	MUST(pipe2(inner_pipe, O_CLOEXEC));
	MUST(pipe2(once, O_CLOEXEC));
	int all = MUST(epoll_create1(EPOLL_CLOEXEC)), inner = MUST(epoll_create1(EPOLL_CLOEXEC));
	int edges = MUST(epoll_create1(EPOLL_CLOEXEC)), onces = MUST(epoll_create1(EPOLL_CLOEXEC));

	watch(all, level[0], EPOLLIN, LEVEL);
	/* The number goes to somebody else; the file stays watched. */
	watch(all, moved[0], EPOLLIN, MOVED);
	int kept = MUST(fcntl(moved[0], F_DUPFD_CLOEXEC, 100));
	MUST(dup3(level[0], moved[0], O_CLOEXEC));
	watch(inner, inner_pipe[0], EPOLLIN, INNER);
	watch(all, inner, EPOLLIN, NESTED);

	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigprocmask(SIG_BLOCK, &set, NULL);
	int signals = MUST(signalfd(-1, &set, SFD_CLOEXEC));
	watch(all, signals, EPOLLIN, SIGNALS);

	pid_t child = MUST(fork());
	if (child == 0) {
		MUST(prctl(PR_SET_PDEATHSIG, SIGKILL));
		for (;;)
			pause();
	}
	int child_fd = (int)MUST(syscall(SYS_pidfd_open, child, 0));
	watch(all, child_fd, EPOLLIN, CHILD);
	pid_t zombie = MUST(fork());
	if (zombie == 0)
		_exit(5);
	int zombie_fd = (int)MUST(syscall(SYS_pidfd_open, zombie, 0));
	int zombies = MUST(epoll_create1(EPOLL_CLOEXEC));
	watch(zombies, zombie_fd, EPOLLIN, ZOMBIE);
	while (due(zombies) != ZOMBIE)
		doze(MS);

	int edge = MUST(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
	watch(edges, edge, EPOLLIN | EPOLLET, EDGE);
	watch(onces, once[0], EPOLLIN | EPOLLONESHOT, ONCE);
	feed(once[1]);
	expect(onces, ONCE, "one-shot");

	int64_t begun = now_ns();
	int ticking = MUST(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
	struct itimerspec period = {{0, 10 * MS}, {0, 10 * MS}}, hour = {{0, 0}, {3600, 0}};
	MUST(timerfd_settime(ticking, 0, &period, NULL));
	int far = MUST(timerfd_create(CLOCK_BOOTTIME, TFD_CLOEXEC));
	MUST(timerfd_settime(far, 0, &hour, NULL));
	uint64_t ticks = 0, rounds = 0;
	ready();

	while (goes_on()) {
		expect(all, 0, "nothing");
		feed(level[1]);
		expect(all, LEVEL, "level");
		drain(level[0]);
		if (breaking("moved")) MUST(close(kept));
		feed(moved[1]);
		expect(all, MOVED, "a file under a number that it lost");
		drain(kept);
		feed(inner_pipe[1]);
		expect(all, NESTED, "nested");
		expect(inner, INNER, "inner");
		drain(inner_pipe[0]);
		MUST(kill(getpid(), SIGUSR1));
		expect(all, SIGNALS, "signals");
		struct signalfd_siginfo info;
		CHECK(read(signals, &info, sizeof info) == sizeof info && info.ssi_signo == SIGUSR1, "signalfd");

		uint64_t one = 1;
		CHECK(write(edge, &one, 8) == 8, "eventfd");
		expect(edges, EDGE, "edge");
		CHECK(read(edge, &one, 8) == 8 && one == 1, "eventfd");

		expect(onces, 0, "a one-shot entry that has fired");
		struct epoll_event again = {EPOLLIN | EPOLLONESHOT, {.u64 = (uint64_t)ONCE << 32 | ONCE}};
		MUST(epoll_ctl(onces, EPOLL_CTL_MOD, once[0], &again));
		expect(onces, ONCE, "a one-shot entry that was set up again");
		expect(zombies, ZOMBIE, "a process that has ended");

		uint64_t count;
		if (read(ticking, &count, 8) == 8)
			ticks += count;
		if (breaking("timer")) MUST(timerfd_settime(ticking, 0, &(struct itimerspec){0}, NULL));
		int64_t passed = (now_ns() - begun) / (10 * MS);
		CHECK((int64_t)ticks <= passed + 1, "a timer has expired %lld times of %lld", (long long)ticks, (long long)passed);
		CHECK((int64_t)ticks >= passed - late_ms / 10, "a timer has expired only %lld times of %lld", (long long)ticks, (long long)passed);
		struct itimerspec rest;
		MUST(timerfd_gettime(far, &rest));
		if (breaking("far")) rest.it_value.tv_sec += 100;
		int64_t off = rest.it_value.tv_sec * SECOND + rest.it_value.tv_nsec - (3600 * SECOND - (now_ns() - begun));
		CHECK(off < late_ms * MS && off > -late_ms * MS, "a timer is %lld us off", (long long)off / 1000);
		rounds++;
		doze(MS);
	}
	MUST(syscall(SYS_pidfd_send_signal, child_fd, SIGKILL, NULL, 0));
	struct epoll_event event;
	CHECK(epoll_wait(all, &event, 1, (int)late_ms) == 1 && (event.data.u64 & 0xffffffff) == CHILD, "the end of a child");
	siginfo_t ended = {0};
	MUST(waitid(P_PIDFD, (id_t)child_fd, &ended, WEXITED));
	CHECK(ended.si_pid == child && ended.si_status == SIGKILL, "how a child ended");
	MUST(waitid(P_PIDFD, (id_t)zombie_fd, &ended, WEXITED));
	CHECK(ended.si_pid == zombie && ended.si_status == 5, "how the other child ended");
	return finished("rounds=%s", rounds > 0 ? "some" : "none");
}
