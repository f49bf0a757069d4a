/* Signals: what is pending, blocked, ignored and caught; stacks and frames of handlers. */
#include "state.h"

#include <pthread.h>
#include <sys/resource.h>
#include <ucontext.h>

/* linux/signal.h */
#define SS_AUTODISARM (1U << 31)

static void block(int signal)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, signal);
	MUST(sigprocmask(SIG_BLOCK, &set, NULL));
}
static void take(int signal, siginfo_t *info)
{
	sigset_t set;
	struct timespec at_once = {0};
	sigemptyset(&set);
	sigaddset(&set, signal);
	/* The library would hide which call has sent it. */
	CHECK(syscall(SYS_rt_sigtimedwait, &set, info, &at_once, 8) == signal, "signal %d is not pending", signal);
}
static void none_left(int signal)
{
	sigset_t set;
	struct timespec at_once = {0};
	sigemptyset(&set);
	sigaddset(&set, signal);
	CHECK(sigtimedwait(&set, NULL, &at_once) == -1, "signal %d is pending once too often", signal);
}

/* Real-time signals queue in order, with their values. */
static void queue_numbered(int signal, int from, int to)
{
	for (int i = from; i < to; i++)
		MUST(sigqueue(getpid(), signal, (union sigval){.sival_int = i}));
}
static void expect_numbered(int signal, int from, int to)
{
	for (int i = from; i < to; i++) {
		siginfo_t info;
		take(signal, &info);
		CHECK(info.si_code == SI_QUEUE && info.si_value.sival_int == i && info.si_pid == getpid() && info.si_uid == getuid(),
			"signal %d has code %d and value %d instead of %d", signal, info.si_code, info.si_value.sival_int, i);
	}
	none_left(signal);
}
static void queued_in_order_setup(void)
{
	for (int i = 0; i < 3; i++)
		block(SIGRTMIN + i);
	queue_numbered(SIGRTMIN + 1, 0, 5);
	queue_numbered(SIGRTMIN, 5, 9);
	queue_numbered(SIGRTMIN + 2, 9, 12);
}
static void queued_in_order_check(void)
{
	expect_numbered(SIGRTMIN, 5, 9);
	expect_numbered(SIGRTMIN + 1, 0, 5);
	expect_numbered(SIGRTMIN + 2, 9, 12);
}
static void queued_in_order_spoil(void) { siginfo_t info; take(SIGRTMIN, &info); }
STATE(queued_in_order)

static void queued_many_setup(void) { block(SIGRTMAX); queue_numbered(SIGRTMAX, 0, 3000); }
static void queued_many_check(void) { expect_numbered(SIGRTMAX, 0, 3000); }
static void queued_many_spoil(void) { siginfo_t info; take(SIGRTMAX, &info); }
STATE(queued_many)

/* As many as the limit allows. */
static void queued_to_limit_setup(void)
{
	struct rlimit limit;
	block(SIGRTMIN);
	MUST(getrlimit(RLIMIT_SIGPENDING, &limit));
	queue_numbered(SIGRTMIN, 0, 20);
	limit.rlim_cur = 4;
	MUST(setrlimit(RLIMIT_SIGPENDING, &limit));
}
static void queued_to_limit_check(void)
{
	CHECK(sigqueue(getpid(), SIGRTMIN, (union sigval){0}) == -1 && errno == EAGAIN, "another one is taken");
	expect_numbered(SIGRTMIN, 0, 20);
}
static void queued_to_limit_spoil(void) { siginfo_t info; take(SIGRTMIN, &info); }
STATE(queued_to_limit)

#define PENDING(id, number) \
	static void id##_setup(void) { block(number); MUST(kill(getpid(), number)); } \
	static void id##_check(void) \
	{ \
		siginfo_t info; \
		take(number, &info); \
		CHECK(info.si_code == SI_USER && info.si_pid == getpid(), "its code is %d", info.si_code); \
		none_left(number); \
	} \
	static void id##_spoil(void) { siginfo_t info; take(number, &info); } \
	STATE(id)
