/*
 * Signals: handlers with their masks and flags, an alternate stack, signals that wait behind a mask (with values, in order,
 * for the process and for one thread), ignored ones, interval timers and POSIX timers. A timer may not fire early, twice,
 * or never.
 */
#include "workload.h"
#include <sys/time.h>
#include <sys/wait.h>

static _Atomic int alarms, on_alternate, plain;
static char alternate[65536];

static void on_alarm(int number) { (void)number; alarms++; }
static void on_plain(int number, siginfo_t *info, void *context)
{
	(void)number; (void)info; (void)context;
	char here;
	plain++;
	if (&here >= alternate && &here < alternate + sizeof alternate)
		on_alternate++;
}

static void same_action(int number, const struct sigaction *set)
{
	struct sigaction now;
	MUST(sigaction(number, NULL, &now));
	int ours = SA_SIGINFO | SA_ONSTACK | SA_RESTART | SA_NODEFER | SA_RESETHAND | SA_NOCLDSTOP;
	CHECK(now.sa_sigaction == set->sa_sigaction && (now.sa_flags & ours) == (set->sa_flags & ours), "the action of signal %d", number);
	for (int i = 1; i < 32; i++)
		CHECK(sigismember(&now.sa_mask, i) == sigismember(&set->sa_mask, i), "signal %d in the mask of the action of signal %d", i, number);
}

static sigset_t waiting;
static pthread_barrier_t step;

