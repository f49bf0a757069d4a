/*
 * What a process is allowed and how it is set: user and group ids, supplementary groups, the five capability sets, securebits,
 * no_new_privs, seccomp filters, resource limits, umask, working directory, niceness, scheduling, I/O priority, CPU affinity,
 * dumpability, OOM adjustment, timer slack, personality, membarrier. All of it is set to something unusual, and must stay so, in every thread.
 */
#include "workload.h"
#include <grp.h>
#include <stddef.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/membarrier.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>

struct seen {
	char status[4096];
	char limits[4096];
	char cwd[256], oom[16], slack[32];
	int niceness, scheduler, personality, keep_caps, securebits, io_priority;
	cpu_set_t cpus;
	mode_t mask;
};

static void slurp(const char *path, char *to, size_t room)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	CHECK(fd >= 0, "set-up failed: %s", path);
	ssize_t length = read(fd, to, room - 1);
	CHECK(length >= 0, "set-up failed: read of %s", path);
	to[length] = 0;
	close(fd);
}

/* The lines of a thread's status file that say what it is, in their order. */
static void status_lines(char *to, size_t room)
{
	static const char *const kept[] = {"Umask:", "Uid:", "Gid:", "Groups:", "SigIgn:", "CapInh:", "CapPrm:", "CapEff:", "CapBnd:",
		"CapAmb:", "NoNewPrivs:", "Seccomp:", "Seccomp_filters:", "Cpus_allowed:"};
	char text[8192], *saved = NULL;
	slurp("/proc/thread-self/status", text, sizeof text);
	*to = 0;
	for (char *line = strtok_r(text, "\n", &saved); line; line = strtok_r(NULL, "\n", &saved))
		for (size_t i = 0; i < sizeof kept / sizeof *kept; i++)
			if (!strncmp(line, kept[i], strlen(kept[i]))) {
				strncat(to, line, room - strlen(to) - 1);
				strncat(to, "\n", room - strlen(to) - 1);
			}
}

static void look(struct seen *s)
{
	memset(s, 0, sizeof *s);
	status_lines(s->status, sizeof s->status);
	slurp("/proc/self/limits", s->limits, sizeof s->limits);
	slurp("/proc/self/oom_score_adj", s->oom, sizeof s->oom);
	CHECK(getcwd(s->cwd, sizeof s->cwd) != NULL, "getcwd");
	snprintf(s->slack, sizeof s->slack, "%d", prctl(PR_GET_TIMERSLACK));
	errno = 0;
	s->niceness = getpriority(PRIO_PROCESS, 0);
	s->scheduler = sched_getscheduler(0);
	s->personality = personality(0xffffffff);
	s->io_priority = (int)syscall(SYS_ioprio_get, 1, 0);
	s->keep_caps = prctl(PR_GET_KEEPCAPS);
	s->securebits = prctl(PR_GET_SECUREBITS);
	MUST(sched_getaffinity(0, sizeof s->cpus, &s->cpus));
}

static void compare(const char *who, const struct seen *then)
{
	struct seen now;
	look(&now);
	CHECK(!strcmp(now.status, then->status), "%s: status was\n%sis\n%s", who, then->status, now.status);
	CHECK(!strcmp(now.limits, then->limits), "%s: limits were\n%s\nare\n%s", who, then->limits, now.limits);
	CHECK(!strcmp(now.cwd, then->cwd), "%s: working directory %s, was %s", who, now.cwd, then->cwd);
	CHECK(!strcmp(now.oom, then->oom), "%s: OOM adjustment %s, was %s", who, now.oom, then->oom);
	CHECK(!strcmp(now.slack, then->slack), "%s: timer slack %s, was %s", who, now.slack, then->slack);
	CHECK(now.niceness == then->niceness, "%s: niceness %d, was %d", who, now.niceness, then->niceness);
	CHECK(now.scheduler == then->scheduler, "%s: scheduling policy %d, was %d", who, now.scheduler, then->scheduler);
	CHECK(now.io_priority == then->io_priority, "%s: I/O priority %x, was %x", who, now.io_priority, then->io_priority);
	CHECK(syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0) == 0, "%s: a registered membarrier", who);
	CHECK(now.personality == then->personality, "%s: personality %x, was %x", who, now.personality, then->personality);
	CHECK(now.keep_caps == then->keep_caps && now.securebits == then->securebits, "%s: securebits %x, were %x", who, now.securebits, then->securebits);
	CHECK(CPU_EQUAL(&now.cpus, &then->cpus), "%s: CPU affinity", who);
	/* The filter made below: this call, which nobody here needs, fails with a number that the kernel never gives for it. */
	errno = 0;
	if (takes_part("seccomp"))
		CHECK(syscall(SYS_getcpu, NULL, NULL, NULL) == -1 && errno == (breaking("seccomp") ? EPERM : ENOTUNIQ), "%s: the seccomp filter no longer acts", who);
	CHECK(syscall(SYS_gettid) > 0, "%s: the seccomp filter refuses too much", who);
}

