/*
 * A thread that does nothing but read the monotonic clock, and keeps the largest step it saw: how long the program stood.
 * Going backwards, or CLOCK_BOOTTIME falling behind CLOCK_MONOTONIC, is a difference.
 */
#include "workload.h"

static _Atomic int64_t gap_max_ns;
static _Atomic uint64_t readings;

static int64_t boot_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_BOOTTIME, &t);
	return t.tv_sec * SECOND + t.tv_nsec;
}

static void *watch(void *unused)
{
	(void)unused;
	int64_t before = now_ns();
	for (;;) {
		int64_t now = now_ns();
		if (breaking("backwards") && readings == 100000)
			now = before - SECOND;
		CHECK(now >= before, "CLOCK_MONOTONIC went back by %lld ns", (long long)(before - now));
		if (now - before > gap_max_ns)
			gap_max_ns = now - before;
		before = now;
		readings++;
	}
	return NULL;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	int64_t apart = boot_ns() - now_ns();
	pthread_t thread;
	CHECK(pthread_create(&thread, NULL, watch, NULL) == 0, "set-up failed: pthread_create");
	ready();
	while (goes_on()) {
		/* Both clocks stand on one offset each; on a machine that never sleeps they stay this far apart. Two readings
		   are not one instant, hence the tolerance. */
		int64_t drift = boot_ns() - now_ns() - apart;
		CHECK(drift > -late_ms * MS && drift < late_ms * MS, "CLOCK_BOOTTIME and CLOCK_MONOTONIC moved apart by %lld ns", (long long)drift);
		doze(20 * MS);
	}
	return finished("gap_us=%lld readings=%llu", (long long)gap_max_ns / 1000, (unsigned long long)readings);
}
