/*
 * A thread for each call that can block. No signal handler exists, so none of the calls may ever fail with EINTR; one that
 * has a deadline may be neither early nor later than --late-ms; one that is woken must bring what it was woken with.
 * Stopping and continuing a process makes some of these calls fail (signal(7), "Interruption of system calls ... by stop
 * signals"), so this program ends with `differs` at a plain SIGSTOP and SIGCONT: that is its own proof.
 * pause() and sigsuspend() are not here: they have no other result than EINTR.
 */
#include "workload.h"
#include <linux/aio_abi.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>

#ifndef SYS_epoll_pwait2
#define SYS_epoll_pwait2 441
#endif

static _Atomic uint64_t calls;

/* A deadline that is met by the kernel's tick, not by a high-resolution timer, may be one tick off; HZ is 100 at least. */
#define TICK (10 * MS)

struct waiting {
	const char *name;
	int64_t asked, start, slack;
};

static struct waiting starts(const char *name, int64_t asked) { return (struct waiting){name, asked, now_ns(), 0}; }

static void no_eintr(const char *name, long result)
{
	CHECK(!(result == -1 && errno == EINTR), "%s failed with EINTR", name);
}

static void ends(struct waiting w, long result, bool timed_out)
{
	int64_t took = now_ns() - w.start;
	no_eintr(w.name, result);
	CHECK(timed_out, "%s returned %ld before its deadline", w.name, result);
	CHECK(took >= w.asked - w.slack, "%s of %lld us was %lld us early", w.name, (long long)w.asked / 1000, (long long)(w.asked - took) / 1000);
	CHECK(took < w.asked + late_ms * MS, "%s of %lld us took %lld us", w.name, (long long)w.asked / 1000, (long long)took / 1000);
	calls++;
}

static void woken(const char *name, long result, bool right)
{
	no_eintr(name, result);
	CHECK(right, "%s returned %ld", name, result);
	calls++;
}

/* Deadlines of different lengths, so that a capture finds calls at all stages: mostly short, now and then seconds. */
static int64_t next_asked(uint64_t round) { return (round % 16 == 15 ? 2000 : 20 + (int64_t)(mix(round) % 100)) * MS; }

#define TIMED(name, label, ...) \
	static void *name(void *u) \
	{ \
		(void)u; \
		for (uint64_t round = 0; goes_on(); round++) { \
			int64_t asked = next_asked(round); \
			struct timespec t = span(breaking(label) && round == 15 ? asked / 2 : asked); \
			struct waiting w = starts(label, asked); \
			__VA_ARGS__ \
		} \
		return NULL; \
	}

