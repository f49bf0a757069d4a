/* Descriptors without a file: counters, timers, signals, processes, epoll. */
#include "state.h"

#include <poll.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <sys/mman.h>

#ifndef PIDFD_THREAD
#define PIDFD_THREAD O_EXCL
#endif
#ifndef P_PIDFD
#define P_PIDFD 3
#endif

static int fd, other, third;

static int pidfd_open(pid_t pid, unsigned flags) { return (int)syscall(SYS_pidfd_open, pid, flags); }
static bool ready(int file, short events)
{
	struct pollfd poller = {.fd = file, .events = events};
	return poll(&poller, 1, 0) == 1 && (poller.revents & events) == events;
}

static void eventfds_setup(void)
{
	fd = MUST(eventfd(3, EFD_SEMAPHORE | EFD_NONBLOCK));
	other = MUST(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
	uint64_t most = 0xfffffffffffffffeull;
	MUST(write(other, &most, sizeof most));
	third = MUST(eventfd(0, 0));
}
static void eventfds_check(void)
{
	uint64_t count;
	for (int i = 0; i < 3; i++)
		CHECK(read(fd, &count, 8) == 8 && count == 1, "the semaphore gave %lu", count);
	CHECK(read(fd, &count, 8) == -1 && errno == EAGAIN, "the semaphore gave more");
	count = 1;
	CHECK(write(other, &count, 8) == -1 && errno == EAGAIN, "the full counter takes more");
	CHECK(read(other, &count, 8) == 8 && count == 0xfffffffffffffffeull, "the full counter was at %lu", count);
	CHECK(!ready(third, POLLIN) && ready(third, POLLOUT), "the empty counter");
	CHECK(!(MUST(fcntl(third, F_GETFL)) & O_NONBLOCK), "flags");
}
static void eventfds_spoil(void) { uint64_t count; MUST(read(fd, &count, 8)); }
STATE(eventfds)

static int timers[7];
static void timerfds_setup(void)
{
	static const int clocks[] = {CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_MONOTONIC, CLOCK_MONOTONIC, CLOCK_REALTIME, CLOCK_MONOTONIC};
	for (int i = 0; i < 7; i++)
		timers[i] = MUST(timerfd_create(clocks[i], i ? TFD_NONBLOCK : TFD_NONBLOCK | TFD_CLOEXEC));
	struct itimerspec spec = {.it_value.tv_sec = now_ns(CLOCK_REALTIME) / 1000000000 + 3600};
	MUST(timerfd_settime(timers[0], TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET, &spec, NULL));
	spec.it_value.tv_sec = now_ns(CLOCK_MONOTONIC) / 1000000000 + 3600;
	MUST(timerfd_settime(timers[1], TFD_TIMER_ABSTIME, &spec, NULL));
	spec = (struct itimerspec){.it_value.tv_sec = 1000, .it_interval = {.tv_sec = 5, .tv_nsec = 7}};
	MUST(timerfd_settime(timers[2], 0, &spec, NULL));
	spec = (struct itimerspec){.it_value.tv_nsec = 1000};
	MUST(timerfd_settime(timers[3], 0, &spec, NULL));
	spec = (struct itimerspec){.it_value.tv_nsec = 1000, .it_interval.tv_nsec = 1000000};
	MUST(timerfd_settime(timers[4], 0, &spec, NULL));
	struct timespec pause = {.tv_nsec = 20000000};
	nanosleep(&pause, NULL);
	spec = (struct itimerspec){.it_interval.tv_sec = 9};
	MUST(timerfd_settime(timers[6], 0, &spec, NULL));
}
static void timerfds_check(void)
{
	struct itimerspec now;
	uint64_t count;
	for (int i = 0; i < 2; i++) {
		MUST(timerfd_gettime(timers[i], &now));
		CHECK(now.it_value.tv_sec > 3000 && now.it_value.tv_sec <= 3600, "timer %d has %ld s left", i, (long)now.it_value.tv_sec);
	}
	MUST(timerfd_gettime(timers[2], &now));
	CHECK(now.it_value.tv_sec > 900 && now.it_value.tv_sec <= 1000 && now.it_interval.tv_sec == 5 && now.it_interval.tv_nsec == 7, "timer 2");
	CHECK(read(timers[3], &count, 8) == 8 && count == 1, "the timer that expired");
	CHECK(read(timers[3], &count, 8) == -1 && errno == EAGAIN, "it expired twice");
	CHECK(read(timers[4], &count, 8) == 8 && count >= 10, "the periodic timer expired %lu times", count);
	MUST(timerfd_gettime(timers[4], &now));
	CHECK(now.it_interval.tv_nsec == 1000000 && now.it_value.tv_nsec > 0, "the periodic timer stands still");
	CHECK(!ready(timers[5], POLLIN) && !ready(timers[6], POLLIN), "a timer that was never set");
}
static void timerfds_spoil(void) { uint64_t count; MUST(read(timers[3], &count, 8)); }
STATE(timerfds)

static void signalfds_setup(void)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGRTMIN + 2);
	MUST(sigprocmask(SIG_BLOCK, &set, NULL));
	fd = MUST(signalfd(-1, &set, SFD_NONBLOCK));
	sigdelset(&set, SIGUSR1);
	other = MUST(signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC));
	MUST(kill(getpid(), SIGUSR1));
	union sigval value = {.sival_int = 4711};
	MUST(sigqueue(getpid(), SIGRTMIN + 2, value));
}
static void signalfds_check(void)
{
	struct signalfd_siginfo information;
	CHECK(read(other, &information, sizeof information) == sizeof information, "the second has no signal");
	CHECK(information.ssi_signo == (unsigned)SIGRTMIN + 2 && information.ssi_int == 4711, "signal %u", information.ssi_signo);
	CHECK(read(other, &information, sizeof information) == -1 && errno == EAGAIN, "it has another one");
	CHECK(read(fd, &information, sizeof information) == sizeof information && information.ssi_signo == SIGUSR1, "the first");
}
static void signalfds_spoil(void) { struct signalfd_siginfo information; MUST(read(other, &information, sizeof information)); }
STATE(signalfds)

