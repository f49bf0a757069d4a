/* Memory that forks have left in common. */
#include "state.h"
#include <sys/mman.h>

#define PAGE 4096L
#define PAGES 4096L
#define CHILDREN 4

static unsigned char *data;
static pid_t children[CHILDREN];
/* How many have changed what they wanted to, and whether the check has begun. */
static volatile struct {
	int ready, checking;
} *said;

static uint64_t *page_at(long page) { return (uint64_t *)(data + page * PAGE); }

/* What nobody can compress, and what is different for every page and whoever has written it. */
static uint64_t word(long page, long who, long index)
{
	uint64_t z = (uint64_t)(page * 512 + index) * 0x9e3779b97f4a7c15 + (uint64_t)who * 0xd1342543de82ef95;
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
	return z ^ (z >> 31);
}

static void fill(long first, long end, long step, long who)
{
	for (long page = first; page < end; page += step)
		for (long index = 0; index < 512; index++)
			page_at(page)[index] = word(page, who, index);
}

static bool right(long page, long who)
{
	for (long index = 0; index < 512; index++)
		if (page_at(page)[index] != word(page, who, index))
			return false;
	return true;
}

static void prepare(void)
{
	said = MUST(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	data = MUST(mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	fill(0, PAGES, 1, 0);
}

static void await_ready(int count)
{
	while (said->ready < count)
		usleep(1000);
}

/* Until the first process has changed what is its own: whoever shared it with the others would show that now. */
static void until_checking(void)
{
	__sync_fetch_and_add(&said->ready, 1);
	until_finishing();
	while (!said->checking)
		usleep(1000);
}

/* --- Content --- */

static bool all_right(long first, long end, long who)
{
	for (long page = first; page < end; page++)
		if (!right(page, who))
			return false;
	return true;
}

static int protects(void)
{
	MUST(mprotect(data, 50 * PAGE, PROT_NONE));
	MUST(mprotect(data + 60 * PAGE, 10 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC));
	until_checking();
	MUST(mprotect(data, 50 * PAGE, PROT_READ));
	return !all_right(0, PAGES, 0);
}

static int changes(void)
{
	fill(0, 1000, 3, 1);
	until_checking();
	for (long page = 0; page < PAGES; page++)
		if (!right(page, page < 1000 && page % 3 == 0 ? 1 : 0))
			return 1;
	return 0;
}

static int unmaps(void)
{
	MUST(munmap(data + 1000 * PAGE, 1000 * PAGE));
	MUST(madvise(data + 2000 * PAGE, 500 * PAGE, MADV_DONTNEED));
	/* Something else is where it was. */
	unsigned char *other = mmap(data + 1100 * PAGE, 10 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	if (other != data + 1100 * PAGE)
		return 2;
	memset(other, 'o', 10 * PAGE);
	until_checking();
	for (long at = 0; at < 10 * PAGE; at++)
		if (other[at] != 'o')
			return 3;
	for (long at = 2000 * PAGE; at < 2500 * PAGE; at++)
		if (data[at])
			return 4;
	if (mmap(data + 1200 * PAGE, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == MAP_FAILED)
		return 5;
	return !all_right(0, 1000, 0) || !all_right(2500, PAGES, 0);
}

static int grandchild(void)
{
	fill(3400, 3450, 1, 4);
	until_checking();
	return !all_right(0, 3000, 0) || !all_right(3000, 3400, 3) || !all_right(3400, 3450, 4) || !all_right(3450, 3500, 3) || !all_right(3500, PAGES, 0);
}

static int forks(void)
{
	fill(3000, 3500, 1, 3);
	pid_t child = in_child(grandchild);
	until_checking();
	int status;
	if (waitpid(child, &status, 0) != child || status)
		return 2;
	return !all_right(0, 3000, 0) || !all_right(3000, 3500, 3) || !all_right(3500, PAGES, 0);
}

static void forked_memory_setup(void)
{
	static int (*const bodies[CHILDREN])(void) = {protects, changes, unmaps, forks};
	prepare();
	for (int number = 0; number < CHILDREN; number++)
		children[number] = in_child(bodies[number]);
	await_ready(CHILDREN + 1);
	fill(500, 600, 1, 9);
	MUST(mprotect(data + 100 * PAGE, 100 * PAGE, PROT_READ));
	MUST(madvise(data + 200 * PAGE, 100 * PAGE, MADV_DONTFORK));
	MUST(madvise(data + 300 * PAGE, 100 * PAGE, MADV_WIPEONFORK));
}

static void forked_memory_check(void)
{
	CHECK(all_right(0, 500, 0) && all_right(500, 600, 9) && all_right(600, PAGES, 0), "the parent has another content");
	fill(600, 3000, 1, 10);
	said->checking = 1;
	for (int number = 0; number < CHILDREN; number++)
		expect_exit(children[number], 0);
	CHECK(all_right(600, 3000, 10), "the parent has no memory of its own");
}

static void forked_memory_spoil(void) { page_at(10)[7]++; }

STATE(forked_memory)

/* --- Sharing --- */

static int idle(void)
{
	until_checking();
	return !all_right(0, PAGES, 0);
}

/* What anonymous memory the processes need together, in KiB. */
static long together(void)
{
	long sum = 0;
	for (int number = -1; number < CHILDREN; number++) {
		char path[64];
		sprintf(path, "/proc/%d/smaps_rollup", number < 0 ? getpid() : children[number]);
		const char *line = strstr(content(path), "Pss_Anon:");
		CHECK(line, "nothing is told of anonymous memory");
		sum += atol(line + strlen("Pss_Anon:"));
	}
	return sum;
}

static long needed;

static void forked_sharing_setup(void)
{
	prepare();
	for (int number = 0; number < CHILDREN; number++)
		children[number] = in_child(idle);
	await_ready(CHILDREN);
	needed = together();
}

static void expect_as_little(void)
{
	long now = together();
	CHECK(now <= needed + needed / 10, "%ld KiB were needed, and now %ld", needed, now);
	said->checking = 1;
}

static void forked_sharing_check(void)
{
	expect_as_little();
	for (int number = 0; number < CHILDREN; number++)
		expect_exit(children[number], 0);
}

static void forked_sharing_spoil(void) { fill(0, PAGES, 1, 0); }

STATE(forked_sharing)

/* Their parent is gone, and who adopts them has nothing of what they share. */
static void forked_orphans_setup(void)
{
	prepare();
	pid_t *numbers = MUST(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	pid_t parent = MUST(fork());
	if (parent == 0) {
		fill(0, PAGES, 1, 0);
		for (int number = 0; number < CHILDREN; number++)
			numbers[number] = in_child(idle);
		_exit(0);
	}
	expect_exit(parent, 0);
	memcpy(children, numbers, sizeof children);
	MUST(munmap(data, PAGES * PAGE));
	await_ready(CHILDREN);
	needed = together();
}

static void forked_orphans_check(void)
{
	expect_as_little();
	for (int number = 0; number < CHILDREN; number++)
		expect_exit(children[number], 0);
}

static void forked_orphans_spoil(void)
{
	data = MUST(mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	fill(0, PAGES, 1, 0);
}

STATE(forked_orphans)

/* --- The heap, whose ends differ --- */

#define HEAP (1024 * PAGE)

static unsigned char *heap;

static bool heap_is(long bytes, unsigned char first, unsigned char rest)
{
	if ((unsigned char *)sbrk(0) != heap + bytes)
		return false;
	for (long at = 0; at < bytes; at++)
		if (heap[at] != (at < HEAP ? first : rest))
			return false;
	/* It goes on growing. */
	unsigned char *more = sbrk(10 * PAGE);
	if (more != heap + bytes || more[9 * PAGE])
		return false;
	memset(more, 'm', 10 * PAGE);
	return true;
}

static int grows(void)
{
	memset(MUST(sbrk(300 * PAGE)), 'g', 300 * PAGE);
	until_checking();
	return !heap_is(HEAP + 300 * PAGE, 'h', 'g');
}

static int shrinks(void)
{
	MUST((long)sbrk(-300 * PAGE));
	until_checking();
	return !heap_is(HEAP - 300 * PAGE, 'h', 0);
}

static void forked_heap_setup(void)
{
	said = MUST(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	heap = MUST(sbrk(HEAP));
	memset(heap, 'h', HEAP);
	children[0] = in_child(grows);
	children[1] = in_child(shrinks);
	await_ready(2);
}

static void forked_heap_check(void)
{
	CHECK(heap_is(HEAP, 'h', 0), "the parent has another heap");
	said->checking = 1;
	expect_exit(children[0], 0);
	expect_exit(children[1], 0);
}

static void forked_heap_spoil(void) { heap[7 * PAGE] = 0; }

STATE(forked_heap)
