/* Who a process is, and what it may do. */
#include "state.h"

#include <grp.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/securebits.h>
#include <pthread.h>
#include <stddef.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>

/* All of what /proc says of the calling thread's rights, to be compared as a whole. */
static const char *rights(void)
{
	static char text[2][2048];
	static int next;
	char *out = text[next++ % 2];
	static const char *const names[] = {"Uid:", "Gid:", "Groups:", "CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:", "NoNewPrivs:", "Seccomp:", "Seccomp_filters:"};
	const char *status = content("/proc/thread-self/status");
	out[0] = 0;
	for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
		const char *line = strstr(status, names[i]);
		CHECK(line, "no line %s", names[i]);
		strncat(out, line, strcspn(line, "\n") + 1);
	}
	snprintf(out + strlen(out), 64, "securebits %#x keep %d\n", prctl(PR_GET_SECUREBITS), prctl(PR_GET_KEEPCAPS));
	return out;
}
static char before[2048];
static void remember(void) { snprintf(before, sizeof before, "%s", rights()); }
static void compare(void)
{
	const char *now = rights();
	CHECK(!strcmp(before, now), "they were\n%s and are\n%s", before, now);
}
static void forget(void) { before[0] ^= 1; }

#define RIGHTS(id, ...) \
	static void id##_setup(void) { id(); remember(); } \
	static void id##_check(void) { compare(); } \
	static void id##_spoil(void) { forget(); } \
	STATE(id, ##__VA_ARGS__)

static void capset_to(uint64_t effective, uint64_t permitted, uint64_t inheritable)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[2] = {
		{(uint32_t)effective, (uint32_t)permitted, (uint32_t)inheritable},
		{(uint32_t)(effective >> 32), (uint32_t)(permitted >> 32), (uint32_t)(inheritable >> 32)},
	};
	MUST(syscall(SYS_capset, &header, data));
}
#define BIT(name) (1ull << (name))
#define SOME (BIT(CAP_CHOWN) | BIT(CAP_SETUID) | BIT(CAP_SETPCAP) | BIT(CAP_NET_RAW))