TIMED(t_epoll_wait, "epoll_wait", {
	int e = MUST(epoll_create1(EPOLL_CLOEXEC));
	struct epoll_event event;
	int r = epoll_wait(e, &event, 1, (int)((t.tv_sec * SECOND + t.tv_nsec) / MS));
	ends(w, r, r == 0);
	close(e);
})
TIMED(t_epoll_pwait2, "epoll_pwait2", {
	int e = MUST(epoll_create1(EPOLL_CLOEXEC));
	struct epoll_event event;
	long r = syscall(SYS_epoll_pwait2, e, &event, 1, &t, NULL, 0);
	ends(w, r, r == 0);
	close(e);
})
TIMED(t_poll, "poll", { int r = poll(NULL, 0, (int)((t.tv_sec * SECOND + t.tv_nsec) / MS)); ends(w, r, r == 0); })
TIMED(t_ppoll, "ppoll", { int r = ppoll(NULL, 0, &t, NULL); ends(w, r, r == 0); })
TIMED(t_select, "select", {
	struct timeval v = {t.tv_sec, t.tv_nsec / 1000};
	int r = select(0, NULL, NULL, NULL, &v);
	ends(w, r, r == 0);
})
TIMED(t_pselect, "pselect", {
	sigset_t mask;
	pthread_sigmask(SIG_SETMASK, NULL, &mask);
	int r = pselect(0, NULL, NULL, NULL, &t, &mask);
	ends(w, r, r == 0);
})
TIMED(t_nanosleep, "nanosleep", { long r = syscall(SYS_nanosleep, &t, NULL); ends(w, r, r == 0); })
TIMED(t_nanosleep_remainder, "nanosleep-remainder", {
	struct timespec left = {77, 77};
	long r = syscall(SYS_nanosleep, &t, &left);
	ends(w, r, r == 0);
	/* The kernel writes what is left when a stop interrupts the sleep, and goes on. A stop that came in the first microseconds
	 * leaves that here; it must be a remainder then. */
	bool untouched = left.tv_sec == 77 && left.tv_nsec == 77;
	int64_t rest = left.tv_sec * SECOND + left.tv_nsec;
	CHECK(untouched || (rest > 0 && rest <= t.tv_sec * SECOND + t.tv_nsec), "a nanosleep that was not interrupted left %lld ns", (long long)rest);
})
TIMED(t_clock_nanosleep, "clock_nanosleep", {
	long r = syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &t, NULL);
	ends(w, r, r == 0);
})
TIMED(t_clock_nanosleep_until, "clock_nanosleep-until", {
	struct timespec until = span(w.start + t.tv_sec * SECOND + t.tv_nsec);
	long r = syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
	ends(w, r, r == 0);
})
TIMED(t_clock_nanosleep_boot, "clock_nanosleep-boottime", {
	long r = syscall(SYS_clock_nanosleep, CLOCK_BOOTTIME, 0, &t, NULL);
	ends(w, r, r == 0);
})
TIMED(t_futex, "futex", {
	uint32_t word = 5;
	long r = syscall(SYS_futex, &word, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, 5, &t, NULL, 0);
	ends(w, r, r == -1 && errno == ETIMEDOUT);
})
TIMED(t_futex_until, "futex-until", {
	uint32_t word = 5;
	struct timespec until = span(w.start + t.tv_sec * SECOND + t.tv_nsec);
	long r = syscall(SYS_futex, &word, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, 5, &until, NULL, FUTEX_BITSET_MATCH_ANY);
	ends(w, r, r == -1 && errno == ETIMEDOUT);
})
TIMED(t_sigtimedwait, "sigtimedwait", {
	sigset_t set;
	siginfo_t info;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	int r = sigtimedwait(&set, &info, &t);
	ends(w, r, r == -1 && errno == EAGAIN);
})
TIMED(t_recv, "recv", {
	/* A long one begins anew at each capture (docs/decisions/interrupted-calls.md). */
	if (w.asked > SECOND) {
		w.asked /= 20;
		t = span((t.tv_sec * SECOND + t.tv_nsec) / 20);
	}
	int pair[2];
	char byte;
	MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
	struct timeval v = {t.tv_sec, t.tv_nsec / 1000};
	MUST(setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &v, sizeof v));
	w.start = now_ns();
	w.slack = TICK;
	ssize_t r = recv(pair[0], &byte, 1, 0);
	ends(w, r, r == -1 && errno == EAGAIN);
	close(pair[0]);
	close(pair[1]);
})
TIMED(t_io_getevents, "io_getevents", {
	aio_context_t context = 0;
	struct io_event event;
	MUST(syscall(SYS_io_setup, 4, &context));
	w.start = now_ns();
	long r = syscall(SYS_io_getevents, context, 1, 1, &event, &t);
	ends(w, r, r == 0);
	syscall(SYS_io_destroy, context);
})
TIMED(t_semtimedop, "semtimedop", {
	int set = MUST(semget(IPC_PRIVATE, 1, 0600));
	struct sembuf down = {0, -1, 0};
	w.start = now_ns();
	w.slack = TICK;
	int r = semtimedop(set, &down, 1, &t);
	ends(w, r, r == -1 && errno == EAGAIN);
	semctl(set, 0, IPC_RMID);
})