PENDING(pending_terminate, SIGTERM)
PENDING(pending_hangup, SIGHUP)
PENDING(pending_alarm, SIGALRM)
PENDING(pending_fault, SIGSEGV)
PENDING(pending_trap, SIGTRAP)
/* The action, and one for the thread alone, are what a debugger's own breakpoints would take. */
static volatile sig_atomic_t trapped;
static void on_trap(int number) { (void)number; trapped++; }
static void trap_action_setup(void) { signal(SIGTRAP, on_trap); }
static void trap_action_check(void)
{
	MUST(raise(SIGTRAP));
	__asm__ volatile("int3");
	CHECK(trapped == 2, "%d came", trapped);
}
static void trap_action_spoil(void) { struct sigaction none = {.sa_handler = SIG_IGN}; MUST(sigaction(SIGURG, &none, NULL)); trapped = 5; }
STATE(trap_action)
static void trap_ignored_setup(void) { signal(SIGTRAP, SIG_IGN); }
static void trap_ignored_check(void)
{
	struct sigaction now;
	MUST(sigaction(SIGTRAP, NULL, &now));
	CHECK(now.sa_handler == SIG_IGN, "it is not ignored");
}
static void trap_ignored_spoil(void) { signal(SIGTRAP, SIG_DFL); }
STATE(trap_ignored)
static void trap_for_thread_setup(void) { signal(SIGTRAP, on_trap); block(SIGTRAP); MUST(syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), SIGTRAP)); }
static void trap_for_thread_check(void)
{
	siginfo_t info;
	take(SIGTRAP, &info);
	CHECK(info.si_code == SI_TKILL, "its code is %d", info.si_code);
	none_left(SIGTRAP);
}
static void trap_for_thread_spoil(void) { siginfo_t info; take(SIGTRAP, &info); }
STATE(trap_for_thread)
PENDING(pending_bad_call, SIGSYS)
PENDING(pending_continue, SIGCONT)
PENDING(pending_terminal_stop, SIGTSTP)
PENDING(pending_child, SIGCHLD)
PENDING(pending_urgent, SIGURG)

/* For one thread only. */
static void pending_for_thread_setup(void)
{
	block(SIGUSR1);
	block(SIGRTMIN + 3);
	MUST(syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), SIGUSR1));
	siginfo_t info = {.si_signo = SIGRTMIN + 3, .si_code = SI_QUEUE};
	info.si_pid = getpid();
	info.si_value.sival_ptr = (void *)0x123456789abc;
	MUST(syscall(SYS_rt_tgsigqueueinfo, getpid(), syscall(SYS_gettid), SIGRTMIN + 3, &info));
}
static void pending_for_thread_check(void)
{
	siginfo_t info;
	take(SIGUSR1, &info);
	CHECK(info.si_code == SI_TKILL, "its code is %d", info.si_code);
	take(SIGRTMIN + 3, &info);
	CHECK(info.si_value.sival_ptr == (void *)0x123456789abc, "its value is %p", info.si_value.sival_ptr);
}
static void pending_for_thread_spoil(void) { siginfo_t info; take(SIGUSR1, &info); }
STATE(pending_for_thread)

static pthread_t other;
static pthread_barrier_t other_ready, other_go;
static void *other_body(void *data)
{
	siginfo_t info;
	(void)data;
	block(SIGUSR2);
	pthread_barrier_wait(&other_ready);
	pthread_barrier_wait(&other_go);
	take(SIGUSR2, &info);
	return NULL;
}
static void pending_for_other_setup(void)
{
	block(SIGUSR2);
	pthread_barrier_init(&other_ready, NULL, 2);
	pthread_barrier_init(&other_go, NULL, 2);
	CHECK(pthread_create(&other, NULL, other_body, NULL) == 0, "no thread");
	pthread_barrier_wait(&other_ready);
	CHECK(pthread_kill(other, SIGUSR2) == 0, "no signal");
}
static void pending_for_other_check(void)
{
	none_left(SIGUSR2);
	pthread_barrier_wait(&other_go);
	CHECK(pthread_join(other, NULL) == 0, "can't be joined");
}
static void pending_for_other_spoil(void) { MUST(kill(getpid(), SIGUSR2)); }
STATE(pending_for_other)

