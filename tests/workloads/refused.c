/*
 * State that can't be saved, in several processes: inotify events that nobody has read in the first, and a corked socket in its child;
 * another child shares the first one's memory. Whoever tries must name all of it, and leave everything as it was.
 */
#include "workload.h"
#include <netinet/in.h>
#include <netinet/udp.h>
#include <sched.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
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
	MUST(mkdir("/tmp/watched", 0700));
	MUST(inotify_add_watch(watching, "/tmp/watched", IN_CREATE));
	close(MUST(open("/tmp/watched/one", O_CREAT | O_WRONLY, 0600)));
	int unread;
	MUST(ioctl(watching, FIONREAD, &unread));
	pid_t child = MUST(fork());
	if (child == 0) {
		int corked = MUST(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
		MUST(setsockopt(corked, IPPROTO_UDP, UDP_CORK, &(int){1}, sizeof(int)));
		for (;;)
			pause();
	}
	pid_t sharer = MUST(clone(shares, stack + sizeof stack, CLONE_VM | SIGCHLD, NULL));
	ready();
	uint64_t seen = 0;
	while (goes_on()) {
		doze(20 * MS);
		int now;
		CHECK(ioctl(watching, FIONREAD, &now) == 0 && now == unread, "events have gone or come");
		if (breaking("sharer")) kill(sharer, SIGSTOP);
		/* A busy machine may let it wait. */
		for (int tries = 0; counted == seen; tries++) {
			CHECK(tries < 500, "the process that shares memory no longer counts");
			doze(20 * MS);
		}
		seen = counted;
		CHECK(waitpid(-1, NULL, WNOHANG) == 0, "a child has ended");
	}
	kill(child, SIGKILL);
	kill(sharer, SIGKILL);
	return finished("refused");
}
