/* Threads and processes: scheduling, names, small attributes, what they hold of the kernel by address. */
#include "state.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <ucontext.h>

/* A second thread that sets up, waits, and checks. */
struct worker {
	void (*setup)(void);
	void (*check)(void);
	pthread_t thread;
	pthread_barrier_t ready, go;
};

static void *worker_body(void *data)
{
	struct worker *worker = data;
	worker->setup();
	pthread_barrier_wait(&worker->ready);
	pthread_barrier_wait(&worker->go);
	worker->check();
	return NULL;
}

static void worker_start(struct worker *worker)
{
	pthread_barrier_init(&worker->ready, NULL, 2);
	pthread_barrier_init(&worker->go, NULL, 2);
	CHECK(pthread_create(&worker->thread, NULL, worker_body, worker) == 0, "no thread");
	pthread_barrier_wait(&worker->ready);
}

static void worker_check(struct worker *worker)
{
	pthread_barrier_wait(&worker->go);
	CHECK(pthread_join(worker->thread, NULL) == 0, "the thread can't be joined");
}

/* Names may hold any bytes but zero. */
static const char odd_name[] = "a) \xff\xfe\n(\\";
static void thread_name_odd_setup(void) { MUST(prctl(PR_SET_NAME, odd_name)); }
static void thread_name_odd_check(void)
{
	char name[16];
	MUST(prctl(PR_GET_NAME, name));
	CHECK(!strcmp(name, odd_name), "its name is %s", name);
}
static void thread_name_odd_spoil(void) { MUST(prctl(PR_SET_NAME, "b")); }
STATE(thread_name_odd)

static void thread_name_empty_setup(void) { MUST(prctl(PR_SET_NAME, "")); }
static void thread_name_empty_check(void)
{
	char name[16];
	MUST(prctl(PR_GET_NAME, name));
	CHECK(name[0] == 0, "its name is %s", name);
}
static void thread_name_empty_spoil(void) { MUST(prctl(PR_SET_NAME, "b")); }
STATE(thread_name_empty)

/* A zombie keeps its odd name too: only its parent sees that it is there. */
static pid_t odd_zombie;
static int odd_zombie_body(void) { MUST(prctl(PR_SET_NAME, odd_name)); return 7; }
static void zombie_name_odd_setup(void)
{
	odd_zombie = in_child(odd_zombie_body);
	siginfo_t info;
	MUST(waitid(P_PID, (id_t)odd_zombie, &info, WEXITED | WNOWAIT));
}
static void zombie_name_odd_check(void)
{
	char path[64], name[64] = "";
	snprintf(path, sizeof path, "/proc/%d/comm", odd_zombie);
	snprintf(name, sizeof name, "%s", content(path));
	CHECK(!strncmp(name, odd_name, strlen(odd_name)), "its name is %s", name);
	expect_exit(odd_zombie, 7);
}
static void zombie_name_odd_spoil(void) { expect_exit(odd_zombie, 7); }
STATE(zombie_name_odd)

static void other_name_setup(void) { MUST(prctl(PR_SET_NAME, "second")); }
static void other_name_check(void)
{
	char name[16];
	MUST(prctl(PR_GET_NAME, name));
	CHECK(!strcmp(name, "second"), "its name is %s", name);
}
static struct worker named = {.setup = other_name_setup, .check = other_name_check};
static void thread_name_each_setup(void) { MUST(prctl(PR_SET_NAME, "first")); worker_start(&named); }
static void thread_name_each_check(void)
{
	char name[16];
	MUST(prctl(PR_GET_NAME, name));
	CHECK(!strcmp(name, "first"), "its name is %s", name);
	worker_check(&named);
}
static void thread_name_each_spoil(void) { MUST(prctl(PR_SET_NAME, "third")); }
STATE(thread_name_each)

/* A process that ends as soon as its first thread goes on, when the others may not have been let go yet. */
static pid_t hasty;
static void *sleeps(void *data) { pause(); return data; }
static int hasty_body(void)
{
	enum { OTHERS = 200 };
	const int64_t gap = 50 * 1000 * 1000;
	pthread_t thread;
	pthread_attr_t attributes;
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 64 * 1024);
	for (int i = 0; i < OTHERS; i++)
		CHECK(pthread_create(&thread, &attributes, sleeps, NULL) == 0, "no thread");
	for (int64_t before = now_ns(CLOCK_MONOTONIC), now; !finishing(); before = now) {
		now = now_ns(CLOCK_MONOTONIC);
		if (now - before > gap)
			break;
	}
	return 7;
}
static void ends_when_let_go_setup(void) { hasty = in_child(hasty_body); }
static void ends_when_let_go_check(void) { expect_exit(hasty, 7); }
static void ends_when_let_go_spoil(void) { expect_exit(hasty, 7); }
STATE(ends_when_let_go)