static pid_t child;
static int sleeper(void) { until_finishing(); pause(); return 0; }
static int ends_at_once(void) { return 5; }
static void pidfds_setup(void)
{
	child = in_child(sleeper);
	fd = MUST(pidfd_open(child, 0));
	other = MUST(pidfd_open(getpid(), 0));
	third = MUST(dup(fd));
}
static void pidfds_check(void)
{
	CHECK(!ready(fd, POLLIN), "the child has ended");
	CHECK(MUST(fcntl(fd, F_GETFD)) == FD_CLOEXEC, "close-on-exec");
	MUST(syscall(SYS_pidfd_send_signal, other, 0, NULL, 0));
	MUST(syscall(SYS_pidfd_send_signal, third, SIGTERM, NULL, 0));
	siginfo_t information;
	MUST(waitid((idtype_t)P_PIDFD, (id_t)fd, &information, WEXITED));
	CHECK(information.si_pid == child && information.si_status == SIGTERM, "process %d ended with %d", information.si_pid, information.si_status);
}
static void pidfds_spoil(void) { MUST(dup2(other, fd)); }
STATE(pidfds)

static void pidfd_ended_setup(void)
{
	child = in_child(ends_at_once);
	fd = MUST(pidfd_open(child, 0));
	expect_exit(child, 5);
	child = in_child(ends_at_once);
	other = MUST(pidfd_open(child, 0));
	siginfo_t information;
	MUST(waitid(P_PID, (id_t)child, &information, WEXITED | WNOWAIT));
	third = MUST(dup(fd));
}
static void pidfd_ended_check(void)
{
	CHECK(ready(fd, POLLIN) && ready(third, POLLIN), "the ended process lives");
	CHECK(syscall(SYS_pidfd_send_signal, fd, 0, NULL, 0) == -1 && errno == ESRCH, "it can get signals");
	siginfo_t information;
	CHECK(waitid((idtype_t)P_PIDFD, (id_t)fd, &information, WEXITED | WNOHANG) == -1 && errno == ECHILD, "it can be waited for");
	MUST(waitid((idtype_t)P_PIDFD, (id_t)other, &information, WEXITED));
	CHECK(information.si_pid == child && information.si_status == 5, "the zombie ended with %d", information.si_status);
	CHECK(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD, "there is another child");
}
static void pidfd_ended_spoil(void) { MUST(dup2(MUST(pidfd_open(getpid(), 0)), fd)); }
STATE(pidfd_ended)

static pid_t thread_id;
static int thread_body(void *unused) { (void)unused; thread_id = (pid_t)syscall(SYS_gettid); for (;;) pause(); return 0; }
static void pidfd_thread_setup(void)
{
	char *stack = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	child = MUST(clone(thread_body, stack + 65536, CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM, NULL));
	fd = MUST(pidfd_open(child, PIDFD_THREAD));
	other = MUST(pidfd_open(getpid(), PIDFD_THREAD | O_NONBLOCK));
}
static void pidfd_thread_check(void)
{
	char path[64], wanted[32];
	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
	snprintf(wanted, sizeof wanted, "Pid:\t%d\n", child);
	CHECK(strstr(content(path), wanted), "it is of another thread: %s", content(path));
	CHECK(MUST(fcntl(fd, F_GETFL)) & O_EXCL && MUST(fcntl(other, F_GETFL)) & O_EXCL, "it is of a process");
	CHECK(MUST(fcntl(other, F_GETFL)) & O_NONBLOCK, "flags");
	MUST(syscall(SYS_pidfd_send_signal, fd, 0, NULL, 0));
}
static void pidfd_thread_spoil(void) { MUST(dup2(other, fd)); }
STATE(pidfd_thread)