/* The rest has no deadline: a partner thread wakes it, with a number to bring. */
struct partner {
	int fd[2];
	int queue;
	pthread_t peer;
	uint32_t word;
	void (*wake)(struct partner *, uint64_t);
	_Atomic uint64_t waiting_for, woken_with;
};

static void *wakes(void *argument)
{
	struct partner *p = argument;
	for (uint64_t number = 1;; number++) {
		/* Not before the other one is about to wait; then a while, so that it does wait. */
		while (p->waiting_for < number)
			doze(MS);
		if (p->waiting_for == UINT64_MAX)
			return NULL;
		doze(next_asked(number) / 4);
		p->wake(p, number);
	}
}

static void partner_starts(struct partner *p, void (*wake)(struct partner *, uint64_t))
{
	p->wake = wake;
	CHECK(pthread_create(&p->peer, NULL, wakes, p) == 0, "set-up failed: pthread_create");
}

static void partner_ends(struct partner *p)
{
	p->waiting_for = UINT64_MAX;
	pthread_join(p->peer, NULL);
}

static bool said(const char *label, uint64_t number, uint64_t expected)
{
	return number == (breaking(label) && expected == 4 ? 5 : expected);
}

static void write_number(struct partner *p, uint64_t number) { MUST(write(p->fd[1], &number, 8)); }

static void *t_read_pipe(void *u)
{
	(void)u;
	struct partner p = {0};
	MUST(pipe2(p.fd, O_CLOEXEC));
	partner_starts(&p, write_number);
	for (uint64_t n = 1, got = 0; goes_on(); n++) {
		p.waiting_for = n;
		ssize_t r = read(p.fd[0], &got, 8);
		woken("read of a pipe", r, r == 8 && said("read-pipe", got, n));
	}
	partner_ends(&p);
	return NULL;
}

static void add_number(struct partner *p, uint64_t number) { MUST(write(p->fd[0], &number, 8)); }

static void *t_read_eventfd(void *u)
{
	(void)u;
	struct partner p = {0};
	p.fd[0] = MUST(eventfd(0, EFD_CLOEXEC));
	partner_starts(&p, add_number);
	for (uint64_t n = 1, got = 0; goes_on(); n++) {
		p.waiting_for = n;
		ssize_t r = read(p.fd[0], &got, 8);
		woken("read of an eventfd", r, r == 8 && said("read-eventfd", got, n));
	}
	partner_ends(&p);
	return NULL;
}

static void drain_pipe(struct partner *p, uint64_t number)
{
	char page[4096];
	(void)number;
	for (int i = 0; i < 16; i++)
		MUST(read(p->fd[0], page, sizeof page));
}

static void *t_write_pipe(void *u)
{
	(void)u;
	struct partner p = {0};
	char page[4096] = {0};
	MUST(pipe2(p.fd, O_CLOEXEC));
	for (int i = 0; i < 16; i++)
		MUST(write(p.fd[1], page, sizeof page));
	partner_starts(&p, drain_pipe);
	for (uint64_t n = 1; goes_on(); n++) {
		p.waiting_for = n;
		for (int i = 0; i < 16; i++) {
			ssize_t r = write(p.fd[1], page, sizeof page);
			woken("write to a full pipe", r, r == (breaking("write-pipe") && n == 3 ? 7 : (ssize_t)sizeof page));
		}
	}
	partner_ends(&p);
	return NULL;
}

static void send_message(struct partner *p, uint64_t number)
{
	struct { long type; uint64_t number; } message = {1, number};
	MUST(msgsnd(p->queue, &message, 8, 0));
}

static void *t_msgrcv(void *u)
{
	(void)u;
	struct partner p = {0};
	struct { long type; uint64_t number; } message;
	p.queue = MUST(msgget(IPC_PRIVATE, 0600));
	partner_starts(&p, send_message);
	for (uint64_t n = 1; goes_on(); n++) {
		p.waiting_for = n;
		ssize_t r = msgrcv(p.queue, &message, 8, 0, 0);
		woken("msgrcv", r, r == 8 && said("msgrcv", message.number, n));
	}
	partner_ends(&p);
	msgctl(p.queue, IPC_RMID, NULL);
	return NULL;
}

