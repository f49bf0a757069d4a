/*
 * memory MEBIBYTES SEED FILE [THREADS [FOLDER]]: what the benchmarks save. Fills anonymous memory with data that compresses about
 * as a program's heap does (3-4 times with zstd -1), and does what it is asked to: checks all of it, writes pages at random, at
 * once or on and on at a rate, writes files, works on every processor. Reads the clock without pause in a thread of its own.
 * THREADS more threads do nothing but wait; in FOLDER are its files.
 *
 * FILE is created when memory is filled, and holds from then on, mapped and shared, the words of `struct report`. Whoever asks
 * sets `argument` and then `request`, which the first thread answers in its place by 2 (done, or as it was) or 3 (differs).
 *
 * Which pages are written, and what with, follows from SEED and the number of pages written before: the check does not
 * believe a table that could be as stale as the pages, but counts through all writes again.
 */
#include "workload.h"
#include <sched.h>
#include <sys/mman.h>

enum { CHECK_ALL = 1, DONE = 2, DIFFERS = 3, CHECK_PAGES = 4, WRITE_PAGES = 5, WRITE_FILES = 6, WORK = 7 };

struct report {
	/* The largest gap between two readings since it was last set to zero; how many readings were made. */
	_Atomic int64_t gap_max_ns;
	_Atomic uint64_t readings, request, now_ns;
	/* Of WRITE_PAGES pages, of WRITE_FILES MiB, of WORK units. */
	_Atomic uint64_t argument;
	/* Pages to write each second, whatever else is asked. */
	_Atomic uint64_t rate;
	/* Pages written since the start. */
	_Atomic uint64_t written;
	/* Pages to write during the next WORK, spread over its units; what the last one took. */
	_Atomic uint64_t pages_of_work;
	_Atomic int64_t work_ns;
	/* Not zero: the clock thread sleeps, since it would take a processor from the work. */
	_Atomic uint64_t without_clock;
};
static struct report *report;

static uint64_t *heap, pages, seed;
static const char *folder;
/* Held for each page that is written, so that a check sees whole pages and a count that fits. */
static pthread_mutex_t writing = PTHREAD_MUTEX_INITIALIZER;
static uint64_t written, files;
static int log_fd = -1;

#define WORDS 512
#define FILE_MIB 64

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
		if (report->without_clock)
			doze(10 * MS);
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
static uint64_t word(uint64_t key, uint64_t i)
{
	uint64_t r = mix(key ^ i);
	switch (i % 8) {
	case 0: return 0x00007f3a00000000u + (r & 0xffffff) * 16;
	case 1: return r & 0xff;
	case 2: return 0;
	case 3: return 0x00007f3a00000000u + (mix(key ^ (i / 64)) & 0xffffff) * 16;
	case 4: return r % 3;
	case 5: return 0x3ff0000000000000u | (r & 0xffff) << 32;
	case 6: return i / 512;
	default: return i % 16 == 7 ? r : 0;
	}
}

/* What a page is filled with by the write of this number; the first filling is number 0. */
static uint64_t key_of(uint64_t number) { return number ? mix(seed + number) : seed; }

/* The page that is written after so many: each once, in an order that is another in each pass. Steps that can be undone, on as
 * many bits as the number of pages takes, until the result is the number of a page. */
static uint64_t target(uint64_t before)
{
	unsigned bits = 1;
	while (pages > 1ull << bits)
		bits++;
	uint64_t x = before % pages, key = mix(seed ^ ~(before / pages)), mask = (1ull << bits) - 1;
	do {
		for (int i = 0; i < 3; i++) {
			x = (x * (mix(key + (uint64_t)i) | 1) + key) & mask;
			x ^= x >> (bits / 2 + 1);
		}
	} while (x >= pages);
	return x;
}

static void write_page(void)
{
	uint64_t at = target(written) * WORDS, key = key_of(written + 1);
	for (uint64_t i = at; i < at + WORDS; i++)
		heap[i] = word(key, i);
	if (log_fd >= 0)
		CHECK(write(log_fd, heap + at, WORDS * 8) == WORDS * 8, "set-up failed: writing the log");
	report->written = ++written;
}

static void write_pages(uint64_t count)
{
	for (uint64_t i = 0; i < count; i++) {
		pthread_mutex_lock(&writing);
		write_page();
		pthread_mutex_unlock(&writing);
	}
}

static void *write_on(void *unused)
{
	(void)unused;
	int64_t before = now_ns();
	double owed = 0;
	for (;;) {
		doze(MS);
		int64_t now = now_ns(), passed = now - before;
		/* What was missed in a pause is not made up for at once: the rate is a bound. */
		owed += (double)report->rate * (double)(passed < 10 * MS ? passed : 10 * MS) / SECOND;
		before = now;
		write_pages((uint64_t)owed);
		owed -= (double)(uint64_t)owed;
	}
	return NULL;
}

static const char *name_of(uint64_t file)
{
	static char name[4096];
	snprintf(name, sizeof name, "%s/file-%llu", folder, (unsigned long long)file);
	return name;
}