static void filter(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getcpu, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOTUNIQ),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {sizeof code / sizeof *code, code};
	MUST(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program));
}

static void *other(void *unused)
{
	(void)unused;
	setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, 0) + 4);
	prctl(PR_SET_TIMERSLACK, 123456);
	struct seen then;
	look(&then);
	while (goes_on()) {
		compare("second thread", &then);
		doze(10 * MS);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	struct rlimit files = {333, 444}, stack = {5 << 20, 6 << 20}, core = {0, 0};
	MUST(setrlimit(RLIMIT_NOFILE, &files));
	MUST(setrlimit(RLIMIT_STACK, &stack));
	MUST(setrlimit(RLIMIT_CORE, &core));
	MUST(chdir("/var/tmp"));
	umask(037);
	/* Upwards from wherever it starts: a container need not be allowed the other way. */
	MUST(setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, 0) + 3));
	struct sched_param none = {0};
	MUST(sched_setscheduler(0, SCHED_BATCH | SCHED_RESET_ON_FORK, &none));
	/* Best effort, the last in its class. */
	MUST(syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 7));
	MUST(syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0));
	cpu_set_t all, cpus;
	MUST(sched_getaffinity(0, sizeof all, &all));
	CPU_ZERO(&cpus);
	for (int i = 0; i < CPU_SETSIZE && CPU_COUNT(&cpus) == 0; i++)
		if (CPU_ISSET(i, &all))
			CPU_SET(i, &cpus);
	if (takes_part("affinity"))
		MUST(sched_setaffinity(0, sizeof cpus, &cpus));
	MUST(prctl(PR_SET_TIMERSLACK, 70000));
	/* One of the few that the usual seccomp profiles of engines allow. */
	if (takes_part("personality"))
		MUST(personality(PER_LINUX32));
	if (geteuid() == 0 && takes_part("ids")) {
		gid_t groups[] = {3001, 3002, 3003};
		MUST(setgroups(3, groups));
		MUST(setresgid(1001, 1002, 1003));
		MUST(prctl(PR_SET_KEEPCAPS, 1));
		MUST(setresuid(2001, 2002, 2003));
		/* What survives: some effective, one more permitted, one inheritable and ambient. */
		struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
		uint32_t effective = 1u << CAP_CHOWN | 1u << CAP_KILL, extra = 1u << CAP_SETUID;
		struct __user_cap_data_struct sets[2] = {{effective, effective | extra, 1u << CAP_KILL}, {0, 0, 0}};
		MUST(syscall(SYS_capset, &head, sets));
		MUST(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_KILL, 0, 0));
		MUST(prctl(PR_SET_KEEPCAPS, 0));
		/* Changing ids made this root's property; the program must still read its own files in /proc. */
		MUST(prctl(PR_SET_DUMPABLE, 1));
	}
	MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	if (takes_part("seccomp"))
		filter();
	struct seen then;
	look(&then);
	pthread_t thread;
	CHECK(pthread_create(&thread, NULL, other, NULL) == 0, "set-up failed: pthread_create");
	ready();
	while (goes_on()) {
		if (breaking("umask")) umask(0);
		if (breaking("limits")) { files.rlim_cur = 100; setrlimit(RLIMIT_NOFILE, &files); }
		if (breaking("directory")) MUST(chdir("/"));
		if (breaking("niceness")) setpriority(PRIO_PROCESS, 0, then.niceness + 1);
		if (breaking("ids")) MUST(setresuid((uid_t)-1, 2001, (uid_t)-1));
		compare("first thread", &then);
		doze(10 * MS);
	}
	pthread_join(thread, NULL);
	return finished("\n%s", then.status);
}
