/* Limits of every resource, also where a restore has to work within them. */
#include "state.h"

#include <sys/mman.h>
#include <sys/resource.h>

static void expect_limit(int resource, rlim_t soft, rlim_t hard)
{
	struct rlimit limit;
	MUST(getrlimit(resource, &limit));
	CHECK(limit.rlim_cur == soft && limit.rlim_max == hard, "limit %d is %lu of %lu", resource, limit.rlim_cur, limit.rlim_max);
}
static void limit_to(int resource, rlim_t soft, rlim_t hard)
{
	struct rlimit limit = {soft, hard};
	MUST(setrlimit(resource, &limit));
}
#define LIMIT(id, resource, soft, hard) \
	static void id##_setup(void) { limit_to(resource, soft, hard); } \
	static void id##_check(void) { expect_limit(resource, soft, hard); } \
	static void id##_spoil(void) { limit_to(resource, (soft) - 1, hard); } \
	STATE(id)
LIMIT(limit_cpu, RLIMIT_CPU, 5000, 6000)
LIMIT(limit_file, RLIMIT_FSIZE, 4096, 8192)
LIMIT(limit_data, RLIMIT_DATA, 64 << 20, 128 << 20)
LIMIT(limit_stack, RLIMIT_STACK, 256 << 10, 1 << 20)
LIMIT(limit_core, RLIMIT_CORE, 1, 2)
LIMIT(limit_resident, RLIMIT_RSS, 4096, 8192)
LIMIT(limit_processes, RLIMIT_NPROC, 2, 3)
LIMIT(limit_files, RLIMIT_NOFILE, 16, 32)
LIMIT(limit_locked, RLIMIT_MEMLOCK, 1, 4096)
LIMIT(limit_space, RLIMIT_AS, 64 << 20, 128 << 20)
LIMIT(limit_locks, RLIMIT_LOCKS, 1, 2)
LIMIT(limit_signals, RLIMIT_SIGPENDING, 1, 2)
LIMIT(limit_queues, RLIMIT_MSGQUEUE, 1, 2)
static void limit_nice_setup(void) { limit_to(RLIMIT_NICE, 0, 0); limit_to(RLIMIT_RTPRIO, 0, 0); }
static void limit_nice_check(void) { expect_limit(RLIMIT_NICE, 0, 0); expect_limit(RLIMIT_RTPRIO, 0, 0); }
static void limit_nice_spoil(void) { fail("such a limit can't be changed any more"); }
STATE(limit_nice)
LIMIT(limit_real_time, RLIMIT_RTTIME, 100000, 200000)

/* Descriptors with numbers that the limit allows no more. */
static void limit_below_descriptor_setup(void)
{
	MUST(dup2(MUST(open("/etc/passwd", O_RDONLY)), 900));
	limit_to(RLIMIT_NOFILE, 10, 10);
}
static void limit_below_descriptor_check(void)
{
	char byte;
	expect_limit(RLIMIT_NOFILE, 10, 10);
	CHECK(read(900, &byte, 1) == 1 && byte == 'r', "the descriptor is gone");
}
static void limit_below_descriptor_spoil(void) { close(900); }
STATE(limit_below_descriptor)

/* More data and mappings than the soft limits allow now; the hard ones leave room. */
static char *beyond;
static void limit_below_mappings_setup(void)
{
	beyond = mmap(NULL, 32 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(beyond != MAP_FAILED, "no memory");
	beyond[5 << 20] = 7;
	limit_to(RLIMIT_DATA, 4096, 1l << 40);
	limit_to(RLIMIT_AS, 1 << 20, 1l << 41);
}
static void limit_below_mappings_check(void)
{
	expect_limit(RLIMIT_DATA, 4096, 1l << 40);
	expect_limit(RLIMIT_AS, 1 << 20, 1l << 41);
	CHECK(beyond[5 << 20] == 7 && !beyond[6 << 20], "other content");
	CHECK(mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED, "the limit is not kept");
}
static void limit_below_mappings_spoil(void) { beyond[5 << 20] = 8; }
STATE(limit_below_mappings)

/* More memory than the limit allows now. */
static char *large;
static void limit_below_memory_setup(void)
{
	large = mmap(NULL, 32 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(large != MAP_FAILED, "no memory");
	large[5 << 20] = 7;
	limit_to(RLIMIT_MEMLOCK, 0, 0);
	limit_to(RLIMIT_STACK, 65536, 65536);
}
static void limit_below_memory_check(void)
{
	expect_limit(RLIMIT_MEMLOCK, 0, 0);
	expect_limit(RLIMIT_STACK, 65536, 65536);
	CHECK(large[5 << 20] == 7, "the memory is another");
}
static void limit_below_memory_spoil(void) { large[5 << 20] = 8; }
STATE(limit_below_memory)

/* Limits of a user without rights, who can't raise them again. */
static void limit_of_user_setup(void)
{
	limit_to(RLIMIT_NOFILE, 20, 40);
	limit_to(RLIMIT_NPROC, 1, 1);
	MUST(setresgid(1000, 1000, 1000));
	MUST(setresuid(1000, 1000, 1000));
}
static void limit_of_user_check(void)
{
	expect_limit(RLIMIT_NOFILE, 20, 40);
	expect_limit(RLIMIT_NPROC, 1, 1);
	CHECK(getuid() == 1000, "it is another user");
}
static void limit_of_user_spoil(void) { limit_to(RLIMIT_NOFILE, 19, 39); }
STATE(limit_of_user)

/* Set from outside on a child. */
static pid_t child;
static int child_body(void) { until_finishing(); usleep(100000); struct rlimit limit; getrlimit(RLIMIT_NOFILE, &limit); return limit.rlim_cur == 33 ? 0 : 1; }
static void limit_of_child_setup(void)
{
	struct rlimit limit = {33, 44};
	child = in_child(child_body);
	MUST(prlimit(child, RLIMIT_NOFILE, &limit, NULL));
}
static void limit_of_child_check(void)
{
	struct rlimit limit;
	MUST(prlimit(child, RLIMIT_NOFILE, NULL, &limit));
	CHECK(limit.rlim_cur == 33 && limit.rlim_max == 44, "it is %lu", limit.rlim_cur);
	expect_exit(child, 0);
}
static void limit_of_child_spoil(void) { struct rlimit limit = {32, 44}; MUST(prlimit(child, RLIMIT_NOFILE, &limit, NULL)); }
STATE(limit_of_child)

/* The signal that a limit of processor time sends comes by work. */
static volatile sig_atomic_t warned;
static void on_warning(int signal) { (void)signal; warned = 1; }
static void limit_cpu_works_setup(void)
{
	signal(SIGXCPU, on_warning);
	limit_to(RLIMIT_CPU, 1, 60);
}
static void limit_cpu_works_check(void)
{
	int64_t end = now_ns(CLOCK_PROCESS_CPUTIME_ID) + 2500000000;
	while (!warned && now_ns(CLOCK_PROCESS_CPUTIME_ID) < end)
		;
	CHECK(warned, "nobody warns");
}
static void limit_cpu_works_spoil(void) { limit_to(RLIMIT_CPU, 50, 60); }
STATE(limit_cpu_works)