static void user_changed(void) { MUST(setgroups(0, NULL)); MUST(setresgid(1000, 1000, 1000)); MUST(setresuid(1000, 1000, 1000)); }
RIGHTS(user_changed)
static void user_each_different(void) { MUST(setresgid(11, 12, 13)); MUST(setresuid(1, 0, 3)); MUST(setresuid(1, 2, 3)); }
RIGHTS(user_each_different)
static void user_of_files(void) { setfsgid(77); setfsuid(78); }
RIGHTS(user_of_files)
static void user_can_come_back(void) { MUST(setresuid(1000, 1000, 0)); }
RIGHTS(user_can_come_back)
static void groups_many(void)
{
	gid_t groups[200];
	for (int i = 0; i < 200; i++)
		groups[i] = (gid_t)(5000 + 3 * i);
	MUST(setgroups(200, groups));
}
RIGHTS(groups_many)
/* As many as the kernel takes. */
static void groups_most_setup(void)
{
	static gid_t groups[65536];
	for (int i = 0; i < 65536; i++)
		groups[i] = (gid_t)(5000 + 3 * i);
	MUST(setgroups(65536, groups));
}
static void groups_most_check(void)
{
	static gid_t groups[65536];
	int count = MUST(getgroups(65536, groups));
	CHECK(count == 65536, "there are %d", count);
	for (int i = 0; i < count; i++)
		CHECK(groups[i] == (gid_t)(5000 + 3 * i), "group %d is %u", i, groups[i]);
}
static void groups_most_spoil(void) { MUST(setgroups(0, NULL)); }
STATE(groups_most)
static void groups_none(void) { MUST(setgroups(0, NULL)); }
RIGHTS(groups_none)
static void capabilities_few(void) { capset_to(BIT(CAP_CHOWN), BIT(CAP_CHOWN) | BIT(CAP_KILL), 0); }
RIGHTS(capabilities_few)
static void capabilities_none(void) { capset_to(0, 0, 0); }
RIGHTS(capabilities_none)
static void capabilities_inheritable(void) { capset_to(SOME, SOME, BIT(CAP_NET_RAW) | BIT(CAP_CHOWN)); }
RIGHTS(capabilities_inheritable)
static void capabilities_ambient(void)
{
	capset_to(SOME, SOME, BIT(CAP_NET_RAW) | BIT(CAP_CHOWN));
	MUST(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_RAW, 0, 0));
}
RIGHTS(capabilities_ambient)
static void capabilities_bounded(void)
{
	MUST(prctl(PR_CAPBSET_DROP, CAP_NET_RAW, 0, 0, 0));
	MUST(prctl(PR_CAPBSET_DROP, CAP_MKNOD, 0, 0, 0));
}
RIGHTS(capabilities_bounded)
/* Inheritable, and bounded no more. */
static void capabilities_inheritable_beyond(void)
{
	capset_to(SOME, SOME, BIT(CAP_NET_RAW));
	MUST(prctl(PR_CAPBSET_DROP, CAP_NET_RAW, 0, 0, 0));
	capset_to(BIT(CAP_CHOWN), SOME, BIT(CAP_NET_RAW));
}
RIGHTS(capabilities_inheritable_beyond)
static void user_with_capabilities(void)
{
	MUST(prctl(PR_SET_KEEPCAPS, 1));
	MUST(setresgid(1000, 1000, 1000));
	MUST(setresuid(1000, 1000, 1000));
	capset_to(BIT(CAP_NET_RAW), BIT(CAP_NET_RAW) | BIT(CAP_SETPCAP), BIT(CAP_NET_RAW));
	MUST(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_RAW, 0, 0));
}
RIGHTS(user_with_capabilities)
static void bits_set(void) { MUST(prctl(PR_SET_SECUREBITS, SECBIT_NOROOT | SECBIT_KEEP_CAPS)); }
RIGHTS(bits_set)
static void bits_locked(void)
{
	MUST(prctl(PR_SET_SECUREBITS, SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_SETUID_FIXUP | SECBIT_NO_SETUID_FIXUP_LOCKED | SECBIT_KEEP_CAPS_LOCKED));
}
RIGHTS(bits_locked)
/* Ambient capabilities stay when the bits forbid new ones. */
static void bits_no_more_ambient(void)
{
	capabilities_ambient();
	MUST(prctl(PR_SET_SECUREBITS, SECBIT_NO_CAP_AMBIENT_RAISE | SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED));
	capset_to(BIT(CAP_NET_RAW), BIT(CAP_NET_RAW), BIT(CAP_NET_RAW));
}
RIGHTS(bits_no_more_ambient)
static void capabilities_kept(void) { MUST(prctl(PR_SET_KEEPCAPS, 1)); }
RIGHTS(capabilities_kept)
static void privileges_no_new(void) { MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)); }
RIGHTS(privileges_no_new)
static void death_of_user(void) { user_changed(); MUST(prctl(PR_SET_DUMPABLE, 1)); MUST(prctl(PR_SET_PDEATHSIG, SIGUSR1)); }
static void user_dumpable_setup(void) { death_of_user(); }
static void user_dumpable_check(void)
{
	int signal;
	MUST(prctl(PR_GET_PDEATHSIG, &signal));
	CHECK(prctl(PR_GET_DUMPABLE) == 1 && signal == SIGUSR1, "dumpable %d, signal %d", prctl(PR_GET_DUMPABLE), signal);
	CHECK(access("/proc/self/fd", R_OK) == 0, "its files in /proc are not its own");
}
static void user_dumpable_spoil(void) { MUST(prctl(PR_SET_DUMPABLE, 0)); }
STATE(user_dumpable)
static int user_not_dumpable_was;
static void user_not_dumpable_setup(void) { user_changed(); MUST(prctl(PR_SET_DUMPABLE, 0)); }
static void user_not_dumpable_check(void) { CHECK(prctl(PR_GET_DUMPABLE) == user_not_dumpable_was, "it is dumpable now"); }
static void user_not_dumpable_spoil(void) { user_not_dumpable_was = 7; }
STATE(user_not_dumpable)

/* Filters: each makes one call fail with an error of its own. */
#define LOAD_CALL BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr))
static void deny(long call, int error, unsigned flags)
{
	struct sock_filter code[] = {
		LOAD_CALL,
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)call, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (unsigned)error),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {4, code};
	MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	MUST(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program));
}
static void expect_denied(long call, int error)
{
	errno = 0;
	long got = syscall(call, 0, 0, 0, 0);
	CHECK(got == -1 && errno == error, "call %ld returns %ld", call, got);
}
static void filter_one(void) { deny(SYS_getppid, 71, 0); }
static void filter_one_setup(void) { filter_one(); remember(); }
static void filter_one_check(void) { compare(); expect_denied(SYS_getppid, 71); }
static void filter_one_spoil(void) { filter_one(); }
STATE(filter_one)
/* The calls that a restore makes in the process, and that it answers by. */
static void filter_everything_setup(void)
{
	static const long calls[] = {SYS_prctl, SYS_rt_sigaction, SYS_mmap, SYS_munmap, SYS_mremap, SYS_mprotect, SYS_setresuid, SYS_capset,
		SYS_seccomp, SYS_recvmsg, SYS_dup3, SYS_dup2, SYS_close_range, SYS_sigaltstack, SYS_arch_prctl, SYS_prlimit64, SYS_timer_create, SYS_brk};
	for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
		if (calls[i] != SYS_prctl && calls[i] != SYS_seccomp)
			deny(calls[i], 90, 0);
}
static void filter_everything_check(void)
{
	expect_denied(SYS_rt_sigaction, 90);
	expect_denied(SYS_mmap, 90);
	expect_denied(SYS_timer_create, 90);
}
static void filter_everything_spoil(void) { deny(SYS_mmap, 91, 0); }
STATE(filter_everything)
static void filter_many(void)
{
	for (int i = 0; i < 40; i++)
		deny(SYS_getppid, 100 + i, 0);
}
RIGHTS(filter_many)
static void filter_logged_setup(void) { deny(SYS_getppid, 72, SECCOMP_FILTER_FLAG_LOG); deny(SYS_getpgrp, 73, SECCOMP_FILTER_FLAG_SPEC_ALLOW); remember(); }
static void filter_logged_check(void) { compare(); expect_denied(SYS_getppid, 72); expect_denied(SYS_getpgrp, 73); }
static void filter_logged_spoil(void) { forget(); }
STATE(filter_logged)
static void filter_as_user_setup(void) { user_changed(); deny(SYS_getppid, 74, 0); remember(); }
static void filter_as_user_check(void) { compare(); expect_denied(SYS_getppid, 74); }
static void filter_as_user_spoil(void) { forget(); }
STATE(filter_as_user)

