/* Address spaces: kinds of mappings, protections, advice, locks. */
#include "state.h"

#include <linux/mempolicy.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#define PAGE 4096L

static char *map(size_t bytes, int protection, int flags)
{
	char *at = mmap(NULL, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
	CHECK(at != MAP_FAILED, "failed: mmap");
	return at;
}

/* Whether the kernel can read a byte there. */
static bool readable(const void *at)
{
	static int pipes[2];
	if (!pipes[1])
		MUST(pipe(pipes));
	char byte;
	if (write(pipes[1], at, 1) != 1)
		return false;
	MUST(read(pipes[0], &byte, 1));
	return true;
}

static bool writable(void *at)
{
	static int pipes[2];
	if (!pipes[1])
		MUST(pipe(pipes));
	char byte = 'w';
	if (readable(at))
		byte = *(volatile char *)at;
	MUST(write(pipes[1], &byte, 1));
	if (read(pipes[0], at, 1) == 1)
		return true;
	MUST(read(pipes[0], &byte, 1));
	return false;
}

/* A field of /proc/self/smaps for the mapping with this address, or of VmFlags whether a flag is there. */
static const char *smaps_line(const void *address, const char *field)
{
	static char line[1024];
	FILE *file = fopen("/proc/self/smaps", "r");
	CHECK(file, "no smaps");
	bool inside = false;
	while (fgets(line, sizeof line, file)) {
		unsigned long start, end;
		char dash;
		if (sscanf(line, "%lx%c%lx ", &start, &dash, &end) == 3 && dash == '-')
			inside = start <= (unsigned long)address && (unsigned long)address < end;
		else if (inside && !strncmp(line, field, strlen(field))) {
			fclose(file);
			return line;
		}
	}
	fclose(file);
	return "";
}

static bool has_flag(const void *address, const char *flag)
{
	char wanted[8];
	sprintf(wanted, " %s ", flag);
	return strstr(smaps_line(address, "VmFlags:"), wanted) != NULL;
}

/* --- protections --- */

static char *protections;

static void memory_protections_setup(void)
{
	protections = map(8 * PAGE, PROT_READ | PROT_WRITE, 0);
	memset(protections, 'p', 8 * PAGE);
	int kinds[8] = {PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC, PROT_READ | PROT_EXEC, PROT_READ | PROT_WRITE | PROT_EXEC, PROT_READ | PROT_WRITE, PROT_NONE};
	for (int page = 0; page < 8; page++)
		MUST(mprotect(protections + page * PAGE, PAGE, kinds[page]));
}

static void memory_protections_check(void)
{
	const char *wanted[8] = {"---p", "r--p", "-w-p", "--xp", "r-xp", "rwxp", "rw-p", "---p"};
	const char *maps = content("/proc/self/maps");
	for (int page = 0; page < 8; page++) {
		char text[64];
		sprintf(text, "%lx-%lx %s", (unsigned long)protections + page * PAGE, (unsigned long)protections + (page + 1) * PAGE, wanted[page]);
		CHECK(strstr(maps, text), "no %s", text);
		MUST(mprotect(protections + page * PAGE, PAGE, PROT_READ | PROT_WRITE));
		CHECK(protections[page * PAGE + 17] == 'p', "page %d has another content", page);
	}
}

static void memory_protections_spoil(void) { MUST(mprotect(protections + 7 * PAGE, PAGE, PROT_READ)); }

STATE(memory_protections)

static unsigned char *code;

/* Code that was written, then made executable. */
static void memory_generated_code_setup(void)
{
	static const unsigned char bytes[] = {0xb8, 42, 0, 0, 0, 0xc3};
	code = (unsigned char *)map(PAGE, PROT_READ | PROT_WRITE, 0);
	memcpy(code, bytes, sizeof bytes);
	MUST(mprotect(code, PAGE, PROT_READ | PROT_EXEC));
}

static void memory_generated_code_check(void)
{
	int (*function)(void);
	memcpy(&function, &code, sizeof function);
	CHECK(function() == 42, "it returns something else");
	CHECK(!writable(code), "it can be written");
}

static void memory_generated_code_spoil(void)
{
	MUST(mprotect(code, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC));
	code[1] = 43;
}

STATE(memory_generated_code)

/* --- shapes --- */

static char *reserved;

static void memory_reserved_setup(void)
{
	/* As JVM, Go and sanitizers do. */
	reserved = map(40L << 30, PROT_NONE, MAP_NORESERVE);
	for (long gib = 0; gib < 40; gib += 7) {
		MUST(mprotect(reserved + (gib << 30), 2 * PAGE, PROT_READ | PROT_WRITE));
		reserved[(gib << 30) + PAGE] = (char)gib;
	}
}

static void memory_reserved_check(void)
{
	for (long gib = 0; gib < 40; gib += 7) {
		CHECK(reserved[(gib << 30) + PAGE] == (char)gib && reserved[gib << 30] == 0, "another content at %ld GiB", gib);
		CHECK(!readable(reserved + (gib << 30) + 2 * PAGE), "a reserved part can be read");
	}
	CHECK(has_flag(reserved + 5 * PAGE, "nr"), "it is reserved");
	MUST(mprotect(reserved + (39L << 30), PAGE, PROT_READ | PROT_WRITE));
	reserved[39L << 30] = 1;
}

static void memory_reserved_spoil(void) { reserved[(14L << 30) + PAGE] = 15; }

STATE(memory_reserved)

#define MANY 3000
static char *many;

static void memory_many_setup(void)
{
	many = map(2 * MANY * PAGE, PROT_READ | PROT_WRITE, 0);
	for (long index = 0; index < MANY; index++) {
		many[2 * index * PAGE] = (char)index;
		MUST(mprotect(many + (2 * index + 1) * PAGE, PAGE, PROT_READ));
	}
}

static void memory_many_check(void)
{
	for (long index = 0; index < MANY; index++)
		CHECK(many[2 * index * PAGE] == (char)index && many[(2 * index + 1) * PAGE] == 0, "another content at %ld", index);
	CHECK(!writable(many + PAGE * (2 * MANY - 1)) && writable(many + PAGE * (2 * MANY - 2)), "other protections");
}

static void memory_many_spoil(void) { many[2 * 1234 * PAGE] ^= 1; }

STATE(memory_many)

static char *edges[3];

static void memory_edges_setup(void)
{
	/* The lowest place for anybody, a high one, and the last page of the half of a process. */
	char *places[3] = {(char *)0x10000, (char *)0x7ff000000000, (char *)0x7fffffffe000};
	for (int index = 0; index < 3; index++) {
		edges[index] = mmap(places[index], PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
		CHECK(edges[index] == places[index], "failed: mmap at %p", places[index]);
		edges[index][1] = (char)('a' + index);
	}
}

static void memory_edges_check(void)
{
	for (int index = 0; index < 3; index++)
		CHECK(edges[index][1] == 'a' + index, "another content at %p", edges[index]);
}

static void memory_edges_spoil(void) { edges[2][1] = 0; }

STATE(memory_edges)

static char *heap_begin, *heap_end;

static void memory_heap_setup(void)
{
	heap_begin = sbrk(0);
	heap_end = (char *)MUST((long)sbrk(10 * PAGE + 123)) + 10 * PAGE + 123;
	memset(heap_begin, 'h', 10 * PAGE + 123);
}

static void memory_heap_check(void)
{
	CHECK(sbrk(0) == heap_end, "the break has moved");
	for (char *at = heap_begin; at < heap_end; at++)
		CHECK(*at == 'h', "another content at %p", at);
	MUST((long)sbrk(PAGE * 100));
	heap_end[PAGE * 90] = 1;
	MUST((long)sbrk(-PAGE * 100));
	CHECK(sbrk(0) == heap_end, "it does not shrink");
}

static void memory_heap_spoil(void) { heap_begin[PAGE] = 0; }

STATE(memory_heap)

static int deep(int levels)
{
	volatile char space[PAGE];
	space[0] = (char)levels;
	return levels ? deep(levels - 1) + space[0] : 0;
}

static char *stack_low;

/* The stack of the first thread goes on growing. */
static void memory_stack_setup(void)
{
	deep(100);
	char here;
	stack_low = &here - 60 * PAGE;
	CHECK(has_flag(&here, "gd"), "the stack does not grow");
}

static void memory_stack_check(void)
{
	char here;
	deep(600);
	CHECK(has_flag(&here, "gd"), "the stack does not grow any more");
	CHECK(strstr(content("/proc/self/maps"), "[stack]"), "no mapping is called the stack");
	CHECK(stack_low != NULL, "never");
}

static void memory_stack_spoil(void) { fail("a stack can't be spoiled"); }

STATE(memory_stack)

static char *grows;

static void memory_grows_down_setup(void)
{
	char *area = map(300 * PAGE, PROT_NONE, 0);
	MUST(munmap(area, 300 * PAGE));
	grows = mmap(area + 290 * PAGE, 10 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED_NOREPLACE, -1, 0);
	CHECK(grows == area + 290 * PAGE, "failed: mmap");
	/* Down by one page. */
	grows -= PAGE;
	grows[0] = 'g';
	grows[9 * PAGE] = 't';
}

static void memory_grows_down_check(void)
{
	CHECK(grows[0] == 'g' && grows[9 * PAGE] == 't', "another content");
	CHECK(has_flag(grows, "gd"), "it does not grow");
	*(volatile char *)(grows - PAGE) = 1;
	CHECK(grows[-PAGE] == 1, "it has not grown");
}

static void memory_grows_down_spoil(void) { grows[0] = 0; }

STATE(memory_grows_down)

/* --- advice --- */

static char *advised;
static const struct { int advice; const char *flag; } advices[] = {
	{MADV_DONTFORK, "dc"}, {MADV_DONTDUMP, "dd"}, {MADV_WIPEONFORK, "wf"}, {MADV_HUGEPAGE, "hg"}, {MADV_NOHUGEPAGE, "nh"},
	{MADV_MERGEABLE, "mg"}, {MADV_SEQUENTIAL, "sr"}, {MADV_RANDOM, "rr"},
};
#define ADVICES (sizeof advices / sizeof *advices)

static void memory_advice_setup(void)
{
	advised = map(2 * ADVICES * PAGE, PROT_READ | PROT_WRITE, 0);
	memset(advised, 'a', 2 * ADVICES * PAGE);
	for (size_t index = 0; index < ADVICES; index++)
		MUST(madvise(advised + 2 * index * PAGE, PAGE, advices[index].advice));
}

static void memory_advice_check(void)
{
	for (size_t index = 0; index < ADVICES; index++) {
		CHECK(has_flag(advised + 2 * index * PAGE, advices[index].flag), "no %s", advices[index].flag);
		CHECK(!has_flag(advised + (2 * index + 1) * PAGE, advices[index].flag), "%s everywhere", advices[index].flag);
		CHECK(advised[2 * index * PAGE] == 'a', "another content");
	}
}

static void memory_advice_spoil(void) { MUST(madvise(advised + 4 * PAGE, PAGE, MADV_KEEPONFORK)); }

STATE(memory_advice)

static char *wiped;

static int wiped_body(void) { return wiped[0] == 0 && wiped[PAGE] == 'k' ? 0 : 1; }

static void memory_wiped_setup(void)
{
	wiped = map(3 * PAGE, PROT_READ | PROT_WRITE, 0);
	memset(wiped, 'k', 3 * PAGE);
	MUST(madvise(wiped, PAGE, MADV_WIPEONFORK));
}

static void memory_wiped_check(void)
{
	CHECK(wiped[0] == 'k', "another content");
	expect_exit(in_child(wiped_body), 0);
}

static void memory_wiped_spoil(void) { MUST(madvise(wiped, PAGE, MADV_KEEPONFORK)); }

STATE(memory_wiped)

static char *guarded;

#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif

static void memory_guards_setup(void)
{
	guarded = map(10 * PAGE, PROT_READ | PROT_WRITE, 0);
	memset(guarded, 'g', 10 * PAGE);
	MUST(madvise(guarded, PAGE, MADV_GUARD_INSTALL));
	MUST(madvise(guarded + 4 * PAGE, 3 * PAGE, MADV_GUARD_INSTALL));
}

static void memory_guards_check(void)
{
	for (int page = 0; page < 10; page++) {
		bool guard = page == 0 || (page >= 4 && page < 7);
		CHECK(readable(guarded + page * PAGE) == !guard, "page %d is guarded, or not", page);
		if (!guard)
			CHECK(guarded[page * PAGE + 9] == 'g', "page %d has another content", page);
	}
	MUST(madvise(guarded, PAGE, MADV_GUARD_REMOVE));
	CHECK(guarded[0] == 0, "a guard page had content");
}

static void memory_guards_spoil(void) { MUST(madvise(guarded + 5 * PAGE, PAGE, MADV_GUARD_REMOVE)); }

STATE(memory_guards)

static char *freed;

/* The content of freed pages may go or stay, but what was written after that stays. */
static void memory_freed_setup(void)
{
	freed = map(64 * PAGE, PROT_READ | PROT_WRITE, 0);
	memset(freed, 'f', 64 * PAGE);
	MUST(madvise(freed, 32 * PAGE, MADV_FREE));
	for (int page = 0; page < 32; page += 2)
		freed[page * PAGE] = 'n';
	MUST(madvise(freed + 40 * PAGE, 8 * PAGE, MADV_DONTNEED));
}

static void memory_freed_check(void)
{
	for (int page = 0; page < 64; page++) {
		char got = freed[page * PAGE];
		if (page < 32)
			CHECK(page % 2 ? got == 'f' || got == 0 : got == 'n', "page %d has %d", page, got);
		else
			CHECK(got == (page >= 40 && page < 48 ? 0 : 'f'), "page %d has %d", page, got);
	}
}

static void memory_freed_spoil(void) { freed[4 * PAGE] = 0; }

STATE(memory_freed)

/* --- locks --- */

static char *locked;

static void memory_locked_setup(void)
{
	locked = map(6 * PAGE, PROT_READ | PROT_WRITE, 0);
	locked[0] = 'l';
	MUST(mlock(locked, PAGE));
	MUST((int)syscall(SYS_mlock2, locked + 2 * PAGE, PAGE, 1));
	/* Memory without access can be locked, too. */
	MUST(mprotect(locked + 4 * PAGE, PAGE, PROT_NONE));
	CHECK(mlock(locked + 4 * PAGE, PAGE) == -1 && errno == ENOMEM, "it was populated");
	/* And memory with a guard page in it. */
	MUST(madvise(locked + 5 * PAGE, PAGE, MADV_GUARD_INSTALL));
	CHECK(mlock(locked + 5 * PAGE, PAGE) == -1 && errno == ENOMEM, "it was populated");
}

static void memory_locked_check(void)
{
	CHECK(has_flag(locked, "lo") && !has_flag(locked, "lf"), "the first page is not locked");
	CHECK(has_flag(locked + 2 * PAGE, "lo") && has_flag(locked + 2 * PAGE, "lf"), "the third page is not locked on fault");
	CHECK(has_flag(locked + 4 * PAGE, "lo") && has_flag(locked + 5 * PAGE, "lo"), "the fifth or sixth page is not locked");
	CHECK(!has_flag(locked + PAGE, "lo") && !has_flag(locked + 3 * PAGE, "lo"), "others are locked");
	CHECK(locked[0] == 'l', "another content");
}

static void memory_locked_spoil(void) { MUST(munlock(locked, PAGE)); }

STATE(memory_locked)

static void memory_lock_future_setup(void) { MUST(mlockall(MCL_FUTURE)); }

static void memory_lock_future_check(void)
{
	char *at = map(3 * PAGE, PROT_READ | PROT_WRITE, 0);
	CHECK(has_flag(at, "lo") && !has_flag(at, "lf"), "new memory is not locked");
}

static void memory_lock_future_spoil(void) { MUST(munlockall()); }

STATE(memory_lock_future)

static void memory_lock_all_on_fault_setup(void) { MUST(mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT)); }

static void memory_lock_all_on_fault_check(void)
{
	char *at = map(3 * PAGE, PROT_READ | PROT_WRITE, 0);
	static char own[PAGE];
	CHECK(has_flag(at, "lo") && has_flag(at, "lf"), "new memory is not locked on fault");
	CHECK(has_flag(own, "lo") && has_flag(own, "lf"), "old memory is not locked on fault");
}

static void memory_lock_all_on_fault_spoil(void) { MUST(mlockall(MCL_CURRENT | MCL_FUTURE)); }

STATE(memory_lock_all_on_fault)

static void memory_lock_all_current_setup(void) { MUST(mlockall(MCL_CURRENT)); }

static void memory_lock_all_current_check(void)
{
	char *at = map(3 * PAGE, PROT_READ | PROT_WRITE, 0);
	static char own[PAGE];
	CHECK(!has_flag(at, "lo"), "new memory is locked");
	CHECK(has_flag(own, "lo"), "old memory is not locked");
}

static void memory_lock_all_current_spoil(void) { MUST(munlockall()); }

STATE(memory_lock_all_current)

static struct rlimit narrow;

/* There is no room for anything more. */
static void memory_full_setup(void)
{
	const char *size = strstr(content("/proc/self/status"), "VmSize:");
	CHECK(size, "no VmSize");
	MUST(getrlimit(RLIMIT_AS, &narrow));
	narrow.rlim_cur = strtoul(size + 7, NULL, 10) * 1024 + 16 * PAGE;
	MUST(setrlimit(RLIMIT_AS, &narrow));
}

static void memory_full_check(void)
{
	struct rlimit now;
	MUST(getrlimit(RLIMIT_AS, &now));
	CHECK(now.rlim_cur == narrow.rlim_cur && now.rlim_max == narrow.rlim_max, "another limit");
	CHECK(mmap(NULL, 64 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED, "there is room");
}

static void memory_full_spoil(void) { narrow.rlim_cur += PAGE; }

STATE(memory_full)

static void memory_lock_narrow_setup(void)
{
	struct rlimit limit;
	MUST(mlockall(MCL_CURRENT | MCL_FUTURE));
	const char *locked_now = strstr(content("/proc/self/status"), "VmLck:");
	CHECK(locked_now, "no VmLck");
	MUST(getrlimit(RLIMIT_MEMLOCK, &limit));
	limit.rlim_cur = strtoul(locked_now + 6, NULL, 10) * 1024 + 8 * PAGE;
	MUST(setrlimit(RLIMIT_MEMLOCK, &limit));
}

static void memory_lock_narrow_check(void)
{
	char *at = map(2 * PAGE, PROT_READ | PROT_WRITE, 0);
	CHECK(has_flag(at, "lo"), "new memory is not locked");
	CHECK(mmap(NULL, 64 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED, "more can be locked");
}

static void memory_lock_narrow_spoil(void) { MUST(munlockall()); }

STATE(memory_lock_narrow)

/* --- attributes of the whole --- */

#ifndef PR_SET_MDWE
#define PR_SET_MDWE 65
#define PR_GET_MDWE 66
#endif
#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#define PR_GET_MEMORY_MERGE 68
#endif

static void memory_deny_code_setup(void) { MUST(prctl(PR_SET_MDWE, 1, 0, 0, 0)); }

static void memory_deny_code_check(void)
{
	CHECK(MUST(prctl(PR_GET_MDWE, 0, 0, 0, 0)) == 1, "another attribute");
	char *at = map(PAGE, PROT_READ | PROT_WRITE, 0);
	CHECK(mprotect(at, PAGE, PROT_READ | PROT_EXEC) == -1 && errno == EACCES, "memory can become executable");
}

static void memory_deny_code_spoil(void) { fail("what is denied stays denied"); }

STATE(memory_deny_code)

static void memory_no_huge_pages_setup(void) { MUST(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)); }
static void memory_no_huge_pages_check(void) { CHECK(prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1, "they are allowed"); }
static void memory_no_huge_pages_spoil(void) { MUST(prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0)); }

STATE(memory_no_huge_pages)

static void memory_merge_setup(void) { MUST(prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0)); }