/* The end of a child that nobody has taken note of. */
static pid_t ended;
static int seven(void) { return 7; }
static void child_end_pending_setup(void)
{
	siginfo_t info;
	block(SIGCHLD);
	ended = in_child(seven);
	MUST(waitid(P_PID, (id_t)ended, &info, WEXITED | WNOWAIT));
}
static void child_end_pending_check(void)
{
	siginfo_t info;
	take(SIGCHLD, &info);
	CHECK(info.si_code == CLD_EXITED && info.si_pid == ended && info.si_status == 7, "it says %d of %d, %d", info.si_code, info.si_pid, info.si_status);
	none_left(SIGCHLD);
	expect_exit(ended, 7);
}
static void child_end_pending_spoil(void) { siginfo_t info; take(SIGCHLD, &info); }
STATE(child_end_pending)

/* No news where there was none. */
static void child_end_known_setup(void)
{
	siginfo_t info;
	child_end_pending_setup();
	take(SIGCHLD, &info);
}
static void child_end_known_check(void) { none_left(SIGCHLD); expect_exit(ended, 7); }
static void child_end_known_spoil(void) { MUST(kill(getpid(), SIGCHLD)); }
STATE(child_end_known)

/* Actions, with every flag. */
static void handler(int signal) { (void)signal; }
static void informed(int signal, siginfo_t *info, void *context) { (void)signal, (void)info, (void)context; }
static void actions_setup(void)
{
	static const int flags[] = {SA_NODEFER, SA_RESETHAND, SA_ONSTACK, SA_RESTART, SA_NOCLDSTOP | SA_NOCLDWAIT, 0};
	for (int i = 0; i < 6; i++) {
		struct sigaction action = {.sa_handler = handler, .sa_flags = flags[i]};
		sigemptyset(&action.sa_mask);
		sigaddset(&action.sa_mask, SIGRTMIN + i);
		MUST(sigaction(SIGRTMIN + 10 + i, &action, NULL));
	}
	struct sigaction action = {.sa_sigaction = informed, .sa_flags = SA_SIGINFO | SA_RESTART};
	sigfillset(&action.sa_mask);
	MUST(sigaction(SIGUSR1, &action, NULL));
	action = (struct sigaction){.sa_handler = SIG_IGN};
	MUST(sigaction(SIGPIPE, &action, NULL));
	MUST(sigaction(SIGCHLD, &action, NULL));
	action = (struct sigaction){.sa_handler = SIG_DFL, .sa_flags = SA_RESTART};
	sigaddset(&action.sa_mask, SIGRTMIN);
	MUST(sigaction(SIGUSR2, &action, NULL));
}
static void actions_check(void)
{
	static const int flags[] = {SA_NODEFER, SA_RESETHAND, SA_ONSTACK, SA_RESTART, SA_NOCLDSTOP | SA_NOCLDWAIT, 0};
	const int visible = SA_NODEFER | (int)SA_RESETHAND | SA_ONSTACK | SA_RESTART | SA_NOCLDSTOP | SA_NOCLDWAIT | SA_SIGINFO;
	struct sigaction action;
	for (int i = 0; i < 6; i++) {
		MUST(sigaction(SIGRTMIN + 10 + i, NULL, &action));
		CHECK(action.sa_handler == handler && (action.sa_flags & visible) == flags[i], "action %d has flags %#x", i, action.sa_flags);
		for (int j = 0; j < 6; j++)
			CHECK(sigismember(&action.sa_mask, SIGRTMIN + j) == (i == j), "action %d masks others", i);
	}
	MUST(sigaction(SIGUSR1, NULL, &action));
	CHECK(action.sa_sigaction == informed && (action.sa_flags & visible) == (SA_SIGINFO | SA_RESTART), "flags %#x", action.sa_flags);
	CHECK(sigismember(&action.sa_mask, SIGTERM) == 1, "the mask is another");
	MUST(sigaction(SIGPIPE, NULL, &action));
	CHECK(action.sa_handler == SIG_IGN, "SIGPIPE is not ignored");
	MUST(sigaction(SIGUSR2, NULL, &action));
	CHECK(action.sa_handler == SIG_DFL && action.sa_flags & SA_RESTART && sigismember(&action.sa_mask, SIGRTMIN),
		"a default action has lost its flags or mask");
	pid_t child = in_child(seven);
	CHECK(waitpid(child, NULL, 0) == -1 && errno == ECHILD, "an ignored child became a zombie");
}
static void actions_spoil(void) { signal(SIGPIPE, SIG_DFL); }
STATE(actions)