static pthread_t other;
static pthread_barrier_t ready, go;
static void *filtered_body(void *data)
{
	(void)data;
	deny(SYS_getppid, 75, 0);
	pthread_barrier_wait(&ready);
	pthread_barrier_wait(&go);
	expect_denied(SYS_getppid, 75);
	return NULL;
}
static void start_other(void *(*body)(void *))
{
	pthread_barrier_init(&ready, NULL, 2);
	pthread_barrier_init(&go, NULL, 2);
	CHECK(pthread_create(&other, NULL, body, NULL) == 0, "no thread");
	pthread_barrier_wait(&ready);
}
static void finish_other(void) { pthread_barrier_wait(&go); pthread_join(other, NULL); }
static void filter_of_thread_setup(void) { start_other(filtered_body); }
static void filter_of_thread_check(void)
{
	CHECK(getppid() == 0, "the first thread is filtered");
	finish_other();
}
static void filter_of_thread_spoil(void) { deny(SYS_getppid, 75, 0); }
STATE(filter_of_thread)

/* What one thread installs for all needs that they have one list, which this one began. */
static void *follower_body(void *data)
{
	(void)data;
	pthread_barrier_wait(&ready);
	pthread_barrier_wait(&go);
	expect_denied(SYS_getppid, 76);
	expect_denied(SYS_getpgrp, 77);
	return NULL;
}
static void filter_for_all_setup(void) { deny(SYS_getppid, 76, 0); start_other(follower_body); }
static void filter_for_all_check(void)
{
	deny(SYS_getpgrp, 77, SECCOMP_FILTER_FLAG_TSYNC);
	finish_other();
}
static void filter_for_all_spoil(void) { deny(SYS_getppid, 78, 0); }
STATE(filter_for_all)

/* Who has logged in, which a program may say once. */
static char login[32];
static void login_user_setup(void)
{
	snprintf(login, sizeof login, "%s", content("/proc/self/loginuid"));
	if (strcmp(login, "4294967295"))
		return;
	strcpy(login, "4711");
	int file = MUST(open("/proc/self/loginuid", O_WRONLY));
	MUST(write(file, login, strlen(login)));
	close(file);
}
static void login_user_check(void) { CHECK(!strcmp(content("/proc/self/loginuid"), login), "it is %s", content("/proc/self/loginuid")); }
static void login_user_spoil(void) { strcpy(login, "4712"); }
STATE(login_user)

/* One thread has given up more than the other. */
static void *humble_body(void *data)
{
	char mine[2048];
	(void)data;
	MUST(syscall(SYS_setresuid, 2000, 2000, 2000));
	snprintf(mine, sizeof mine, "%s", rights());
	pthread_barrier_wait(&ready);
	pthread_barrier_wait(&go);
	CHECK(!strcmp(mine, rights()), "they were\n%s and are\n%s", mine, rights());
	return NULL;
}
static void user_of_thread_setup(void) { start_other(humble_body); remember(); }
static void user_of_thread_check(void) { compare(); finish_other(); }
static void user_of_thread_spoil(void) { forget(); }
STATE(user_of_thread)

/* Strict mode: only read, write, _exit and sigreturn. */
static pid_t strict;
static int strict_pipe[2];
static int strict_body(void)
{
	char byte;
	MUST(prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT));
	long got = read(strict_pipe[0], &byte, 1);
	syscall(SYS_exit, got == 1 && byte == 'x' ? 0 : 1);
	return 2;
}
static void strict_mode_setup(void) { MUST(pipe(strict_pipe)); strict = in_child(strict_body); usleep(50000); }
static void strict_mode_check(void)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/status", strict);
	CHECK(strstr(content(path), "Seccomp:\t1"), "it is not strict");
	MUST(write(strict_pipe[1], "x", 1));
	expect_exit(strict, 0);
}
static void strict_mode_spoil(void) { MUST(kill(strict, SIGKILL)); usleep(20000); }
STATE(strict_mode)
