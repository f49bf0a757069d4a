/*
 * State that can't be saved, in several processes: an epoll in the first, a timer descriptor in its child, and a child that
 * shares the first one's memory. Whoever tries must name all of it, and leave everything as it was.
 */
#include "workload.h"
#include <sched.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <sys/wait.h>

static char stack[64 << 10];
static _Atomic uint64_t counted;

static int shares(void *unused)
{
	(void)unused;
	while (syscall(SYS_nanosleep, &(struct timespec){0, 5 * MS}, NULL) == 0)
		counted++;
	return 1;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	int poll_fd = MUST(epoll_create1(EPOLL_CLOEXEC));
	pid_t child = MUST(fork());
	if (child == 0) {
		MUST(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC));
		for (;;)
			pause();
	}
	pid_t sharer = MUST(clone(shares, stack + sizeof stack, CLONE_VM | SIGCHLD, NULL));
	ready();
	uint64_t seen = 0;
	while (goes_on()) {
		struct epoll_event event;
		CHECK(epoll_wait(poll_fd, &event, 1, 20) == 0, "epoll_wait");
		if (breaking("sharer")) kill(sharer, SIGSTOP);
		CHECK(counted != seen, "the process that shares memory no longer counts");
		seen = counted;
		CHECK(waitpid(-1, NULL, WNOHANG) == 0, "a child has ended");
	}
	kill(child, SIGKILL);
	kill(sharer, SIGKILL);
	return finished("refused");
}