static volatile sig_atomic_t count;
static void counting(int signal) { (void)signal; count++; }
static void reset_handler_setup(void)
{
	struct sigaction action = {.sa_handler = counting, .sa_flags = (int)SA_RESETHAND};
	MUST(sigaction(SIGUSR1, &action, NULL));
	MUST(sigaction(SIGUSR2, &action, NULL));
	MUST(raise(SIGUSR1));
}
static void reset_handler_check(void)
{
	struct sigaction action;
	MUST(sigaction(SIGUSR1, NULL, &action));
	CHECK(action.sa_handler == SIG_DFL && count == 1, "the handler is back");
	MUST(raise(SIGUSR2));
	CHECK(count == 2, "the handler did not run");
	MUST(sigaction(SIGUSR2, NULL, &action));
	CHECK(action.sa_handler == SIG_DFL, "the handler stays");
}
static void reset_handler_spoil(void) { MUST(raise(SIGUSR2)); }
STATE(reset_handler)

/* Saved inside of a handler, on a stack of its own; a second handler on top. */
static char stack[65536] __attribute__((aligned(16)));
static volatile int in_first, in_second, left;
static int wanted_flags;
static void second_handler(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)info, (void)context;
	stack_t now;
	char here;
	in_second = 1;
	MUST(write(1, "ready\n", 6));
	until_finishing();
	MUST(sigaltstack(NULL, &now));
	if (wanted_flags & (int)SS_AUTODISARM)
		CHECK(now.ss_flags & SS_DISABLE, "the stack is armed: %#x", now.ss_flags);
	else
		CHECK(now.ss_sp == stack && now.ss_flags & SS_ONSTACK, "it is on another stack: %#x", now.ss_flags);
	CHECK(&here >= stack && &here < stack + sizeof stack, "it runs elsewhere");
	left++;
}
static void first_handler(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)info, (void)context;
	in_first = 1;
	MUST(raise(SIGUSR2));
	left++;
}
static void on_stack(int flags)
{
	wanted_flags = flags;
	stack_t set = {.ss_sp = stack, .ss_size = sizeof stack, .ss_flags = flags};
	MUST(sigaltstack(&set, NULL));
	struct sigaction action = {.sa_sigaction = first_handler, .sa_flags = SA_SIGINFO | SA_ONSTACK};
	MUST(sigaction(SIGUSR1, &action, NULL));
	action = (struct sigaction){.sa_sigaction = second_handler, .sa_flags = SA_SIGINFO};
	MUST(sigaction(SIGUSR2, &action, NULL));
	MUST(raise(SIGUSR1));
}
static void expect_stack(void)
{
	stack_t now;
	MUST(sigaltstack(NULL, &now));
	CHECK(left == 2, "%d handlers returned", left);
	CHECK(now.ss_sp == stack && now.ss_size == sizeof stack && now.ss_flags == wanted_flags, "the stack is %p, flags %#x", now.ss_sp, now.ss_flags);
}
static void disable_stack(void) { stack_t off = {.ss_flags = SS_DISABLE}; MUST(sigaltstack(&off, NULL)); }
static void nested_handlers_setup(void) { on_stack(0); }
static void nested_handlers_check(void) { expect_stack(); }
static void nested_handlers_spoil(void) { disable_stack(); }
STATE(nested_handlers)
static void disarmed_stack_setup(void) { on_stack((int)SS_AUTODISARM); }
static void disarmed_stack_check(void) { expect_stack(); }
static void disarmed_stack_spoil(void) { disable_stack(); }
STATE(disarmed_stack)

static void alternate_stack_setup(void)
{
	stack_t set = {.ss_sp = stack, .ss_size = sizeof stack - 4096, .ss_flags = (int)SS_AUTODISARM};
	MUST(sigaltstack(&set, NULL));
}
static void alternate_stack_check(void)
{
	stack_t now;
	MUST(sigaltstack(NULL, &now));
	CHECK(now.ss_sp == stack && now.ss_size == sizeof stack - 4096 && now.ss_flags == (int)SS_AUTODISARM, "it is another");
}
static void alternate_stack_spoil(void) { disable_stack(); }
STATE(alternate_stack)