/* Policies, priorities and nice values; the latter are high, since a container may begin with one. */
static void expect_policy(int policy, int priority)
{
	struct sched_param parameters;
	CHECK(sched_getscheduler(0) == policy, "the policy is %d", sched_getscheduler(0));
	MUST(sched_getparam(0, &parameters));
	CHECK(parameters.sched_priority == priority, "the priority is %d", parameters.sched_priority);
}
static void choose_policy(int policy, int priority)
{
	struct sched_param parameters = {.sched_priority = priority};
	MUST(sched_setscheduler(0, policy, &parameters));
}
#define POLICY(id, policy, priority, ...) \
	static void id##_setup(void) { choose_policy(policy, priority); } \
	static void id##_check(void) { expect_policy(policy, priority); } \
	static void id##_spoil(void) { choose_policy(SCHED_OTHER, 0); } \
	STATE(id, ##__VA_ARGS__)
POLICY(policy_batch, SCHED_BATCH, 0)
POLICY(policy_idle, SCHED_IDLE, 0)
POLICY(policy_reset_on_fork, SCHED_BATCH | SCHED_RESET_ON_FORK, 0)

/* The time slice that a thread asks for, beside its nice value and policy. */
struct slice { uint32_t size, policy; uint64_t flags; int32_t nice; uint32_t priority; uint64_t ns, deadline_ns, period_ns; };
static struct slice slice;
static void ask_for_slice(uint64_t ns)
{
	struct slice wanted = {.size = sizeof wanted, .policy = SCHED_BATCH, .nice = 4, .ns = ns};
	MUST(syscall(SYS_sched_setattr, 0, &wanted, 0));
	MUST(syscall(SYS_sched_getattr, 0, &slice, sizeof slice, 0));
}
static void time_slice_setup(void) { ask_for_slice(20000000); }
static void time_slice_check(void)
{
	struct slice now;
	MUST(syscall(SYS_sched_getattr, 0, &now, sizeof now, 0));
	CHECK(now.ns == slice.ns, "it was %lu ns and is %lu ns", slice.ns, now.ns);
	CHECK(now.policy == SCHED_BATCH && now.nice == 4, "policy %u, nice value %d", now.policy, now.nice);
}
static void time_slice_spoil(void) { uint64_t before = slice.ns; ask_for_slice(50000000); slice.ns = before; }
STATE(time_slice)

static void nice_low_setup(void) { MUST(setpriority(PRIO_PROCESS, 0, 14)); }
static void nice_low_check(void) { CHECK(getpriority(PRIO_PROCESS, 0) == 14, "the nice value is %d", getpriority(PRIO_PROCESS, 0)); }
static void nice_low_spoil(void) { MUST(setpriority(PRIO_PROCESS, 0, 18)); }
STATE(nice_low)

static void nice_high_setup(void) { MUST(setpriority(PRIO_PROCESS, 0, -5)); }
static void nice_high_check(void) { CHECK(getpriority(PRIO_PROCESS, 0) == -5, "the nice value is %d", getpriority(PRIO_PROCESS, 0)); }
static void nice_high_spoil(void) { MUST(setpriority(PRIO_PROCESS, 0, 0)); }
STATE(nice_high, .privileged = true)

static void other_nice_setup(void) { MUST(setpriority(PRIO_PROCESS, 0, 17)); choose_policy(SCHED_BATCH, 0); }
static void other_nice_check(void)
{
	CHECK(getpriority(PRIO_PROCESS, 0) == 17, "the nice value is %d", getpriority(PRIO_PROCESS, 0));
	expect_policy(SCHED_BATCH, 0);
}
static struct worker nice_worker = {.setup = other_nice_setup, .check = other_nice_check};
static void nice_each_setup(void) { worker_start(&nice_worker); MUST(setpriority(PRIO_PROCESS, 0, 15)); }
static void nice_each_check(void)
{
	CHECK(getpriority(PRIO_PROCESS, 0) == 15, "the nice value is %d", getpriority(PRIO_PROCESS, 0));
	expect_policy(SCHED_OTHER, 0);
	worker_check(&nice_worker);
}
static void nice_each_spoil(void) { MUST(setpriority(PRIO_PROCESS, 0, 16)); }
STATE(nice_each)

static void nice_of_idle_setup(void) { MUST(setpriority(PRIO_PROCESS, 0, 16)); choose_policy(SCHED_IDLE, 0); }
static void nice_of_idle_check(void)
{
	CHECK(getpriority(PRIO_PROCESS, 0) == 16, "the nice value is %d", getpriority(PRIO_PROCESS, 0));
	expect_policy(SCHED_IDLE, 0);
}
static void nice_of_idle_spoil(void) { MUST(setpriority(PRIO_PROCESS, 0, 17)); }
STATE(nice_of_idle)

/* Processors. */
static int first_processor(void)
{
	cpu_set_t set;
	MUST(sched_getaffinity(0, sizeof set, &set));
	int processor = 0;
	while (!CPU_ISSET(processor, &set))
		processor++;
	return processor;
}
static void pin(int processor)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(processor, &set);
	MUST(sched_setaffinity(0, sizeof set, &set));
}
static int pinned;
static void affinity_one_setup(void) { pinned = first_processor(); pin(pinned); }
static void affinity_one_check(void)
{
	cpu_set_t set;
	MUST(sched_getaffinity(0, sizeof set, &set));
	CHECK(CPU_COUNT(&set) == 1 && CPU_ISSET(pinned, &set), "it may run on %d processors", CPU_COUNT(&set));
}
static cpu_set_t everywhere;
static void affinity_one_spoil(void)
{
	memset(&everywhere, 0xff, sizeof everywhere);
	MUST(sched_setaffinity(0, sizeof everywhere, &everywhere));
}
STATE(affinity_one)