/* Epoll. */

static int instance, pipes[3][2];
static void watch(int file, uint32_t events, uint64_t data)
{
	struct epoll_event event = {.events = events, .data.u64 = data};
	MUST(epoll_ctl(instance, EPOLL_CTL_ADD, file, &event));
}
static uint64_t next_event(uint32_t *events)
{
	struct epoll_event event;
	if (epoll_wait(instance, &event, 1, 0) != 1)
		return 0;
	if (events)
		*events = event.events;
	return event.data.u64;
}

static void epoll_kinds_setup(void)
{
	instance = MUST(epoll_create1(EPOLL_CLOEXEC));
	for (int i = 0; i < 3; i++)
		MUST(pipe2(pipes[i], O_NONBLOCK));
	watch(pipes[0][0], EPOLLIN | EPOLLET | EPOLLWAKEUP, 1);
	watch(pipes[1][0], EPOLLIN | EPOLLEXCLUSIVE, 2);
	watch(pipes[2][0], EPOLLIN | EPOLLONESHOT, 3);
	other = MUST(dup(pipes[1][0]));
	watch(other, EPOLLIN, 4);
	int nested = instance;
	instance = MUST(epoll_create1(0));
	watch(nested, EPOLLIN, 5);
	third = instance;
	instance = nested;
}
static void epoll_kinds_check(void)
{
	uint32_t events;
	CHECK(next_event(NULL) == 0, "something is due");
	MUST(write(pipes[0][1], "x", 1));
	CHECK(next_event(&events) == 1 && events == EPOLLIN, "the edge");
	CHECK(next_event(NULL) == 0, "the edge comes twice");
	MUST(write(pipes[2][1], "x", 1));
	CHECK(next_event(NULL) == 3 && next_event(NULL) == 0, "the one-shot entry");
	struct epoll_event event;
	MUST(write(pipes[1][1], "x", 1));
	CHECK(epoll_wait(third, &event, 1, 0) == 1 && event.data.u64 == 5, "the outer instance");
	uint64_t a = next_event(NULL), b = next_event(NULL);
	CHECK(a + b == 6 && a != b, "one file under two numbers: %d and %d", (int)a, (int)b);
}
static void epoll_kinds_spoil(void) { MUST(epoll_ctl(instance, EPOLL_CTL_DEL, other, NULL)); }
STATE(epoll_kinds)

/* Edges that the program has been told of, of files that are still ready. */
static void epoll_edges_told_setup(void)
{
	/* The outer one first. */
	int outer = MUST(epoll_create1(0));
	instance = MUST(epoll_create1(EPOLL_CLOEXEC));
	MUST(pipe2(pipes[0], O_NONBLOCK));
	MUST(pipe2(pipes[1], O_NONBLOCK));
	watch(pipes[1][0], EPOLLIN, 1);
	int inner = instance;
	instance = outer;
	watch(inner, EPOLLIN | EPOLLET, 2);
	watch(pipes[0][0], EPOLLIN | EPOLLET, 3);
	watch(pipes[0][1], EPOLLOUT | EPOLLET, 4);
	MUST(write(pipes[0][1], "x", 1));
	MUST(write(pipes[1][1], "x", 1));
	for (int i = 0; i < 3; i++)
		CHECK(next_event(NULL) != 0, "only %d events", i);
	CHECK(next_event(NULL) == 0, "more events");
}
static void epoll_edges_told_check(void)
{
	CHECK(next_event(NULL) == 0, "something is told twice");
	MUST(write(pipes[0][1], "x", 1));
	CHECK(next_event(NULL) == 3 && next_event(NULL) == 0, "another edge");
	MUST(write(pipes[1][1], "x", 1));
	CHECK(next_event(NULL) == 2 && next_event(NULL) == 0, "another edge inside");
	char byte;
	MUST(read(pipes[0][0], &byte, 1));
	MUST(close(pipes[0][0]));
	uint32_t events;
	CHECK(next_event(&events) == 4 && events & EPOLLERR, "nobody reads any more");
}
static void epoll_edges_told_spoil(void) { MUST(write(pipes[0][1], "x", 1)); }
STATE(epoll_edges_told)