/* The mask that a handler returns to. */
static void mask_behind_handler_handler(int signal) { (void)signal; MUST(write(1, "ready\n", 6)); until_finishing(); }
static void mask_behind_handler_setup(void)
{
	struct sigaction action = {.sa_handler = mask_behind_handler_handler};
	sigfillset(&action.sa_mask);
	MUST(sigaction(SIGUSR1, &action, NULL));
	block(SIGHUP);
	MUST(raise(SIGUSR1));
}
static void mask_behind_handler_check(void)
{
	sigset_t set;
	MUST(sigprocmask(SIG_BLOCK, NULL, &set));
	CHECK(sigismember(&set, SIGHUP) && !sigismember(&set, SIGUSR1) && !sigismember(&set, SIGTERM), "the mask is another");
}
static void mask_behind_handler_spoil(void) { block(SIGTERM); }
STATE(mask_behind_handler)

static void full_mask_setup(void) { sigset_t set; sigfillset(&set); MUST(sigprocmask(SIG_SETMASK, &set, NULL)); }
static void full_mask_check(void)
{
	unsigned long mask;
	MUST(syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &mask, 8));
	/* Not SIGKILL and SIGSTOP; the library keeps its own two out too. */
	CHECK((mask | 3ul << 31) == ~(1ul << (SIGKILL - 1) | 1ul << (SIGSTOP - 1)), "the mask is %#lx", mask);
}
static void full_mask_spoil(void) { sigset_t set; sigemptyset(&set); MUST(sigprocmask(SIG_SETMASK, &set, NULL)); }
STATE(full_mask)

/* A child in each kind of wait for signals; the parent sends one after the restore. */
static pid_t waiter;
static void send_later(int signal) { usleep(50000); MUST(kill(waiter, signal)); }
static int suspended_body(void)
{
	struct sigaction action = {.sa_handler = counting};
	sigset_t set;
	sigaction(SIGUSR1, &action, NULL);
	block(SIGUSR1);
	block(SIGUSR2);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	if (sigsuspend(&set) != -1 || errno != EINTR || count != 1)
		return 1;
	sigprocmask(SIG_BLOCK, NULL, &set);
	return sigismember(&set, SIGUSR1) && sigismember(&set, SIGUSR2) ? 0 : 2;
}
static void suspended_setup(void) { waiter = in_child(suspended_body); usleep(50000); }
static void suspended_check(void) { send_later(SIGUSR1); expect_exit(waiter, 0); }
static void suspended_spoil(void) { MUST(kill(waiter, SIGKILL)); }
STATE(suspended)

static int paused_body(void)
{
	struct sigaction action = {.sa_handler = counting, .sa_flags = SA_RESTART};
	sigaction(SIGUSR1, &action, NULL);
	return pause() == -1 && errno == EINTR && count == 1 ? 0 : 1;
}
static void paused_setup(void) { waiter = in_child(paused_body); usleep(50000); }
static void paused_check(void) { send_later(SIGUSR1); expect_exit(waiter, 0); }
static void paused_spoil(void) { MUST(kill(waiter, SIGKILL)); }
STATE(paused)

static int waiting_body(void)
{
	sigset_t set;
	siginfo_t info;
	block(SIGUSR1);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	return sigwaitinfo(&set, &info) == SIGUSR1 && info.si_pid == getppid() ? 0 : 1;
}
static void waiting_setup(void) { waiter = in_child(waiting_body); usleep(50000); }
static void waiting_check(void) { send_later(SIGUSR1); expect_exit(waiter, 0); }
static void waiting_spoil(void) { MUST(kill(waiter, SIGKILL)); }
STATE(waiting)

/* A signal of a stopped child that waits until it goes on. */
static int stopped_body(void)
{
	struct sigaction action = {.sa_handler = counting};
	sigaction(SIGUSR1, &action, NULL);
	MUST(raise(SIGSTOP));
	return count == 1 ? 0 : 1;
}
static void pending_of_stopped_setup(void)
{
	waiter = in_child(stopped_body);
	MUST(waitpid(waiter, NULL, WUNTRACED));
	MUST(kill(waiter, SIGUSR1));
}
static void pending_of_stopped_check(void) { MUST(kill(waiter, SIGCONT)); expect_exit(waiter, 0); }
static void pending_of_stopped_spoil(void) { MUST(kill(waiter, SIGKILL)); }
STATE(pending_of_stopped)