static void other_pinned_setup(void) { pinned = first_processor(); pin(pinned); }
static struct worker pinned_worker = {.setup = other_pinned_setup, .check = affinity_one_check};
static void affinity_of_thread_setup(void) { worker_start(&pinned_worker); }
static void affinity_of_thread_check(void)
{
	cpu_set_t set;
	MUST(sched_getaffinity(0, sizeof set, &set));
	CHECK(CPU_COUNT(&set) > 1, "it may run on one processor only");
	worker_check(&pinned_worker);
}
static void affinity_of_thread_spoil(void) { pin(first_processor()); }
STATE(affinity_of_thread)

/* I/O priority (linux/ioprio.h): class best effort, 5. */
static void io_priority_setup(void) { MUST(syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 5)); }
static void io_priority_check(void) { CHECK(syscall(SYS_ioprio_get, 1, 0) == (2 << 13 | 5), "it is another"); }
static void io_priority_spoil(void) { MUST(syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 6)); }
STATE(io_priority)

static void io_priority_idle_setup(void) { MUST(syscall(SYS_ioprio_set, 1, 0, 3 << 13)); }
static void io_priority_idle_check(void) { CHECK(syscall(SYS_ioprio_get, 1, 0) == 3 << 13, "it is another"); }
static void io_priority_idle_spoil(void) { MUST(syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 6)); }
STATE(io_priority_idle)

/* What prctl keeps. */
#define PRCTL(id, set, get, wanted, other) \
	static void id##_setup(void) { MUST(prctl(set, wanted, 0, 0, 0)); } \
	static void id##_check(void) { long got = prctl(get, 0, 0, 0, 0); CHECK(got == wanted, "it is %ld", got); } \
	static void id##_spoil(void) { MUST(prctl(set, other, 0, 0, 0)); } \
	STATE(id)
PRCTL(timer_slack, PR_SET_TIMERSLACK, PR_GET_TIMERSLACK, 123456, 50000)
PRCTL(dumpable_not, PR_SET_DUMPABLE, PR_GET_DUMPABLE, 0, 1)

#define PRCTL_INT(id, set, get, wanted, other) \
	static void id##_setup(void) { MUST(prctl(set, wanted, 0, 0, 0)); } \
	static void id##_check(void) { int got = -1; MUST(prctl(get, &got, 0, 0, 0)); CHECK(got == wanted, "it is %d", got); } \
	static void id##_spoil(void) { MUST(prctl(set, other, 0, 0, 0)); } \
	STATE(id)