static int holder(void) { until_finishing(); struct timespec pause = {.tv_nsec = 400000000}; nanosleep(&pause, NULL); return 0; }
static void epoll_held_elsewhere_setup(void)
{
	instance = MUST(epoll_create1(0));
	MUST(pipe(pipes[0]));
	watch(pipes[0][0], EPOLLIN, 7);
	child = in_child(holder);
	close(pipes[0][0]);
	/* Its number is another file's now. */
	MUST(pipe(pipes[1]));
	watch(pipes[1][0], EPOLLIN, 8);
}
static void epoll_held_elsewhere_check(void)
{
	CHECK(pipes[0][0] == pipes[1][0], "the number was not used again");
	CHECK(next_event(NULL) == 0, "something is due");
	MUST(write(pipes[0][1], "x", 1));
	CHECK(next_event(NULL) == 7, "the closed file is not watched");
	MUST(write(pipes[1][1], "x", 1));
	uint64_t a = next_event(NULL), b = next_event(NULL);
	CHECK(a + b == 15, "events of %d and %d", (int)a, (int)b);
	expect_exit(child, 0);
}
static void epoll_held_elsewhere_spoil(void) { MUST(kill(child, SIGKILL)); }
STATE(epoll_held_elsewhere)

static void epoll_used_up_setup(void)
{
	instance = MUST(epoll_create1(0));
	fd = MUST(eventfd(1, EFD_NONBLOCK));
	watch(fd, EPOLLIN | EPOLLONESHOT, 9);
	CHECK(next_event(NULL) == 9, "the event");
	MUST(pipe(pipes[0]));
	watch(pipes[0][0], EPOLLIN | EPOLLONESHOT, 10);
	MUST(write(pipes[0][1], "x", 1));
	CHECK(next_event(NULL) == 10, "the event");
	close(pipes[0][1]);
}
static void epoll_used_up_check(void)
{
	uint64_t one = 1;
	MUST(write(fd, &one, 8));
	CHECK(next_event(NULL) == 0, "a used up entry is due");
	struct epoll_event event = {.events = EPOLLIN | EPOLLONESHOT, .data.u64 = 11};
	MUST(epoll_ctl(instance, EPOLL_CTL_MOD, fd, &event));
	CHECK(next_event(NULL) == 11, "it can't be set up again");
}
static void epoll_used_up_spoil(void) { MUST(epoll_ctl(instance, EPOLL_CTL_DEL, fd, NULL)); }
STATE(epoll_used_up)

/* Thousands of files that all have one inode: who asks the kernel of each file whether it is each entry's is never done. */
#define WATCHED 3000
static int watched[WATCHED];
static void epoll_many_setup(void)
{
	struct rlimit limit;
	MUST(getrlimit(RLIMIT_NOFILE, &limit));
	CHECK(limit.rlim_max >= WATCHED + 100, "this host allows %lu descriptors only", limit.rlim_max);
	limit.rlim_cur = limit.rlim_max;
	MUST(setrlimit(RLIMIT_NOFILE, &limit));
	instance = MUST(epoll_create1(0));
	for (int i = 0; i < WATCHED; i++) {
		watched[i] = MUST(eventfd(0, EFD_NONBLOCK));
		watch(watched[i], EPOLLIN, (uint64_t)i + 1);
	}
}
static void epoll_many_check(void)
{
	uint64_t one = 1;
	for (int i = 0; i < WATCHED; i += 41) {
		MUST(write(watched[i], &one, 8));
		uint64_t event = next_event(NULL);
		CHECK(event == (uint64_t)i + 1, "file %d is told as %lu", i, event);
		MUST(read(watched[i], &one, 8));
	}
}
static void epoll_many_spoil(void) { MUST(epoll_ctl(instance, EPOLL_CTL_DEL, watched[41], NULL)); }
STATE(epoll_many)

/* What is refused, and by which name. */

#define REFUSED(id, text, open, ...) \
	static void id##_setup(void) { fd = MUST(open); } \
	static void id##_check(void) { CHECK(fcntl(fd, F_GETFD) != -1, "the descriptor is closed"); } \
	static void id##_spoil(void) { close(fd); } \
	STATE(id, .refused = text, ##__VA_ARGS__)

REFUSED(refused_io_uring, "[io_uring]", syscall(SYS_io_uring_setup, 4, calloc(1, 120)), .privileged = true)
REFUSED(refused_userfaultfd, "[userfaultfd]", syscall(SYS_userfaultfd, O_CLOEXEC | 1))
REFUSED(refused_fanotify, "[fanotify]", syscall(SYS_fanotify_init, 0x200, O_RDONLY), .privileged = true)