static void memory_merge_check(void)
{
	CHECK(prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0) == 1, "it is not merged");
	char *at = map(PAGE, PROT_READ | PROT_WRITE, 0);
	CHECK(has_flag(at, "mg"), "new memory is not merged");
}

static void memory_merge_spoil(void) { MUST(prctl(PR_SET_MEMORY_MERGE, 0, 0, 0, 0)); }

STATE(memory_merge, .privileged = true)

static char *sealed_at;

static void memory_sealed_setup(void)
{
	sealed_at = map(4 * PAGE, PROT_READ | PROT_WRITE, 0);
	sealed_at[PAGE] = 's';
	MUST(mprotect(sealed_at + PAGE, PAGE, PROT_READ));
	MUST((int)syscall(462, sealed_at + PAGE, 2 * PAGE, 0));
}

static void memory_sealed_check(void)
{
	CHECK(mprotect(sealed_at + PAGE, PAGE, PROT_READ | PROT_WRITE) == -1 && errno == EPERM, "the protection can be changed");
	CHECK(munmap(sealed_at + 2 * PAGE, PAGE) == -1 && errno == EPERM, "it can be unmapped");
	CHECK(mprotect(sealed_at + 3 * PAGE, PAGE, PROT_READ) == 0, "what is beside it is sealed");
	CHECK(sealed_at[PAGE] == 's' && !writable(sealed_at + PAGE), "another content or protection");
	sealed_at[2 * PAGE] = 1;
}