PRCTL_INT(is_subreaper, PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER, 1, 0)
PRCTL_INT(death_signal, PR_SET_PDEATHSIG, PR_GET_PDEATHSIG, SIGUSR2, 0)

static void machine_check_setup(void) { MUST(prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0)); }
static void machine_check_check(void) { CHECK(prctl(PR_MCE_KILL_GET, 0, 0, 0, 0) == PR_MCE_KILL_EARLY, "it is another"); }
static void machine_check_spoil(void) { MUST(prctl(PR_MCE_KILL, PR_MCE_KILL_CLEAR, 0, 0, 0)); }
STATE(machine_check)

/* A thread that may not read the time stamp counter faults when it does. */
static volatile sig_atomic_t faulted;
static void on_fault(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)info;
	faulted = 1;
	((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] += 2;
}
static void no_stamps_setup(void)
{
	struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
	MUST(sigaction(SIGSEGV, &action, NULL));
	MUST(prctl(PR_SET_TSC, PR_TSC_SIGSEGV, 0, 0, 0));
}
static void no_stamps_check(void)
{
	__asm__ volatile("rdtsc" ::: "rax", "rdx");
	CHECK(faulted, "it may read the time stamp counter");
	MUST(prctl(PR_SET_TSC, PR_TSC_ENABLE, 0, 0, 0));
}
static struct worker no_stamps = {.setup = no_stamps_setup, .check = no_stamps_check};
static void time_stamps_denied_setup(void) { worker_start(&no_stamps); }
static void time_stamps_denied_check(void) { worker_check(&no_stamps); }
static void time_stamps_denied_spoil(void) { fail("there is nothing to spoil from another thread"); }
STATE(time_stamps_denied)

/* Speculation of one thread: store bypass off. Where the processor has no such control there is nothing to keep. */
static int speculation_before;
static void speculation_setup(void)
{
	speculation_before = prctl(PR_GET_SPECULATION_CTRL, PR_SPEC_STORE_BYPASS, 0, 0, 0);
	if (speculation_before & PR_SPEC_PRCTL && speculation_before >= 0) {
		MUST(prctl(PR_SET_SPECULATION_CTRL, PR_SPEC_STORE_BYPASS, PR_SPEC_DISABLE, 0, 0));
		speculation_before = PR_SPEC_PRCTL | PR_SPEC_DISABLE;
	}
}
static void speculation_check(void)
{
	int now = prctl(PR_GET_SPECULATION_CTRL, PR_SPEC_STORE_BYPASS, 0, 0, 0);
	CHECK(now == speculation_before, "it is %d, was %d", now, speculation_before);
}
static void speculation_spoil(void) { speculation_before = ~speculation_before; }
STATE(speculation)

static void personality_set_setup(void) { MUST(personality(ADDR_NO_RANDOMIZE | UNAME26)); }
static void personality_set_check(void)
{
	CHECK(personality(0xffffffff) == (ADDR_NO_RANDOMIZE | UNAME26), "it is %#x", personality(0xffffffff));
}
static void personality_set_spoil(void) { MUST(personality(0)); }
STATE(personality_set, .privileged = true)

static void other_personality_setup(void) { MUST(personality(8)); }
static void other_personality_check(void) { CHECK(personality(0xffffffff) == 8, "it is %#x", personality(0xffffffff)); }
static struct worker personal = {.setup = other_personality_setup, .check = other_personality_check};
static void personality_each_setup(void) { worker_start(&personal); }
static void personality_each_check(void)
{
	CHECK(personality(0xffffffff) == 0, "it is %#x", personality(0xffffffff));
	worker_check(&personal);
}
static void personality_each_spoil(void) { MUST(personality(8)); }
STATE(personality_each)

static void write_file(const char *path, const char *text)
{
	int fd = MUST(open(path, O_WRONLY | O_CLOEXEC));
	MUST(write(fd, text, strlen(text)));
	close(fd);
}
static void dump_filter_setup(void) { write_file("/proc/self/coredump_filter", "0x7f"); }
static void dump_filter_check(void) { CHECK(!strcmp(content("/proc/self/coredump_filter"), "0000007f\n"), "it is %s", content("/proc/self/coredump_filter")); }
static void dump_filter_spoil(void) { write_file("/proc/self/coredump_filter", "0x33"); }
STATE(dump_filter)

