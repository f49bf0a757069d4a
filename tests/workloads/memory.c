/*
 * memory MEBIBYTES SEED FILE: what the benchmarks save. Fills anonymous memory with data that compresses about as a program's
 * heap does (3-4 times with zstd -1), checks it as it is asked to, and reads the clock without pause in a thread of its own.
 *
 * FILE is created when memory is filled, and from then on holds, mapped and shared: the largest gap that the clock thread
 * saw since it was last set to zero (ns), how many readings were made, and a request that the first thread answers: 1 asks
 * for the check of all memory, 4 for that of one word a page; the answer is 2 (as it was) or 3 (differs).
 */
#include "workload.h"
#include <sched.h>
#include <sys/mman.h>

struct report { _Atomic int64_t gap_max_ns; _Atomic uint64_t readings, request, now_ns; };
static struct report *report;

static void *watch(void *unused)
{
	(void)unused;
	/* The last CPU that is allowed: what else runs here tends to start on the first. */
	cpu_set_t all, last;
	CPU_ZERO(&last);
	if (sched_getaffinity(0, sizeof all, &all) == 0) {
		for (int i = CPU_SETSIZE - 1; i >= 0 && CPU_COUNT(&last) == 0; i--)
			if (CPU_ISSET(i, &all))
				CPU_SET(i, &last);
		sched_setaffinity(0, sizeof last, &last);
	}
	int64_t before = now_ns();
	for (;;) {
		int64_t now = now_ns();
		CHECK(now >= before, "CLOCK_MONOTONIC went back");
		if (now - before > report->gap_max_ns)
			report->gap_max_ns = now - before;
		before = now;
		report->now_ns = (uint64_t)now;
		report->readings++;
	}
}

/* Words as a program has them: pointers into one region, small counts, flags, a few that are random, runs of zeros. */
static uint64_t word(uint64_t seed, uint64_t i)
{
	uint64_t r = mix(seed ^ i);
	switch (i % 8) {
	case 0: return 0x00007f3a00000000u + (r & 0xffffff) * 16;
	case 1: return r & 0xff;
	case 2: return 0;
	case 3: return 0x00007f3a00000000u + (mix(seed ^ (i / 64)) & 0xffffff) * 16;
	case 4: return r % 3;
	case 5: return 0x3ff0000000000000u | (r & 0xffff) << 32;
	case 6: return i / 512;
	default: return i % 16 == 7 ? r : 0;
	}
}

int main(int argc, char **argv)
{
	CHECK(argc == 4, "usage: memory MEBIBYTES SEED FILE");
	uint64_t count = strtoull(argv[1], NULL, 10) << 17, seed = strtoull(argv[2], NULL, 10);
	uint64_t *heap = mmap(NULL, count * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(heap != MAP_FAILED, "set-up failed: mmap");
	for (uint64_t i = 0; i < count; i++)
		heap[i] = word(seed, i);
	char made[4096];
	snprintf(made, sizeof made, "%s.new", argv[3]);
	int fd = MUST(open(made, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
	MUST(ftruncate(fd, 4096));
	report = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(report != MAP_FAILED, "set-up failed: mmap");
	close(fd);
	pthread_t thread;
	CHECK(pthread_create(&thread, NULL, watch, NULL) == 0, "set-up failed: pthread_create");
	MUST(rename(made, argv[3]));
	for (;;) {
		if (report->request == 1 || report->request == 4) {
			uint64_t wrong = 0, step = report->request == 1 ? 1 : 512;
			for (uint64_t i = 0; i < count; i += step)
				wrong += heap[i] != word(seed, i);
			report->request = wrong ? 3 : 2;
		}
		doze(MS);
	}
}