/* Signals sent to this thread alone wait for it, and for nobody else. */
static void *threaded(void *argument)
{
	uint64_t *rounds = argument;
	for (uint64_t round = 0;; round++) {
		union sigval value = {.sival_int = (int)round + 5000};
		MUST(pthread_sigqueue(pthread_self(), SIGRTMIN + 5, value));
		pthread_barrier_wait(&step);
		pthread_barrier_wait(&step);
		if (round == *rounds)
			return NULL;
		sigset_t mine;
		siginfo_t info;
		sigemptyset(&mine);
		sigaddset(&mine, SIGRTMIN + 5);
		struct timespec none = {0, 0};
		CHECK(sigtimedwait(&mine, &info, &none) == SIGRTMIN + 5 && info.si_int == (int)round + 5000, "the thread's own pending signal");
		CHECK(sigtimedwait(&mine, &info, &none) == -1 && errno == EAGAIN, "a signal pends twice");
	}
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	sigemptyset(&waiting);
	for (int i = 1; i <= 6; i++)
		sigaddset(&waiting, SIGRTMIN + i);
	sigaddset(&waiting, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &waiting, NULL);

	stack_t stack = {.ss_sp = alternate, .ss_size = sizeof alternate};
	MUST(sigaltstack(&stack, NULL));
	struct sigaction plain_action = {.sa_sigaction = on_plain, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART | SA_NODEFER};
	sigaddset(&plain_action.sa_mask, SIGHUP);
	sigaddset(&plain_action.sa_mask, SIGTERM);
	MUST(sigaction(SIGUSR2, &plain_action, NULL));
	struct sigaction alarm_action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
	MUST(sigaction(SIGALRM, &alarm_action, NULL));
	struct sigaction ignore = {.sa_handler = SIG_IGN};
	MUST(sigaction(SIGHUP, &ignore, NULL));

	timer_t posix;
	struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 6, .sigev_value.sival_int = 77};
	struct itimerspec in_100_ms = {.it_value = {0, 100 * MS}};
	if (takes_part("posix-timers"))
		MUST(timer_create(CLOCK_MONOTONIC, &event, &posix));

	uint64_t last = UINT64_MAX;
	pthread_t thread;
	pthread_barrier_init(&step, NULL, 2);
	CHECK(pthread_create(&thread, NULL, threaded, &last) == 0, "set-up failed: pthread_create");
	ready();

	uint64_t rounds = 0;
	for (;; rounds++) {
		pthread_barrier_wait(&step);
		/* Four values of one signal and one of another wait behind the mask; a plain signal pends once, however often sent. */
		for (int i = 0; i < 4; i++)
			MUST(sigqueue(getpid(), SIGRTMIN + 2, (union sigval){.sival_int = (int)rounds * 10 + i}));
		MUST(sigqueue(getpid(), SIGRTMIN + 1, (union sigval){.sival_int = (int)rounds}));
		kill(getpid(), SIGUSR1);
		kill(getpid(), SIGUSR1);

		int before = alarms;
		int64_t start = now_ns();
		struct itimerval every = {{0, 50000}, {0, 50000}};
		MUST(setitimer(ITIMER_REAL, &every, NULL));
		struct itimerval distant = {{7, 0}, {1000, 0}};
		MUST(setitimer(ITIMER_VIRTUAL, &distant, NULL));
		if (takes_part("posix-timers"))
			MUST(timer_settime(posix, 0, &in_100_ms, NULL));

		doze(300 * MS);

		struct itimerval off = {{0, 0}, {0, 0}}, was;
		MUST(setitimer(ITIMER_REAL, &off, NULL));
		int64_t took = now_ns() - start;
		int fired = alarms - before + (breaking("itimer") ? 1000 : 0);
		/* Never more than whole periods went by (one may be on its way); at least one within 300 ms. */
		CHECK(fired >= 1 && fired <= took / (50 * MS) + 1, "ITIMER_REAL fired %d times in %lld ms", fired, (long long)took / MS);
		MUST(getitimer(ITIMER_VIRTUAL, &was));
		CHECK(was.it_interval.tv_sec == 7 && was.it_value.tv_sec > 900 && was.it_value.tv_sec <= 1000, "ITIMER_VIRTUAL has %ld s to go", (long)was.it_value.tv_sec);

		sigset_t pending;
		MUST(sigpending(&pending));
		CHECK(sigismember(&pending, SIGUSR1) && sigismember(&pending, SIGRTMIN + 1) && sigismember(&pending, SIGRTMIN + 2)
		      && !sigismember(&pending, SIGRTMIN + 5), "the set of pending signals");
		struct timespec none = {0, 0};
		siginfo_t info;
		sigset_t one;
		if (breaking("pending")) {
			sigemptyset(&one);
			sigaddset(&one, SIGRTMIN + 2);
			sigtimedwait(&one, &info, &none);
		}
		if (takes_part("posix-timers")) {
			sigemptyset(&one);
			sigaddset(&one, SIGRTMIN + 6);
			struct timespec patience = span(late_ms * MS);
			/* A stop may end this wait: what counts is what pends. */
			int r;
			do r = sigtimedwait(&one, &info, &patience); while (r == -1 && errno == EINTR);
			CHECK(r == SIGRTMIN + 6 && info.si_code == SI_TIMER && info.si_int == (breaking("posix-timers") ? 76 : 77), "the POSIX timer: %d", r);
			CHECK(now_ns() - start >= 100 * MS, "the POSIX timer fired early");
		}
		sigemptyset(&one);
		sigaddset(&one, SIGRTMIN + 1);
		sigaddset(&one, SIGRTMIN + 2);
		CHECK(sigtimedwait(&one, &info, &none) == SIGRTMIN + 1 && info.si_int == (int)rounds && info.si_pid == getpid() && info.si_code == SI_QUEUE,
		      "the lowest pending real-time signal, its value or sender");
		for (int i = 0; i < 4; i++)
			CHECK(sigtimedwait(&one, &info, &none) == SIGRTMIN + 2 && info.si_int == (int)rounds * 10 + i && info.si_uid == getuid(),
			      "pending value %d", i);
		CHECK(sigtimedwait(&one, &info, &none) == -1 && errno == EAGAIN, "a real-time signal pends that nobody sent");
		sigemptyset(&one);
		sigaddset(&one, SIGUSR1);
		CHECK(sigtimedwait(&one, &info, &none) == SIGUSR1 && info.si_code == SI_USER, "the plain pending signal");
		CHECK(sigtimedwait(&one, &info, &none) == -1, "the plain signal pends twice");

		int handled = plain, alternately = on_alternate;
		raise(SIGUSR2);
		CHECK(plain == handled + 1 && on_alternate == alternately + (breaking("altstack") ? 2 : 1), "the handler ran elsewhere than on its stack");
		raise(SIGHUP);
		same_action(SIGUSR2, &plain_action);
		same_action(SIGALRM, &alarm_action);
		same_action(SIGHUP, &ignore);
		if (breaking("action") && rounds == 2)
			signal(SIGHUP, SIG_DFL), same_action(SIGHUP, &ignore);

		bool more = goes_on();
		if (!more)
			last = rounds;
		pthread_barrier_wait(&step);
		if (!more)
			break;
	}
	pthread_join(thread, NULL);
	return finished("rounds=%llu alarms=%d", (unsigned long long)rounds + 1, alarms);
}
