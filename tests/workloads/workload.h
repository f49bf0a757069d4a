/*
 * What every workload shares: its command line, its nonce, when it ends, and how it says what differs.
 *
 *   NAME [--break WHAT] [--without A,B] [--only A,B] [--seconds N] [--late-ms N]
 *
 * A workload prints `nonce HEX` and `ready` once its state stands, works until the file $FINISH (/tmp/finish) exists, and
 * then prints `OK HEX …` with the same nonce, and exits 0. The first thing that is not as it must be ends the whole
 * program with `differs: …` and exit status 1. `--break WHAT` makes the program spoil that piece of its own state after
 * `ready`, to show that it would notice. Nothing here may depend on being undisturbed in time: a pause of `--late-ms` is no
 * error, a deadline that came early is.
 */
#ifndef WORKLOAD_H
#define WORKLOAD_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static uint64_t nonce;
static const char *breaks = "";
static const char *without = "";
static const char *only = "";
static int64_t seconds_max = 3600;
/* A checkpoint that moves the container stops it for as long as it takes; clocks go on from where they stood. */
static int64_t late_ms = 10000;
static int64_t began_ns;

#define MS 1000000LL
#define SECOND 1000000000LL

static int64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * SECOND + t.tv_nsec;
}

static struct timespec span(int64_t ns) { return (struct timespec){ns / SECOND, ns % SECOND}; }

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...)
{
	char text[1024];
	int saved = errno;
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	/* One write: several threads or processes may find a difference at once. */
	char line[1200];
	int length = snprintf(line, sizeof line, "differs: %s (errno %d %s)\n", text, saved, strerror(saved));
	ssize_t ignored = write(1, line, (size_t)length);
	(void)ignored;
	_exit(1);
}

#define CHECK(condition, ...) do { if (!(condition)) fail(__VA_ARGS__); } while (0)
/* For calls that set state up: their failure is no difference, but nothing can be shown without them. */
#define MUST(call) ({ __auto_type r_ = (call); if ((long)r_ == -1) fail("set-up failed: %s", #call); r_; })

static bool listed(const char *list, const char *name)
{
	size_t length = strlen(name);
	for (const char *at = list; (at = strstr(at, name)) != NULL; at += length)
		if ((at == list || at[-1] == ',') && (at[length] == 0 || at[length] == ','))
			return true;
	return false;
}

/* Whether a piece called NAME takes part. */
static inline bool takes_part(const char *name)
{
	return !listed(without, name) && (*only == 0 || listed(only, name));
}

static inline bool breaking(const char *what) { return strcmp(breaks, what) == 0; }

static inline void begin(int argc, char **argv)
{
	for (int i = 1; i + 1 < argc; i += 2) {
		if (!strcmp(argv[i], "--break")) breaks = argv[i + 1];
		else if (!strcmp(argv[i], "--without")) without = argv[i + 1];
		else if (!strcmp(argv[i], "--only")) only = argv[i + 1];
		else if (!strcmp(argv[i], "--seconds")) seconds_max = atoll(argv[i + 1]);
		else if (!strcmp(argv[i], "--late-ms")) late_ms = atoll(argv[i + 1]);
		else fail("unknown argument %s", argv[i]);
	}
	CHECK(argc % 2 == 1, "%s wants a value", argv[argc - 1]);
	setvbuf(stdout, NULL, _IOLBF, 0);
	CHECK(getrandom(&nonce, sizeof nonce, 0) == sizeof nonce, "set-up failed: getrandom");
	began_ns = now_ns();
	printf("nonce %016llx\n", (unsigned long long)nonce);
}

static inline void ready(void) { printf("ready\n"); }

/* False once the test has said that it is enough. */
static inline bool goes_on(void)
{
	const char *finish = getenv("FINISH");
	if (access(finish ? finish : "/tmp/finish", F_OK) == 0)
		return false;
	CHECK(now_ns() - began_ns < seconds_max * SECOND, "nobody asked for the end within %lld s", (long long)seconds_max);
	return true;
}

static inline int finished(const char *format, ...) __attribute__((format(printf, 1, 2)));
static inline int finished(const char *format, ...)
{
	va_list arguments;
	printf("OK %016llx ", (unsigned long long)nonce);
	va_start(arguments, format);
	vprintf(format, arguments);
	va_end(arguments);
	printf("\n");
	return 0;
}

/* Sleeps, whatever interrupts it: for pacing, never for what is checked. */
static inline void doze(int64_t ns)
{
	struct timespec until = span(now_ns() + ns);
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR)
		;
}

/* A well-mixed 64-bit value from a seed (the finaliser of SplitMix64, Steele et al. 2014). */
static inline uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15u;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
	return x ^ (x >> 31);
}

#endif