/* Files of 64 MiB with content of the same kind. */
static void write_files(uint64_t mebibytes)
{
	static uint64_t part[1 << 17];
	for (uint64_t left = mebibytes; left > 0; files++) {
		int fd = MUST(open(name_of(files), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
		for (uint64_t i = 0; i < FILE_MIB && left > 0; i++, left--) {
			for (uint64_t j = 0; j < 1 << 17; j++)
				part[j] = word(mix(~seed - files), (i << 17) + j);
			CHECK(write(fd, part, sizeof part) == sizeof part, "set-up failed: writing a file");
		}
		close(fd);
	}
}

/* How many words of this file differ from those that `key` gives, page by page. A page more or less counts as well. */
static uint64_t wrong_in(const char *name, uint64_t first_page, uint64_t count, bool log)
{
	uint64_t page[WORDS], wrong = 0, i = 0;
	int fd = open(name, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 1;
	for (; read(fd, page, sizeof page) == sizeof page; i++) {
		uint64_t at = log ? target(i) * WORDS : i * WORDS, key = log ? key_of(i + 1) : mix(~seed - first_page);
		for (uint64_t j = 0; j < WORDS; j++)
			wrong += page[j] != word(key, at + j);
	}
	close(fd);
	return wrong + (log ? i != count : i == 0);
}

static bool as_it_was(bool every_word)
{
	uint64_t wrong = 0, step = every_word ? 1 : WORDS;
	pthread_mutex_lock(&writing);
	uint64_t *last = calloc(pages, sizeof *last);
	CHECK(last || pages == 0, "set-up failed: calloc");
	for (uint64_t i = 0; i < written; i++)
		last[target(i)] = i + 1;
	for (uint64_t page = 0; page < pages; page++)
		for (uint64_t i = page * WORDS, key = key_of(last[page]); i < (page + 1) * WORDS; i += step)
			wrong += heap[i] != word(key, i);
	free(last);
	if (folder && every_word) {
		for (uint64_t file = 0; file < files; file++)
			wrong += wrong_in(name_of(file), file, 0, false);
		char name[4096];
		snprintf(name, sizeof name, "%s/log", folder);
		wrong += wrong_in(name, 0, written, true);
	}
	report->written = written;
	pthread_mutex_unlock(&writing);
	return wrong == 0;
}

static pthread_mutex_t waiting = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t call = PTHREAD_COND_INITIALIZER;
static uint64_t calls;
static _Atomic uint64_t answers;

static void *wait_idle(void *unused)
{
	(void)unused;
	pthread_mutex_lock(&waiting);
	for (uint64_t seen = 0;; seen++) {
		while (seen == calls)
			pthread_cond_wait(&call, &waiting);
		answers++;
	}
	return NULL;
}

/* Whether all of them still wait, and wake. */
static bool all_answer(uint64_t threads)
{
	answers = 0;
	pthread_mutex_lock(&waiting);
	calls++;
	pthread_cond_broadcast(&call);
	pthread_mutex_unlock(&waiting);
	for (int i = 0; i < 10000 && answers != threads; i++)
		doze(MS);
	return answers == threads;
}

static _Atomic uint64_t units_done;
static volatile uint64_t sink;

static void *work(void *unused)
{
	(void)unused;
	uint64_t units = report->argument, to_write = report->pages_of_work, sum = 0, unit;
	while ((unit = units_done++) < units) {
		for (uint64_t i = 0; i < 1 << 14; i++) {
			uint64_t r = mix(unit << 14 | i);
			sum += r ^ heap[r % (pages * WORDS)];
		}
		write_pages((unit + 1) * to_write / units - unit * to_write / units);
	}
	sink = sum;
	return NULL;
}

static void work_everywhere(void)
{
	pthread_t workers[256];
	long count = sysconf(_SC_NPROCESSORS_ONLN);
	CHECK(count > 0 && count <= 256, "set-up failed: %ld processors", count);
	units_done = 0;
	int64_t begin = now_ns();
	for (long i = 0; i < count; i++)
		CHECK(pthread_create(&workers[i], NULL, work, NULL) == 0, "set-up failed: pthread_create");
	for (long i = 0; i < count; i++)
		pthread_join(workers[i], NULL);
	report->work_ns = now_ns() - begin;
}

int main(int argc, char **argv)
{
	CHECK(argc >= 4 && argc <= 6, "usage: memory MEBIBYTES SEED FILE [THREADS [FOLDER]]");
	pages = strtoull(argv[1], NULL, 10) << 8;
	seed = strtoull(argv[2], NULL, 10);
	uint64_t threads = argc > 4 ? strtoull(argv[4], NULL, 10) : 0;
	heap = mmap(NULL, pages * WORDS * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(heap != MAP_FAILED, "set-up failed: mmap");
	for (uint64_t i = 0; i < pages * WORDS; i++)
		heap[i] = word(seed, i);
	char name[4096];
	if (argc > 5) {
		folder = argv[5];
		snprintf(name, sizeof name, "%s/log", folder);
		log_fd = MUST(open(name, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600));
	}
	snprintf(name, sizeof name, "%s.new", argv[3]);
	int fd = MUST(open(name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
	MUST(ftruncate(fd, 4096));
	report = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(report != MAP_FAILED, "set-up failed: mmap");
	close(fd);
	pthread_t thread;
	CHECK(pthread_create(&thread, NULL, watch, NULL) == 0, "set-up failed: pthread_create");
	CHECK(pthread_create(&thread, NULL, write_on, NULL) == 0, "set-up failed: pthread_create");
	for (uint64_t i = 0; i < threads; i++)
		CHECK(pthread_create(&thread, NULL, wait_idle, NULL) == 0, "set-up failed: pthread_create");
	MUST(rename(name, argv[3]));
	for (;;) {
		uint64_t request = report->request, argument = report->argument, answer = DONE;
		switch (request) {
		case CHECK_ALL:
		case CHECK_PAGES:
			answer = as_it_was(request == CHECK_ALL) && all_answer(threads) ? DONE : DIFFERS;
			break;
		case WRITE_PAGES: write_pages(argument); break;
		case WRITE_FILES: write_files(argument); break;
		case WORK: work_everywhere(); break;
		default: answer = request;
		}
		if (answer != request)
			report->request = answer;
		doze(MS);
	}
}