static void raise_semaphore(struct partner *p, uint64_t number)
{
	struct sembuf up = {0, (short)(number % 7 + 1), 0};
	MUST(semop(p->queue, &up, 1));
}

static void *t_semop(void *u)
{
	(void)u;
	struct partner p = {0};
	p.queue = MUST(semget(IPC_PRIVATE, 1, 0600));
	partner_starts(&p, raise_semaphore);
	for (uint64_t n = 1; goes_on(); n++) {
		p.waiting_for = n;
		struct sembuf down = {0, (short)-(short)(n % 7 + 1), 0};
		int r = semop(p.queue, &down, 1);
		int left = semctl(p.queue, 0, GETVAL);
		woken("semop", r, r == 0 && left == (breaking("semop") && n == 4 ? 1 : 0));
	}
	partner_ends(&p);
	semctl(p.queue, 0, IPC_RMID);
	return NULL;
}

static void connect_once(struct partner *p, uint64_t number)
{
	struct sockaddr_un address;
	socklen_t length = sizeof address;
	MUST(getsockname(p->fd[0], (struct sockaddr *)&address, &length));
	int fd = MUST(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
	MUST(connect(fd, (struct sockaddr *)&address, length));
	MUST(write(fd, &number, 8));
	close(fd);
}

static void *t_accept(void *u)
{
	(void)u;
	struct partner p = {0};
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	snprintf(address.sun_path, sizeof address.sun_path, "/tmp/eintr-%d.sock", getpid());
	p.fd[0] = MUST(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
	unlink(address.sun_path);
	MUST(bind(p.fd[0], (struct sockaddr *)&address, sizeof address));
	MUST(listen(p.fd[0], 4));
	partner_starts(&p, connect_once);
	for (uint64_t n = 1, got = 0; goes_on(); n++) {
		p.waiting_for = n;
		int fd = accept(p.fd[0], NULL, NULL);
		woken("accept", fd, fd >= 0);
		ssize_t r = read(fd, &got, 8);
		woken("read of an accepted socket", r, r == 8 && said("accept", got, n));
		close(fd);
	}
	partner_ends(&p);
	unlink(address.sun_path);
	return NULL;
}

static void wake_futex(struct partner *p, uint64_t number)
{
	__atomic_store_n(&p->word, (uint32_t)number, __ATOMIC_SEQ_CST);
	syscall(SYS_futex, &p->word, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 1, NULL, NULL, 0);
}

static void *t_futex_woken(void *u)
{
	(void)u;
	struct partner p = {0};
	partner_starts(&p, wake_futex);
	for (uint64_t n = 1; goes_on(); n++) {
		p.waiting_for = n;
		long r = 0;
		uint32_t seen;
		while ((seen = __atomic_load_n(&p.word, __ATOMIC_SEQ_CST)) == n - 1) {
			r = syscall(SYS_futex, &p.word, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, (uint32_t)(n - 1), NULL, NULL, 0);
			no_eintr("futex without a deadline", r);
		}
		woken("futex without a deadline", r, said("futex-woken", seen, n));
	}
	partner_ends(&p);
	return NULL;
}

/* Sent as pid's own SIGRTMIN+2 to a thread group that blocks it everywhere. */
static void queue_signal(struct partner *p, uint64_t number)
{
	(void)p;
	MUST(sigqueue(getpid(), SIGRTMIN + 2, (union sigval){.sival_int = (int)number}));
}

static void *t_sigwaitinfo(void *u)
{
	(void)u;
	struct partner p = {0};
	sigset_t set;
	siginfo_t info;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 2);
	partner_starts(&p, queue_signal);
	for (uint64_t n = 1; goes_on(); n++) {
		p.waiting_for = n;
		int r = sigwaitinfo(&set, &info);
		woken("sigwaitinfo", r, r == SIGRTMIN + 2 && said("sigwaitinfo", (uint64_t)info.si_int, n));
	}
	partner_ends(&p);
	return NULL;
}

static void *t_wait4(void *u)
{
	(void)u;
	for (uint64_t n = 1; goes_on(); n++) {
		int expected = (int)(n % 100), status = 0;
		pid_t child = MUST(fork());
		if (child == 0) {
			struct timespec t = span(next_asked(n) / 2);
			if (syscall(SYS_nanosleep, &t, NULL) != 0)
				_exit(255);
			_exit(expected);
		}
		pid_t r = waitpid(child, &status, 0);
		woken("wait4", r, r == child && WIFEXITED(status) && WEXITSTATUS(status) == (breaking("wait4") && n == 4 ? 101 : expected));
	}
	return NULL;
}

/* Whoever holds the lock alone may look at the number that both count up. */
static uint64_t guarded;
static void unlock_later(struct partner *p, uint64_t number)
{
	(void)number;
	guarded++;
	MUST(flock(p->fd[1], LOCK_UN));
}

static void *t_flock(void *u)
{
	(void)u;
	struct partner p = {0};
	char path[] = "/tmp/eintr-flock-XXXXXX";
	p.fd[0] = MUST(mkstemp(path));
	p.fd[1] = MUST(open(path, O_RDWR | O_CLOEXEC));
	MUST(flock(p.fd[1], LOCK_EX));
	partner_starts(&p, unlock_later);
	for (uint64_t n = 1; goes_on(); n++) {
		p.waiting_for = n;
		int r = flock(p.fd[0], LOCK_EX);
		woken("flock", r, r == 0 && said("flock", guarded, n));
		MUST(flock(p.fd[0], LOCK_UN));
		MUST(flock(p.fd[1], LOCK_EX));
	}
	partner_ends(&p);
	unlink(path);
	return NULL;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	static const struct { const char *name; void *(*run)(void *); } all[] = {
		{"epoll_wait", t_epoll_wait}, {"epoll_pwait2", t_epoll_pwait2}, {"poll", t_poll}, {"ppoll", t_ppoll},
		{"select", t_select}, {"pselect", t_pselect}, {"nanosleep", t_nanosleep}, {"nanosleep-remainder", t_nanosleep_remainder},
		{"clock_nanosleep", t_clock_nanosleep}, {"clock_nanosleep-until", t_clock_nanosleep_until},
		{"clock_nanosleep-boottime", t_clock_nanosleep_boot}, {"futex", t_futex}, {"futex-until", t_futex_until},
		{"sigtimedwait", t_sigtimedwait}, {"recv", t_recv}, {"io_getevents", t_io_getevents}, {"semtimedop", t_semtimedop},
		{"read-pipe", t_read_pipe}, {"read-eventfd", t_read_eventfd}, {"write-pipe", t_write_pipe}, {"msgrcv", t_msgrcv},
		{"semop", t_semop}, {"accept", t_accept}, {"futex-woken", t_futex_woken}, {"sigwaitinfo", t_sigwaitinfo},
		{"wait4", t_wait4}, {"flock", t_flock},
	};
	enum { COUNT = sizeof all / sizeof *all };
	/* Blocked in every thread to come, for those that wait for them. */
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	sigaddset(&set, SIGRTMIN + 2);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	pthread_t threads[COUNT];
	int started = 0;
	for (int i = 0; i < COUNT; i++)
		if (takes_part(all[i].name))
			CHECK(pthread_create(&threads[started++], NULL, all[i].run, NULL) == 0, "set-up failed: pthread_create");
	CHECK(started > 0, "no call of that name");
	ready();
	for (int i = 0; i < started; i++)
		pthread_join(threads[i], NULL);
	return finished("calls=%llu kinds=%d", (unsigned long long)calls, started);
}