static void memory_sealed_spoil(void) { MUST(munmap(sealed_at, PAGE)); MUST((int)syscall(462, sealed_at + 3 * PAGE, PAGE, 0)); }

STATE(memory_sealed)

static char *droppable;

static void memory_droppable_setup(void)
{
	droppable = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, 8 | MAP_ANONYMOUS, -1, 0);
	CHECK(droppable != MAP_FAILED, "failed: mmap");
	droppable[0] = 'd';
}

static void memory_droppable_check(void)
{
	CHECK(has_flag(droppable, "dp"), "it may not be dropped");
	CHECK(droppable[0] == 'd' || droppable[0] == 0, "another content");
}

static void memory_droppable_spoil(void)
{
	MUST((long)mmap(droppable, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
}

STATE(memory_droppable)

static char *placed;

static void memory_policy_setup(void)
{
	unsigned long nodes = 1;
	placed = map(4 * PAGE, PROT_READ | PROT_WRITE, 0);
	MUST((int)syscall(SYS_mbind, placed + PAGE, PAGE, MPOL_BIND, &nodes, 64, 0));
	MUST((int)syscall(SYS_mbind, placed + 2 * PAGE, PAGE, MPOL_INTERLEAVE, &nodes, 64, 0));
}

static void memory_policy_check(void)
{
	int wanted[4] = {MPOL_DEFAULT, MPOL_BIND, MPOL_INTERLEAVE, MPOL_DEFAULT};
	for (int page = 0; page < 4; page++) {
		int mode;
		unsigned long nodes[16];
		MUST((int)syscall(SYS_get_mempolicy, &mode, nodes, 1024, placed + page * PAGE, MPOL_F_ADDR));
		CHECK(mode == wanted[page], "page %d has policy %d", page, mode);
	}
}

static void memory_policy_spoil(void) { MUST((int)syscall(SYS_mbind, placed + PAGE, PAGE, MPOL_DEFAULT, NULL, 0, 0)); }

STATE(memory_policy, .privileged = true)

static void memory_executable_setup(void)
{
	MUST(personality(READ_IMPLIES_EXEC));
	char *at = map(PAGE, PROT_READ, 0);
	CHECK(has_flag(at, "ex"), "reading does not imply executing");
}

static void memory_executable_check(void)
{
	CHECK(MUST(personality(0xffffffff)) == READ_IMPLIES_EXEC, "another personality");
	char *at = map(PAGE, PROT_READ, 0);
	CHECK(has_flag(at, "ex"), "reading does not imply executing");
}

static void memory_executable_spoil(void) { MUST(personality(0)); }

STATE(memory_executable)

/* --- other origins --- */

static char *zeros[2];

static void memory_zero_device_setup(void)
{
	int fd = MUST(open("/dev/zero", O_RDWR));
	zeros[0] = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	zeros[1] = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(zeros[0] != MAP_FAILED && zeros[1] != MAP_FAILED, "failed: mmap");
	zeros[0][PAGE] = 'z';
	zeros[1][PAGE] = 's';
	MUST(close(fd));
}

static int zero_child(void)
{
	zeros[0][0] = 'c';
	zeros[1][0] = 'c';
	return 0;
}

static void memory_zero_device_check(void)
{
	CHECK(zeros[0][PAGE] == 'z' && zeros[1][PAGE] == 's', "another content");
	expect_exit(in_child(zero_child), 0);
	CHECK(zeros[0][0] == 0 && zeros[1][0] == 'c', "private is shared, or the other way round");
}

static void memory_zero_device_spoil(void) { zeros[1][PAGE] = 0; }

STATE(memory_zero_device)

static void memory_secret_setup(void)
{
	int fd = (int)syscall(447, 0);
	/* A kernel may be started without. */
	if (fd == -1)
		fd = MUST((int)syscall(SYS_userfaultfd, O_CLOEXEC | 1));
	else
		MUST(ftruncate(fd, PAGE));
}

static void memory_secret_check(void) {}
static void memory_secret_spoil(void) { fail("nothing to spoil"); }

STATE(memory_secret, .privileged = true, .refused = "not supported")

static char *files[4];

/* Private and shared views of one file; changed, truncated and grown under them. */
static void memory_file_views_setup(void)
{
	int fd = MUST(open("/tmp/views", O_RDWR | O_CREAT, 0600));
	char page[PAGE];
	for (int index = 0; index < 8; index++) {
		memset(page, 'a' + index, PAGE);
		MUST(write(fd, page, PAGE));
	}
	files[0] = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	files[1] = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	files[2] = mmap(NULL, 2 * PAGE, PROT_READ, MAP_SHARED, fd, 5 * PAGE);
	CHECK(files[0] != MAP_FAILED && files[1] != MAP_FAILED && files[2] != MAP_FAILED, "failed: mmap");
	files[0][PAGE] = 'P';
	files[0][7 * PAGE] = 'Q';
	files[1][5 * PAGE] = 'S';
	MUST(ftruncate(fd, 6 * PAGE + 10));
	MUST(close(fd));
}

static void memory_file_views_check(void)
{
	CHECK(files[0][0] == 'a' && files[0][PAGE] == 'P' && files[0][PAGE + 1] == 'b', "another private view");
	CHECK(files[1][PAGE] == 'b' && files[1][5 * PAGE] == 'S' && files[2][0] == 'S', "another shared view");
	CHECK(files[1][6 * PAGE + 9] == 'g' && files[1][6 * PAGE + 10] == 0, "another end");
	CHECK(!readable(files[0] + 7 * PAGE) && !readable(files[1] + 7 * PAGE), "there is memory behind the end");
	files[1][2 * PAGE] = 'W';
	const char *text = content("/tmp/views");
	CHECK(text[2 * PAGE] == 'W' && text[5 * PAGE] == 'S' && text[PAGE] == 'b', "the file has another content");
	CHECK(!writable(files[2]), "a view for reading can be written");
}

static void memory_file_views_spoil(void) { files[0][PAGE] = 'b'; }

STATE(memory_file_views)

static char *unlinked_views[3];

static void memory_file_unlinked_setup(void)
{
	int fd = MUST(open("/tmp/unlinked-view", O_RDWR | O_CREAT, 0600));
	MUST(ftruncate(fd, 5 * PAGE + 100));
	unlinked_views[0] = mmap(NULL, 6 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	unlinked_views[1] = mmap(NULL, 6 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	CHECK(unlinked_views[0] != MAP_FAILED && unlinked_views[1] != MAP_FAILED, "failed: mmap");
	memset(unlinked_views[0], 'u', 5 * PAGE + 100);
	unlinked_views[1][PAGE] = 'p';
	MUST(close(fd));
	MUST(unlink("/tmp/unlinked-view"));
}

static void memory_file_unlinked_check(void)
{
	CHECK(unlinked_views[0][5 * PAGE + 99] == 'u' && unlinked_views[0][5 * PAGE + 100] == 0, "another content");
	CHECK(unlinked_views[1][PAGE] == 'p' && unlinked_views[0][PAGE] == 'u', "another private content");
	unlinked_views[0][2 * PAGE] = 'n';
	CHECK(unlinked_views[1][2 * PAGE] == 'n', "the views are of different files");
}

static void memory_file_unlinked_spoil(void) { unlinked_views[1][PAGE] = 0; }

STATE(memory_file_unlinked)

static char *far_view;

static void memory_file_far_setup(void)
{
	int fd = MUST(open("/tmp/far", O_RDWR | O_CREAT, 0600));
	MUST(ftruncate(fd, (5L << 30) + PAGE));
	far_view = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 5L << 30);
	CHECK(far_view != MAP_FAILED, "failed: mmap");
	far_view[7] = 'f';
	MUST(close(fd));
}

static void memory_file_far_check(void)
{
	int fd = MUST(open("/tmp/far", O_RDWR));
	char byte;
	CHECK(far_view[7] == 'f' && pread(fd, &byte, 1, (5L << 30) + 7) == 1 && byte == 'f', "another content");
	far_view[8] = 'g';
	CHECK(pread(fd, &byte, 1, (5L << 30) + 8) == 1 && byte == 'g', "it is another part of the file");
}

static void memory_file_far_spoil(void) { far_view[7] = 0; }

STATE(memory_file_far)

static char *anonymous_shared;
static pid_t anonymous_child;
static int anonymous_pipe[2];

static int anonymous_body(void)
{
	char byte;
	MUST(munmap(anonymous_shared, PAGE));
	anonymous_shared[PAGE] = 'c';
	if (read(anonymous_pipe[0], &byte, 1) != 1)
		return 2;
	return anonymous_shared[2 * PAGE] == 'p' ? 0 : 1;
}

static void memory_shared_anonymous_setup(void)
{
	MUST(pipe(anonymous_pipe));
	anonymous_shared = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(anonymous_shared != MAP_FAILED, "failed: mmap");
	anonymous_child = in_child(anonymous_body);
	while (((volatile char *)anonymous_shared)[PAGE] != 'c')
		usleep(1000);
}

static void memory_shared_anonymous_check(void)
{
	CHECK(anonymous_shared[PAGE] == 'c' && anonymous_shared[0] == 0, "another content");
	anonymous_shared[2 * PAGE] = 'p';
	MUST(write(anonymous_pipe[1], "x", 1));
	expect_exit(anonymous_child, 0);
}

static void memory_shared_anonymous_spoil(void) { anonymous_shared[PAGE] = 0; }

STATE(memory_shared_anonymous)