static void oom_score_setup(void) { write_file("/proc/self/oom_score_adj", "321"); }
static void oom_score_check(void) { CHECK(!strcmp(content("/proc/self/oom_score_adj"), "321\n"), "it is %s", content("/proc/self/oom_score_adj")); }
static void oom_score_spoil(void) { write_file("/proc/self/oom_score_adj", "400"); }
STATE(oom_score)

/* The nice value of a whole session among others. */
static int session_nice(void)
{
	const char *nice = strrchr(content("/proc/self/autogroup"), ' ');
	CHECK(nice, "there are no autogroups");
	return atoi(nice + 1);
}
static void set_session_nice(const char *nice)
{
	int fd = MUST(open("/proc/self/autogroup", O_WRONLY));
	/* The kernel takes ten a second from all who have no privilege for more. */
	while (write(fd, nice, strlen(nice)) == -1) {
		CHECK(errno == EAGAIN, "the nice value is refused: %s", strerror(errno));
		usleep(20000);
	}
	close(fd);
}
static void autogroup_setup(void) { set_session_nice("7"); }
static void autogroup_check(void) { CHECK(session_nice() == 7, "it is %d", session_nice()); }
static void autogroup_spoil(void) { set_session_nice("9"); }
STATE(autogroup)

/* Keys that the kernel keeps for a thread, a process, a session: the keyring's number, and how to say so. */
#define KEYS(id, keyring, text) \
	static void id##_setup(void) { MUST(syscall(SYS_add_key, "user", #id, "secret", 6, keyring)); } \
	static void id##_check(void) { MUST(syscall(SYS_keyctl, 10, keyring, "user", #id, 0)); } \
	static void id##_spoil(void) { MUST(syscall(SYS_keyctl, 7, keyring)); } \
	STATE(id, .refused = text)
KEYS(keys_thread, -1, "keys in a keyring of the thread")
KEYS(keys_process, -2, "keys in a keyring of the process")
KEYS(keys_session, -3, "keys in a session keyring")

/* A segment of the local table, and a segment register that selects it. */
struct segment { unsigned number, base, limit, flags; };
static char *low_page;
static void local_segment_setup(void)
{
	low_page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	CHECK(low_page != MAP_FAILED, "no page below 4 GiB");
	memcpy(low_page, "segment", 8);
	struct segment segment = {.number = 3, .base = (unsigned)(uintptr_t)low_page, .limit = 4095, .flags = 1 | 1 << 6};
	MUST(syscall(SYS_modify_ldt, 0x11, &segment, sizeof segment));
	unsigned short selector = 3 << 3 | 7;
	__asm__ volatile("movw %0, %%gs" :: "r"(selector));
}
static void local_segment_check(void)
{
	char first;
	unsigned short selector;
	unsigned long table[8] = {0};
	__asm__ volatile("movw %%gs, %0" : "=r"(selector));
	CHECK(selector == (3 << 3 | 7), "the selector is %#x", selector);
	CHECK(syscall(SYS_modify_ldt, 0, table, sizeof table) > 24, "there is no table");
	CHECK(table[0] == 0 && table[3] != 0, "the table is another");
	__asm__ volatile("movb %%gs:1, %0" : "=r"(first));
	CHECK(first == 'e', "the segment begins elsewhere");
	__asm__ volatile("movw %0, %%gs" :: "r"(selector));
	__asm__ volatile("movb %%gs:2, %0" : "=r"(first));
	CHECK(first == 'g', "the segment begins elsewhere when it is loaded again");
}
static void local_segment_spoil(void)
{
	struct segment none = {.number = 3, .flags = 1 << 3 | 1 << 5};
	MUST(syscall(SYS_modify_ldt, 0x11, &none, sizeof none));
}
STATE(local_segment)

/* Segment bases. */
static unsigned long gs_target = 0x1234;
static void gs_base_setup(void) { MUST(syscall(SYS_arch_prctl, 0x1001, &gs_target)); }
static void gs_base_check(void)
{
	unsigned long value;
	__asm__ volatile("movq %%gs:0, %0" : "=r"(value));
	CHECK(value == 0x1234, "it reads %#lx", value);
}
static void gs_base_spoil(void) { static unsigned long other; MUST(syscall(SYS_arch_prctl, 0x1001, &other)); }
STATE(gs_base)

/* A thread that has its calls handed back to it. */
static void dispatched_setup(void)
{
	static volatile char selector;
	MUST(prctl(59, 1, 0, 0, &selector));
}
static void dispatched_check(void) { }
static void dispatched_spoil(void) { fail("there is nothing to spoil"); }
STATE(dispatched, .refused = "PR_SET_SYSCALL_USER_DISPATCH")

