/* Timers that send signals, and the clocks by which they go. */
#include "state.h"

#include <pthread.h>
#include <sys/resource.h>
#include <sys/time.h>

static void block(int signal)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, signal);
	MUST(sigprocmask(SIG_BLOCK, &set, NULL));
}
static bool take(int signal, siginfo_t *info, int within_ms)
{
	sigset_t set;
	struct timespec limit = {within_ms / 1000, within_ms % 1000 * 1000000L};
	sigemptyset(&set);
	sigaddset(&set, signal);
	return sigtimedwait(&set, info, &limit) == signal;
}
static timer_t make(clockid_t clock, int notify, int signal, int value)
{
	int id;
	struct sigevent event = {.sigev_notify = notify, .sigev_signo = signal, .sigev_value.sival_int = value};
	/* The library wraps ids; those of the kernel are what has to stay. */
	MUST(syscall(SYS_timer_create, clock, &event, &id));
	return (timer_t)(intptr_t)id;
}
static void set(timer_t timer, int flags, long rest_ms, long interval_ms)
{
	struct itimerspec times = {
		.it_value = {rest_ms / 1000, rest_ms % 1000 * 1000000L},
		.it_interval = {interval_ms / 1000, interval_ms % 1000 * 1000000L},
	};
	MUST(syscall(SYS_timer_settime, (int)(intptr_t)timer, flags, &times, NULL));
}
static long rest_ms(timer_t timer)
{
	struct itimerspec times;
	MUST(syscall(SYS_timer_gettime, (int)(intptr_t)timer, &times));
	return times.it_value.tv_sec * 1000 + times.it_value.tv_nsec / 1000000;
}
static long interval_ms(timer_t timer)
{
	struct itimerspec times;
	MUST(syscall(SYS_timer_gettime, (int)(intptr_t)timer, &times));
	return times.it_interval.tv_sec * 1000 + times.it_interval.tv_nsec / 1000000;
}

