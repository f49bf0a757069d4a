/*
 * State that can't be saved, in several processes: an inotify instance in the first, a path that is only held in its child, and a child that
 * shares the first one's memory. Whoever tries must name all of it, and leave everything as it was.
 */
#include "workload.h"
#include <sched.h>
#include <sys/inotify.h>
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
	int watching = MUST(inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
	MUST(inotify_add_watch(watching, "/tmp", IN_DELETE_SELF));
	pid_t child = MUST(fork());
	if (child == 0) {
		MUST(open("/tmp", O_PATH | O_CLOEXEC));
		for (;;)
			pause();
	}
	pid_t sharer = MUST(clone(shares, stack + sizeof stack, CLONE_VM | SIGCHLD, NULL));
	ready();
	uint64_t seen = 0;
	while (goes_on()) {
		doze(20 * MS);
		char event[64];
		CHECK(read(watching, event, sizeof event) == -1 && errno == EAGAIN, "an event that nobody caused");
		if (breaking("sharer")) kill(sharer, SIGSTOP);
		CHECK(counted != seen, "the process that shares memory no longer counts");
		seen = counted;
		CHECK(waitpid(-1, NULL, WNOHANG) == 0, "a child has ended");
	}
	kill(child, SIGKILL);
	kill(sharer, SIGKILL);
	return finished("refused");
}