/* A joined thread's stack is given back when the kernel clears the word at its id address. */
static void nothing(void) { }
static struct worker cleared = {.setup = nothing, .check = nothing};
static void clear_tid_setup(void) { worker_start(&cleared); }
static void clear_tid_check(void) { worker_check(&cleared); }
static void clear_tid_spoil(void) { fail("there is nothing to spoil"); }
STATE(clear_tid)

/* A robust mutex whose owner ends. */
static pthread_mutex_t robust;
static void hold_robust(void) { CHECK(pthread_mutex_lock(&robust) == 0, "can't be locked"); }
static struct worker owner = {.setup = hold_robust, .check = nothing};
static void robust_prepare(int protocol)
{
	pthread_mutexattr_t attributes;
	pthread_mutexattr_init(&attributes);
	pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
	pthread_mutexattr_setprotocol(&attributes, protocol);
	pthread_mutex_init(&robust, &attributes);
	worker_start(&owner);
}
static void robust_owner_setup(void) { robust_prepare(PTHREAD_PRIO_NONE); }
static void robust_owner_check(void)
{
	CHECK(pthread_mutex_trylock(&robust) == EBUSY, "nobody holds it");
	worker_check(&owner);
	CHECK(pthread_mutex_lock(&robust) == EOWNERDEAD, "its owner's end was not noticed");
}
static void robust_owner_spoil(void)
{
	worker_check(&owner);
	CHECK(pthread_mutex_lock(&robust) == EOWNERDEAD, "its owner's end was not noticed");
	pthread_mutex_unlock(&robust);
}
STATE(robust_owner)
static void robust_inheriting_setup(void) { robust_prepare(PTHREAD_PRIO_INHERIT); }
static void robust_inheriting_check(void) { robust_owner_check(); }
static void robust_inheriting_spoil(void) { robust_owner_spoil(); }
STATE(robust_inheriting)

/* A thread that waits for a mutex with priority inheritance. */
static pthread_mutex_t inheriting;
static pthread_t inheritor;
static volatile int got_it;
static void *inheritor_body(void *data)
{
	(void)data;
	CHECK(pthread_mutex_lock(&inheriting) == 0, "can't be locked");
	got_it = 1;
	pthread_mutex_unlock(&inheriting);
	return NULL;
}
static void wait_for_inheriting_setup(void)
{
	pthread_mutexattr_t attributes;
	pthread_mutexattr_init(&attributes);
	pthread_mutexattr_setprotocol(&attributes, PTHREAD_PRIO_INHERIT);
	pthread_mutex_init(&inheriting, &attributes);
	pthread_mutex_lock(&inheriting);
	CHECK(pthread_create(&inheritor, NULL, inheritor_body, NULL) == 0, "no thread");
	usleep(50000);
}
static void wait_for_inheriting_check(void)
{
	usleep(20000);
	CHECK(!got_it, "the mutex was given away");
	CHECK(pthread_mutex_unlock(&inheriting) == 0, "it is somebody else's");
	CHECK(pthread_join(inheritor, NULL) == 0 && got_it, "the other thread did not get it");
}
static void wait_for_inheriting_spoil(void) { pthread_mutex_unlock(&inheriting); usleep(100000); }
STATE(wait_for_inheriting)

/* Many threads that wait for each other. */
static pthread_t crowd[64];
static pthread_barrier_t crowd_gate;
static int crowd_sum;
static void *crowd_body(void *data)
{
	pthread_barrier_wait(&crowd_gate);
	__atomic_add_fetch(&crowd_sum, (int)(intptr_t)data, __ATOMIC_SEQ_CST);
	return NULL;
}
static void many_threads_setup(void)
{
	pthread_barrier_init(&crowd_gate, NULL, 65);
	for (intptr_t i = 0; i < 64; i++)
		CHECK(pthread_create(&crowd[i], NULL, crowd_body, (void *)i) == 0, "no thread");
}
static void many_threads_check(void)
{
	pthread_barrier_wait(&crowd_gate);
	for (int i = 0; i < 64; i++)
		pthread_join(crowd[i], NULL);
	CHECK(crowd_sum == 2016, "the sum is %d", crowd_sum);
}
static void many_threads_spoil(void) { crowd_sum = 1; }
STATE(many_threads)