/* Far in the future, on every clock. */
static timer_t timer;
#define CLOCK(id, clock, ...) \
	static void id##_setup(void) { timer = make(clock, SIGEV_SIGNAL, SIGUSR1, 5); set(timer, 0, 1000000, 7000); } \
	static void id##_check(void) \
	{ \
		CHECK(rest_ms(timer) > 900000 && rest_ms(timer) <= 1000000, "the rest is %ld ms", rest_ms(timer)); \
		CHECK(interval_ms(timer) == 7000, "the period is %ld ms", interval_ms(timer)); \
	} \
	static void id##_spoil(void) { set(timer, 0, 0, 0); } \
	STATE(id, ##__VA_ARGS__)
CLOCK(timer_real, CLOCK_REALTIME)
CLOCK(timer_monotonic, CLOCK_MONOTONIC)
CLOCK(timer_boot, CLOCK_BOOTTIME)
CLOCK(timer_atomic, CLOCK_TAI)
CLOCK(timer_process_time, CLOCK_PROCESS_CPUTIME_ID)
CLOCK(timer_thread_time, CLOCK_THREAD_CPUTIME_ID)

/* On the processor clock of this process, and of a child, by number. */
static clockid_t clock_of(pid_t pid) { clockid_t clock; CHECK(clock_getcpuclockid(pid, &clock) == 0, "no clock"); return clock; }
CLOCK(timer_own_clock, clock_of(getpid()))
static pid_t sleeper;
static int sleeper_body(void) { until_finishing(); sleep(1000); return 0; }
static void timer_child_clock_setup(void)
{
	sleeper = in_child(sleeper_body);
	timer = make(clock_of(sleeper), SIGEV_SIGNAL, SIGUSR1, 5);
	set(timer, 0, 100000, 0);
}
static void timer_child_clock_check(void)
{
	CHECK(rest_ms(timer) > 90000, "the rest is %ld ms", rest_ms(timer));
	MUST(kill(sleeper, SIGKILL));
}
static void timer_child_clock_spoil(void) { set(timer, 0, 0, 0); }
STATE(timer_child_clock)

static void busy(int ms)
{
	int64_t end = now_ns(CLOCK_THREAD_CPUTIME_ID) + ms * 1000000LL;
	while (now_ns(CLOCK_THREAD_CPUTIME_ID) < end)
		;
}
static void timer_by_work_setup(void)
{
	block(SIGRTMIN);
	timer = make(CLOCK_PROCESS_CPUTIME_ID, SIGEV_SIGNAL, SIGRTMIN, 77);
	set(timer, 0, 200, 0);
}
static void timer_by_work_check(void)
{
	siginfo_t info;
	CHECK(!take(SIGRTMIN, &info, 0), "it has expired without work");
	busy(300);
	CHECK(take(SIGRTMIN, &info, 0) && info.si_value.sival_int == 77, "it did not expire");
}
static void timer_by_work_spoil(void) { set(timer, 0, 0, 0); }
STATE(timer_by_work)

/* Numbers: gaps stay. */
static void timer_numbers_setup(void)
{
	timer_t timers[8];
	for (int i = 0; i < 8; i++)
		timers[i] = make(CLOCK_MONOTONIC, SIGEV_NONE, 0, i);
	for (int i = 0; i < 8; i++)
		set(timers[i], 0, 100000 * (i + 1), 0);
	MUST(syscall(SYS_timer_delete, (int)(intptr_t)timers[0]));
	MUST(syscall(SYS_timer_delete, (int)(intptr_t)timers[4]));
}
static void timer_numbers_check(void)
{
	struct itimerspec times;
	for (int i = 0; i < 8; i++) {
		long got = syscall(SYS_timer_gettime, i, &times);
		if (i == 0 || i == 4)
			CHECK(got == -1 && errno == EINVAL, "timer %d is back", i);
		else
			CHECK(got == 0 && times.it_value.tv_sec > 100 * i && times.it_value.tv_sec <= 100 * (i + 1), "timer %d has %ld s", i, (long)times.it_value.tv_sec);
	}
}
static void timer_numbers_spoil(void) { MUST(syscall(SYS_timer_delete, 5)); }
STATE(timer_numbers)

/* Ids go on from where they were is not promised; that a new one is new is. */
static void timer_next_setup(void) { timer_numbers_setup(); }
static void timer_next_check(void)
{
	intptr_t next = (intptr_t)make(CLOCK_MONOTONIC, SIGEV_NONE, 0, 9);
	CHECK(next < 1 || next > 7 || next == 4, "timer %ld is given twice", (long)next);
	timer_numbers_spoil();
}
static void timer_next_spoil(void) { MUST(syscall(SYS_timer_delete, 5)); }
STATE(timer_next)

static void timer_unarmed_setup(void) { timer = make(CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGUSR1, 0); }
static void timer_unarmed_check(void) { CHECK(rest_ms(timer) == 0, "it is armed"); set(timer, 0, 5000, 0); CHECK(rest_ms(timer) > 4000, "it can't be armed"); }
static void timer_unarmed_spoil(void) { set(timer, 0, 5000, 0); }
STATE(timer_unarmed)

/* Expired once; the signal waits. */
static void timer_expired_setup(void)
{
	block(SIGRTMIN);
	timer = make(CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGRTMIN, 31);
	set(timer, 0, 1, 0);
	usleep(20000);
}
static void timer_expired_check(void)
{
	siginfo_t info;
	CHECK(take(SIGRTMIN, &info, 0) && info.si_code == SI_TIMER && info.si_value.sival_int == 31 && info.si_timerid == (int)(intptr_t)timer, "its signal is gone");
	CHECK(!take(SIGRTMIN, &info, 30), "it expires twice");
}
static void timer_expired_spoil(void) { siginfo_t info; take(SIGRTMIN, &info, 0); }
STATE(timer_expired)

/* A periodic timer whose signal waits queues no second one, and counts what it misses. */
static void timer_overrun_setup(void)
{
	block(SIGRTMIN);
	timer = make(CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGRTMIN, 32);
	set(timer, 0, 10, 10);
	usleep(50000);
}
static void timer_overrun_check(void)
{
	siginfo_t info;
	usleep(100000);
	CHECK(take(SIGRTMIN, &info, 0) && info.si_value.sival_int == 32, "its signal is gone");
	CHECK(info.si_overrun >= 8, "it has missed %d", info.si_overrun);
	set(timer, 0, 0, 0);
	while (take(SIGRTMIN, &info, 0))
		CHECK(info.si_overrun < 8, "it was queued twice");
}
static void timer_overrun_spoil(void) { siginfo_t info; set(timer, 0, 0, 0); take(SIGRTMIN, &info, 0); }
STATE(timer_overrun)

/* For one thread. */
static pthread_t receiver;
static volatile int receiver_tid;
static void *receiver_body(void *data)
{
	siginfo_t info;
	(void)data;
	receiver_tid = (int)syscall(SYS_gettid);
	return (void *)(intptr_t)(take(SIGRTMIN + 2, &info, 20000) && info.si_code == SI_TIMER);
}
static void timer_for_thread_setup(void)
{
	int id;
	block(SIGRTMIN + 2);
	CHECK(pthread_create(&receiver, NULL, receiver_body, NULL) == 0, "no thread");
	while (!receiver_tid)
		usleep(1000);
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN + 2};
	event._sigev_un._tid = receiver_tid;
	MUST(syscall(SYS_timer_create, CLOCK_MONOTONIC, &event, &id));
	timer = (timer_t)(intptr_t)id;
	set(timer, 0, 100000, 0);
}
static void timer_for_thread_check(void)
{
	void *got;
	set(timer, 0, 10, 0);
	CHECK(pthread_join(receiver, &got) == 0 && got, "the thread did not get it");
}
static void timer_for_thread_spoil(void) { siginfo_t info = {.si_signo = SIGRTMIN + 2, .si_code = SI_QUEUE}; MUST(syscall(SYS_rt_tgsigqueueinfo, getpid(), receiver_tid, SIGRTMIN + 2, &info)); usleep(50000); }
STATE(timer_for_thread)

static void timers_many_setup(void)
{
	for (int i = 0; i < 600; i++)
		set(make(CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGUSR1, i), 0, 100000, 0);
}
static void timers_many_check(void)
{
	for (int i = 0; i < 600; i++)
		CHECK(rest_ms((timer_t)(intptr_t)i) > 50000, "timer %d is not armed", i);
}
static void timers_many_spoil(void) { MUST(syscall(SYS_timer_delete, 599)); }
STATE(timers_many)

/* As many as the limit of queued signals allows. */
static void timers_to_limit_setup(void)
{
	struct rlimit limit;
	for (int i = 0; i < 10; i++)
		set(make(CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGUSR1, i), 0, 100000, 0);
	MUST(getrlimit(RLIMIT_SIGPENDING, &limit));
	limit.rlim_cur = 0;
	MUST(setrlimit(RLIMIT_SIGPENDING, &limit));
}
static void timers_to_limit_check(void)
{
	for (int i = 0; i < 10; i++)
		CHECK(rest_ms((timer_t)(intptr_t)i) > 50000, "timer %d is not armed", i);
}
static void timers_to_limit_spoil(void) { MUST(syscall(SYS_timer_delete, 9)); }
STATE(timers_to_limit)

/* setitimer */
#define INTERVAL(id, which) \
	static void id##_setup(void) \
	{ \
		struct itimerval times = {.it_value = {1000, 0}, .it_interval = {3, 250000}}; \
		MUST(setitimer(which, &times, NULL)); \
	} \
	static void id##_check(void) \
	{ \
		struct itimerval times; \
		MUST(getitimer(which, &times)); \
		CHECK(times.it_value.tv_sec > 900 && times.it_value.tv_sec <= 1000, "the rest is %ld s", (long)times.it_value.tv_sec); \
		CHECK(times.it_interval.tv_sec == 3 && times.it_interval.tv_usec / 10000 == 25, "the period is %ld.%06ld s", (long)times.it_interval.tv_sec, (long)times.it_interval.tv_usec); \
	} \
	static void id##_spoil(void) { struct itimerval off = {0}; MUST(setitimer(which, &off, NULL)); } \
	STATE(id)
INTERVAL(interval_real, ITIMER_REAL)
INTERVAL(interval_virtual, ITIMER_VIRTUAL)
INTERVAL(interval_profiling, ITIMER_PROF)

static volatile sig_atomic_t ticks;
static void tick(int signal) { (void)signal; ticks++; }
static void interval_ticks_setup(void)
{
	struct sigaction action = {.sa_handler = tick, .sa_flags = SA_RESTART};
	struct itimerval times = {.it_value = {0, 5000}, .it_interval = {0, 5000}};
	MUST(sigaction(SIGALRM, &action, NULL));
	MUST(setitimer(ITIMER_REAL, &times, NULL));
}
static void interval_ticks_check(void)
{
	int before = ticks;
	for (int i = 0; i < 400 && ticks < before + 10; i++)
		usleep(5000);
	CHECK(ticks >= before + 10, "it ticks no more");
}
static void interval_ticks_spoil(void) { struct itimerval off = {0}; MUST(setitimer(ITIMER_REAL, &off, NULL)); }
STATE(interval_ticks)

static void interval_profile_ticks_setup(void)
{
	struct sigaction action = {.sa_handler = tick, .sa_flags = SA_RESTART};
	struct itimerval times = {.it_value = {0, 20000}, .it_interval = {0, 20000}};
	MUST(sigaction(SIGPROF, &action, NULL));
	MUST(setitimer(ITIMER_PROF, &times, NULL));
}
static void interval_profile_ticks_check(void)
{
	int before = ticks;
	busy(200);
	CHECK(ticks >= before + 3, "it ticks no more");
}
static void interval_profile_ticks_spoil(void) { struct itimerval off = {0}; MUST(setitimer(ITIMER_PROF, &off, NULL)); }
STATE(interval_profile_ticks)

static void alarm_set_setup(void) { alarm(500); }
static void alarm_set_check(void) { unsigned left = alarm(0); CHECK(left > 400 && left <= 500, "it has %u s", left); }
static void alarm_set_spoil(void) { alarm(0); }
STATE(alarm_set)

/* Clocks go on, also for children and for threads that are made later. */
static int64_t mono, boot;
static void clocks_go_on_setup(void) { mono = now_ns(CLOCK_MONOTONIC); boot = now_ns(CLOCK_BOOTTIME); }
static int later_child(void)
{
	int64_t now = now_ns(CLOCK_MONOTONIC), booted = now_ns(CLOCK_BOOTTIME);
	return now < mono || now > mono + 100000000000 || booted < boot || booted > boot + 100000000000;
}
static void clocks_go_on_check(void)
{
	CHECK(later_child() == 0, "monotonic time went from %ld to %ld", (long)mono, (long)now_ns(CLOCK_MONOTONIC));
	expect_exit(in_child(later_child), 0);
	struct timespec raw;
	MUST(syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &raw));
	CHECK(raw.tv_sec - now_ns(CLOCK_MONOTONIC) / 1000000000 < 2, "the call differs from the vdso");
}
static void clocks_go_on_spoil(void) { mono += 1000000000000; }
STATE(clocks_go_on)
